"""Models from every local format, and everything that can be wrong with one."""

from __future__ import annotations

import json
import mmap
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch_files
from tiny_weights import (
    ARRAYS,
    CONFIG,
    DATA,
    TINY,
    Arrays,
    assert_same,
    bare,
    hf_folder,
    numbers,
    with_masks,
)

from micrograd_gpt import no_grad
from micrograd_gpt.arrays.devices import move
from micrograd_gpt.gpt2 import GPT2, GPT2Config
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.support.files import read_json
from micrograd_gpt.variants import VariantConfig, VariantGPT2
from micrograd_gpt.weights.config import SIZES
from micrograd_gpt.weights.formats import open_weights
from micrograd_gpt.weights.pretrained import build, from_pretrained
from micrograd_gpt.weights.reading import FLOATS
from micrograd_gpt.weights.releases import (
    OPENAI_FILES,
)
from micrograd_gpt.weights.saving import save_pretrained
from micrograd_gpt.weights.tensor_files import write_safetensors

# ---------------------------------------------------------------------------------------------
# Local formats


def head_for_wte(arrays: Arrays) -> Arrays:
    rest = {n: a for n, a in arrays.items() if n != "transformer.wte.weight"}
    return rest | {"lm_head.weight": arrays["transformer.wte.weight"]}


@pytest.mark.parametrize(
    "arrays",
    [
        ARRAYS,
        bare(ARRAYS),
        with_masks(bare(ARRAYS)),
        {f"transformer.{n}": a for n, a in with_masks(bare(ARRAYS)).items()},
        ARRAYS | {"lm_head.weight": ARRAYS["transformer.wte.weight"]},
        head_for_wte(ARRAYS),
        {f"module.{n}": a for n, a in head_for_wte(ARRAYS).items()},
        {f"_orig_mod.module.{n}": a for n, a in bare(ARRAYS).items()},
    ],
    ids=["prefix", "no prefix", "masks", "prefix and masks", "head", "head for embedding"]
    + ["DataParallel", "torch.compile of it"],
)
def test_hugging_face_folders(tmp_path: Path, arrays: Arrays) -> None:
    assert_same(from_pretrained(GPT2, hf_folder(tmp_path, arrays)))
    assert_same(from_pretrained(GPT2, str(tmp_path / "model.safetensors")))


@pytest.mark.parametrize("form", ["zip", "old", "shards"])
def test_pytorch_s_folders(tmp_path: Path, form: str) -> None:
    files = DATA.parent / "torch_files"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if form == "shards":
        weight_map = {}
        for i, names in enumerate((sorted(ARRAYS)[::2], sorted(ARRAYS)[1::2])):
            shard = f"pytorch_model-{i + 1:05d}-of-00002.bin"
            torch_files.save(tmp_path / shard, {name: ARRAYS[name] for name in names})
            weight_map |= dict.fromkeys(names, shard)
        index = {"weight_map": weight_map}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        shutil.copy(files / {"zip": ".", "old": "old"}[form] / "pytorch_model.bin", tmp_path)
    assert_same(from_pretrained(GPT2, tmp_path))
    # Where both are there, safetensors count.
    hf_folder(tmp_path, {name: array + 1 for name, array in ARRAYS.items()})
    assert_same(from_pretrained(GPT2, tmp_path), {name: a + 1 for name, a in ARRAYS.items()})


def test_a_head_of_its_own(tmp_path: Path) -> None:
    arrays = ARRAYS | {"lm_head.weight": ARRAYS["transformer.wte.weight"][::-1]}
    folder = hf_folder(tmp_path, arrays, {**CONFIG, "tie_word_embeddings": False})
    assert_same(from_pretrained(GPT2, folder), arrays)


@pytest.mark.parametrize(
    "head", ["score", "classifier", "qa_outputs", "multiple_choice_head", "v_head.summary"]
)
def test_another_head_is_left_out(
    tmp_path: Path, head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = {f"{head}.weight": ARRAYS[SQUARE], f"{head}.bias": ARRAYS[SQUARE][0]}
    assert_same(from_pretrained(GPT2, hf_folder(tmp_path, ARRAYS | heads)))
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: {tmp_path}") and all(name in note for name in heads)


def test_names_that_a_stranger_chose_do_not_reach_the_terminal_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = {f"score.\x1b[2J\r{'x' * i}": ARRAYS[SQUARE] for i in range(100)}
    from_pretrained(GPT2, hf_folder(tmp_path, ARRAYS | heads))
    note = capsys.readouterr().err
    assert note.rstrip("\n").isprintable() and len(note) < 300 + len(str(tmp_path))


def test_a_sharded_folder(tmp_path: Path) -> None:
    weight_map = {}
    for i, names in enumerate((sorted(ARRAYS)[::2], sorted(ARRAYS)[1::2])):
        shard = f"model-{i + 1:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({n: ARRAYS[n] for n in names}, tmp_path / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert_same(from_pretrained(GPT2, tmp_path))
    assert_same(from_pretrained(GPT2, index))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*00002-of-00002"):
        from_pretrained(GPT2, tmp_path)
    with pytest.raises(UserError, match=r"00001-of-00002\.safetensors is a part of a model: give"):
        from_pretrained(GPT2, tmp_path / "model-00001-of-00002.safetensors")
    index.unlink()
    with pytest.raises(UserError, match=r"holds files of a model without the \*\.index\.json"):
        from_pretrained(GPT2, tmp_path)


def test_a_set_of_one_file_is_a_whole_model(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    whole = tmp_path / "model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors").rename(whole)
    assert_same(from_pretrained(GPT2, whole))


@pytest.mark.parametrize("kind", ["saver", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_openai_s_folder(kind: str, dtype: str) -> None:
    model = from_pretrained(GPT2, DATA / kind, dtype=dtype)
    assert_same(model, dtype=dtype)
    assert not model.training
    assert model.config == GPT2Config(2, 4, 16, 61, 32)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stored_dtypes_load_into_the_one_asked_for(tmp_path: Path, stored: str, dtype: str) -> None:
    hf_folder(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", ARRAYS, dtype=stored)
    rounded = {
        name: (array.view("u4") + (0x7FFF + (array.view("u4") >> 16 & 1)) & 0xFFFF0000).view("f4")
        if stored == "bfloat16"
        else array.astype(stored)
        for name, array in ARRAYS.items()
    }
    assert_same(from_pretrained(GPT2, tmp_path, dtype=dtype), rounded, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_held_as_such_but_for_layer_norm(tmp_path: Path, dtype: str) -> None:
    got = numbers(from_pretrained(GPT2, hf_folder(tmp_path), dtype=dtype))
    for name, array in ARRAYS.items():
        held = "float32" if ".ln_" in name else dtype
        assert got[name].dtype == held
        np.testing.assert_array_equal(got[name], array.astype(FLOATS[held]))


@pytest.mark.parametrize(
    "variant", [{}, {"norm_position": "post"}, {"position_embedding": "sinusoidal"}]
)
def test_what_we_save_comes_back_bit_for_bit(tmp_path: Path, variant: dict[str, str]) -> None:
    model = VariantGPT2(VariantConfig(2, 4, 16, 61, 32, **variant), seed=5)  # type: ignore[arg-type]
    save_pretrained(model, tmp_path)
    again = from_pretrained(GPT2, tmp_path)
    assert vars(again.config) == vars(model.config) if variant else type(again) is GPT2
    assert_same(again, numbers(model))
    ids = np.arange(10).reshape(2, 5)
    with no_grad():
        np.testing.assert_array_equal(again(ids).data, model.eval() and model(ids).data)


def test_a_bare_file_of_a_published_size_needs_no_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json beside it, and is not one of OpenAI's"):
        from_pretrained(GPT2, tmp_path / "model.safetensors")
    for key in ("vocab_size", "n_positions"):
        monkeypatch.setitem(SIZES, "355M", TINY | {key: 60})
        with pytest.raises(
            UserError, match=r"no config\.json beside it, and is not one of OpenAI's"
        ):
            from_pretrained(GPT2, tmp_path / "model.safetensors")
    monkeypatch.setitem(SIZES, "355M", TINY)
    assert open_weights(tmp_path / "model.safetensors").config == GPT2Config(2, 4, 16, 61, 32)


def test_loading_keeps_one_copy(tmp_path: Path) -> None:
    config = GPT2Config(2, 4, 512, 8192, 128)
    save_pretrained(GPT2(config), tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size  # 42 MB
    tracemalloc.start()
    model = from_pretrained(GPT2, tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    matrices = [p.data for p in model.parameters() if p.ndim == 2]
    traced = 0 if hasattr(mmap, "MADV_HUGEPAGE") else sum(a.nbytes for a in matrices)
    assert traced <= kept < peak < traced + 0.15 * size


@pytest.mark.gpu
def test_loading_onto_a_gpu() -> None:
    model = from_pretrained(GPT2, DATA / "saver", device="gpu")
    assert all(p.device == "gpu" for p in model.parameters())
    move(model, "cpu")
    assert_same(model)


@pytest.mark.parametrize(
    ("value", "warns"), [(np.nan, True), (np.inf, True), (-np.inf, True), (3e38, False)]
)
def test_numbers_that_are_none_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, warns: bool
) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    array = ARRAYS[name].copy()
    array[3, 5] = value
    from_pretrained(GPT2, hf_folder(tmp_path, ARRAYS | {name: array}))
    err = capsys.readouterr().err
    assert err.count("\n") == warns and (not warns or f"{name} holds NaN or infinity" in err)


# ---------------------------------------------------------------------------------------------
# What is wrong with a folder


def changed(**config: Any) -> dict[str, Any]:
    return {key: value for key, value in (CONFIG | config).items() if value is not ...}


QKV = "transformer.h.1.attn.c_attn.weight"
SQUARE = "transformer.h.0.attn.c_proj.weight"
WRONG_FOLDERS: dict[str, tuple[Arrays, Any, str]] = {
    "missing tensor": ({n: a for n, a in ARRAYS.items() if n != QKV}, CONFIG, f"lacks {QKV!r}$"),
    "missing tensors": (
        {n: a for n, a in ARRAYS.items() if "ln_1" not in n},
        CONFIG,
        r"lacks 'transformer\.h\.0\.ln_1\.bias' and 3 more",
    ),
    "missing embedding": (
        {n: a for n, a in ARRAYS.items() if "wte" not in n},
        changed(n_embd=10**9, n_head=1),
        r"lacks transformer\.wte\.weight of shape",
    ),
    "missing positions of a huge config": (
        {n: a for n, a in ARRAYS.items() if "wpe" not in n},
        changed(n_positions=10**15),
        "not enough memory",
    ),
    "missing layer": (
        {n: a for n, a in ARRAYS.items() if ".h.1." not in n},
        CONFIG,
        r"config\.json says n_layer 2, the tensors 1",
    ),
    "extra tensor": (
        ARRAYS | {"transformer.h.0.crossattention.bias": ARRAYS[SQUARE]},
        CONFIG,
        r"has a tensor that the model does not have: 'transformer\.h\.0\.crossattention\.bias'",
    ),
    "foreign tensor": (ARRAYS | {"pooler.weight": ARRAYS[SQUARE]}, CONFIG, r"pooler\.weight"),
    "name of two lines": (ARRAYS | {"a\nb": ARRAYS[SQUARE]}, CONFIG, r"'a\\nb'"),
    "one tensor, two names": (
        ARRAYS | {"ln_f.bias": ARRAYS["transformer.ln_f.bias"]},
        CONFIG,
        r"has a tensor that the model does not have: 'ln_f\.bias'",
    ),
    "transposed": (ARRAYS | {QKV: ARRAYS[QKV].T}, CONFIG, rf"{QKV} has shape \(48, 16\)"),
    "extra axis": (ARRAYS | {QKV: ARRAYS[QKV][None]}, CONFIG, r"has shape \(1, 16, 48\)"),
    "integers": (ARRAYS | {QKV: ARRAYS[QKV].view("i4")}, CONFIG, f"{QKV!r} holds int32"),
    "another head": (
        ARRAYS | {"lm_head.weight": ARRAYS["transformer.wte.weight"] + 1},
        CONFIG,
        r"lm_head\.weight differs .*: if .* config\.json must say tie_word_embeddings: false",
    ),
    "no head of its own": (ARRAYS, changed(tie_word_embeddings=False), r"lacks 'lm_head\.weight'"),
    "config of more layers": (ARRAYS, changed(n_layer=10**9), "n_layer 1000000000, the tensors 2"),
    "config of other width": (ARRAYS, changed(n_embd=20), "n_embd 20, the tensors 16"),
    "config of other vocabulary": (ARRAYS, changed(vocab_size=62), "vocab_size 62, the tensors 61"),
    "config of other context": (ARRAYS, changed(n_positions=64), "n_positions 64, the tensors 32"),
    "config of heads that do not fit": (ARRAYS, changed(n_head=5), "multiple of n_head"),
    "config without width": (ARRAYS, changed(n_embd=...), "lacks n_embd"),
    "config of another model": (ARRAYS, changed(model_type="llama"), "model_type"),
    "config that is a list": (ARRAYS, [CONFIG], r"config\.json"),
}


@pytest.mark.parametrize("wrong", WRONG_FOLDERS)
def test_a_wrong_folder_is_one_line_that_says_what(tmp_path: Path, wrong: str) -> None:
    arrays, config, message = WRONG_FOLDERS[wrong]
    with pytest.raises(UserError, match=message) as caught:
        from_pretrained(GPT2, hf_folder(tmp_path, arrays, config))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damaged", [".", "best"])
def test_a_damaged_model_of_a_run_names_the_run_s_other_one(
    name: str, damaged: str, tmp_path: Path
) -> None:
    hf_folder(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "best")
    folder, other = tmp_path / damaged, tmp_path / ("best" if damaged == "." else "")
    (folder / name).write_bytes(b"{")
    with pytest.raises(UserError) as caught:
        from_pretrained(GPT2, folder)
    assert str(caught.value).startswith(f"{folder / name} ")
    assert str(caught.value).endswith(f": copy the files of {other} into {folder}")
    for kept in (tmp_path / name for name in ("step-999999", "step-1000000")):
        kept.mkdir()
        shutil.copy(other / name, kept)  # may be later than the best, which loses less
    latest = kept if damaged == "." else tmp_path
    with pytest.raises(UserError, match=f": copy the files of {latest} into {folder}$"):
        from_pretrained(GPT2, folder)
    for kept in tmp_path.glob("step-*"):
        shutil.rmtree(kept)
    shutil.rmtree(other) if damaged == "." else (other / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*(fetch it again|line 1 column 2 .*)$"):
        from_pretrained(GPT2, folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path: Path, name: str) -> None:
    hf_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(UserError, match="it only names the file in Git LFS: run git lfs pull"):
        open_weights(tmp_path)


def test_weights_that_are_a_link_to_nowhere_are_named(tmp_path: Path) -> None:
    """As in a folder of the Hub's cache that was moved."""
    hf_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("../blobs/0")
    with pytest.raises(UserError, match=r"^cannot read .*model\.safetensors: No such file"):
        open_weights(tmp_path)
    torch_file = tmp_path / "pytorch_model.bin"
    torch_file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):  # which is there
        open_weights(tmp_path)


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a file or folder, nor one of 124M"):
        from_pretrained(GPT2, "125M")
    with pytest.raises(UserError, match="does not exist"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not hold a model"):
        open_weights(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"neither a \.safetensors, \.bin or \.pt file nor"):
        open_weights(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"cannot read .*: File name too long$"):
        open_weights(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="neither a file or folder"):
        from_pretrained(GPT2, "x" * 300)
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
    for path in (p for p in tmp_path.iterdir() if p.suffix != ".txt"):
        with pytest.raises(UserError, match=r"is damaged|not a file that torch\.save wrote"):
            open_weights(path)
    with pytest.raises(UserError, match=r"has pytorch_model\.bin but no config\.json"):
        open_weights(tmp_path)
    hf_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        open_weights(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has model\.safetensors but no config\.json"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ("{", " is damaged: it cannot be read as JSON"),
        ("[]", " is damaged: it is not a JSON object"),
        ('{"n_vocab": 61, "n_ctx": 32, "n_embd": 16, "n_head": 4}', " lacks n_layer$"),
        ('{"n_ctx": 32, "n_embd": 16, "n_head": 4, "n_layer": 2}', " lacks n_vocab$"),
        ('{"n_vocab": 61, "n_ctx": 0, "n_embd": 16, "n_head": 4, "n_layer": 2}', ": n_ctx must be"),
        (
            '{"n_vocab": 61, "n_ctx": 32, "n_embd": 16, "n_head": 4, "n_layer": 3}',
            " says n_layer 3,",
        ),
    ],
)
def test_openai_s_folder_with_wrong_hparams(tmp_path: Path, hparams: str, message: str) -> None:
    folder = Path(shutil.copytree(DATA / "saver", tmp_path / "x"))
    (folder / "hparams.json").write_text(hparams)
    with pytest.raises(UserError, match=rf"hparams\.json{message}") as caught:
        from_pretrained(GPT2, folder)
    assert "config" not in str(caught.value)


# ---------------------------------------------------------------------------------------------
# Random damage


def corrupted(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    match rng.randrange(5):
        case 0:  # a flipped bit
            return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        case 1:  # random bytes
            n = rng.randint(1, 8)
            return (content[:at] + rng.randbytes(n) + content[at + n :])[: len(content)]
        case 2:  # cut short
            return content[:at]
        case 3:  # bytes lost
            return content[:at] + content[at + rng.randint(1, 16) :]
        case _:  # bytes doubled
            n = rng.randint(1, 16)
            return content[:at] + content[at - n : at] + content[at:]


def outcome(path: Path) -> tuple[GPT2Config, Arrays] | None:
    """The config and the weights, or None for a clean error; anything else is raised."""
    try:
        model = build(open_weights(path))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return None
    return model.config, numbers(model)


@pytest.mark.slow
def test_fuzz_a_safetensors_file(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    errors = 0
    rng = random.Random(0)
    for _ in range(3000):
        # Two of three in the header. It is a tenth of this file, and of real ones far less.
        part = rng.random() < 0.67
        damaged = corrupted(whole[:header], rng) + whole[header:] if part else corrupted(whole, rng)
        path.write_bytes(damaged)
        got = outcome(folder)
        errors += got is None
        if got is not None:
            assert got[0] == GPT2Config(2, 4, 16, 61, 32)
            # The numbers are those at the right places of the file. There is no checksum: what was
            # changed inside of the numbers themselves is read as it stands.
            assert len(damaged) == len(whole)
            changed = np.frombuffer(whole, "u1")[header:] != np.frombuffer(damaged, "u1")[header:]
            wrong = sum(
                (np.ascontiguousarray(got[1][n]).view("u1") != ARRAYS[n].view("u1")).sum()
                for n in ARRAYS
            )
            assert wrong == changed.sum()
    assert 1600 < errors < 3000


@pytest.mark.slow
def test_fuzz_a_tensorflow_checkpoint(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA / "saver", tmp_path / "model"))
    hparams = json.loads((folder / "hparams.json").read_text())
    wholes = {name: (folder / name).read_bytes() for name in OPENAI_FILES}
    errors = 0
    rng = random.Random(1)
    for i in range(1500):
        name = OPENAI_FILES[(0, 1, 2, 2, 2, 3, 3, 3)[i % 8]]
        (folder / name).write_bytes(corrupted(wholes[name], rng))
        got = outcome(folder)
        if got is not None and name == "hparams.json":
            hparams = read_json(folder / name) or {}
            assert got[0].n_head == hparams["n_head"]  # shows in no tensor
        elif got is not None:
            assert got[0] == GPT2Config(2, 4, 16, 61, 32)
        (folder / name).write_bytes(wholes[name])
        errors += got is None
        if got is not None:
            for parameter, array in ARRAYS.items():
                np.testing.assert_array_equal(got[1][parameter], array)
    assert 1000 < errors < 1500


@pytest.mark.slow
def test_fuzz_a_shard_index_and_a_config(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "1.safetensors")
    index = json.dumps({"weight_map": dict.fromkeys(ARRAYS, "1.safetensors")}).encode()
    wholes = {"model.safetensors.index.json": index, "config.json": json.dumps(CONFIG).encode()}
    for name, whole in wholes.items():
        (folder / name).write_bytes(whole)
    assert outcome(folder) is not None
    errors = 0
    rng = random.Random(2)
    for i in range(600):
        name = list(wholes)[i % 2]
        (folder / name).write_bytes(corrupted(wholes[name], rng))
        got = outcome(folder)
        errors += got is None
        if got is not None:
            config = read_json(folder / "config.json") or {}
            assert {key: getattr(got[0], key) for key in TINY} == {key: config[key] for key in TINY}
            for parameter, array in ARRAYS.items():
                np.testing.assert_array_equal(got[1][parameter], array)
        (folder / name).write_bytes(wholes[name])
    assert 300 < errors < 600


@pytest.mark.parametrize("dtype", ["int4", "float8", "Float32"])
def test_an_unknown_dtype_is_named(tmp_path: Path, dtype: str) -> None:
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=5, n_positions=4))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=f"^unknown dtype '{dtype}': choose one of float32, float64"
    ):
        GPT2.from_pretrained(tmp_path, dtype=dtype)
