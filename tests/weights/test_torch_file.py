"""PyTorch's files: what is in them, and that nothing in them is run or reaches outside of them."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tiny_weights import assert_same
from torch_files import (
    Part,
    Raw,
    called,
    instructions,
    pickled,
    save,
    storage_reference,
    whole,
    write_zip,
)

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights import torch_file
from micrograd_gpt.weights.formats import open_weights
from micrograd_gpt.weights.pretrained import build
from micrograd_gpt.weights.torch_file import (
    LEGACY_START,
    PICKLE_BYTES,
    read_state_dict,
    read_torch,
)
from micrograd_gpt.weights.torch_pickle import TorchTensor

DATA = Path(__file__).parents[1] / "data" / "torch_files"
FILES = ("pytorch_model.bin", "old/pytorch_model.bin", "ckpt.pt")
TWELVE = np.arange(12, dtype="f4")


def numbers(path: Path, tensor: Any) -> np.ndarray:
    assert isinstance(tensor, TorchTensor)
    stored = tensor.stored("x", path)
    out = np.empty(stored.shape, stored.dtype)
    stored.read_into(out)
    return out


def same_kind(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


# ---------------------------------------------------------------------------------------------
# What torch writes


@pytest.mark.parametrize("name", FILES)
def test_what_torch_saved_is_read_bit_for_bit(name: str) -> None:
    assert_same(build(open_weights(DATA / name)))


def test_all_of_a_checkpoint_is_read() -> None:
    saved = read_torch(DATA / "ckpt.pt")
    assert list(saved) == [
        *("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")
    ]
    assert saved["config"] == {
        **{"out_dir": "out", "compile": True},
        **{"learning_rate": 6e-4, "meta": None},
    }
    assert saved["iter_num"] == 1
    assert numbers(DATA / "ckpt.pt", saved["best_val_loss"]) == 4.25
    decayed, others = saved["optimizer"]["param_groups"]
    assert decayed["betas"] == (0.9, 0.999) and len(decayed["params"] + others["params"]) == 28
    assert numbers(DATA / "ckpt.pt", saved["optimizer"]["state"][27]["step"]) == 1
    first = numbers(DATA / "ckpt.pt", saved["optimizer"]["state"][0]["exp_avg"])
    np.testing.assert_allclose(first, 0.05, rtol=1e-6)  # a tenth of a gradient of 0.5


@pytest.mark.parametrize("protocol", [2])
def test_plain_data_comes_as_python_pickles_it(file: Path, protocol: int) -> None:
    data = {
        "numbers": [0, 255, 256, 65535, 65536, -1, 2**31, -(2**70), 0.1, float("inf")],
        "texts": ["", "wte", "é€😀", "x" * 300],
        "others": (None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}),
        "keys": {0: "a", -5: "b", "": "c"},
        "many": {str(i): [i] for i in range(400)},
        "ordered": OrderedDict(a=1, b=OrderedDict()),
    }
    data["again"] = data["texts"]
    write_zip(file, pickle.dumps(data, protocol), {})
    got = read_torch(file)
    assert got == data and got["again"] is got["texts"]
    assert type(got["others"][1]) is bool


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "bfloat16", "i8", "u1", "?"])
def test_every_dtype(file: Path, dtype: str) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array = np.arange(6).astype(dtype).reshape(2, 3)
    save(file, {"x": array})
    assert same_kind(numbers(file, read_torch(file)["x"]), array)


def test_parts_of_storages(file: Path) -> None:
    parts = {
        "rows": Part("0", TWELVE, 4, (2, 4), (4, 1)),
        "one": Part("0", TWELVE, 11, (), ()),
        "none": Part("0", TWELVE, 12, (0, 5), (5, 1)),
        "widths of one": Part("0", TWELVE, 3, (1, 3, 1), (7, 1, 9)),
    }
    save(file, parts)
    got = read_torch(file)
    rows = TWELVE.reshape(3, 4)
    for name, expected in {
        "rows": rows[1:],
        "one": rows[2, 3],
        "none": rows[3:, :0].reshape(0, 5),
        "widths of one": TWELVE[3:6].reshape(1, 3, 1),
    }.items():
        np.testing.assert_array_equal(numbers(file, got[name]), expected, name)


def test_a_parameter_is_read_as_its_data(file: Path) -> None:
    """As dict(model.named_parameters()) has it."""
    parameter = called(PARAMETER, rebuilt(STORAGE, 0, (12,), (1,)), True, EMPTY)
    write_zip(file, pickled({"x": parameter}), {"0": TWELVE.tobytes()})
    np.testing.assert_array_equal(numbers(file, read_torch(file)["x"]), TWELVE)


@pytest.mark.parametrize("strides", [(1, 3), (0, 1), (4, 0), (8, 1)])
def test_a_tensor_in_another_order_is_named(file: Path, strides: tuple[int, int]) -> None:
    save(file, {"h.0.x": Part("0", TWELVE, 0, (2, 3), strides)})
    with pytest.raises(UserError, match=r"'h\.0\.x' is not stored row by row.*contiguous"):
        read_state_dict(file)


# ---------------------------------------------------------------------------------------------
# What an attacker writes


class Attack:
    """Pickled by Python, this runs `mark` when Python reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True])
def test_no_code_is_run(file: Path, tmp_path: Path, old: bool) -> None:
    attack = pickle.dumps({"x": Attack(tmp_path / "ran")}, 2)
    pickle.loads(attack)
    (tmp_path / "ran").rmdir()  # it works where pickles are trusted
    if old:
        facts = {"little_endian": True}
        file.write_bytes(LEGACY_START + pickled(1001) + pickled(facts) + attack + pickled([]))
    else:
        write_zip(file, attack, {})
    with pytest.raises(UserError, match=r"is refused: .*'posix\.mkdir'|'nt\.mkdir'") as caught:
        read_torch(file)
    assert "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


GLOBALS = ["os system", "posix system", "builtins eval", "builtins getattr", "numpy load"]
GLOBALS += ["torch load", "torch._utils _rebuild_tensor", "collections namedtuple", "torch Storage"]
GLOBALS += ["collections OrderedDict.__class__", "torch FloatStorage.__init__", " ", "__main__ x"]


@pytest.mark.parametrize("name", GLOBALS)
def test_every_other_name_is_refused(file: Path, name: str) -> None:
    for value in (Raw(b"c" + name.replace(" ", "\n").encode() + b"\n"), called(name, "x")):
        write_zip(file, pickled({"x": value}), {})
        with pytest.raises(UserError, match="is refused: its pickle asks for") as caught:
            read_torch(file)
        assert repr(name.replace(" ", ".")) in str(caught.value)


def test_a_name_of_any_length_makes_one_short_line(file: Path) -> None:
    write_zip(file, pickled(called("os \x1b[31m\r" + "y" * 10**5)), {})
    with pytest.raises(UserError, match="is refused") as caught:
        read_torch(file)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


USED = {0x80, *b"(.NKMJG}])tXaesuqrhjcRbQ", 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A}


@pytest.mark.parametrize("code", sorted(set(range(256)) - USED))
def test_instructions_that_torch_does_not_write_are_refused(file: Path, code: int) -> None:
    start = Raw(b"(" + instructions(("os", "system")))
    write_zip(file, pickled(Raw(start + bytes([code]) + b"\x01os\nsystem\n")), {})
    with pytest.raises(UserError, match="is refused: its pickle uses the instruction"):
        read_torch(file)


ORDERED = Raw(b"ccollections\nOrderedDict\n")
REBUILD = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
STORAGE = storage_reference("0", "Float", 12)
EMPTY = called("collections OrderedDict")


def rebuilt(*arguments: Any) -> Raw:
    return called(REBUILD, *arguments, False, EMPTY)


NONSENSE: dict[str, tuple[Raw, str]] = {
    # Calls, and attributes
    "a dict called with items": (called("collections OrderedDict", [("a", 1)]), "unknown way"),
    "a storage type called": (called("torch FloatStorage", 2**40), "unknown way"),
    "a text called": (Raw(instructions("os.system") + instructions(("x",)) + b"R"), "unknown way"),
    "a call without a tuple": (Raw(ORDERED + instructions([]) + b"R"), "unknown way"),
    "attributes of a tensor": (
        Raw(rebuilt(STORAGE, 0, (12,), (1,)) + instructions({"x": 1}) + b"b"),
        "attributes of what is not a dict",
    ),
    "attributes of a name": (Raw(ORDERED + instructions({"x": 1}) + b"b"), "attributes of"),
    "attributes that are a text": (Raw(EMPTY + instructions("x") + b"b"), "attributes of"),
    # Storages
    "no such storage": (storage_reference("1", "Float", 12), "no storage '1'"),
    "a storage outside of its folder": (storage_reference("../data.pkl", "Byte", 1), "no storage"),
    "more numbers than stored": (storage_reference("0", "Float", 13), "no storage '0' of 13"),
    "fewer numbers than stored": (storage_reference("0", "Float", 11), "no storage '0' of 11"),
    "another type than stored": (storage_reference("0", "Double", 12), "no storage '0' of 12"),
    "a negative count": (storage_reference("0", "Float", -12), "refers to something else"),
    "a vast count": (storage_reference("0", "Float", 2**64), "refers to something else"),
    "a count that is a truth value": (storage_reference("0", "Float", True), "something else"),
    "a view of a storage": (storage_reference("0", "Float", 12, ("1", 0, 3)), "something else"),
    "a key that is a number": (storage_reference(0, "Float", 12), "refers to something else"),
    "a module": (Raw(instructions(("module", ORDERED, "a.py", "")) + b"Q"), "something else"),
    "a reference that is a text": (Raw(instructions("storage") + b"Q"), "something else"),
    "a dict as a storage": (
        Raw(instructions(("storage", ORDERED, "0", "cpu", 12)) + b"Q"),
        "something else",
    ),
    # Tensors
    "beyond its storage": (rebuilt(STORAGE, 0, (13,), (1,)), "reaches beyond its storage"),
    "beyond it by its start": (rebuilt(STORAGE, 1, (12,), (1,)), "reaches beyond its storage"),
    "beyond it by its strides": (rebuilt(STORAGE, 0, (2, 3), (12, 1)), "reaches beyond"),
    "beyond it by far": (rebuilt(STORAGE, 0, (2**62, 2**62), (2**62, 1)), "reaches beyond"),
    "beyond it and empty": (rebuilt(STORAGE, 13, (0,), (1,)), "reaches beyond"),
    "a negative start": (rebuilt(STORAGE, -1, (2,), (1,)), "a tensor that makes no sense"),
    "a negative stride": (rebuilt(STORAGE, 11, (12,), (-1,)), "a tensor that makes no sense"),
    "a negative size": (rebuilt(STORAGE, 0, (-1,), (1,)), "a tensor that makes no sense"),
    "fewer strides than sizes": (rebuilt(STORAGE, 0, (3, 4), (1,)), "makes no sense"),
    "sizes that are floats": (rebuilt(STORAGE, 0, (3.0,), (1,)), "makes no sense"),
    "many dimensions": (rebuilt(STORAGE, 0, (1,) * 9, (1,) * 9), "makes no sense"),
    "no storage": (rebuilt("0", 0, (3,), (1,)), "a tensor that makes no sense"),
    "too few arguments": (called(REBUILD, STORAGE, 0), "a tensor that makes no sense"),
    "a parameter of no tensor": (called(PARAMETER, {}, True, EMPTY), "a parameter that makes no"),
    "a parameter of nothing": (called(PARAMETER), "a parameter that makes no sense"),
    "a parameter called with a text": (
        Raw(b"c" + PARAMETER.replace(" ", "\n").encode() + b"\n" + instructions("abc") + b"R"),
        "a parameter that makes no sense",
    ),
    # The machine
    "a dict with half an item": (Raw(b"}(" + instructions("a") + b"u"), "not a dict"),
    "items of a list": (Raw(b"](" + instructions("a") * 2 + b"u"), "not a dict"),
    "an item of a tuple": (Raw(b")" + instructions("a") * 2 + b"s"), "not a dict"),
    "a list appended to a dict": (Raw(b"}NNa"), "not a list"),
    "an unknown memo": (Raw(b"h\x07"), "takes what is not there"),
    "an empty stack": (Raw(b"0"[:0]), "takes what is not there"),
    "a mark that is not there": (Raw(b"t"), "takes what is not there"),
    "a tuple of too few": (Raw(b"N\x87"), "takes what is not there"),
    "a text that is cut": (Raw(b"X\xff\xff\xff\x7fab"), "cut short"),
    "a text that is not UTF-8": (Raw(b"X\x01\x00\x00\x00\xff"), "can't decode byte"),
    "a name without an end": (Raw(b"cos"), "name without an end"),
    "another protocol": (Raw(b"\x80\x04N"), "protocol 4"),
    "a key that is a tuple": (Raw(b"})Ns"), "keys are not texts"),
    "a key that is a float": (Raw(b"}" + instructions(1.0) + b"Ns"), "keys are not texts"),
    "a key that is a large number": (Raw(b"}" + instructions(2**61) + b"Ns"), "keys are not"),
    "a key that is a dict": (Raw(b"}}Ns"), "keys are not texts"),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_what_makes_no_sense_is_one_line(file: Path, nonsense: str) -> None:
    value, message = NONSENSE[nonsense]
    write_zip(file, pickled(value), {"0": TWELVE.tobytes()})
    with pytest.raises(UserError, match=message) as caught:
        read_torch(file)
    assert str(file) in str(caught.value) and str(caught.value).isprintable()


def test_what_is_not_a_model_is_named(file: Path) -> None:
    for saved in ([1], {}, "text", 7, None):
        save(file, saved)
        with pytest.raises(UserError, match=r"does not hold a dict of tensors"):
            read_state_dict(file)
    for saved in ({"x": TWELVE, "epoch": 3}, {"state_dict": {"x": TWELVE}}):
        save(file, saved)
        with pytest.raises(UserError, match=r"holds '(epoch|state_dict)', .*: save its state_dict"):
            read_state_dict(file)
    save(file, {"x": TWELVE, 3: TWELVE})
    with pytest.raises(UserError, match="holds 3, which is not a tensor"):
        read_state_dict(file)
    save(file, {"x" * 10**6: 3})
    with pytest.raises(UserError, match=r"holds 'xxx.*, which is not a tensor") as caught:
        read_state_dict(file)
    assert len(str(caught.value)) < 300 + len(str(file))


# ---------------------------------------------------------------------------------------------
# Bombs


def test_data_that_doubles_with_every_line_takes_no_more_memory_than_its_pickle(file: Path) -> None:
    for open_, close in ((b"(", b"t"), (b"](", b"e")):
        program = b"]q\x00" + b"".join(
            open_ + bytes([ord("h"), i]) * 2 + close + bytes([ord("q"), i + 1]) for i in range(200)
        )
        program = b"(" + program + b"t"
        write_zip(file, pickled(Raw(program)), {})
        tracemalloc.start()
        read_torch(file)
        with pytest.raises(UserError, match="does not hold a dict of tensors"):
            read_state_dict(file)
        write_zip(file, pickled({"x": Raw(program)}), {})
        with pytest.raises(UserError, match="holds 'x', which is not a tensor"):
            read_state_dict(file)
        write_zip(
            file,
            pickled({"model_args": {"n_layer": Raw(program)}, "model": {"x": whole("0", TWELVE)}}),
            {"0": TWELVE.tobytes()},
        )
        with pytest.raises(UserError, match="no whole number n_layer"):
            open_weights(file)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10**6


def test_what_contains_itself_is_read(file: Path) -> None:
    write_zip(file, pickled(Raw(b"]q\x00h\x00a")), {})
    got = read_torch(file)
    assert got[0] is got


def test_any_number_of_levels_is_no_danger(file: Path) -> None:
    for level in (b"]" * 10**5 + b"a" * (10**5 - 1), b")" + b"\x85" * 10**5):
        write_zip(file, pickled(Raw(level)), {})
        with pytest.raises(UserError, match="does not hold a dict of tensors"):
            read_state_dict(file)


def test_a_pickle_of_any_size_fills_a_limited_memory(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zip(file, pickled(Raw(b"N" * PICKLE_BYTES)), {})
    with pytest.raises(UserError, match="bytes, which no model needs"):
        read_torch(file)
    limit = 50_000
    monkeypatch.setattr(torch_file, "PICKLE_BYTES", limit)
    file.write_bytes(LEGACY_START + b"\x80\x02" + b"N" * limit + b".")
    with pytest.raises(UserError, match="longer than any model needs"):
        read_torch(file)
    remembered = instructions(("storage", Raw(b"ctorch\nFloatStorage\n"), "0", "cpu", 12))
    for start, instruction in (
        *((b"", code) for code in (b"}", b"]", b"N\x85", b"]q\x00", b"G" + bytes(8))),
        (remembered + b"q\x00", b"h\x00Q"),
    ):
        count = (limit - len(start) - 10) // len(instruction)
        write_zip(file, b"\x80\x02" + start + instruction * count + b".", {"0": bytes(48)})
        tracemalloc.start()
        read_torch(file)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 120 * limit, (instruction, peak)


def test_a_zip_directory_of_any_size_fills_a_limited_memory(file: Path) -> None:
    count = PICKLE_BYTES // 46 + 1  # an entry has 46 bytes, and its name
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *[0] * 16)
    write_zip(file, pickled({}), {})
    whole = file.read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    start = whole.index(b"PK\x01\x02")
    directory = whole[start:end] + entry * count
    sizes = (0, 0, 0xFFFF, 0xFFFF, len(directory), start, 0)
    file.write_bytes(whole[:start] + directory + struct.pack("<4s4H2LH", b"PK\x05\x06", *sizes))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a part of it has 2,\d+,\d+ bytes, which no"):
        read_torch(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * PICKLE_BYTES


def test_a_small_file_does_not_describe_a_large_model(file: Path) -> None:
    table = np.zeros((61, 16), "f4")
    saved = {"transformer.wte.weight": whole("0", table)}
    saved |= {f"transformer.h.{i}.x": whole("0", table) for i in range(1000)}
    save(file, saved)
    with pytest.raises(UserError, match="its tensors overlap"):
        open_weights(file)


# ---------------------------------------------------------------------------------------------
# Damage


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The committed file as Python's zipfile writes it, perhaps compressed."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), compress_type=compression)
    return content.getvalue()


def test_a_zip_archive_that_was_packed_again_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    (tmp_path / "config.json").write_bytes((DATA / "config.json").read_bytes())
    path.write_bytes(rewritten(DATA / path.name))
    assert_same(build(open_weights(path)))
    path.write_bytes(rewritten(DATA / path.name, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="is compressed or encrypted"):
        open_weights(path)


def test_archives_that_torch_did_not_write(file: Path) -> None:
    for name in ("data.pkl", "a/b/data.pkl", "archive/data.txt"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, pickled({}))
        with pytest.raises(UserError, match=r"zip archive, but not one that torch\.save wrote"):
            read_torch(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickled({}))
        archive.writestr("b/data.pkl", pickled({}))
    with pytest.raises(UserError, match=r"zip archive, but not one that torch\.save wrote"):
        read_torch(file)
    with zipfile.ZipFile(file, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data.pkl", pickled({}))
        archive.writestr("a/data.pkl", pickled([]))
    with pytest.raises(UserError, match=r"contradicts itself about 'a/data\.pkl'"):
        read_torch(file)


def test_an_archive_that_points_beyond_the_file_is_damaged(file: Path) -> None:
    write_zip(file, pickled({"x": whole("0", np.zeros(10**6, "f4"))}), {"0": bytes(40)})
    content = bytearray(file.read_bytes())
    last = content.rindex(b"PK\x01\x02")  # the directory's entry of data/0; its two sizes:
    content[last + 20 : last + 28] = (4 * 10**6).to_bytes(4, "little") * 2
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"'archive/data/0' does not lie inside of it"):
        read_torch(file)


OLD_STORAGE = Raw(storage_reference("a", "Float", 12, None))
OLD = {
    "version": 1001,
    "facts": {"little_endian": True},
    "saved": {"x": called(REBUILD, OLD_STORAGE, 0, (12,), (1,), False, EMPTY)},
    "keys": ["a"],
}
NUMBERS = (12).to_bytes(8, "little") + TWELVE.tobytes()


def old_file(path: Path, numbers: bytes = NUMBERS, **changes: Any) -> None:
    pickles = b"".join(pickled(value) for value in (OLD | changes).values())
    path.write_bytes(LEGACY_START + pickles + numbers)


def test_an_old_file_written_by_hand(file: Path) -> None:
    old_file(file)
    np.testing.assert_array_equal(numbers(file, read_torch(file)["x"]), TWELVE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1000}, "has a version of PyTorch's format that is unknown here"),
        ({"facts": None}, "has a version of PyTorch's format that is unknown here"),
        ({"facts": {}}, "big-endian"),
        ({"keys": []}, "lacks the storage 'a'"),
        ({"keys": ["a", "b"], "numbers": NUMBERS * 2}, "the storage 'b' in two ways"),
        ({"keys": {"a": 1}}, "has no list of its storages"),
        ({"keys": [1]}, "has no list of its storages"),
        ({"numbers": b""}, "cut short"),
        ({"numbers": NUMBERS[:-1]}, "bytes where its storages take"),
        ({"numbers": b"\x0d" + NUMBERS[1:] + bytes(4)}, "the storage 'a' in two ways"),
        ({"numbers": b"\xff" * 8 + TWELVE.tobytes()}, "the storage 'a' in two ways"),
        (
            {"saved": {"x": OLD_STORAGE, "y": storage_reference("a", "Int", 12, None)}},
            "the storage 'a' in two ways",
        ),
        ({"saved": storage_reference("a", "Float", 12, ("b", 0, 3))}, "something else"),
    ],
)
def test_what_is_wrong_with_an_old_file(file: Path, changes: dict[str, Any], message: str) -> None:
    old_file(file, **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_torch(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_big_endian_numbers_are_refused(file: Path) -> None:
    write_zip(file, pickled({}), {}, byteorder=b"big")
    with pytest.raises(UserError, match="byte order b'big', not little"):
        read_torch(file)
    old = (DATA / "old" / "pytorch_model.bin").read_bytes()
    file.write_bytes(old.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    with pytest.raises(UserError, match="big-endian"):
        read_torch(file)


@pytest.mark.parametrize("content", [b"", b"x", b"version https://git-lfs.github.com/spec/v1\n"])
def test_other_files_are_named(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"is not a file that torch\.save wrote"):
        read_torch(file)
    file.unlink()
    with pytest.raises(UserError, match="cannot read"):
        read_torch(file)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short_is_damaged(file: Path, name: str) -> None:
    whole = (DATA / name).read_bytes()
    for end in (len(whole) - 1, len(whole) - 30, len(whole) // 2, 1500, 100, 15):
        file.write_bytes(whole[:end])
        with pytest.raises(UserError, match="is damaged"):
            read_torch(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_fuzz(tmp_path: Path, name: str) -> None:
    """Damage anywhere but in the numbers is one clear line, or changes nothing that is read."""
    whole = (DATA / name).read_bytes()
    path = tmp_path / Path(name).name
    (tmp_path / "config.json").write_bytes((DATA / "config.json").read_bytes())
    rng = random.Random(0)
    places = structure(whole)
    errors = 0
    for _ in range(500):
        at, n = rng.choice(places), rng.randint(1, 4)
        path.write_bytes(whole[:at] + rng.randbytes(n) + whole[at + n :])
        try:
            weights = open_weights(path)
            build(weights)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            errors += 1
            continue
        for tensor in weights.tensors.values():
            assert tensor.offset > 0 and tensor.offset + tensor.nbytes <= len(whole)
    assert 150 < errors < 500


def structure(content: bytes) -> list[int]:
    """The places of the bytes that are not numbers of a tensor, or nearly."""
    if not content.startswith(b"PK"):
        return list(range(5500))
    directory = content.rindex(b"PK\x01\x02", 0, content.index(b"PK\x01\x02") + 4)
    pickle_end = content.index(b"PK\x03\x04", 4)
    return [*range(pickle_end), *range(directory, len(content))]
