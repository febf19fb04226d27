"""TensorFlow checkpoints: files TensorFlow wrote, forged and damaged ones, and the CRC itself.

tests/data/tf_checkpoint was written by tests/reference/make_tf_checkpoint.py.
"""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from micrograd_gpt.support.errors import UserError
from micrograd_gpt.weights import reading
from micrograd_gpt.weights.crc32c import LANES, POLYNOMIAL, crc32c, mask
from micrograd_gpt.weights.tf_checkpoint import TABLE_MAGIC, TFCheckpoint

DATA = Path(__file__).parents[1] / "data" / "tf_checkpoint"


# ---------------------------------------------------------------------------------------------
# CRC-32C


def crc32c_by_definition(data: bytes) -> int:
    """Bit by bit."""
    state = 0xFFFFFFFF
    for byte in data:
        for i in range(8):
            state ^= byte >> i & 1
            state = (state >> 1) ^ (POLYNOMIAL if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, appendix B.4, and the customary check value
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc_of_the_published_vectors(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc32c_by_definition(data) == crc


ROW = 4 * LANES  # bytes


@pytest.mark.parametrize(
    "length", [1, 2, 3, 4, 5, 7, 8, 1000, ROW - 4, ROW, ROW + 1, ROW + 4, 2 * ROW + 7]
)
def test_crc_is_the_definition_s_at_every_kind_of_length(length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert crc32c(data) == crc32c_by_definition(data)


@given(st.binary(max_size=300), st.data())
def test_crc_goes_on_where_it_stopped(data: bytes, draw: st.DataObject) -> None:
    cut = draw.draw(st.integers(0, len(data)))
    assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data) == crc32c_by_definition(data)


def test_crc_of_arrays_is_that_of_their_bytes() -> None:
    array = np.random.default_rng(0).standard_normal((3 * LANES + 5, 2)).astype("f4")
    assert crc32c(array) == crc32c(array.tobytes())
    assert crc32c(array[::2]) == crc32c(array[::2].tobytes())
    assert crc32c(array[:0]) == 0


def test_every_flipped_bit_changes_the_crc() -> None:
    data = bytearray(random.Random(0).randbytes(100))
    crcs = set()
    for bit in range(800):
        data[bit // 8] ^= 1 << bit % 8
        crcs.add(crc32c(bytes(data)))
        data[bit // 8] ^= 1 << bit % 8
    assert len(crcs) == 800 and crc32c(bytes(data)) not in crcs


# ---------------------------------------------------------------------------------------------
# What TensorFlow wrote


def read(checkpoint: TFCheckpoint, name: str, dtype: str = "float32") -> np.ndarray:
    out = np.full(checkpoint.shapes[name], np.nan, dtype)
    checkpoint.read_into(name, out)
    return out


@pytest.mark.parametrize("kind", ["saver", "sharded"])
def test_tensorflow_s_numbers_bit_for_bit(kind: str) -> None:
    expected = safetensors.numpy.load_file(DATA / "expected.safetensors")
    checkpoint = TFCheckpoint(DATA / kind)
    checkpoint.verify()
    assert checkpoint.shapes == {name: array.shape for name, array in expected.items()}
    assert len({v.path for v in checkpoint.variables.values()}) == {"saver": 1, "sharded": 2}[kind]
    for name, array in expected.items():
        assert read(checkpoint, name).tobytes() == array.tobytes()
        np.testing.assert_array_equal(read(checkpoint, name, "float64"), array)
        np.testing.assert_array_equal(read(checkpoint, name, "float16"), array.astype("f2"))


def test_tensors_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK", 100)
    test_tensorflow_s_numbers_bit_for_bit("saver")


def test_names_are_gpt2_s() -> None:
    names = TFCheckpoint(DATA / "saver").gpt2_names()
    assert len(names) == 28
    for ours, theirs in {
        "transformer.wte.weight": "model/wte",
        "transformer.wpe.weight": "model/wpe",
        "transformer.ln_f.weight": "model/ln_f/g",
        "transformer.ln_f.bias": "model/ln_f/b",
        "transformer.h.1.attn.c_attn.weight": "model/h1/attn/c_attn/w",
        "transformer.h.0.mlp.c_proj.bias": "model/h0/mlp/c_proj/b",
        "transformer.h.0.ln_2.weight": "model/h0/ln_2/g",
    }.items():
        assert names[ours] == theirs


@pytest.mark.parametrize(
    ("extra", "ours", "theirs"),
    [
        ("model/wte/w", "transformer.wte.weight", "model/wte"),
        ("model/h.0/ln_1/g", "transformer.h.0.ln_1.weight", "model/h0/ln_1/g"),
    ],
)
def test_two_variables_of_one_name_are_refused(extra: str, ours: str, theirs: str) -> None:
    checkpoint = TFCheckpoint(DATA / "saver")
    checkpoint.variables[extra] = checkpoint.variables[theirs]
    with pytest.raises(UserError, match=f"holds both '{theirs}' and '{extra}'"):
        checkpoint.gpt2_names()


@pytest.mark.parametrize("name", ["transformer.wpe.weight", "model", "other/wte", ""])
def test_a_variable_outside_of_model_is_no_parameter(name: str) -> None:
    checkpoint = TFCheckpoint(DATA / "saver")
    before = checkpoint.gpt2_names()
    checkpoint.variables[name] = checkpoint.variables["model/wpe"]
    (added,) = checkpoint.gpt2_names().items() - before.items()
    assert added == (f"{name} (outside of model/)", name)


# ---------------------------------------------------------------------------------------------
# Damage to it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "saver", tmp_path / "model"))


def outcome(folder: Path) -> dict[str, bytes] | str:
    """All tensors' bytes, or the error."""
    try:
        checkpoint = TFCheckpoint(folder)
        return {name: read(checkpoint, name).tobytes() for name in checkpoint.shapes}
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


def test_the_index_cut_at_any_byte_is_found(folder: Path) -> None:
    path = folder / "model.ckpt.index"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.ckpt\.index is damaged"):
            TFCheckpoint(folder)


def test_the_data_cut_at_any_byte_is_found(folder: Path) -> None:
    path = folder / "model.ckpt.data-00000-of-00001"
    size = path.stat().st_size
    for length in [*range(size - 1, size - 200, -1), *range(size - 200, -1, -997), 0]:
        with open(path, "r+b") as file:
            file.truncate(length)
        with pytest.raises(UserError, match=r"model\.ckpt\.data.* has [\d,]+ bytes, but 'model/"):
            TFCheckpoint(folder)


def test_a_flipped_bit_in_the_index_is_found_or_harmless(folder: Path) -> None:
    path = folder / "model.ckpt.index"
    whole = path.read_bytes()
    expected = outcome(folder)
    harmless = 0
    for at in range(len(whole)):
        bit = random.Random(at).randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        got = outcome(folder)
        assert isinstance(got, str) or got == expected
        harmless += got == expected
    # The meta-index block and the footer's place of it and padding, which nothing reads.
    assert 0 < harmless < 60


def test_a_flipped_bit_in_a_tensor_is_found_and_the_tensor_named(folder: Path) -> None:
    path = folder / "model.ckpt.data-00000-of-00001"
    whole = bytearray(path.read_bytes())
    variables = TFCheckpoint(folder).variables
    for at in random.Random(0).sample(range(len(whole)), 150):
        whole[at] ^= 1 << at % 8
        path.write_bytes(whole)
        whole[at] ^= 1 << at % 8
        (name,) = [n for n, v in variables.items() if v.offset <= at < v.offset + v.nbytes]
        with pytest.raises(
            UserError, match=f"the checksum of {name!r} is wrong; remove {folder} and"
        ):
            TFCheckpoint(folder).verify()
        with pytest.raises(
            UserError, match=f"the checksum of {name!r} is wrong; remove {folder} and"
        ):
            read(TFCheckpoint(folder), name, "float64")


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(UserError, match=r"model\.ckpt\.data-00000-of-00001 is missing"):
        TFCheckpoint(folder)
    (folder / "model.ckpt.index").unlink()
    with pytest.raises(UserError, match=r"cannot read .*model\.ckpt\.index"):
        TFCheckpoint(folder)
    (folder / "checkpoint").unlink()
    with pytest.raises(UserError, match="holds 0 TensorFlow checkpoints"):
        TFCheckpoint(folder)


@pytest.mark.parametrize(
    "text",
    [
        'model_checkpoint_path: "/elsewhere/run1/model.ckpt"\n',
        'all_model_checkpoint_paths: "older"\nmodel_checkpoint_path: "C:\\\\runs\\\\model.ckpt"\n',
    ],
)
def test_a_path_of_another_machine_means_the_file_here(folder: Path, text: str) -> None:
    (folder / "checkpoint").write_text(text)
    assert TFCheckpoint(folder).index == folder / "model.ckpt.index"


def test_which_checkpoint_is_never_guessed(folder: Path) -> None:
    shutil.copy(folder / "model.ckpt.index", folder / "model-2.index")
    assert TFCheckpoint(folder).index.name == "model.ckpt.index"
    for content in (
        b"\xff\x00",
        b'model_checkpoint_path: "a\0b"',
        b'model_checkpoint_path: "a\rb"',
    ):
        (folder / "checkpoint").write_bytes(content)
        with pytest.raises(UserError, match="does not name a checkpoint"):
            TFCheckpoint(folder)
    (folder / "checkpoint").unlink()
    with pytest.raises(UserError, match="holds 2 TensorFlow checkpoints"):
        TFCheckpoint(folder)


# ---------------------------------------------------------------------------------------------
# Forged indexes: what a valid table may say that OpenAI's do not


def varint(n: int) -> bytes:
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def entry(shape: list[int], array: np.ndarray, offset: int, dtype: int = 1, **more: int) -> bytes:
    dims = b"".join(field(2, field(1, size)) for size in shape)
    return (
        (field(1, dtype) + field(2, dims) + field(3, more.get("shard", 0)))
        + (field(4, offset) + field(5, more.get("size", array.nbytes)))
        + (varint(6 << 3 | 5) + struct.pack("<I", mask(crc32c(array))))
    )


def table(entries: list[tuple[bytes, bytes]], per_block: int = 3, compression: int = 0) -> bytes:
    """A LevelDB table, with prefix-compressed keys in blocks of `per_block` entries."""
    out = b""

    def block(entries: list[tuple[bytes, bytes]]) -> bytes:
        nonlocal out
        body, before = b"", b""
        for key, value in entries:
            shared = 0
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
            body += varint(shared) + varint(len(key) - shared) + varint(len(value))
            body += key[shared:] + value
            before = key
        body += struct.pack("<II", 0, 1)  # one restart, at 0
        place = varint(len(out)) + varint(len(body))
        trailer = bytes([compression])
        out += body + trailer + struct.pack("<I", mask(crc32c(body + trailer)))
        return place

    index = []
    for start in range(0, len(entries), per_block):
        part = entries[start : start + per_block]
        index.append((part[-1][0], block(part)))
    places = block([]) + block(index)
    return out + places.ljust(40, b"\0") + struct.pack("<Q", TABLE_MAGIC)


HEADER = field(1, 1)  # one shard; endianness 0, little
ARRAYS = {f"model/h{i}/ln_1/{k}": np.arange(4, dtype="f4") + i for i in range(5) for k in "bg"}


def forge(folder: Path, change: Callable[[list[tuple[bytes, bytes]]], None], **how: int) -> Path:
    """A checkpoint of ARRAYS whose index entries were changed before it was sealed."""
    entries = [(b"", HEADER)]
    data = b""
    for name, array in sorted(ARRAYS.items()):
        entries.append((name.encode(), entry([4], array, len(data))))
        data += array.tobytes()
    change(entries)
    (folder / "model.ckpt.index").write_bytes(table(entries, **how))
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    return folder


@pytest.mark.parametrize("per_block", [1, 2, 3, 100])
def test_tables_of_several_blocks(tmp_path: Path, per_block: int) -> None:
    checkpoint = TFCheckpoint(forge(tmp_path, lambda entries: None, per_block=per_block))
    assert sorted(checkpoint.shapes) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read(checkpoint, name), array)


ONE = ARRAYS["model/h0/ln_1/b"]  # the first: entries[1]
FORGERIES: dict[str, tuple[bytes, str]] = {
    "size against shape": (entry([5], ONE, 0), "cannot have 16 bytes"),
    "negative dimension": (entry([2**64 - 1], ONE, 0), "cannot have"),
    "outside the data": (entry([4], ONE, 148), "has 160 bytes, but 'model/h0/ln_1/b' ends at 164"),
    "far outside": (entry([4], ONE, 2**63), "ends at"),
    "shard that is not there": (entry([4], ONE, 0, shard=1), "shard 1 of 1"),
    "integers": (entry([4], ONE, 0, dtype=3), "dtype 3; only floats"),
    "text": (entry([], ONE, 0, dtype=7), "dtype 7; only floats"),
    "partitioned": (entry([4], ONE, 0) + field(7, b""), "partitioned variable"),
    "cut field": (entry([4], ONE, 0)[:-1], "runs past its message"),
    "field of a kind not in use": (b"\x0b", "unknown kind 3"),
    "number for a message": (field(2, 5) + field(1, 1), "where a message should be"),
    "message for a number": (field(1, b"x"), "is not a number"),
    "endless number": (b"\xff" * 20, "longer than 64 bits"),
    "cut number": (b"\x08\xff", "index out of range"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_entries_are_refused(tmp_path: Path, forgery: str) -> None:
    value, message = FORGERIES[forgery]

    def change(entries: list[tuple[bytes, bytes]]) -> None:
        entries[1] = (entries[1][0], value)

    with pytest.raises(UserError, match=message) as caught:
        TFCheckpoint(forge(tmp_path, change))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_that_points_at_other_bytes_is_found_by_the_checksum(tmp_path: Path) -> None:
    def change(entries: list[tuple[bytes, bytes]]) -> None:
        entries[1] = (entries[1][0], entry([4], ONE, 32))

    checkpoint = TFCheckpoint(forge(tmp_path, change))
    with pytest.raises(UserError, match="the checksum of 'model/h0/ln_1/b' is wrong"):
        checkpoint.verify()


def test_foreign_tables_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compressed with snappy"):
        TFCheckpoint(forge(tmp_path, lambda entries: None, compression=1))
    with pytest.raises(UserError, match="unknown way"):
        TFCheckpoint(forge(tmp_path, lambda entries: None, compression=7))
    with pytest.raises(UserError, match="big-endian"):
        TFCheckpoint(forge(tmp_path, lambda e: e.__setitem__(0, (b"", HEADER + field(2, 1)))))
    with pytest.raises(UserError, match="no header"):
        TFCheckpoint(forge(tmp_path, lambda e: e.pop(0)))
    with pytest.raises(UserError, match="damaged"):
        TFCheckpoint(forge(tmp_path, lambda e: e.__setitem__(1, (b"\xff", e[1][1]))))


@pytest.mark.parametrize("entry_head", [(1, 0, 0), (0, 200, 0), (0, 0, 200), (0, 1, 2**40)])
def test_entries_that_run_past_their_block(tmp_path: Path, entry_head: tuple[int, ...]) -> None:
    block = b"".join(map(varint, entry_head)) + b"xyz" + struct.pack("<II", 0, 1)
    sealed = block + b"\0" + struct.pack("<I", mask(crc32c(block + b"\0")))
    footer = (varint(0) * 2 + varint(0) + varint(len(block))).ljust(40, b"\0")
    path = tmp_path / "model.ckpt.index"
    path.write_bytes(sealed + footer + struct.pack("<Q", TABLE_MAGIC))
    with pytest.raises(UserError, match="an entry runs past its block"):
        TFCheckpoint(tmp_path)


def test_float64_and_float16_variables(tmp_path: Path) -> None:
    for dtype, number in (("f8", 2), ("f2", 19)):
        array = (np.arange(4) / 8).astype(dtype)
        (tmp_path / "model.ckpt.index").write_bytes(
            table([(b"", HEADER), (b"x", entry([2, 2], array, 0, dtype=number))])
        )
        (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(array.tobytes())
        got = read(TFCheckpoint(tmp_path), "x")
        np.testing.assert_array_equal(got, array.reshape(2, 2).astype("f4"))
