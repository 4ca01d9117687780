"""Out of memory, told in one line: what was asked for, what is free, and what to make smaller."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ASKED = re.compile(r"\ballocate (\d[\d.]*) ?(bytes|[KMGTPE]iB)", re.IGNORECASE)
_FREE = re.compile(r"of which (\d[\d.]*) ?([KMGTPE]iB) is free")
_REFUSED = ("can't allocate memory", "out of memory", "not enough memory", "bad_alloc")
_SMALLER = {
    "fit": "a smaller --batch_size, --micro_batch or model, see ltm-pyro cost",
    "evaluate": "fewer --sequences or --draws",
    "export": "fewer --sequences or --draws",
    "compare": "fewer --sequences or --draws",
    "generate": "a smaller --n or --length",
}
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, in whoever's words."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _REFUSED)
    )


def explain(error: BaseException, command: str) -> str:
    """The one line for `error`, met by a command."""
    asked, told = _ASKED.search(str(error)), _FREE.search(str(error))
    limits = list(_limits())
    free = _amount(max(0.0, min(limits)), "bytes") if limits else ""
    if told:
        free = _amount(float(told[1]), told[2])
    what = _amount(float(asked[1].rstrip(".")), asked[2]) if asked else "more"
    has = f"and {free} are free" if free else "than there is" if what == "more" else ""
    smaller = _SMALLER.get(command, "smaller settings")
    return f"out of memory: {what} was asked for {has}".rstrip() + f"; choose {smaller}"


def _amount(value: float, unit: str) -> str:
    """An amount of memory in the unit that suits it."""
    power = [u.lower() for u in _UNITS].index(unit.lower())
    while value >= 1024 and power < len(_UNITS) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.3g} {_UNITS[power]}"


def _limits() -> Iterator[float]:
    """Bytes that are left of the machine's memory, and of the limits set for this process."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield 1024.0 * int(next(line for line in lines if "MemAvailable" in line).split()[1])
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        limit, used = ((group / f"memory.{n}").read_text() for n in ("max", "current"))
        yield float(int(limit) - int(used))
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit_as = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit_as != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield float(limit_as - pages * resource.getpagesize())
