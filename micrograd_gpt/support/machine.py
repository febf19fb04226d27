"""What this process may use of the machine: cores and memory, where a container or a batch system
gives it only a part.

On Linux a control group limits both (https://docs.kernel.org/admin-guide/cgroup-v2.html); the files
of version 1 are read too. `root` is the root folder of the system.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """How many cores this process may use, at least 1.

    That is as many as the system lets it run on, no more than its control group's quota of time
    pays for, and no more than OMP_NUM_THREADS says.
    """
    found = [len(bound_to())]
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # "4,2": for nested loops
    if asked.isdecimal() and int(asked) >= 1:
        found.append(int(asked))
    for folder in _groups("cpu", root):
        quota, period, *_ = [*_words(folder / "cpu.max"), "", ""]
        if not quota:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ("".join(_words(folder / name)) for name in names)
        if quota.isdecimal() and period.isdecimal() and int(period):  # not "max", nor -1
            found.append(max(1, math.ceil(int(quota) / int(period))))
    return min(found)


def bound_to() -> set[int]:
    """The numbers of the cores that the system lets this process run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def available_memory(root: Path = ROOT) -> int | None:
    """How many bytes this process can still get before the system ends it; None if not known.

    On Linux that is what no process holds, swap included, and what its control group has left;
    elsewhere it is all that the machine has.
    """
    lines = (line.split() for line in _text(root / "proc/meminfo").splitlines())
    kilobytes = {words[0]: int(words[1]) for words in lines if len(words) > 1}
    if "MemAvailable:" not in kilobytes:
        return _all_memory()
    found = [1024 * (kilobytes["MemAvailable:"] + kilobytes.get("SwapFree:", 0))]
    files = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder in _groups("memory", root):
        for names in files:
            limit, used = ("".join(_words(folder / name)) for name in names)
            if limit.isdecimal() and used.isdecimal():
                freed = _could_be_freed(folder)
                found.append(max(0, int(limit) - int(used) + freed))
    return min(found)


def _all_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _could_be_freed(folder: Path) -> int:
    """Bytes of files that the group has read, which count as used until another needs the room."""
    words = _words(folder / "memory.stat")
    numbers = dict(zip(words[::2], words[1::2], strict=False))
    return int(numbers.get("inactive_file", 0)) + int(numbers.get("active_file", 0))


def _groups(kind: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control group of a kind, and of those that it is part of."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and kind not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / kinds  # version 2 has one tree, of all kinds
        inner = top / path.lstrip("/")
        yield from (inner, *(above for above in inner.parents if above.is_relative_to(top)))


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):  # there is none on this system, or it may not be read
        return ""
