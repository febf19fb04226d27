"""The worker processes: results in order, Ctrl-C left to the parent, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from worker_tasks import deaf_from_the_start_and_later, encode_bytes, kill_yourself, total

import micrograd_gpt
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.workers import worker_pool


def test_workers_give_results_in_order_and_draw_little_ahead() -> None:
    drawn = []

    def pieces() -> Iterator[list[str]]:
        for i in range(40):
            drawn.append(i)
            yield ["a" * i]

    with worker_pool(2) as parallel_map:
        for i, length in enumerate(parallel_map(total, pieces())):
            assert length == i and len(drawn) <= i + 6
        with pytest.raises(UserError, match="lone surrogate"):
            list(parallel_map(encode_bytes, [["a"], ["\ud800"]]))
    assert i == 39


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot hold a signal back")
def test_workers_leave_ctrl_c_to_their_parent() -> None:
    with worker_pool(1) as parallel_map:
        (deaf,) = parallel_map(deaf_from_the_start_and_later, [["a"]])
    assert deaf == (True, True)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_worker_that_is_killed_is_reported() -> None:
    with (
        pytest.raises(UserError, match="a process that tokenizes was killed"),
        worker_pool(1) as parallel_map,
    ):
        list(parallel_map(kill_yourself, [["a"]]))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal
            from micrograd_gpt.text.workers import worker_pool

            def pid(piece):
                return os.getpid()

            if __name__ == "__main__":
                with worker_pool(1) as parallel_map:
                    print(*parallel_map(pid, [["a"]]), flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    package = str(Path(micrograd_gpt.__file__).parents[1])
    child = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": package},
    )
    out, _ = child.communicate(timeout=60)  # returns when the last to hold the pipe, a worker, ends
    assert int(out) > 0 and child.returncode == -signal.SIGKILL
