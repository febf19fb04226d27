"""How many cores and how much memory a process may use, from files as Linux has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from micrograd_gpt.support.machine import available_memory, usable_cores

MEMINFO = "MemTotal: 64000000 kB\nMemAvailable: 8000000 kB\nSwapFree: 1000000 kB\n"


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        (  # the limit of a group above holds too
            {
                "proc/self/cgroup": "0::/user.slice/job\n",
                "sys/fs/cgroup/user.slice/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000\n",
            },
            3,
        ),
        (  # version 1; in a container the path is the one outside
            {
                "proc/self/cgroup": "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
    ],
)
def test_cores(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert usable_cores(system(tmp_path, files)) == cores


@pytest.mark.parametrize(("asked", "cores"), [("2", 2), ("4,2", 4), ("64", 16), ("many", 16)])
def test_cores_that_the_user_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, cores: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 9_000_000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "2000000000\n",
                "sys/fs/cgroup/memory.current": "1500000000\n",
                "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 100\nactive_file 23\n",
            },
            500_000_123,
        ),
        (
            {
                "proc/self/cgroup": "7:memory:/docker/1\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "400\n",
            },
            600,
        ),
        (  # version 1 has a large number for "no limit"
            {
                "proc/self/cgroup": "7:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "400\n",
            },
            9_000_000 * 1024,
        ),
        (  # a limit that was lowered since
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "5000000\n",
                "sys/fs/cgroup/memory.current": "6000000\n",
            },
            0,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 9_000_000 * 1024),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_memory(system(tmp_path, {"proc/meminfo": MEMINFO} | files)) == expected


def test_this_machine_has_memory() -> None:
    assert (available_memory() or 1 << 40) > 1 << 20


@pytest.mark.skipif(os.name == "nt", reason="Windows has no sysconf")
def test_without_meminfo_all_memory_counts(tmp_path: Path) -> None:
    found = available_memory(tmp_path)
    assert found is not None and found > 100_000_000
