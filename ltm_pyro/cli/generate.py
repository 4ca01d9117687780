"""`ltm-pyro generate`: text from a run."""

from __future__ import annotations

from ltm_pyro.cli.options import add_run, open_run
from ltm_pyro.cli.parsing import Parser
from ltm_pyro.errors import InputError

_DESCRIPTION = """\
Write text with a run. With a prompt, the thoughts of each text are drawn from the
posterior given the prompt; without one, from the prior. The same seed writes the
same texts.
"""
_EXAMPLES = """\
ltm-pyro generate runs/demo
ltm-pyro generate runs/demo --prompt "The with statement" --n 3 --seed 1
ltm-pyro generate runs/demo --prompt "The" --temperature 0.7 --top-p 0.9
"""


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro generate`; returns the exit status."""
    parser = Parser("generate", "RUN [OPTIONS]", _DESCRIPTION, _EXAMPLES)
    add_run(parser)
    parser.add_argument("--prompt", type=str, help="text to go on from")
    parser.add_argument("--n", type=int, default=1, help="how many texts")
    parser.add_argument("--seed", type=int, default=0, help="seed of thoughts and tokens")
    parser.add_argument(
        "--length", type=int, help="tokens per text, prompt included (default: all it can)"
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1: likelier text")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, help="choose among the likeliest with this probability"
    )
    options = parser.parse_args(arguments)
    if options.seed < 0:
        raise InputError(f"seed is {options.seed}: must be 0 or more")

    from ltm_pyro.cli.printing import printable
    from ltm_pyro.inference.generation import generate

    fitted = open_run(options.run, options.device)
    texts = generate(
        fitted.model,
        fitted.tokenizer,
        prompt=options.prompt,
        n=options.n,
        seed=options.seed,
        length=options.length,
        svi=fitted.svi,
        greedy=options.greedy,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    for i, text in enumerate(texts, start=1):
        print(f"=== text {i} of {len(texts)}, seed {options.seed}\n{printable(text)}")
    return 0
