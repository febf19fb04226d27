"""GGUF files, read back by the gguf package: every tensor, the shape, and the tokenizer.

benchmarks/in_llama_cpp.py runs them in llama.cpp itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import training

from micrograd_gpt import layers
from micrograd_gpt.gpt2 import GPT2, MLP, GPT2Config
from micrograd_gpt.nn import Dropout, Linear
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.text.base_tokenizer import END_OF_TEXT, Tokenizer
from micrograd_gpt.text.byte_pairs import (
    AddedToken,
    BytePairTokenizer,
    GPT2Tokenizer,
    gpt2_merges,
    gpt2_vocabulary,
)
from micrograd_gpt.text.merges import SPELLING
from micrograd_gpt.text.tokenizers import ByteTokenizer
from micrograd_gpt.variants import VariantConfig, VariantGPT2
from micrograd_gpt.weights.gguf_file import gguf_tensors, write_gguf
from micrograd_gpt.weights.saving import save_pretrained

gguf = pytest.importorskip("gguf")

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16}


def fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def test_the_shape_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    config = VariantConfig(**SHAPE, vocab_size=257, n_inner=20, layer_norm_epsilon=1e-3)
    write_gguf(tmp_path / "a.gguf", VariantGPT2(config), ByteTokenizer(), name="mine")
    found = fields(gguf.GGUFReader(tmp_path / "a.gguf"))
    expected = {
        "general.architecture": "gpt2",
        "general.name": "mine",
        "general.file_type": 0,
        "gpt2.context_length": 16,
        "gpt2.embedding_length": 8,
        "gpt2.feed_forward_length": 20,
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-3),
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("dtype", "kind", "own"),
    [("float32", "F32", "f4"), ("float16", "F16", "f2"), ("bfloat16", "BF16", ml_dtypes.bfloat16)],
)
def test_every_tensor(dtype: str, kind: str, own: Any, tmp_path: Path) -> None:
    config = VariantConfig(**SHAPE, vocab_size=300, tie_word_embeddings=False)
    model = VariantGPT2(config, seed=4)
    write_gguf(tmp_path / "a.gguf", model, ByteTokenizer(), dtype)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    expected = dict(gguf_tensors(model, 257))
    assert {tensor.name for tensor in reader.tensors} == expected.keys() and len(expected) == 29
    for tensor in reader.tensors:
        array = expected[tensor.name]
        is_matrix = array.ndim == 2 and tensor.name != "position_embd.weight"
        assert tensor.tensor_type.name == (kind if is_matrix else "F32")
        assert tensor.shape.tolist() == list(array.shape[::-1])  # the format's order
        numbers = array.astype(own if is_matrix else "f4")
        stored = np.ascontiguousarray(tensor.data).tobytes()
        assert stored == np.ascontiguousarray(numbers).tobytes(), tensor.name
    # llama.cpp has names of its own for every one of them
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]}
    modules = {name.rpartition(".")[0] for name in expected}
    assert modules <= {name.format(bid=layer) for name in known for layer in range(2)}


def byte_pairs() -> BytePairTokenizer:
    merges = gpt2_merges()[:40]
    tokens = ["</s>", *("".join(pair) for pair in reversed(merges)), *SPELLING]
    end = AddedToken("</s>", 0, special=True, normalized=False)
    pad = AddedToken("[PAD]", len(tokens), special=True, normalized=False)
    dog = AddedToken(" 犬", len(tokens) + 1, special=False, normalized=True)
    special = {"eos_token": 0, "bos_token": 1, "pad_token": pad.id}
    return BytePairTokenizer({t: i for i, t in enumerate(tokens)}, merges, [end, pad, dog], special)


@pytest.mark.parametrize("tokenizer", [GPT2Tokenizer(), ByteTokenizer(), byte_pairs()])
def test_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = GPT2(GPT2Config(**SHAPE, vocab_size=tokenizer.vocab_size + 5))
    write_gguf(tmp_path / "a.gguf", model, tokenizer)
    found = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in fields(gguf.GGUFReader(tmp_path / "a.gguf")).items()
    }
    assert (found["model"], found["pre"]) == ("gpt2", "gpt-2")
    assert found["add_bos_token"] is False
    assert found["eos_token_id"] == tokenizer.end_of_text
    kinds = {kind: [i for i, k in enumerate(found["token_type"]) if k == kind] for kind in (3, 4)}
    if isinstance(tokenizer, BytePairTokenizer):
        assert found["tokens"] == [*tokenizer.vocabulary, "[PAD]", " 犬"]
        assert found["merges"] == [" ".join(pair) for pair in tokenizer.merges]
        assert (found["bos_token_id"], found["padding_token_id"]) == (1, 297)
        assert kinds == {3: [0, 297], 4: [298]}
        return
    is_gpt2 = tokenizer.name == "gpt2"
    assert found["tokens"] == list(gpt2_vocabulary() if is_gpt2 else [*SPELLING, END_OF_TEXT])
    assert kinds == {3: [tokenizer.end_of_text], 4: []}
    assert found["bos_token_id"] == tokenizer.end_of_text
    if is_gpt2:
        assert found["merges"] == [" ".join(pair) for pair in gpt2_merges()]
    else:  # llama.cpp takes no empty list, but this merge never happens
        assert found["merges"] == [f"{END_OF_TEXT} {END_OF_TEXT}"]


def test_the_script_writes_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = GPT2(GPT2Config(**SHAPE, vocab_size=257), seed=2)
    save_pretrained(model, "source", ByteTokenizer())
    script = training.script("load_gpt2")
    assert script.main(["--from", "source", "--export", "new/a.gguf"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == (
        "wrote new/a.gguf, weights stored as float32"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "source"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.gguf"]
    reader = gguf.GGUFReader("new/a.gguf")
    assert fields(reader)["general.name"] == "source"
    (embedding,) = (t.data for t in reader.tensors if t.name == "token_embd.weight")
    np.testing.assert_array_equal(embedding, model.transformer.wte.weight.data)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "a.gguf", ByteTokenizer()
    model = GPT2(GPT2Config(**SHAPE, vocab_size=257))
    write_gguf(path, model, tokenizer)
    before = path.read_bytes()
    model.transformer.h[1].mlp.c_fc.weight.data[3, 3] = 1e6
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight holds numbers too large for floa"):
        write_gguf(path, model, tokenizer, "float16")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"] and path.read_bytes() == before
    write_gguf(path, model, tokenizer, "bfloat16")
    assert path.read_bytes() != before


def test_an_edited_mlp_keeps_its_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(self: MLP, c: GPT2Config, init: Any, draws: Any) -> None:
        self.c_fc, self.c_proj = Linear(8, 16, init), Linear(16, 8, init)
        self.resid_dropout = Dropout(0.0, draws)

    monkeypatch.setattr(MLP, "__init__", narrow)
    write_gguf(tmp_path / "a.gguf", GPT2(GPT2Config(**SHAPE, vocab_size=257)), ByteTokenizer())
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert fields(reader)["gpt2.feed_forward_length"] == 16
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_up.weight"] == [8, 16]


def test_edited_code_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = GPT2(GPT2Config(1, 1, 4, 257, 8))
    write_gguf(tmp_path / "model.gguf", model, ByteTokenizer())
    assert "edited" not in capsys.readouterr().err
    monkeypatch.setattr(layers, "gelu", lambda x: x.relu())
    write_gguf(tmp_path / "model.gguf", model, ByteTokenizer())
    note = "note: llama.cpp computes GPT-2's code, and not what is yours: 'layers.gelu'"
    assert capsys.readouterr().err == f"{note}\n"

    class Own(MLP):
        pass

    model.transformer.h[0].mlp.__class__ = Own
    write_gguf(tmp_path / "model.gguf", model, ByteTokenizer())
    assert capsys.readouterr().err == f"{note}, 'Own'\n"
