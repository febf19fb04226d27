"""A run's folder: what is written is what is read, and nothing else is taken for it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import FullDiskFile, fail, kill, needs_fork, run_with_fault

from micrograd_gpt import optim
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.runs import checkpoint
from micrograd_gpt.support import files
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.file_sets import SAVED
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from micrograd_gpt.weights import reading
from micrograd_gpt.weights.config import read_config
from micrograd_gpt.weights.saving import save_pretrained
from micrograd_gpt.weights.tensor_files import TensorFile, write_safetensors

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 5, "n_positions": 6}
TOKENIZER = CharTokenizer.from_text("abcde")
UNCHANGED = "; what was there before is unchanged$"


def trained(steps: int = 2, seed: int = 0) -> tuple[GPT2, optim.AdamW]:
    model = GPT2(GPT2Config(**SHAPE), seed=seed)
    optimizer = optim.AdamW(model.parameters())
    ids = np.arange(10).reshape(2, 5) % 5
    for _ in range(steps):
        model.loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_a_run_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {"seed": 3})
    again, moments = trained(0, seed=9)
    checkpoint.load_run(tmp_path, again, moments)
    assert moments.steps == 2 and checkpoint.load_settings(tmp_path) == {"seed": 3}
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        np.testing.assert_array_equal(a.data, b.data)
    for a, b in zip(optimizer.m + optimizer.v, moments.m + moments.v, strict=True):
        np.testing.assert_array_equal(a, b)
    assert load_tokenizer(tmp_path).decode([0, 4]) == "ae"
    assert read_config(tmp_path) == model.config


def test_what_an_edited_optimizer_keeps_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained()
    again, other = trained(0)
    for kept in (optimizer, other):  # as AMSGrad keeps one more, and SGD with momentum one less
        vars(kept).update(largest=[m + 1 for m in kept.m], unlike=[kept.m[0]])
        del kept.v
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    checkpoint.load_run(tmp_path, again, other)
    for a, b in zip(optimizer.m + optimizer.largest, other.m + other.largest, strict=True):
        np.testing.assert_array_equal(a, b)
    assert capsys.readouterr().err == ""


def test_a_run_of_another_optimizer_goes_on_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained()
    for saved, resumed in (({"largest": optimizer.m}, {}), ({}, {"largest": optimizer.m})):
        again, other = trained(0)
        vars(optimizer).update(
            saved, norms=[np.float32(1)] * len(optimizer.m)
        )  # these are not kept
        vars(other).update(resumed)
        checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
        checkpoint.load_run(tmp_path, again, other)
        for a, b in zip(optimizer.m + optimizer.v, other.m + other.v, strict=True):
            np.testing.assert_array_equal(a, b)
        said = f"note: 'largest' is not in both {tmp_path}/optimizer.safetensors and this optimizer"
        assert said in capsys.readouterr().err
        vars(optimizer).pop("largest", None)


def test_the_folder_is_a_hugging_face_folder(tmp_path: Path) -> None:
    model, _ = trained()
    model.save_pretrained(tmp_path, TOKENIZER)
    assert {f.name for f in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    file = TensorFile(tmp_path / "model.safetensors")
    assert file.metadata["format"] == "pt" and "lm_head.weight" not in file.shapes
    assert file.shapes["transformer.h.0.attn.c_attn.weight"] == (8, 24)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["eos_token_id"] is None
    assert config["n_layer"] == 1 and config["activation_function"] == "gelu_new"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_may_be_stored_smaller(tmp_path: Path, dtype: str) -> None:
    model, _ = trained()
    model.save_pretrained(tmp_path, dtype=dtype)
    stored = TensorFile(tmp_path / "model.safetensors").read("transformer.wte.weight")
    ours = model.transformer.wte.weight.data
    half_a_unit = 2**-8 if dtype == "bfloat16" else 2**-11  # of the stored mantissa's last bit
    np.testing.assert_allclose(stored, ours, rtol=half_a_unit, atol=2**-25)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def test_a_run_that_an_earlier_version_saved_goes_on(tmp_path: Path) -> None:
    """Its tokenizer.json was in a format of our own, and there was no tokenizer_config.json."""
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    del state["config"]
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER.to_dict()))
    checkpoint.load_run(tmp_path, model, optimizer)
    optimizer.steps = 3
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, val_loss=1.0, keep=1)
    new = {"config.json", "model.safetensors", "tokenizer.json", "optimizer.safetensors"}
    new |= {"tokenizer_config.json", "trainer_state.json"}
    assert {f.name for f in (tmp_path / "best").iterdir()} == new
    older = tmp_path / "step-000002"
    assert {f.name for f in older.iterdir()} == new - {"tokenizer_config.json"}
    for folder in (tmp_path, tmp_path / "best", older):
        assert load_tokenizer(folder).to_dict() == TOKENIZER.to_dict()
    checkpoint.remove_run(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_a_set_of_two_steps_is_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    save_pretrained(model, tmp_path, metadata={"step": "3"})
    with pytest.raises(UserError, match=r"model\.safetensors is from step 3, .* from step 2"):
        checkpoint.load_run(tmp_path, model, optimizer)


def test_what_is_missing_or_of_another_model_is_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    with pytest.raises(
        UserError, match=r"holds no run to resume, as it has no trainer_state\.json"
    ):
        checkpoint.load_run(tmp_path, model, optimizer)
    with pytest.raises(UserError, match=r"holds no model: there is no config\.json"):
        read_config(tmp_path)
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    wider = GPT2(GPT2Config(**{**SHAPE, "n_embd": 12}))
    with pytest.raises(UserError, match=r"has shape \(5, 8\), the model needs \(5, 12\)"):
        checkpoint.load_run(tmp_path, wider, optim.AdamW(wider.parameters()))
    deeper = GPT2(GPT2Config(**{**SHAPE, "n_layer": 2}))
    with pytest.raises(UserError, match=r"lacks 'transformer\.h\.1\."):
        checkpoint.load_run(tmp_path, deeper, optim.AdamW(deeper.parameters()))
    weights = {name: p.data for name, p in model.named_parameters()}
    write_safetensors(
        tmp_path / "model.safetensors", {**weights, "surplus": np.zeros(2)}, {"step": "2"}
    )
    with pytest.raises(UserError, match="has a tensor that the model does not have: 'surplus'"):
        checkpoint.load_run(tmp_path, model, optimizer)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"step": "\xff"}', b"\x80", b"[" * 100_000, b'{"a":' * 100_000],
)
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    model, optimizer = trained(0)
    for name in ("trainer_state.json", "config.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"trainer_state\.json is damaged: it ") as caught:
        checkpoint.load_run(tmp_path, model, optimizer)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"config\.json is damaged: it "):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "optimizer.safetensors",
        "trainer_state.json",
    ],
)
def test_a_run_s_file_that_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def open_full(path: Path, mode: str) -> Any:
        return FullDiskFile(open(path, mode), room=10 if name in path.name else 1 << 30)

    monkeypatch.setattr(files, "open", open_full, raising=False)
    message = rf"cannot write .*{name}: No space left on device{UNCHANGED}"
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {"seed": 4})
    assert "\n" not in str(caught.value)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.keys() == before.keys() and after[name] == before[name]


# ------------------------------------------------------------------------- sets that never mix


def saved(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in checkpoint.SET]


def test_earlier_sets_and_the_best_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    losses = {1: 3.0, 2: 2.0, 3: None, 4: 2.5, 5: float("nan")}
    for step, loss in losses.items():
        optimizer.steps = step
        checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, loss, keep=2)
    assert [p.name for p in checkpoint.earlier_sets(tmp_path)] == ["step-000003", "step-000004"]
    steps = {
        p: json.loads((tmp_path / p / "trainer_state.json").read_text())["step"]
        for p in (".", "best", "step-000003", "step-000004")
    }
    assert steps == {".": 5, "best": 2, "step-000003": 3, "step-000004": 4}
    assert checkpoint.best_loss(tmp_path) == 2.0
    for folder in (tmp_path, tmp_path / "best", tmp_path / "step-000003"):
        again, moments = trained(0, seed=9)
        checkpoint.load_run(folder, again, moments)
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    # The same step again is no earlier one; fewer may be kept; a lower loss later is the best.
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, 1.0, keep=1)
    assert [p.name for p in checkpoint.earlier_sets(tmp_path)] == ["step-000004"]
    assert checkpoint.best_loss(tmp_path) == 1.0
    checkpoint.remove_run(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"tokenizer.json", "tokenizer_config.json"}
    assert not checkpoint.holds_run(tmp_path)
    assert checkpoint.best_loss(tmp_path) == float("inf")


def test_the_last_good_checkpoint_is_older_than_the_failure(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    assert checkpoint.last_good(tmp_path, 9) == "there is none yet"
    for step in (3, 6, 9):
        optimizer.steps = step
        checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, 1.0, keep=1)
    assert checkpoint.last_good(tmp_path, 10) == f"{tmp_path}, of step 9"
    assert checkpoint.last_good(tmp_path, 9) == f"{tmp_path / 'step-000006'}, of step 6"
    assert checkpoint.last_good(tmp_path, 5) == f"{tmp_path / 'best'}, of step 3"
    assert checkpoint.last_good(tmp_path, 3) == "there is none yet"


def unmoved(folder: Path, files: tuple[str, ...] = checkpoint.SET) -> None:
    """Leave the set as a process does that is killed before it moved `files` to their places."""
    (folder / SAVED).mkdir()
    for name in files:
        (folder / name).rename(folder / SAVED / name)


@pytest.mark.parametrize("files", [checkpoint.SET, checkpoint.SET[-1:]], ids=["all", "the last"])
def test_earlier_sets_that_a_kill_left_unmoved_count(tmp_path: Path, files: tuple[str]) -> None:
    model, optimizer = trained(0)
    for step in (3, 6, 9):
        optimizer.steps = step
        checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, keep=2)
    unmoved(tmp_path / "step-000006", files)
    assert checkpoint.last_good(tmp_path, 9) == f"{tmp_path / 'step-000006'}, of step 6"
    unmoved(tmp_path / "step-000006", files)
    places = [tmp_path / "step-000003", tmp_path / "step-000006"]
    assert checkpoint.earlier_sets(tmp_path) == places
    unmoved(tmp_path / "step-000003", files)
    unmoved(tmp_path, files)
    optimizer.steps = 12
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, keep=2)
    kept = [p.name for p in tmp_path.iterdir() if p.is_dir()]
    assert sorted(kept) == ["step-000006", "step-000009"]


def test_the_last_good_checkpoint_is_named_whatever_else_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(0)
    for step in (3, 6, 9, 12):
        optimizer.steps = step
        checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, 1.0, keep=3)
    (tmp_path / "step-000009" / "trainer_state.json").write_text("{")
    unmoved(tmp_path / "step-000006")
    unmoved(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    assert checkpoint.last_good(tmp_path, 13) == f"{tmp_path}, of step 12"
    assert checkpoint.last_good(tmp_path, 12) == f"{tmp_path / 'step-000006'}, of step 6"
    assert checkpoint.last_good(tmp_path / "nowhere", 12) == "there is none yet"


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize(("fault", "status"), [(kill, 9), (fail, 1)])
def test_stopped_at_any_operation_a_run_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], status: int
) -> None:
    """Every file operation of a save, one after another, is the last the process comes to."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # only time would be lost
    model, optimizer = trained(1)
    ids = np.arange(10).reshape(2, 5) % 5
    start = tmp_path / "start"
    checkpoint.save_run(start, model, TOKENIZER, optimizer, {}, 3.0, keep=1)
    model.loss(ids, ids).backward()
    optimizer.step()
    steps = []
    for number in count():
        folder = tmp_path / str(number)
        shutil.copytree(start, folder)
        got = run_with_fault(
            lambda folder=folder: checkpoint.save_run(
                folder, model, TOKENIZER, optimizer, {}, 2.0, keep=1
            ),
            fault,
            number,
        )
        again, moments = trained(0, seed=9)
        checkpoint.load_run(folder, again, moments)
        steps.append(moments.steps)
        assert saved(folder)[1:3] != saved(start)[1:3] or moments.steps == 1
        best = checkpoint.best_loss(folder)  # is there, and whole
        assert best in ((3.0,) if moments.steps == 1 else (3.0, 2.0))
        checkpoint.load_run(folder / "best", again, moments)
        # The next save, of the process that goes on, puts everything in order.
        checkpoint.save_run(folder, model, TOKENIZER, optimizer, {}, 2.0, keep=1)
        checkpoint.load_run(folder / "best", again, moments)
        assert moments.steps == 2 and checkpoint.best_loss(folder) == 2.0
        assert not [p for p in folder.rglob("*") if p.name.startswith(".")]
        shutil.rmtree(folder)
        if got == 0:
            break
        assert got == status
    assert steps == sorted(steps) and set(steps) == {1, 2} and len(steps) > 40


def test_saving_and_loading_copy_no_arrays(tmp_path: Path) -> None:
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=512, vocab_size=5, n_positions=6))
    optimizer = optim.AdamW(model.parameters())
    size = 3 * 4 * sum(parameter.size for parameter in model.parameters())
    peaks = []
    for action in (
        lambda: checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, 1.0),
        lambda: checkpoint.load_run(tmp_path, model, optimizer),
    ):
        tracemalloc.start()
        action()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < size / 10


def test_a_state_without_its_facts_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"_state\.json is damaged, or another program's: it la"):
        checkpoint.load_settings(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"step": 1, "settings": {}, "config": 3}')
    with pytest.raises(UserError, match=r"trainer_state\.json is damaged: its config is not"):
        checkpoint.load_settings(tmp_path)


def test_a_config_that_makes_another_model_of_the_same_weights_is_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, before in (("n_head", 4, "2"), ("layer_norm_epsilon", 0.5, "1e-05")):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        again = GPT2(read_config(tmp_path))
        message = f"was saved with {key} {before}, and its .* now says {value}"
        with pytest.raises(UserError, match=message):
            checkpoint.load_run(tmp_path, again, optim.AdamW(again.parameters()))
    (tmp_path / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.5}))
    checkpoint.load_run(tmp_path, model, optimizer)  # a run's dropout is its settings'


def test_how_often_each_parameter_moved_comes_back(tmp_path: Path) -> None:
    """Layers unfrozen late are corrected for bias by their own steps, also after a restart."""
    model, optimizer = trained(3)
    body = model.transformer.h[0].mlp.c_fc.weight
    late = [p is body for p in model.parameters()].index(True)
    optimizer.missed[late] = 2
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    again, moments = trained(0)
    checkpoint.load_run(tmp_path, again, moments)
    assert moments.steps == 3 and moments.missed == optimizer.missed
    state = json.loads((tmp_path / checkpoint.STATE).read_text())
    assert state["missed_steps"] == {"transformer.h.0.mlp.c_fc.weight": 2}
    del state["missed_steps"]  # as runs were saved before
    (tmp_path / checkpoint.STATE).write_text(json.dumps(state))
    checkpoint.load_run(tmp_path, again, moments)
    assert not any(moments.missed)
    state["missed_steps"] = {"transformer.wte.weight": "many"}
    (tmp_path / checkpoint.STATE).write_text(json.dumps(state))
    with pytest.raises(UserError, match="damaged: its missed_steps are not numbers"):
        checkpoint.load_run(tmp_path, again, moments)


def test_a_tape_made_before_loading_is_an_error(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    loss = model.loss(np.array([[1, 2]]), np.array([[2, 3]]))
    checkpoint.load_run(tmp_path, model, optimizer)
    with pytest.raises(RuntimeError, match="was changed in place"):
        loss.backward()


@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_no_reason_to_start_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})

    def refuse(file: Any, *args: Any, **options: Any) -> Any:
        if file == tmp_path / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open(file, *args, **options)

    monkeypatch.setattr(reading, "open", refuse, raising=False)
    with pytest.raises(UserError, match=f"^cannot read {tmp_path / name}: Permission denied$"):
        checkpoint.load_run(tmp_path, *trained(0))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors"])
def test_a_damaged_file_of_a_run_names_the_way_back(name: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {})
    (tmp_path / name).write_bytes(b"damaged")
    advice = {
        "optimizer.safetensors": f"start again from the weights with --init-from {tmp_path}",
        "model.safetensors": "start again: this run kept no other checkpoint",
    }[name]
    with pytest.raises(UserError) as caught:
        checkpoint.load_run(tmp_path, *trained(0))
    assert str(caught.value).endswith(f": {advice}") and name in str(caught.value)

    checkpoint.remove_run(tmp_path)
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, val_loss=1.0, keep=1)
    optimizer.steps = 5
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, val_loss=2.0, keep=1)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(UserError) as caught:
        checkpoint.load_run(tmp_path, *trained(0))
    way_back = f"copy the files of {tmp_path / 'step-000002'}, of step 2, into {tmp_path}"
    assert str(caught.value).endswith(way_back) and "fetch" not in str(caught.value)
    for file in (tmp_path / "best").iterdir():
        shutil.copy(file, tmp_path)
    checkpoint.load_run(tmp_path, *trained(0))  # as good as the other one


@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors"])
def test_a_checkpoint_with_the_same_damaged_file_is_no_way_back(name: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, val_loss=2.0, keep=1)
    optimizer.steps = 5
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, val_loss=1.0, keep=1)
    os.truncate(tmp_path / name, 9)  # and so the file in best/, which is the same
    with pytest.raises(UserError, match=f"copy the files of {tmp_path / 'step-000002'}, of step 2"):
        checkpoint.load_run(tmp_path, *trained(0))
    for place in (tmp_path, tmp_path / "best"):
        with pytest.raises(
            UserError, match=f"copy the files of {tmp_path}/step-000002 into {place}"
        ):
            TensorFile(place / name)
    shutil.rmtree(tmp_path / "step-000002")
    with pytest.raises(UserError, match="start again: this run kept no other checkpoint"):
        TensorFile(tmp_path / name)


def test_a_run_without_its_state_names_the_way_back(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, val_loss=1.0)
    (tmp_path / "trainer_state.json").unlink()
    best = tmp_path / "best"
    with pytest.raises(UserError, match=f"json: copy the files of {best}, of step 2, into"):
        checkpoint.load_run(tmp_path, *trained(0))


def test_a_model_that_was_saved_into_a_run_names_the_way_back(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save_run(tmp_path, model, TOKENIZER, optimizer, {}, val_loss=1.0)
    model.save_pretrained(tmp_path, TOKENIZER)
    with pytest.raises(
        UserError, match=r"from no step of a run, .* saved apart; copy the files of"
    ):
        checkpoint.load_run(tmp_path, *trained(0))
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(UserError, match="saved apart; start another run from the weights"):
        checkpoint.load_run(tmp_path, *trained(0))


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abcdefgh")
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8, n_positions=4)
    save_pretrained(GPT2(config), tmp_path, tokenizer)
    assert checkpoint.own_tokenizer(tmp_path).vocab_size == 8
    ByteTokenizer().save(tmp_path)
    with pytest.raises(UserError, match="the tokenizer has 257 tokens and the model 8: put the"):
        checkpoint.own_tokenizer(tmp_path)
