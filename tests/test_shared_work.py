"""Evaluating and generating by several processes: the same results, in the same order."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mpi_launch import MPICH, TIMEOUT, mpirun, needs_mpi, needs_mpich, needs_open_mpi, started
from small_gpt2 import TEXT, make_model, save_model
from test_ranks import errors, needs_proc, ranks_of, wait_for
from training import ROOT, script

from micrograd_gpt.runs.ranks import Ranks
from micrograd_gpt.text.template import Template, save_template
from micrograd_gpt.text.tokenizers import ByteTokenizer
from micrograd_gpt.tuning.classifier import GPT2Classifier, write_classifier

GENERATE, EVALUATE = ROOT / "generate.py", ROOT / "evaluate_gpt2.py"
TRAIN = ROOT / "train_gpt2.py"
WORDS = TEXT.split()
OneProcess = Callable[..., tuple[str, str]]


class InThreads(Ranks):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(values)
        self.values, self.barrier = values, barrier

    def collect(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


@pytest.mark.parametrize(("pieces", "size"), [(0, 2), (1, 1), (1, 2), (5, 2), (6, 3), (7, 3)])
def test_every_rank_gets_all_results_in_order_and_does_its_share(
    pieces: int, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[list[int]] = [[] for _ in range(size)]
    found: list[list[int]] = [[] for _ in range(size)]
    values, barrier = [None] * size, threading.Barrier(size)

    def square(rank: int, number: int) -> int:
        done[rank].append(number)
        return number**2

    def work(rank: int) -> None:
        ranks = InThreads(rank, values, barrier)
        found[rank] += ranks.do(partial(square, rank, number) for number in range(pieces))

    threads = [threading.Thread(target=work, args=[rank], daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert found == [[number**2 for number in range(pieces)]] * size
    assert done == [list(range(pieces))[rank::size] for rank in range(size)]
    idle = f"there is work for only {pieces} of {size} ranks"
    assert (idle in capsys.readouterr().err) == (0 < pieces < size)


# ------------------------------------------------------------------------------- what is shared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was tuned on instructions, a classifier, and files for all there is to do."""
    folder = tmp_path_factory.mktemp("shared")
    save_model(folder / "model", ByteTokenizer())
    save_template(Template("{instruction} {output}"), folder / "model")
    body = make_model(0, 8, vocab_size=ByteTokenizer().vocab_size)
    write_classifier(GPT2Classifier(body, ["ham", "spam"]), folder / "classifier", ByteTokenizer())
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 6))) for _ in range(40)]
    texts[5] = texts[30]  # which draw other random numbers
    (folder / "prompts.txt").write_text("\n".join(texts))
    (folder / "labels.tsv").write_text(
        "\n".join(f"{draw.choice(('ham', 'spam'))}\t{t}" for t in texts)
    )
    records = {
        "prompts": [{"prompt": text} for text in texts],
        "questions": [{"instruction": text, "output": "no"} for text in texts],
        "last_words": [{"text": text} for text in texts],
        "choices": [{"context": t, "endings": ["dog", "fox"], "label": 1} for t in texts],
    }
    for name, objects in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(o) + "\n" for o in objects))
    return folder


@pytest.fixture
def one_process(capsys: pytest.CaptureFixture[str]) -> OneProcess:
    """Returns one_process(script, *flags): what it prints here on stdout and stderr."""

    def one_process(path: Path, *flags: object) -> tuple[str, str]:
        capsys.readouterr()
        assert script(path.stem).main([*map(str, flags)]) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    return one_process


def comparable(text: str) -> str:
    """What a script printed, without how fast it was, and with line ends as from a pipe."""
    return re.sub(r'"tokens_per_second": [0-9.]+', "", re.sub("\r\n?", "\n", text))


QUESTIONS = ["generate", "--data", "questions.jsonl", "--model", "model", "--temperature", "1"]
TASKS = {
    "perplexity": ["--data", "prompts.txt", "--model", "model", "--batch-size", "3"],
    "multiple-choice": ["--data", "choices.jsonl", "--model", "model", "--batch-size", "4"],
    "last-word": ["--data", "last_words.jsonl", "--model", "model", "--batch-size", "4"],
    "classify": ["--data", "labels.tsv", "--model", "classifier", "--batch-size", "7"],
    "generate": [*QUESTIONS[1:], "--max-new-tokens", "6"],
}


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_is_the_same_on_any_number_of_ranks(
    folder: Path,
    tmp_path: Path,
    one_process: OneProcess,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    count: int,
) -> None:
    monkeypatch.chdir(folder)
    one, several = tmp_path / "one", tmp_path / "several"
    flags = [task, *TASKS[task], "--json", "--out"]
    printed = one_process(EVALUATE, *flags, one)
    found = mpirun(count, EVALUATE, *flags, several)
    assert (found.returncode, found.stdout, found.stderr) == (0, *printed)
    for name in ("items.jsonl", "report.json", "settings.json"):
        assert (several / name).read_text() == (one / name).read_text()
    assert (several / "confusion.png").exists() == (task == "classify")


@needs_mpi
@pytest.mark.slow
def test_answers_come_in_one_order_as_they_are_done(
    folder: Path, one_process: OneProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    flags = [*QUESTIONS, "--max-new-tokens", "6"]
    printed, report = one_process(EVALUATE, *flags)
    found = mpirun(2, EVALUATE, *flags)
    assert (found.returncode, found.stdout, found.stderr) == (0, printed, report)
    assert printed.count("\n") == 40


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "flags",
    [
        ["--prompts", "prompts.txt", "--batch-size", "6"],
        ["--prompts", "prompts.jsonl", "--json", "--batch-size", "6", "--seed", "7"],
        ["--prompts", "prompts.jsonl", "--json", "--greedy", "--stop", "e", "--batch-size", "9"],
        ["--prompts", "prompts.txt", "--num-samples", "2", "--batch-size", "4", "--json"],
        ["--prompts", "prompts.txt", "--num-beams", "3", "--num-samples", "2", "--json"],
        [*(f"--instruction={text}" for text in WORDS), "--batch-size", "2"],
    ],
    ids=["text", "json", "stop", "samples", "beams", "instructions"],
)
def test_texts_are_the_same_on_any_number_of_ranks(
    folder: Path,
    one_process: OneProcess,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    count: int,
) -> None:
    monkeypatch.chdir(folder)
    flags = ["--model", "model", "--max-new-tokens", "8", *flags]
    printed, notes = one_process(GENERATE, *flags)
    found = mpirun(count, GENERATE, *flags)
    assert (found.returncode, found.stderr) == (0, notes)
    assert comparable(found.stdout) == comparable(printed) != ""


@needs_mpich  # Open MPI 5 never ends what is piped in
@pytest.mark.slow
def test_prompts_from_a_pipe(folder: Path, one_process: OneProcess) -> None:
    flags = ["--model", folder / "model", "--max-new-tokens", "8", "--batch-size", "6", "--prompts"]
    printed, notes = one_process(GENERATE, *flags, folder / "prompts.txt")
    with open(folder / "prompts.txt", "rb") as prompts:
        found = mpirun(2, GENERATE, *flags, "-", mpi=MPICH, stdin=prompts)
    assert (found.returncode, found.stdout, found.stderr) == (0, comparable(printed), notes)


# ---------------------------------------------------------------------- what is not, and why


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--prompt", "a", "--num-samples", "8"], "and one prompt, with all of its samples, runs"),
        (["--prompt", "a", "--prompt", "b", "--microscope", "a.html"], "--microscope "),
        (["--prompts", "missing.txt"], "cannot read missing.txt: No such file or directory"),
        (["--prompts", "prompts.txt", "--top-q", "1"], "unrecognized arguments: --top-q"),
        pytest.param(["--prompts", "-"], "mpirun stdin never ends", marks=needs_open_mpi),
        pytest.param([], "mpirun stdin never ends: give a file", marks=needs_open_mpi),
        pytest.param(["--prompts", "/dev/stdin"], "mpirun stdin never", marks=needs_open_mpi),
    ],
)
def test_what_ranks_cannot_share_is_refused_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], problem: str
) -> None:
    monkeypatch.chdir(folder)
    found = mpirun(2, GENERATE, "--model", "model", *flags)
    (message,) = errors(found.stderr)
    assert (found.returncode, found.stdout) == (2, "") and problem in message


@needs_open_mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (EVALUATE, ["perplexity", "--model", "model", "--data", "/dev/stdin"]),
        (TRAIN, ["--data", "/dev/stdin", "--out", "none"]),
        (TRAIN, ["--data", "prompts.txt", "--validation", "/proc/self/fd/0", "--out", "none"]),
    ],
)
def test_a_text_that_never_ends_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: Path, flags: list[str]
) -> None:
    monkeypatch.chdir(folder)
    with open("prompts.txt", "rb") as text:
        found = mpirun(2, script, *flags, stdin=text)
    (message,) = errors(found.stderr)
    assert (found.returncode, found.stdout) == (2, "") and "mpirun stdin never ends" in message
    assert not Path("none").exists()


def test_of_one_process_a_note_says_that_stdin_never_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    Ranks().check_stdin(True)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    Ranks().check_stdin(False)
    assert capsys.readouterr().err == ""
    Ranks().check_stdin(True)
    assert capsys.readouterr().err.startswith("note: Open MPI's mpirun never ends stdin: ")


@needs_mpi
@pytest.mark.slow
def test_ranks_without_work_are_mentioned(
    folder: Path, one_process: OneProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    flags = ["--model", "model", "--prompt", "a", "--prompt", "b", "--max-new-tokens", "5"]
    printed, notes = one_process(GENERATE, *flags)
    found = mpirun(2, GENERATE, *flags)
    assert (found.returncode, found.stdout) == (0, comparable(printed))
    assert "for only" not in notes
    assert "note: there is work for only 1 of 2 ranks (a lower --batch-size" in found.stderr


# ----------------------------------------------------------------------------------------- faults


@needs_mpi
@needs_open_mpi  # MPICH's launcher kills the others before they can say anything
@needs_proc
@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_rest_is_done_by_others(
    folder: Path,
    tmp_path: Path,
    one_process: OneProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    items = tmp_path / "out" / "items.jsonl"
    flags = [*QUESTIONS, "--max-new-tokens", "200", "--batch-size", "2"]
    straight, _ = one_process(EVALUATE, *flags, "--out", tmp_path / "straight")
    command = ["-n", 2, sys.executable, EVALUATE, *flags, "--out", tmp_path / "out"]
    with started(*command) as process:
        wait_for(items.exists, process)
        victim = ranks_of(process.pid)[1]
        os.kill(victim, signal.SIGKILL)
        _, stderr = process.communicate(timeout=TIMEOUT)
    (message,) = errors(stderr)
    assert process.returncode != 0 and f"error: rank 1 (process {victim}) on " in message
    there = f"{tmp_path / 'out'} has the results so far: the same command goes on from there"
    assert message.endswith(f"has ended; {there}")
    done = items.read_text().count("\n")
    assert 0 < done < 40
    found = mpirun(3, EVALUATE, *flags, "--out", tmp_path / "out")
    assert (found.returncode, found.stdout) == (0, straight)
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    assert sorted(row["item"] for row in rows) == list(range(40))


@needs_mpi
@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGINT)])
def test_a_signal_to_one_rank_ends_all(folder: Path, rank: int, number: signal.Signals) -> None:
    flags = ["--model", folder / "model", "--prompts", folder / "prompts.txt", "--ignore-eos"]
    command = [sys.executable, GENERATE, *flags, "--max-new-tokens", "100000"]
    with started("-n", 2, *command) as process:
        assert process.stdout is not None
        process.stdout.read(40)  # which rank 0 has decided
        os.kill(ranks_of(process.pid)[rank], number)
        _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130 and errors(stderr) == [] and "Traceback" not in stderr
