"""Runs on the Hugging Face Hub: given away with a model card, and taken up again."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltm_pyro.data.cache import default_folder
from ltm_pyro.errors import InputError, shown
from ltm_pyro.reading import as_path
from ltm_pyro.run.files import partial_of, writing
from ltm_pyro.run.opening import load_run
from ltm_pyro.run.replacing import refuse_existing

if TYPE_CHECKING:
    from ltm_pyro.run.folder import Run

CARD = "README.md"
_CHECKPOINTS = ("checkpoint", "best", "control")
_REPLACED = [f"{name}/tensors-*" for name in _CHECKPOINTS]  # named by their content
SHARED = [
    *("config.json", "tokenizer.json", "metrics.csv", "scores.json", "scores.csv"),
    *(f"{name}/state.json" for name in _CHECKPOINTS),
    *(f"{name}.safetensors" for name in _REPLACED),
    *("control/metrics.csv", "store/*"),
]
"""What of a run folder is given away: no text of the corpus, and no picture of one."""


def push_to_hub(
    run: Run,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Puts a run on the Hub with its model card; returns its address.

    What is given away is `SHARED`: settings (with the path that the corpus was read from), weights
    and optimiser, tokenizer, metrics and scores; no text of the corpus. A `README.md` that is there
    is replaced.

    Args:
        run: The run, as it is saved.
        repo_id: `OWNER/NAME`; made if it is not there.
        private: Whether a new repository is private.
        token: Of the Hub; by default the one that `hf auth login` has stored.
        revision: A branch; the main one by default.
        message: Of the commit.

    Raises:
        InputError: if steps have not been saved, or the Hub refuses.
    """
    if run.saved_step() != run.svi.slow_step:
        raise InputError(f"{run.label} holds steps that are not saved: call run.save() first")
    checked_name(repo_id)
    hub = _library()
    card = run.model_card(repo_id)
    with run.writing(), _told(repo_id):
        api = hub.HfApi(token=token)
        where: dict[str, Any] = {"repo_id": repo_id, "revision": revision}
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=run.folder, allow_patterns=SHARED, delete_patterns=_REPLACED,
            commit_message=message or f"Run at slow step {run.svi.slow_step}", **where,
        )  # fmt: skip
        api.upload_file(
            path_or_fileobj=card.encode(), path_in_repo=CARD,
            commit_message=message or "Model card", **where,
        )  # fmt: skip
    return f"https://huggingface.co/{repo_id}"


def from_pretrained(
    repo_id: str,
    folder: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: str | None = None,
) -> Run:
    """A run from the Hub, as `load_run` gives one; nothing of it is executed.

    Only the files of a run are fetched: JSON, CSV and safetensors, whose checksums are compared.

    Args:
        repo_id: `OWNER/NAME`.
        folder: Where to put it, to go on with the fit there; by default the cache, one folder for
            each version.
        revision: A branch, tag or commit.
        token: Of the Hub; by default the one that `hf auth login` has stored.
        device: As in `load_run`.

    Raises:
        InputError: if it cannot be fetched, is no run, or is damaged.
    """
    return load_run(fetch(repo_id, folder, revision=revision, token=token), device=device)


def fetch(
    repo_id: str,
    folder: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """The run folder of a run from the Hub; arguments and errors as in `from_pretrained`."""
    checked_name(repo_id)
    hub = _library()
    with _told(repo_id):
        options = {"revision": revision, "token": token, "allow_patterns": SHARED}
        found = Path(hub.snapshot_download(repo_id, **options))
    if folder is not None:
        place = as_path("folder", folder)
        refuse_existing(place, overwrite=False)
    else:
        place = default_folder() / "hub" / f"{repo_id.replace('/', '--')}@{found.name[:12]}"
    if folder is not None or not place.exists():
        _copy(found, place)
    return place


def checked_name(repo_id: str) -> str:
    """`repo_id`, known to be of the form that the Hub has."""
    part = r"\w[\w.-]{0,95}"
    if not isinstance(repo_id, str) or not re.fullmatch(f"{part}(/{part})?", repo_id, re.ASCII):
        raise InputError(f"{shown(repo_id)} is no name on the Hub: write OWNER/NAME")
    return repo_id


def _copy(source: Path, target: Path) -> None:
    """A copy of regular files: in the Hub's cache they are links, which no run folder holds."""
    partial = partial_of(target)
    with writing(target):
        shutil.rmtree(partial, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            for pattern in SHARED:
                for path in source.glob(pattern):
                    place = partial / path.relative_to(source)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, place)
            if not partial.exists():
                raise InputError(f"{shown(target.name)} holds no run: check its name")
            partial.replace(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise InputError(
            "sharing a run needs the package huggingface_hub: pip install 'ltm-pyro[hub]'"
        ) from None


@contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """What the Hub says, in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the library's, its HTTP client's and the system's
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"the Hub has not given or taken {shown(repo_id)}: {shown(lines[0], 160)[1:-1]}; check "
            "the name, the connection, and the token (hf auth login)"
        ) from None
