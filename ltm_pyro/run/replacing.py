"""Where a new run goes: a free place, or that of a run which is kept aside until it has started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ltm_pyro.errors import InputError
from ltm_pyro.run.files import new_folder, writing
from ltm_pyro.run.folder import CHECKPOINT, CONFIG


def refuse_foreign(folder: Path) -> None:
    """Refuses to put a run where something else is."""
    if Path.cwd().is_relative_to(os.path.realpath(folder)):
        raise InputError(
            f"{str(folder)!r} is the folder that this was started in, or above it: choose another "
            "--out"
        )
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not _is_run(folder):
        raise InputError(
            f"{str(folder)!r} exists and is no run folder: choose another --out, nothing in it is "
            "touched"
        )


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).exists() and (folder / CHECKPOINT).exists()


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Refuses to put a new run where something is."""
    refuse_foreign(folder)
    if _is_run(folder) and not overwrite:
        raise InputError(
            f"run folder {str(folder)!r} exists: go on with it by --resume, replace it by "
            "--overwrite, or choose another --out"
        )


def replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Puts a new run at `folder`; one that is there is kept aside."""
    if not folder.exists() or not any(folder.iterdir()):
        new_folder(folder, files)
        return
    fresh, old = folder.with_name(f".{folder.name}.new"), _replaced(folder)
    with writing(folder):
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        new_folder(fresh, files)
        folder.replace(old)
        try:
            fresh.replace(folder)
        except BaseException:
            old.replace(folder)
            raise


def _replaced(folder: Path) -> Path:
    """Where a run is kept whose place a new one has taken."""
    return folder.with_name(f".{folder.name}.old")


def was_replaced(folder: Path) -> bool:
    """Whether a run is kept whose place the one in `folder` has taken."""
    return _replaced(folder).exists()


def recover_replaced(folder: Path) -> None:
    """Puts back a run that was taken away by a process which was killed before it put another."""
    if not folder.exists() and _replaced(folder).exists():
        with writing(folder):
            _replaced(folder).replace(folder)


def forget_replaced(folder: Path) -> None:
    """Removes a run that a new one has replaced."""
    shutil.rmtree(_replaced(folder), ignore_errors=True)


def undo_new(folder: Path) -> None:
    """Removes a new run that cannot start, and puts back the one that it has replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    recover_replaced(folder)
