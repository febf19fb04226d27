"""safetensors files: what the library writes, what it reads, and every kind of damage."""

from __future__ import annotations

import errno
import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from faults import fill_disk
from hypothesis import given
from hypothesis import strategies as st

from micrograd_gpt.support import files
from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights import reading, tensor_files
from micrograd_gpt.weights.reading import FLOATS, same_bytes
from micrograd_gpt.weights.tensor_files import TensorFile, write_safetensors

RNG = np.random.default_rng(0)
ALL_DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32"),
    *("uint64", "int64", "float16", "bfloat16", "float32", "float64"),
]


def random_array(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return (RNG.standard_normal(shape) * 5).astype(dtype)


def file_bytes(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# ---------------------------------------------------------------------------------------------
# Whole files


def test_bytes_are_the_library_s(tmp_path: Path) -> None:
    arrays = {f"{d}.{i}": random_array(d, (2, i)) for d in ALL_DTYPES for i in (3, 0, 1)}
    arrays |= {"scalar": np.array(3.0), "ünï": random_array("float32", (5,))}
    write_safetensors(tmp_path / "ours.safetensors", arrays, {"format": "pt"})
    expected = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == expected


def test_round_trip_is_exact(tmp_path: Path) -> None:
    arrays = {d: random_array(d, (7, 3)) for d in ALL_DTYPES}
    arrays["strided"] = random_array("float32", (6, 8))[::2, ::-1]
    arrays["big endian"] = random_array("float32", (4,)).astype(">f4")
    write_safetensors(tmp_path / "x.safetensors", arrays, {"a": "1", "format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"a": "1", "format": "pt"}
    assert file.shapes == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        read = file.read(name)
        assert read.dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("chunk", [16, 1 << 20])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32", "float64"])
def test_floats_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, stored: str, wanted: str
) -> None:
    for module in (reading, tensor_files):  # several chunks, the last one not full
        monkeypatch.setattr(module, "CHUNK", chunk)
    array = random_array("float32", (5, 9))
    write_safetensors(tmp_path / "x.safetensors", {"x": array}, dtype=stored)
    kept = bfloat16_oracle(array) if stored == "bfloat16" else array.astype(stored)
    expected = kept.astype(wanted)
    if wanted == "bfloat16":
        expected = bfloat16_oracle(kept.astype("float32")).astype(wanted)
    for order in ("C", "F"):
        out = np.full((5, 9), np.nan, FLOATS[wanted], order)
        TensorFile(tmp_path / "x.safetensors").read_into("x", out)
        assert out.dtype == wanted
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("chunk", [4, 64, 1 << 20])
@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (3, 0), (7, 5), (4, 3, 5)])
@pytest.mark.parametrize("wanted", ["float32", "float64"])
def test_arrays_of_any_layout_are_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, shape: tuple[int, ...], wanted: str
) -> None:
    monkeypatch.setattr(reading, "CHUNK", chunk)
    array = np.asarray(random_array("float32", shape))
    write_safetensors(tmp_path / "x.safetensors", {"x": array})
    entry = TensorFile(tmp_path / "x.safetensors").entries["x"]
    wide = np.full([2 * n for n in shape], np.nan, wanted)
    outs = [np.full(shape, np.nan, wanted, order) for order in ("C", "F")]
    outs.append(wide[(..., *(slice(None, None, -2) for _ in shape))])
    for out in outs:
        assert entry.read_into(out)
        np.testing.assert_array_equal(out, array)
    assert np.isnan(wide).sum() == wide.size - array.size
    if array.size:
        array.reshape(-1)[-1] = np.inf
        write_safetensors(tmp_path / "x.safetensors", {"x": array})
        assert not any(entry.read_into(out) for out in outs)


def test_only_floats_are_converted_when_writing(tmp_path: Path) -> None:
    arrays = {"f": random_array("float64", (3,)), "i": np.arange(3), "b": np.array([True])}
    write_safetensors(tmp_path / "x.safetensors", arrays, dtype="float16")
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert [str(found[name].dtype) for name in "fib"] == ["float16", "int64", "bool"]


def bfloat16_oracle(numbers: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of finite float32, ties to even, by the definition: compare both."""
    below = (numbers.view("u4") & 0xFFFF0000).astype("u4")  # towards zero
    above = below + np.uint32(0x10000)
    exact = np.abs(numbers.astype("f8"))
    to_below = exact - np.abs(below.view("f4").astype("f8"))
    # Beyond the largest bfloat16 the next step counts as if the exponent went on.
    with np.errstate(over="ignore", invalid="ignore"):
        above_value = np.abs(above.view("f4").astype("f8"))
    above_value = np.where(np.isinf(above_value), 2.0**128, above_value)
    to_above = above_value - exact
    even_is_below = (below >> 16) & 1 == 0
    up = (to_above < to_below) | ((to_above == to_below) & ~even_is_below)
    return np.where(up, above, below).view("f4")


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_bfloat16_rounds_to_nearest_even(bits: list[int]) -> None:
    # Beside the drawn numbers the hard ones: exactly half way, and next to it.
    words = np.array(bits, "u4")
    halves = (words & 0xFFFF0000) | 0x8000
    numbers = np.concatenate([words, halves, halves - 1, halves + 1]).astype("u4").view("f4")
    with np.errstate(over="ignore", invalid="ignore"):
        got = numbers.astype(FLOATS["bfloat16"]).astype("float32")
    finite = np.isfinite(numbers)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(numbers))
    np.testing.assert_array_equal(got[np.isinf(numbers)], numbers[np.isinf(numbers)])
    np.testing.assert_array_equal(got[finite], bfloat16_oracle(numbers[finite]))


def test_same_bytes(tmp_path: Path) -> None:
    x = random_array("float32", (4, 6))
    y = x.copy()
    y[3, 5] = np.nextafter(y[3, 5], np.float32(9))
    arrays = {"x": x, "x again": x, "y": y, "turned": x.reshape(6, 4), "i": x.view("i4")}
    write_safetensors(tmp_path / "x.safetensors", arrays)
    entries = TensorFile(tmp_path / "x.safetensors").entries
    assert [same_bytes(entries["x"], entries[n]) for n in arrays] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_reading_and_writing_need_no_second_copy(tmp_path: Path) -> None:
    array = np.zeros((8 << 10, 1 << 10), np.float32)  # 32 MB
    in_columns = np.asfortranarray(array)
    path = tmp_path / "x.safetensors"
    for dtype in ("float32", "bfloat16"):
        tracemalloc.start()
        write_safetensors(path, {"x": array}, dtype=dtype)
        TensorFile(path).read_into("x", array)
        TensorFile(path).read_into("x", in_columns)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 << 20  # a chunk and what its conversion needs


# ---------------------------------------------------------------------------------------------
# Sharded sets


def write_shards(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    arrays = {name: random_array("float32", (2, 3)) for name in "abcd"}
    files = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "2.safetensors"}
    for shard in ("1.safetensors", "2.safetensors"):
        write_safetensors(folder / shard, {n: arrays[n] for n in files if files[n] == shard})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 96}, "weight_map": files}))
    return index, arrays


def test_a_sharded_set_reads_as_one(tmp_path: Path) -> None:
    index, arrays = write_shards(tmp_path)
    file = TensorFile(index)
    assert file.shapes.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)
    assert not same_bytes(file.entries["a"], file.entries["c"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["weight_map"].update(e="2.safetensors"), "does not hold 'e'"),
        (lambda m: m["weight_map"].pop("c"), "holds 'c', which the index does not list there"),
        (lambda m: m["weight_map"].update(c="3.safetensors", d="3.safetensors"), "cannot read"),
        *(
            (
                lambda m, shard=shard: m["weight_map"].update(a=shard, b=shard),
                "not a file beside the index",
            )
            for shard in ("../1.safetensors", "", ".", "..", "/", "a\0", "a\nb", "\ud800")
        ),
        (lambda m: m["weight_map"].update({"e\nf": "2.safetensors"}), r"does not hold 'e\\nf'"),
        (lambda m: m.pop("weight_map"), "is not the index"),
        (lambda m: m.update(weight_map=[1]), "is not the index"),
    ],
)
def test_a_wrong_index_is_named(tmp_path: Path, change: Any, named: str) -> None:
    index, _ = write_shards(tmp_path)
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=named) as caught:
        TensorFile(index)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_an_index_that_is_no_json_is_named(tmp_path: Path, text: bytes) -> None:
    index, _ = write_shards(tmp_path)
    index.write_bytes(text)
    with pytest.raises(UserError, match=r"index\.json is not the index"):
        TensorFile(index)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
def test_a_name_no_file_can_have_is_one_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot read"):
        reading.open_unbuffered(tmp_path / name)


# ---------------------------------------------------------------------------------------------
# Damage

DAMAGES = {
    "empty file": b"",
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header beyond all memory": struct.pack("<Q", 2**63) + b"{}",
    "header that is no JSON": file_bytes(b"{nonsense", b""),
    "header that is a list": file_bytes([], b""),
    "header nested deeply": file_bytes(b"[" * 50_000, b""),
    "web page": b"<!DOCTYPE html><html>" * 10,
    "offsets outside": file_bytes({"x": tensor([2], 0, 8)}, b"1234"),
    "offsets reversed": file_bytes({"x": tensor([1], 4, 0)}, b"1234"),
    "negative offsets": file_bytes({"x": tensor([1], -4, 0)}, b"1234"),
    "bytes beyond the last tensor": file_bytes({"x": tensor([1], 0, 4)}, b"12345678"),
    "hole": file_bytes({"x": tensor([1], 0, 4), "y": tensor([1], 8, 12)}, b"x" * 12),
    "overlap": file_bytes({"x": tensor([2], 0, 8), "y": tensor([2], 4, 12)}, b"x" * 12),
    "same bytes twice": file_bytes({"x": tensor([1], 0, 4), "y": tensor([1], 0, 4)}, b"x" * 4),
    "shape larger than the bytes": file_bytes({"x": tensor([3], 0, 8)}, b"x" * 8),
    "shape beyond 64 bits": file_bytes({"x": tensor([2**40, 2**40], 0, 8)}, b"x" * 8),
    "unknown dtype": file_bytes({"x": tensor([1], 0, 4, "F31")}, b"x" * 4),
    "dtype not supported": file_bytes({"x": tensor([4], 0, 4, "F8_E4M3")}, b"x" * 4),
    "a name twice": file_bytes(
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(DAMAGES[damage])
    with pytest.raises(UserError, match=r"x\.safetensors") as caught:
        TensorFile(path)
    assert "\n" not in str(caught.value)


def test_truncation_at_any_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": np.arange(6.0), "y": np.arange(3)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.safetensors"):
            TensorFile(path)


def test_a_file_cut_after_it_was_opened_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": np.arange(6.0)})
    file = TensorFile(path)
    os.truncate(path, path.stat().st_size - 1)
    for dtype in ("float64", "float32"):
        with pytest.raises(UserError, match="ended early"):
            file.read_into("x", np.empty(6, dtype))


def test_missing_file_folder_and_forbidden_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none.*No such file"):
        TensorFile(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        TensorFile(tmp_path)

    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # Not by chmod: an administrator may read everything.
    monkeypatch.setattr(reading, "open", forbidden, raising=False)
    with pytest.raises(UserError, match="Permission denied"):
        TensorFile(tmp_path / "x.safetensors")


def test_integers_do_not_pass_for_floats(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"x": np.arange(3, dtype="i4")})
    file = TensorFile(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"'x' holds int32, where float32 is needed"):
        file.read_into("x", np.empty(3, np.float32))
    with pytest.raises(UserError, match="where int64 is needed"):
        file.read_into("x", np.empty(3, np.int64))


def test_a_wrong_target_is_the_caller_s_mistake(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"x": np.zeros((2, 3))})
    file = TensorFile(tmp_path / "x.safetensors")
    for out in (np.empty((3, 2)), np.empty(6)):
        with pytest.raises(ValueError, match=r"shape \(2, 3\)") as caught:
            file.read_into("x", out)
        assert not isinstance(caught.value, UserError)


# ---------------------------------------------------------------------------------------------
# Writing that fails


@pytest.mark.parametrize("room", [0, 100, 1000])
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_full_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, before: bytes | None
) -> None:
    path = tmp_path / "x.safetensors"
    if before is not None:
        path.write_bytes(before)
    fill_disk(monkeypatch, files, room)
    with pytest.raises(UserError, match=r"cannot write .*x\.safetensors: No space left"):
        write_safetensors(path, {"x": np.zeros(500), "y": np.zeros(3)})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == (
        {} if before is None else {path.name: before}
    )


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    big = {"small": np.ones(3, "f4"), "w": np.array([1, 70_000, np.inf], "f4")}
    with pytest.raises(UserError, match="w holds numbers too large for float16"):
        write_safetensors(path, big, dtype="float16")
    with pytest.raises(UserError, match="too large for float32"):
        write_safetensors(path, {"w": np.array([1e300])}, dtype="float32")
    with pytest.raises(UserError, match="too large for bfloat16"):
        write_safetensors(path, {"w": np.array([3.4e38], "f4")}, dtype="bfloat16")
    with pytest.raises(UserError, match="choose one of"):
        write_safetensors(path, big, dtype="float8")
    with pytest.raises(UserError, match="complex"):
        write_safetensors(path, {"w": np.zeros(3, "complex64")})
    assert list(tmp_path.iterdir()) == []
    write_safetensors(path, big, dtype="bfloat16")  # infinity itself may be stored
    assert np.isinf(TensorFile(path).read("w")[2])
