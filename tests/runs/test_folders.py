"""A folder into which something is to be written, and what it holds already."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest
from training import SMALL

from micrograd_gpt.runs.config_file import HEADING
from micrograd_gpt.runs.folders import OF_A_MODEL, OF_A_RUN, check_free, check_target
from micrograd_gpt.runs.lock import LOCK, OwnFolder, only_writer
from micrograd_gpt.support.errors import UserError


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_user_s_file_is_not_written_over(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / "notes.txt").touch()
    check_free(tmp_path, overwrite)
    (tmp_path / name).write_text("# mine")
    with pytest.raises(UserError, match=f"{name} would be written over, and is from no run"):
        check_free(tmp_path, overwrite)
    (tmp_path / "settings.toml").write_text(HEADING)  # a run was killed before its first checkpoint
    check_free(tmp_path, overwrite)


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_a_model_is_not_written_over_a_user_s_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} would be written over"):
        check_target(tmp_path, [], overwrite=False)
    check_target(tmp_path, [], overwrite=True)
    check_target(tmp_path / name, [], overwrite=False)  # a file, such as model.gguf


def test_the_data_of_a_run_is_still_there_after_it(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    data = tmp_path / "samples.jsonl"
    data.write_text('{"text": "The quick brown fox jumps over the lazy dog."}\n' * 40)
    flags = ["--data", str(data), "--out", str(tmp_path), *SMALL, "--max-steps", "1"]
    with pytest.raises(UserError, match=r"samples\.jsonl would be written over"):
        train_gpt2.main([*flags, "--overwrite"])
    assert data.exists() and sorted(tmp_path.iterdir()) == sorted([data, text])


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
    (tmp_path / "settings.toml").write_text(HEADING)
    with pytest.raises(UserError, match="is where a training run has begun: choose another --out"):
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
            with pytest.raises(
                UserError, match="out has become another training's, as it was moved or"
            ):
                own.check()


def test_a_folder_whose_name_another_run_had_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with only_writer(out):
        own = OwnFolder(out)
        out.rename(tmp_path / "moved")
        out.mkdir()
        (out / "model.safetensors").touch()
        with pytest.raises(
            UserError, match="out has become another training's, as it was moved or"
        ):
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
    with only_writer(out):
        out.rename(tmp_path / "moved")
        out.mkdir()
        (out / LOCK).touch()
    assert (out / LOCK).exists()
