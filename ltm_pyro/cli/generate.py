"""`ltm-pyro generate`: text from a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ltm_pyro.cli.options import add_run, open_run
from ltm_pyro.cli.parsing import Parser
from ltm_pyro.errors import InputError, printable
from ltm_pyro.reading import as_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DESCRIPTION = """\
Write text with a run. With a prompt, the thoughts of each text are drawn from the
posterior given the prompt; without one, from the prior; or they are those of --z, or
lie between those of two texts. The same seed writes the same texts.
"""
_EXAMPLES = """\
ltm-pyro generate runs/demo
ltm-pyro generate runs/demo --prompt "The with statement" --n 3 --seed 1
ltm-pyro generate runs/demo --prompt "The" --temperature 0.7 --top-p 0.9
ltm-pyro generate runs/demo --between "A cold day." "How to open a file" --n 5
ltm-pyro generate runs/demo --z thoughts.npy --max_new_tokens 64
"""


def _thoughts(path: str) -> NDArray[Any]:
    """The numbers in a file of NumPy's. Nothing in it is executed."""
    import numpy as np

    file = as_path("z", path)
    if not file.is_file():
        raise InputError(f"there is no file {str(file)!r}: write one with numpy.save")
    try:
        array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"cannot read z from {str(file)!r}: {error.strerror or error}") from None
    except (ValueError, EOFError):
        raise InputError(
            f"z {str(file)!r} is no array of NumPy's: write it with numpy.save(file, post.mean)"
        ) from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"z {str(file)!r} holds several arrays: save one alone by numpy.save")
    return array


def _parser() -> Parser:
    parser = Parser("generate", "RUN [OPTIONS]", _DESCRIPTION, _EXAMPLES)
    add_run(parser)
    parser.option("prompt", str, "text to go on from")
    parser.option("z", str, "thoughts (K, D) or (n, K, D), e.g. of post.mean", metavar="FILE.npy")
    parser.option(
        "between",
        str,
        "texts on the line between the thoughts of two texts",
        nargs=2,
        metavar=("A", "B"),
    )
    parser.option("n", int, "how many texts (default: 1, all of --z, 5 of --between)")
    parser.option("seed", int, "seed of thoughts and tokens", default=0)
    parser.option("length", int, "tokens per text, prompt included (default: all it can)")
    parser.option("max_new_tokens", int, "instead: tokens after the prompt")
    parser.switch("greedy", "always the likeliest token")
    parser.option("temperature", float, "below 1: likelier text", default=1.0)
    parser.option("top-k", int, "choose among the k likeliest tokens")
    parser.option("top-p", float, "choose among the likeliest with this probability")
    return parser


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro generate`; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.z is not None and options.between is not None:
        raise InputError("--z and --between both say where thoughts come from: give one of them")

    from ltm_pyro.tasks.embedding import interpolate
    from ltm_pyro.tasks.generation import generate

    z = None if options.z is None else _thoughts(options.z)
    fitted = open_run(options.run, options.device, options.checkpoint)
    names = ("prompt", "seed", "length", "max_new_tokens", "greedy", "temperature", "top_k")
    rule = {name: getattr(options, name) for name in (*names, "top_p")}
    if options.between is not None:
        n = 5 if options.n is None else options.n
        texts = interpolate(fitted, options.between[0], options.between[1], n, **rule)
    else:
        texts = generate(fitted.model, fitted.tokenizer, z=z, n=options.n, svi=fitted.svi, **rule)
    for i, text in enumerate(texts, start=1):
        print(f"=== text {i} of {len(texts)}, seed {options.seed}\n{printable(text)}")
    return 0
