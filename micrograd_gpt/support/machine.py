"""How much memory a program may use on this machine."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # cgroups of version 1 write a number above this for "no limit"


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int | None:
    """The bytes of memory that a program can still get; None where the system does not tell.

    On Linux: what is available without swapping, and no more than a container's limit leaves.
    Elsewhere: all memory of the machine, where POSIX's sysconf knows it.
    """
    if not meminfo.exists():
        return _all_memory()
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limits = [
        (cgroup / "memory.max", cgroup / "memory.current"),
        (
            cgroup / "memory" / "memory.limit_in_bytes",
            cgroup / "memory" / "memory.usage_in_bytes",
        ),
    ]
    for limit, used in limits:
        most = _number(limit)
        if most is not None and most < NO_LIMIT:
            available = min(available, max(0, most - (_number(used) or 0)))
    return available


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, as for a limit that is "max"."""
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text.isdigit() else None


def _all_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf; a name may be unknown
        return None
