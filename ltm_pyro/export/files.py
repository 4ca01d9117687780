"""Trees in files: NetCDF and zarr, whole or block by block."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import h5netcdf
import numpy as np
import xarray as xr

from ltm_pyro import compat_arviz
from ltm_pyro.errors import InputError
from ltm_pyro.run.files import partial_of, refuse_irregular, sync_folder, write_atomic, writing

_ENGINE: Literal["h5netcdf"] = "h5netcdf"
_GROWS = "sequence"


def save_datatree(tree: xr.DataTree, path: str | Path) -> Path:
    """Writes the tree; at any moment the old file is there, or the whole new one.

    Args:
        tree: Of `to_datatree`.
        path: Where to, usually `posterior.nc`; with the ending `.zarr` a zarr store.

    Raises:
        InputError: if it cannot be written.
    """
    target = Path(path)
    if target.suffix == ".zarr":
        return write_datatree([tree], target)
    # Made in memory: the HDF5 library ends in a segmentation fault where a disk is full.
    write_atomic(target, tree.to_netcdf(engine=_ENGINE))
    return target


def write_datatree(trees: Iterable[xr.DataTree], path: str | Path) -> Path:
    """Writes trees of one block of sequences after another, as one tree; one is held at a time.

        write_datatree((to_datatree(svi.infer(b), b) for b in corpus.val.batches(256)), "all.nc")

    What has no dimension `sequence` is taken from the first.

    Args:
        trees: Of `to_datatree`, with the same arguments but for the sequences.
        path: As in `save_datatree`; a file that is there gives way to the whole new one.

    Raises:
        InputError: if there is no tree, they do not fit, or it cannot be written.
    """
    target = Path(path)
    blocks = iter(trees)
    first = next(blocks, None)
    if first is None:
        raise InputError("there is no tree to write: give one at least")
    with _replacing(target) as partial:
        if target.suffix == ".zarr":
            _write_zarr(first, blocks, partial)
        else:
            _write_netcdf(first, blocks, partial)
    return target


def load_datatree(path: str | Path) -> xr.DataTree:
    """Reads what `save_datatree` or `write_datatree` wrote, whole into memory.

    Raises:
        InputError: if there is no such file, or it is not NetCDF or zarr.
    """
    source = Path(path)
    zarr = source.suffix == ".zarr"
    if not (source.is_dir() if zarr else source.is_file()):
        raise InputError(f"{str(path)!r} does not exist: write it with save_datatree")
    if zarr:
        _need_zarr()
    try:
        with xr.open_datatree(source, engine="zarr" if zarr else _ENGINE) as tree:
            loaded: xr.DataTree = tree.load()
            compat_arviz.teach_trees()
            return loaded
    except (OSError, ValueError) as error:
        kind, reason = "zarr" if zarr else "NetCDF", str(error).partition("\n")[0]
        raise InputError(f"{str(path)!r} cannot be read as {kind}: {reason}") from None


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A name to write under, which takes the target's place at the end, or goes."""
    if target.suffix == ".zarr":
        _need_zarr()
        if target.exists() and not (target.is_dir() and (target / ".zgroup").exists()):
            raise InputError(f"{str(target)!r} is no zarr store: choose another name")
    else:
        refuse_irregular(target)
    partial = partial_of(target)
    _remove(partial)
    with writing(target):
        try:
            yield partial
            if target.is_dir():
                _remove(target)
            partial.replace(target)
            sync_folder(target.parent)
        finally:
            _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _need_zarr() -> None:
    if importlib.util.find_spec("zarr") is None:
        raise InputError("zarr stores need the package zarr: pip install 'ltm-pyro[data]'")


def _write_zarr(first: xr.DataTree, blocks: Iterable[xr.DataTree], path: Path) -> None:
    import zarr

    # Version 2 of the format has texts of any length.
    first.to_zarr(path, mode="w", consolidated=False, zarr_format=2)
    for tree in blocks:
        for node in _growing(tree):
            data = node.to_dataset(inherit=False)
            fixed = [name for name, values in data.variables.items() if _GROWS not in values.dims]
            grown = data.drop_vars(fixed)
            grown.to_zarr(
                path, group=node.path, append_dim=_GROWS, consolidated=False, zarr_format=2
            )
    zarr.consolidate_metadata(path, zarr_format=2)


def _write_netcdf(first: xr.DataTree, blocks: Iterable[xr.DataTree], path: Path) -> None:
    grows = {node.path: {_GROWS} for node in _growing(first)}
    first.to_netcdf(path, engine=_ENGINE, unlimited_dims=grows)
    with h5netcdf.File(path, "a") as file:
        for tree in blocks:
            for node in _growing(tree):
                _append(node, file[node.path])


def _append(node: xr.DataTree, group: Any) -> None:
    start = group.dimensions[_GROWS].size
    group.resize_dimension(_GROWS, start + node.sizes[_GROWS])
    for name, variable in node.to_dataset(inherit=False).variables.items():
        if _GROWS in variable.dims:
            place = [slice(None)] * variable.ndim
            place[variable.dims.index(_GROWS)] = slice(start, None)
            values = variable.values
            stored = values.astype(np.int8) if values.dtype == bool else values
            group.variables[name][tuple(place)] = stored


def _growing(tree: xr.DataTree) -> list[xr.DataTree]:
    return [node for node in tree.subtree if _GROWS in node.sizes]
