"""The training script, from its flags to what it leaves in the folder."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tokenizer_folders import added_token, tokenizer_json, vocabulary, write
from training import SCRIPT, SMALL, metrics, run, script, weights

from micrograd_gpt import optim
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.shard_files import FORMAT, MANIFEST
from micrograd_gpt.text.shards import write_shard
from micrograd_gpt.text.template import Template, save_template
from micrograd_gpt.text.tokenizer_files import load_tokenizer
from micrograd_gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from micrograd_gpt.tuning import flags as tuning_flags
from micrograd_gpt.weights.saving import save_pretrained

FLAGS = """--data --validation --text-field --line-ends --special-tokens --no-special-tokens
    --config --version
    --encoding --tokenizer --size --n-layer --n-head --n-embd --block-size --dropout
    --init-from --out --resume --overwrite --allow-changes --seed --device --dtype --tf32 --no-tf32
    --max-steps --batch-size --grad-accum-steps --recompute --no-recompute --learning-rate --min-lr
    --reduce-dtype --shard-optimizer --no-shard-optimizer --warmup-steps --weight-decay --beta1
    --beta2 --grad-clip --log-interval
    --eval-interval --eval-batches --sample-interval --save-interval --keep --on-save-error
    --tensorboard --no-tensorboard --watch --no-watch --plan --rate --devices --interconnect
    --help"""


@pytest.mark.slow
def test_a_run_that_is_watched(text: Path, tmp_path: Path) -> None:
    """Its page has the samples that were said, and stops being opened again when the run ends."""
    flags = ["--data", text, "--out", tmp_path, *SMALL, "--watch"]
    result = run(*flags, "--max-steps", 5, "--sample-interval", 2)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "watch.html").read_text("utf-8")
    assert "Step 5 of 5: training loss" in page and "validation loss" in page
    assert "The run has ended" in page and "refresh" not in page
    assert page.count("<polyline") == 4 and page.count("<pre>") == 3
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert all(row["text"] in result.stderr for row in rows[:2])
    assert f"sample:\n{rows[2]['text']}\n" in result.stdout
    more = run("--resume", "--out", tmp_path, "--max-steps", 7)  # --watch still holds
    assert more.returncode == 0, more.stderr
    page = (tmp_path / "watch.html").read_text("utf-8")
    assert "Step 7 of 7" in page and page.count("<pre>") == 5


def test_a_run_from_start_to_end(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--data", text, "--out", out, *SMALL, "--learning-rate", 1e-2]
    result = run(*flags, "--max-steps", 30, "--eval-interval", 10)
    assert result.returncode == 0, result.stderr
    assert "sample:" in result.stdout and "perplexity" in result.stdout
    assert f"saved in {out}/" in result.stdout and "--prompt" in result.stdout
    assert "step    10" in result.stderr and "sample" not in result.stderr
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert {row["step"] for row in rows if "val_loss" in row} == {10, 20, 30}
    assert rows[-1]["val_loss"] < rows[0]["train_loss"] - 0.3
    expected = {"step", "train_loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert expected | {"elapsed_seconds"} <= rows[0].keys()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    names = {f.name for f in out.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("optimizer.safetensors", "trainer_state.json", "metrics.jsonl", "loss.png", "best"),
        "settings.toml",
    }
    # A second run does not overwrite it unless told to.
    again = run("--data", text, "--out", out, *SMALL)
    assert again.returncode == 2 and "holds a run already" in again.stderr
    (out / "generation_config.json").write_text('{"eos_token_id": 1}')  # Transformers goes by it
    anew = run(*flags, "--max-steps", 2, "--overwrite")
    assert anew.returncode == 0 and [row["step"] for row in metrics(out)] == [1, 2]
    assert {f.name for f in out.iterdir()} == names


def test_what_a_run_advises_to_try_can_be_tried(
    train_gpt2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "text.txt", tmp_path / "my run"
    data.write_text("--- - -- ---- " * 40)
    flags = ["--data", data, "--out", out, *SMALL, "--max-steps", 1]
    assert train_gpt2.main([*map(str, flags)]) == 0
    advice = capsys.readouterr().out.splitlines()[-1].removeprefix("try: python ")
    name, *words = shlex.split(advice)
    assert script(name.removesuffix(".py")).main([*words, "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("---")


@pytest.mark.slow
def test_a_run_with_the_tokenizer_of_a_folder(text: Path, tmp_path: Path) -> None:
    """It goes into the run's folder, which needs the other folder no more."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    size = len(vocabulary())
    added = [added_token("</s>", size), added_token("<pad>", size + 1)]
    config = {"eos_token": "</s>", "pad_token": "<pad>"}
    write(source, tokenizer_json=tokenizer_json(added), tokenizer_config_json=config)
    planned = run("--data", text, "--tokenizer", source, "--plan", *SMALL)
    assert planned.returncode == 0 and f"{size + 2}" in planned.stdout
    first = run("--data", text, "--out", out, "--tokenizer", source, *SMALL, "--max-steps", 2)
    assert first.returncode == 0, first.stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (size + 2, size)
    tokenizer = load_tokenizer(out)
    assert tokenizer.to_dict() == load_tokenizer(source).to_dict()
    assert tokenizer.special_tokens == {"eos_token": size, "pad_token": size + 1}
    shutil.rmtree(source)
    again = run("--out", out, "--resume", "--max-steps", 3)
    assert again.returncode == 0, again.stderr
    anew = ["--data", text, "--tokenizer", source, "--out", tmp_path / "x", *SMALL]
    result = run(*anew)
    assert result.returncode == 2 and "source' is neither" in result.stderr
    source.mkdir()
    result = run(*anew)
    assert result.returncode == 2 and "error: there is no tokenizer in" in result.stderr


def test_a_tokenizer_whose_name_is_a_folders_too(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = ["--data", text, "--tokenizer", "word", "--plan", *SMALL]
    assert script("train_gpt2").main(plan) == 0 and not capsys.readouterr().err
    (tmp_path / "word").mkdir()
    assert script("train_gpt2").main(plan) == 0
    said = "note: word is the tokenizer of that name; for the folder, write ./word\n"
    assert capsys.readouterr().err == said
    (tmp_path / "char").mkdir()  # which nobody named
    assert script("train_gpt2").main(["--data", text, "--plan", "--n-layer", "1"]) == 0
    assert not capsys.readouterr().err


def test_that_a_run_has_no_template_of_the_weights_is_said(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(GPT2(GPT2Config(1, 2, 16, 257, 16)), tmp_path, ByteTokenizer())
    for is_said in (False, True):
        plan = ["--data", str(text), "--init-from", str(tmp_path), "--plan", "--rate", "1"]
        assert script("train_gpt2").main(plan) == 0
        assert ("was tuned on instructions: this run" in capsys.readouterr().err) == is_said
        save_template(Template(), tmp_path)


@pytest.mark.parametrize("start", ["", "best", "step-000001"])
def test_a_run_does_not_remove_what_it_starts_from(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, start: str
) -> None:
    """Until its first checkpoint there would be neither."""
    out = tmp_path / "out"
    for folder in (out, out / "best", out / "step-000001"):
        save_pretrained(GPT2(GPT2Config(1, 2, 16, 257, 16)), folder, ByteTokenizer())
        (folder / "trainer_state.json").touch()
    flags = ["--data", text, "--init-from", out / start, "--out", out, "--overwrite"]
    with pytest.raises(UserError, match="which is needed: give another --out"):
        train_gpt2.main([*map(str, flags)])
    assert GPT2.from_pretrained(out / start)


@pytest.mark.slow
def test_weights_with_a_padded_vocabulary_are_tuned(text: Path, tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text(text.read_text("utf-8"))
    size = tokenizer.vocab_size
    model = GPT2(GPT2Config(1, 2, 16, size + 9, 16))
    model.transformer.wte.weight.data[size:] *= 99  # so that the model prefers these
    save_pretrained(model, tmp_path / "padded", tokenizer)
    flags = ["--data", text, "--out", tmp_path / "out", "--max-steps", 1, "--batch-size", 2]
    result = run("--init-from", tmp_path / "padded", *flags)
    assert result.returncode == 0 and "sample:" in result.stdout, result.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == size + 9

    CharTokenizer.from_text(text.read_text("utf-8") + "0123456789").save(tmp_path / "padded")
    result = run("--init-from", tmp_path / "padded", *flags, "--overwrite")
    assert result.returncode == 2 and "error: the tokenizer has" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_gpt2.py", "generate.py", "load_gpt2.py"])
def test_unknown_kernels_are_refused_before_anything_is_lost(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run("--data", text, "--out", out, *SMALL, "--max-steps", 1).returncode == 0
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    flags = {
        "train_gpt2.py": ["--data", text, "--out", out, "--overwrite", *SMALL],
        "generate.py": ["--model", out, "--prompt", "A", "--json"],
        "load_gpt2.py": ["--from", out, "--out", tmp_path / "loaded"],
    }[name]
    monkeypatch.setenv("MICROGRAD_GPT_KERNELS", "fast")
    command = [sys.executable, str(SCRIPT.parent / name), *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert "MICROGRAD_GPT_KERNELS is 'fast'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_resumed_equals_never_stopped(text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *SMALL, "--dropout", 0.1, "--grad-accum-steps", 2, "--seed", 5]
    flags += ["--max-steps", 12]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run(*flags, "--out", straight).returncode == 0

    # Stopped by SIGTERM somewhere on the way, then resumed.
    process = subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), *map(str, flags), "--out", str(stopped)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while (
        len(
            (stopped / "metrics.jsonl").read_bytes()
            if stopped.is_dir() and (stopped / "metrics.jsonl").exists()
            else b""
        )
        == 0
    ):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    if process.returncode == 143:
        assert "continue with --resume" in stderr
        step = json.loads((stopped / "trainer_state.json").read_text())["step"]
        assert 1 <= step < 12
        resumed = run("--resume", "--out", stopped)
        assert resumed.returncode == 0, resumed.stderr
        assert f"from step {step}" in resumed.stderr
    else:  # it was done before the signal came
        assert process.returncode == 0

    for name, array in weights(straight).items():
        np.testing.assert_array_equal(array, weights(stopped)[name], err_msg=name)
    losses = [[(r["step"], r["train_loss"]) for r in metrics(f)] for f in (straight, stopped)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses(text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *SMALL, "--max-steps", 5, "--dropout", 0.2]
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*flags, "--seed", seed, "--out", tmp_path / name)
        losses.append([row["train_loss"] for row in metrics(tmp_path / name)])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_resume_refuses_what_would_change_the_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--data", text, "--out", out, *SMALL, "--max-steps", 3)
    before = weights(out)
    for flags, message in (
        (["--learning-rate", "0.5"], f"another run with --init-from {out}"),
        (["--block-size", "4"], f"another run with --init-from {out}"),
        (["--block-size", "9"], "or start another run in another --out"),
        (["--n-layer", "3"], "or start another run in another --out"),
        (["--init-from", "124M"], "or start another run in another --out"),
        (["--batch-size", "3"], "has --batch-size 4, not 3"),
        ([], "is complete at step 3"),
        (["--overwrite"], "--overwrite would remove"),
        (["--dtype", "float64", "--allow-changes"], "has --dtype float32, not float64"),
    ):
        result = run("--resume", "--out", out, *flags)
        assert result.returncode == 2 and message in result.stderr
        assert result.stderr.count("\n") == 1
    longer = run("--resume", "--out", out, "--max-steps", 5, "--batch-size", 4)
    assert longer.returncode == 0, longer.stderr
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5]
    assert any((weights(out)[name] != before[name]).any() for name in before)
    moved = text.rename(tmp_path / "moved.txt")  # the same text under another name
    longer = run("--resume", "--out", out, "--max-steps", 6, "--data", moved)
    assert longer.returncode == 0, longer.stderr
    moved.write_text(moved.read_text() + "more")
    other = run("--resume", "--out", out, "--max-steps", 7)
    assert other.returncode == 2 and "no longer the data of the run" in other.stderr


@pytest.mark.slow
def test_fine_tuning_starts_from_the_weights_it_is_given(text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run("--data", text, "--out", first, *SMALL, "--max-steps", 30)
    result = run(
        *("--data", text, "--init-from", first, "--out", second, "--max-steps", 2),
        *("--batch-size", 4, "--eval-batches", 2, "--log-interval", 1, "--dropout", 0.1),
    )
    assert result.returncode == 0, result.stderr
    assert metrics(second)[0]["train_loss"] < metrics(first)[5]["train_loss"]
    config = json.loads((second / "config.json").read_text())
    assert config["resid_pdrop"] == config["attn_pdrop"] == config["embd_pdrop"] == 0.1
    dropping = tmp_path / "dropping"  # weights that are read come in evaluation mode
    flags = ("--data", text, "--init-from", first, "--out", dropping, "--max-steps", 1)
    assert run(*flags, "--dropout", 0.5, "--learning-rate", 1e-9).returncode == 0
    plain = tmp_path / "plain"
    assert run(*flags[:5], plain, *flags[6:], "--learning-rate", 1e-9).returncode == 0
    losses = [metrics(folder)[0]["train_loss"] for folder in (dropping, plain)]
    assert abs(losses[0] - losses[1]) > 1e-3
    for start in (
        ["--data", text, "--init-from", first, "--out", tmp_path / "x"],
        ["--resume", "--out", plain],
    ):
        result = run(*start, "--tokenizer", "gpt2")
        assert result.returncode == 2
        assert "--tokenizer makes no sense with --init-from" in result.stderr
    result = run("--data", text, "--init-from", first, "--out", tmp_path / "x", "--block-size", 9)
    assert result.returncode == 2 and "--block-size is at most 8" in result.stderr


@pytest.mark.slow_after(4)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing.txt"], "missing.txt"),
        (
            ["--tokenizer", "bpe"],
            "is char, word, byte, gpt2 or a folder, and 'bpe' is neither",
        ),
        (["--size", "2B"], "unknown GPT-2 size '2B'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--batch-size", "0"], "must be 1 or more, not 0"),
        (["--batch-size", "many"], "--batch-size: must be a whole number, not 'many'"),
        (["--n-head", "3"], "must be a multiple of n_head"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--dropout", "1"], "--dropout must be in [0, 1)"),
        (["--block-size", "1000000"], "smaller --block-size"),
        (["--init-from", "nowhere"], "'nowhere' is neither a file or folder, nor one of 124M"),
        (["--resume"], "holds no run to resume"),
        (["--resume", "--overwrite"], "--overwrite would remove: give only one"),
        (["--min-lr", "-1"], "--min-lr must be 0 or more, not -1.0"),
        (["--grad-clip", "nan"], "--grad-clip must be 0 or more, not nan"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    flags: list[str], message: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = [] if "--data" in flags else ["--data", str(text)]
    result = run(*data, *flags)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert [f.name for f in tmp_path.iterdir()] == ["text.txt"]


def test_shards_of_another_tokenizer_than_the_given_weights_have(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    """No --tokenizer is advised, which --init-from does not take."""
    manifest = {
        "format": FORMAT,
        "tokenizer": {"tokenizer": "byte"},
        "shards": [{"file": "tokens_000000.bin", "tokens": 100}],
    }
    write_shard(tmp_path / "tokens_000000.bin", [np.arange(100)])
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    flags = ["--data", str(tmp_path), "--init-from", "124M", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="give the text itself, or start from scratch with --tok"):
        train_gpt2.main(flags)


def test_a_loss_that_is_not_finite_stops_the_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        *("--data", text, "--out", out, *SMALL, "--max-steps", 60, "--learning-rate", 1e30),
        *("--warmup-steps", 0, "--grad-clip", 1e30),
    )
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: step ") and "smaller --learning-rate" in last
    assert "of seed 1337" in last and "the last good checkpoint: there is none yet" in last


def test_a_gradient_that_is_not_finite_names_the_last_good_checkpoint(
    train_gpt2: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([1.0, 1.0, 1.0, float("inf")])
    monkeypatch.setattr(optim, "clip_grad_norm", lambda *_: next(norms))
    out = tmp_path / "out"
    flags = ["--data", text, "--out", out, *SMALL, "--save-interval", 1, "--keep", 3, "--seed", 5]
    message = (
        rf"^step 3: the loss is \d.*, the gradient norm inf, in batch 6-7 of seed 5; "
        rf"the last good checkpoint: {out}/step-000002, of step 2; try "
    )
    with pytest.raises(UserError, match=message):
        train_gpt2.main([*map(str, flags), "--grad-accum-steps", "2"])
    assert json.loads((out / "trainer_state.json").read_text())["step"] == 3


def test_gradient_accumulation_equals_the_large_batch() -> None:
    """Four micro-batches of 2, each loss divided by 4, against one batch of 8: within rounding."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=11, n_positions=8)
    ids = np.random.default_rng(0).integers(0, 11, (2, 8, 8))
    whole, parts = GPT2(config), GPT2(config)
    whole.loss(*ids).backward()
    for rows in np.split(np.arange(8), 4):
        (parts.loss(*ids[:, rows]) * (1 / 4)).backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        size = np.abs(a.grad).max()
        np.testing.assert_allclose(a.grad, b.grad, rtol=0, atol=3e-6 * size, err_msg=name)
    norms = [optim.clip_grad_norm(m.parameters(), 1.0) for m in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_help_names_every_flag_and_its_default(
    train_gpt2: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        train_gpt2.parse_flags(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert set(re.findall(r"--[a-z0-9-]+", text)) >= set(FLAGS.split())
    for words in (
        "--max-steps MAX_STEPS optimizer steps (4000 for tiny, else 10000; 1000 when fine-tuning)",
        "the highest (0.003 for tiny, else 0.0006; 3e-5 when fine-tuning)",
        "number type; bfloat16 and float16 are used for the matrix work only (float32)",
        "rounded to 11 bits (off)",
    ):
        assert words in text


def test_a_slash_behind_the_run_s_folder_is_not_repeated(
    train_gpt2: ModuleType, tmp_path: Path
) -> None:
    """As "saved in out//" would have it."""
    out = f"{tmp_path}/out/"
    tuning = {"command": "instruct", "data": "a.jsonl", "out": out}
    assert train_gpt2.resolve_settings({"out": out}).out == f"{tmp_path}/out"
    assert tuning_flags.resolve_settings(tuning).out == f"{tmp_path}/out"


def test_defaults_by_size(
    train_gpt2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no run is in the way
    tiny = train_gpt2.resolve_settings({})
    assert (tiny.n_layer, tiny.n_head, tiny.n_embd, tiny.tokenizer) == (4, 4, 128, "char")
    large = train_gpt2.resolve_settings({"size": "345M", "learning_rate": 1e-4})
    assert (large.n_layer, large.n_embd, large.block_size) == (24, 1024, 1024)
    assert large.tokenizer == "gpt2" and large.min_lr == 1e-5 and large.size == "355M"
    tuned = train_gpt2.resolve_settings({"init_from": "124M"})
    assert (tuned.max_steps, tuned.learning_rate, tuned.batch_size) == (1000, 3e-5, 4)
    assert tuned.block_size == 1024 and tuned.min_lr == 3e-6
    with pytest.raises(UserError, match="--tokenizer makes no sense with --init-from"):
        train_gpt2.resolve_settings({"init_from": "124M", "tokenizer": "char"})


# ------------------------------------------------------------------------------- flags in a file


@pytest.mark.slow
def test_the_settings_of_a_run_can_be_given_back(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    data = tmp_path / 'a "b" \\ \x7f \U0001f600.txt'
    data.write_text(text.read_text())
    flags = [
        "--data",
        str(data),
        *SMALL,
        "--max-steps",
        "3",
        "--learning-rate",
        "1e-05",
        "--no-tf32",
    ]
    train_gpt2.main([*flags, "--out", str(tmp_path / "first")])
    written = tmp_path / "first" / "settings.toml"
    again = ["--config", str(written), "--out", str(tmp_path / "second")]
    train_gpt2.main(again)
    first, second = (metrics(tmp_path / name) for name in ("first", "second"))
    assert [r["train_loss"] for r in first] == [r["train_loss"] for r in second]
    states = [
        json.loads((tmp_path / n / "trainer_state.json").read_text())["settings"]
        for n in ("first", "second")
    ]
    assert states[0] == states[1] | {"out": states[0]["out"]}
    tuned = ["--init-from", str(tmp_path / "first"), "--data", str(data), "--max-steps", "1"]
    train_gpt2.main([*tuned, "--out", str(tmp_path / "third")])
    third = str(tmp_path / "third" / "settings.toml")
    train_gpt2.main(["--config", third, "--out", str(tmp_path / "fourth")])
    train_gpt2.main(["--config", third, "--resume", "--max-steps", "2"])  # it names its --out
    assert "max_steps = 2\n" in Path(third).read_text()


def test_flags_come_before_those_in_a_file(train_gpt2: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("batch-size = 7\nn_layer = 3\n[optimizer]\nlearning_rate = 1\ntf32 = true\n")
    flags = train_gpt2.parse_flags(["--config", str(path), "--n_layer", "2"])
    assert flags == {"batch_size": 7, "n_layer": 2, "learning_rate": 1.0, "tf32": True}
    assert type(flags["learning_rate"]) is float
    path.write_text("batch-size = 7\nn_layer = 3\ntokenizer = 'char'\n")
    flags = train_gpt2.parse_flags(["--config", str(path), "--size", "124M"])  # and its n_layer
    assert flags == {"batch_size": 7, "tokenizer": "char", "size": "124M"}
    flags = train_gpt2.parse_flags(["--config", str(path), "--init-from", "124M"])
    assert flags == {"batch_size": 7, "init_from": "124M"}
    path.write_text("learning_rate = 1e-3\nmin_lr = 1e-4\n")
    flags = train_gpt2.parse_flags(["--config", str(path), "--learning-rate", "1e-5"])
    assert flags == {"learning_rate": 1e-5}


def test_a_file_of_flags_may_come_from_windows(train_gpt2: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b"\xef\xbb\xbfbatch-size = 7\r\ndata = 'a.txt'\r\n")
    flags = train_gpt2.parse_flags(["--config", str(path)])
    assert flags == {"batch_size": 7, "data": "a.txt"}


def test_a_number_in_a_file_of_flags_may_be_a_text(train_gpt2: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("validation = 0.2\nout = 2026\n")
    assert train_gpt2.parse_flags(["--config", str(path)]) == {"validation": "0.2", "out": "2026"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_size = ", "is not TOML: Invalid value"),
        ("lr = 1", "there is no flag 'lr': did you mean learning_rate?"),
        ("batchsize = 1", "there is no flag 'batchsize': did you mean batch_size?"),
        ("zzz = 1", "there is no flag 'zzz'; see --help"),
        ("config = 'a'", "there is no flag 'config'"),
        ("batch_size = 1\n[run]\nbatch-size = 2", "batch-size stands there twice"),
        (
            "batch_size = '1'",
            "batch_size must be a whole number, 1 or more, not '1': leave out the quotes",
        ),
        ("learning_rate = '1e-3'", "must be a number, above 0, not '1e-3': leave out the quotes"),
        ("batch_size = 1.5", "batch_size must be a whole number, 1 or more, not 1.5"),
        ("dropout = 1", r"dropout must be a number, in [0, 1), not 1"),
        ("dtype = 'int8'", "dtype must be float32 or"),
        ("data = ['a']", "data must be a text in UTF-8 that is not empty, not ['a']"),
    ],
)
def test_mistakes_in_a_file_of_flags(
    content: str, message: str, train_gpt2: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "my.toml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        train_gpt2.parse_flags(["--config", str(path)])
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"cannot read .*missing"):
        train_gpt2.parse_flags(["--config", str(tmp_path / "missing")])


@pytest.mark.parametrize("start", ["scratch", "weights"])
def test_a_model_that_does_not_fit_is_not_told_to_lower_its_batch(
    start: str,
    train_gpt2: ModuleType,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--data", str(text), "--out", str(tmp_path / "out")]
    if start == "weights":
        train_gpt2.main([*flags[:3], str(tmp_path / "small"), *SMALL, "--max-steps", "1"])
        flags += ["--init-from", str(tmp_path / "small")]
    words = {
        "scratch": "the model itself does not fit; choose a smaller --size, --n-layer or --n-embd",
        "weights": "small is too large to train here; give a smaller one",
    }[start]

    def too_large(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 112 GiB")

    monkeypatch.setattr(optim, "AdamW", too_large)
    with pytest.raises(UserError, match=f"112 GiB.*{words}") as caught:
        train_gpt2.main(flags)
    assert "--batch-size" not in str(caught.value)

    monkeypatch.setattr("micrograd_gpt.arrays.memory.available_memory", lambda: 1000)
    with pytest.raises(UserError, match=f"no memory for .*{words}"):
        train_gpt2.main(flags)


def test_a_run_from_before_line_ends_were_a_setting_goes_on(
    train_gpt2: ModuleType, text: Path, tmp_path: Path
) -> None:
    text.write_bytes(b"one\r\ntwo\r\n" * 100)
    out = tmp_path / "out"
    flags = ["--data", str(text), "--out", str(out), *SMALL, "--line-ends", "keep"]
    train_gpt2.main([*flags, "--max-steps", "1"])
    state = json.loads((out / "trainer_state.json").read_text())
    for name in ("line_ends", "validation", "text_field", "special_tokens"):
        del state["settings"][name]
    (out / "trainer_state.json").unlink()  # a link of best/ too
    (out / "trainer_state.json").write_text(json.dumps(state))
    assert train_gpt2.main(["--resume", "--out", str(out), "--max-steps", "2"]) == 0
    assert "\r" in load_tokenizer(out).decode(range(7))


@pytest.mark.slow
def test_a_class_of_one_s_own_is_trained_and_resumed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Own(GPT2):
        pass

    train, out = script("train_gpt2"), str(tmp_path / "out")
    monkeypatch.setattr(train, "GPT2", Own)
    assert train.main(["--data", str(text), "--out", out, *SMALL, "--max-steps", "1"]) == 0
    assert train.main(["--resume", "--out", out, "--max-steps", "2"]) == 0
    assert json.loads(Path(out, "config.json").read_text())["architectures"] == ["Own"]
    said = f"note: {out} was saved by a class 'Own', and goes on as a GPT2\n"
    assert said not in capsys.readouterr().err
    monkeypatch.setattr(train, "GPT2", GPT2)
    assert train.main(["--resume", "--out", out, "--max-steps", "3"]) == 0
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_sample_that_fails_costs_no_steps(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> str:
        raise UserError("no sample")

    train, out = script("train_gpt2"), str(tmp_path / "out")
    monkeypatch.setattr(train, "sample", broken)
    every = ["--max-steps", "9", "--sample-interval", "4", "--save-interval", "2"]
    with pytest.raises(UserError, match="no sample"):
        train.main(["--data", str(text), "--out", out, *SMALL, *every])
    assert json.loads(Path(out, "trainer_state.json").read_text())["step"] == 4
