"""A folder into which something is to be written, and what it holds already."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
from training import SMALL

from micrograd_gpt.runs.checkpoint import holds_run
from micrograd_gpt.runs.folders import (
    OF_A_MODEL,
    OF_A_RUN,
    check_free,
    check_inputs_stay,
    check_target,
)
from micrograd_gpt.runs.lock import LOCK, OwnFolder, only_writer
from micrograd_gpt.runs.metrics import METRICS
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.tokenizer_files import TOKENIZER_FILES, load_tokenizer
from micrograd_gpt.text.tokenizers import ByteTokenizer
from micrograd_gpt.weights.formats import RUN_FLAGS_BEGIN, STATE

ANOTHERS = "out has become another training's, as it was moved or"


def test_a_folder_that_is_taken_is_noted_where_a_run_is_planned(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / STATE).write_text("{}")
    plan = ["--data", str(text), *SMALL, "--out", str(tmp_path), "--plan", "--rate", "1"]
    assert train_gpt2.main(plan) == 0
    said = f"note: this run would be refused: {tmp_path} holds a run already: --resume it"
    assert capsys.readouterr().err.startswith(said)
    assert train_gpt2.main([*plan, "--overwrite"]) == 0 and not capsys.readouterr().err
    assert (tmp_path / STATE).read_text() == "{}"


@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_user_s_file_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").touch()
    check_free(tmp_path)
    (tmp_path / name).write_text("# mine")
    with pytest.raises(UserError, match=f"{name} is called like a file of a run.*: --overwrite it"):
        check_free(tmp_path)
    # a run was killed before its first checkpoint
    (tmp_path / "settings.toml").write_text(RUN_FLAGS_BEGIN)
    check_free(tmp_path)


@pytest.mark.parametrize("name", sorted({*OF_A_MODEL, *TOKENIZER_FILES}))
def test_a_model_is_not_written_over_a_user_s_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is called like a file of a model.*: --overwrite"):
        check_target(tmp_path, [], overwrite=False)
    check_target(tmp_path, [], overwrite=True)
    check_target(tmp_path / name, [], overwrite=False)  # a file, such as model.gguf


@pytest.mark.parametrize("name", ["best", "step-000002"])
def test_a_new_run_is_not_written_where_another_keeps_its_checkpoints(
    tmp_path: Path, name: str
) -> None:
    checks = (
        check_free,
        lambda out: check_inputs_stay(out, None, []),
        lambda out: check_target(out, [], overwrite=True),
    )
    for check in checks:
        check(tmp_path / name)  # which is called so by chance
    (tmp_path / "trainer_state.json").touch()
    for check in checks:
        with pytest.raises(UserError, match=f"{name} is where the run in {tmp_path} keeps a che"):
            check(tmp_path / name)
        check(tmp_path / "another")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best", "step-000002"])
def test_a_run_does_not_go_on_in_its_checkpoint_but_in_a_copy(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, name: str
) -> None:
    run, flags = tmp_path / "run", ["--max-steps", "4", "--eval-interval", "2", "--keep", "1"]
    train_gpt2.main(["--data", str(text), "--out", str(run), *SMALL, *flags])
    place, copy = run / name, tmp_path / "copy"
    with pytest.raises(UserError, match=f"{name} is a checkpoint of the run in {run}, .*copy"):
        train_gpt2.main(["--resume", "--out", str(place), "--max-steps", "6"])
    assert not (place / METRICS).exists()
    shutil.copytree(place, copy)
    train_gpt2.main(["--resume", "--out", str(copy), "--max-steps", "6"])
    assert holds_run(copy)


@pytest.mark.parametrize("place", ["samples.jsonl", "best/a.jsonl", "step-000002/a.jsonl"])
def test_the_data_of_a_run_is_still_there_after_it(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, place: str
) -> None:
    out = tmp_path / "out"
    data = out / place
    data.parent.mkdir(parents=True)
    data.write_text('{"text": "The quick brown fox jumps over the lazy dog."}\n' * 40)
    (data.parent / STATE).touch()
    other = ["--data", str(text), "--out", str(out), *SMALL, "--max-steps", "1", "--overwrite"]
    for flags in (["--data", data], ["--data", data.parent], ["--validation", data]):
        with pytest.raises(UserError, match=f"--out {out} would remove {data}, which is needed"):
            train_gpt2.main([*map(str, flags), *other[2 * (flags[0] == "--data") :]])
    assert data.exists() and not (out / "model.safetensors").exists()


@pytest.mark.parametrize("place", ["best", "step-000002"])
def test_the_tokenizer_of_a_run_is_still_there_after_it(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, place: str
) -> None:
    out = tmp_path / "out"
    made = ByteTokenizer()
    made.save(out / place)
    (out / place / STATE).touch()
    flags = ["--data", str(text), "--out", str(out), *SMALL, "--max-steps", "1", "--overwrite"]
    with pytest.raises(UserError, match=f"would remove {out / place}, which is needed: give ano"):
        train_gpt2.main([*flags, "--tokenizer", str(out / place)])
    assert load_tokenizer(out / place).to_dict() == made.to_dict()


def test_overwriting_is_not_advised_where_the_data_would_go(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    data = tmp_path / "out" / "samples.jsonl"
    data.parent.mkdir()
    data.write_text('{"text": "The quick brown fox jumps over the lazy dog."}\n' * 40)
    out = ["--out", str(data.parent), *SMALL, "--max-steps", "1"]
    for begun in (False, True):
        if begun:  # by a run that was killed before its first checkpoint
            (data.parent / "settings.toml").write_text(RUN_FLAGS_BEGIN)
        with pytest.raises(UserError, match=f"would remove {data}, which is needed: give another"):
            train_gpt2.main(["--data", str(data), *out])
    assert data.exists()


@pytest.mark.slow
def test_data_that_no_run_removes_may_lie_in_its_folder(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    book = tmp_path / "step-by-step" / "config.json"
    book.parent.mkdir()
    book.write_text('{"text": "The quick brown fox jumps over the lazy dog."}\n' * 40)
    out = ["--out", str(tmp_path), *SMALL, "--max-steps", "1", "--overwrite"]
    for data in (text, book.parent, tmp_path):
        assert train_gpt2.main(["--data", str(data), *out]) == 0
    assert text.exists() and book.exists()


def test_a_run_takes_the_place_of_files_when_it_is_told_to(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of those that it has read: their content goes on in the run's own."""
    out = tmp_path / "out"
    ByteTokenizer().save(out)
    before = (out / "tokenizer.json").read_text()
    (out / "settings.toml").write_text(f"data = {json.dumps(str(text))}\n")
    (out / "loss.png").touch()
    file = ["--config", str(out / "settings.toml"), "--tokenizer", str(out)]
    flags = [*file, "--out", str(out), *SMALL, "--max-steps", "1"]
    with pytest.raises(UserError, match=r"tokenizer\.json is called like a file of a run"):
        train_gpt2.main(flags)

    def fail(*args: object) -> None:
        raise UserError("stopped before the first checkpoint")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="stopped before"):
        patch.setattr(train_gpt2, "learning_rate", fail)
        train_gpt2.main([*flags, "--overwrite"])
    assert (out / "tokenizer.json").read_text() == before
    assert train_gpt2.main([*flags, "--overwrite"]) == 0
    assert (out / "tokenizer.json").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("left", ["best", "step-000002"])
def test_the_best_of_another_run_is_not_taken_for_one_s_own(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, left: str
) -> None:
    out = tmp_path / "out"
    flags = ["--data", str(text), "--out", str(out), *SMALL, "--max-steps", "1"]
    assert train_gpt2.main(flags) == 0
    shutil.copytree(out / "best", tmp_path / "copy")
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "copy", out / left)
    with pytest.raises(UserError, match=f"{left} is left of a run: --overwrite it, or give ano"):
        train_gpt2.main(flags)
    assert train_gpt2.main([*flags, "--overwrite"]) == 0
    assert (out / "best").exists() and not (out / "step-000002").exists()


def test_no_model_is_written_where_a_run_has_begun(tmp_path: Path) -> None:
    check_target(tmp_path, [], overwrite=True)
    (tmp_path / "settings.toml").write_text(RUN_FLAGS_BEGIN)
    with pytest.raises(UserError, match="is where a training run has begun: --overwrite it, or"):
        check_target(tmp_path, [], overwrite=False)
    check_target(tmp_path, [], overwrite=True)


def test_a_folder_whose_name_another_run_has_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with only_writer(out):
        own = OwnFolder(out)
        own.check()
        out.rename(tmp_path / "moved")
        own.check()  # what is saved now makes the folder anew
        with only_writer(out):
            (out / LOCK).write_text("process 1 on another machine")
            with pytest.raises(UserError, match=ANOTHERS):
                own.check()


def test_a_folder_whose_name_another_run_had_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with only_writer(out):
        own = OwnFolder(out)
        out.rename(tmp_path / "moved")
        out.mkdir()
        (out / "model.safetensors").touch()
        with pytest.raises(UserError, match=ANOTHERS):
            own.check()


def test_a_folder_that_was_emptied_is_written_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with only_writer(out):
        own = OwnFolder(out)
        out.rename(tmp_path / "moved")
        out.mkdir()
        own.check()
        (out / "model.safetensors").touch()  # the run saves
        own.check()


def test_a_lock_that_somebody_removed_stops_no_run(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        own = OwnFolder(tmp_path)
        (tmp_path / LOCK).unlink()
        own.check()


def test_a_run_that_was_moved_leaves_another_s_lock_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ExitStack() as other:
        with only_writer(out):
            out.rename(tmp_path / "moved")
            other.enter_context(only_writer(out))
        assert (out / LOCK).exists()


@pytest.mark.slow
def test_what_a_user_put_into_a_checkpoint_stays(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    """Where a run is overwritten, and where an earlier checkpoint makes room for the next."""
    out = tmp_path / "out"
    flags = ["--data", str(text), "--out", str(out), *SMALL, "--save-interval", "1"]
    theirs = [out / "best" / "model.gguf", out / "step-000001" / "mine" / "notes.txt"]
    assert train_gpt2.main([*flags, "--max-steps", "3", "--keep", "3"]) == 0
    for file in theirs:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    assert train_gpt2.main(["--resume", "--out", str(out), "--max-steps", "5"]) == 0
    assert not holds_run(out / "step-000001") and holds_run(out / "step-000002")
    assert train_gpt2.main([*flags, "--max-steps", "1", "--overwrite", "--eval-interval", "9"]) == 0
    assert not (out / "step-000002").exists()
    assert [file.read_text() for file in theirs] == ["mine", "mine"]
    assert list(theirs[1].parent.parent.iterdir()) == [theirs[1].parent]
