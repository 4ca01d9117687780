"""`ltm-pyro share`: a run's model card, and the run on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from ltm_pyro.cli.options import add_run, open_run
from ltm_pyro.cli.parsing import Parser
from ltm_pyro.errors import printable
from ltm_pyro.reading import as_path

_DESCRIPTION = """\
Write the model card of a run: what it is, what it was fitted to, its scores with
their definitions, the checks made and not made, and when not to use it. With --to the
run goes to the Hugging Face Hub, the card with it: settings, weights, tokenizer,
metrics and scores, no text of the corpus. It is taken up again by
ltm_pyro.from_pretrained, and by commands that read a run as hf:OWNER/NAME.
"""
_EXAMPLES = """\
ltm-pyro share runs/demo                           prints the card, without network
ltm-pyro share runs/demo --out card.md
ltm-pyro share runs/demo --to OWNER/NAME --private
"""


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro share`; returns the exit status."""
    parser = Parser("share", "RUN [OPTIONS]", _DESCRIPTION, _EXAMPLES)
    add_run(parser)
    parser.option("to", str, "OWNER/NAME on the Hugging Face Hub")
    parser.switch("private", "a new repository is private")
    parser.option("revision", str, "a branch (default: the main one)")
    parser.option("out", str, "write the card to this file")
    options = parser.parse_args(arguments)

    from ltm_pyro.run.files import refuse_irregular, write_atomic

    if options.out is not None:
        refuse_irregular(as_path("out", options.out))
    fitted = open_run(options.run, options.device)
    card = fitted.model_card(*filter(None, [options.to]))
    if options.out is not None:
        write_atomic(Path(options.out), card.encode())
        print(f"wrote {printable(options.out)}")
    if options.to is not None:
        private = options.private or None
        where = fitted.push_to_hub(options.to, private=private, revision=options.revision)
        print(f"shared at {printable(where)}")
    elif options.out is None:
        print(printable(card), end="")
    return 0
