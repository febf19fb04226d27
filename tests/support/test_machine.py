"""How much memory is free, as the system and a container's limit have it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from micrograd_gpt.support.machine import free_memory

MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    8000 kB\n"


def test_what_is_available_and_no_more_than_the_limit_leaves(tmp_path: Path) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    meminfo.write_text(MEMINFO)
    group.mkdir()
    assert free_memory(meminfo, group) == 8_192_000
    (group / "memory.max").write_text("max\n")
    assert free_memory(meminfo, group) == 8_192_000
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("2000000\n")
    assert free_memory(meminfo, group) == 3_000_000
    (group / "memory.current").write_text("6000000\n")  # some of it can be reclaimed
    assert free_memory(meminfo, group) == 0
    (group / "memory.max").unlink()
    (group / "memory").mkdir()  # version 1
    (group / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert free_memory(meminfo, group) == 8_192_000
    (group / "memory" / "memory.limit_in_bytes").write_text("4000\n")
    assert free_memory(meminfo, group) == 4000


@pytest.mark.skipif(os.name == "nt", reason="Windows has no sysconf")
def test_without_meminfo_all_memory_counts(tmp_path: Path) -> None:
    found = free_memory(tmp_path / "none")
    assert found is not None and found > 100_000_000
