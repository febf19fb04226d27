"""What kernels may be given: arrays that are what they seem to be, and whose sizes fit together.

A kernel in C or CUDA reads and writes wherever it is told to, and one in NumPy cuts arrays into
parts by the size of another. So all that a kernel is given is checked here first. NotForMe leaves
what does not fit to the definition, which raises NumPy's error or computes what NumPy would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from micrograd_gpt import functional, layers
from micrograd_gpt.arrays.devices import Array
from micrograd_gpt.arrays.int8 import Int8Matrix, groups
from micrograd_gpt.arrays.precision import is_half
from micrograd_gpt.arrays.stand_ins import NotForMe
from micrograd_gpt.kernels import linear_cross_entropy
from micrograd_gpt.layers import IGNORE

F = TypeVar("F", bound=Callable[..., Any])

FLOAT32, FLOAT64, INT8 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int8)
# NumPy's own arrays; of any other kind (masked ones, matrices) the operators may mean other things
PLAIN = (np.ndarray, np.memmap)

# The arrays that a definition takes, in the letters of its docstring: those with one letter have
# one size, "3C" is three times C, and "*" a whole shape. Labels hold integers, all others floats.
# There may be no bias.
SHAPES = {
    functional.linear_forward: "x N K, weight K M, bias M",
    functional.linear_backward: "grad N M, x N K, weight K M",
    functional.layer_norm_forward: "x N C, weight C, bias C",
    functional.layer_norm_backward: "grad N C, x N C, weight C, mean N 1, rstd N 1",
    functional.gelu_forward: "x *",
    functional.gelu_backward: "grad *, x *",
    functional.attention_forward: "q B H T D, k B H S D, v B H S D",
    functional.attention_backward: (
        "grad B H T D, q B H T D, k B H T D, v B H T D, out B H T D, log_total B H T"
    ),
    functional.cross_entropy_forward: "logits N V, labels N",
    layers.dropout_forward: "x *",
    linear_cross_entropy.linear_cross_entropy_forward: "x N C, weight V C, labels N",
}
OF_LAYERS = ("weight", "bias")
ROW_OF_ADAMW = "p *, grad *, m *, v *"
BLOCK = (
    "ln_1_weight C, ln_1_bias C, c_attn_weight C 3C, c_attn_bias 3C, c_proj_weight C C, "
    "c_proj_bias C, ln_2_weight C, ln_2_bias C, c_fc_weight C 4C, c_fc_bias 4C, "
    "c_proj_weight 4C C, c_proj_bias C"
)


@functools.lru_cache(maxsize=4096)  # a run meets the same shapes again and again
def fit(line: str, shapes: tuple[tuple[int, ...] | None, ...]) -> bool:
    """Whether arrays of these shapes have elements, and sizes that fit as the line says."""
    sizes: dict[str, Any] = {"1": 1}
    for array, shape in zip(line.split(", "), shapes, strict=False):
        name, *letters = array.split()
        if shape is None and name == "bias":
            continue
        if shape is None or 0 in shape:
            return False
        if letters == ["*"]:
            if sizes.setdefault("*", shape) != shape:
                return False
            continue
        if len(shape) != len(letters):
            return False
        for letter, size in zip(letters, shape, strict=True):
            times = int(letter[:-1] or 1)  # 3 for "3C"
            if size != times * sizes.setdefault(letter[-1], size // times):
                return False
    return "S" not in sizes or sizes["S"] >= sizes["T"]  # the last query stands at the last key


def check_fit(line: str, arrays: Sequence[Any]) -> None:
    """Raise NotForMe unless these arrays fit as the line says; None stands for no bias."""
    if not fit(line, tuple([None if array is None else array.shape for array in arrays])):
        raise NotForMe


def check_plain(arrays: Sequence[Any], dtypes: Sequence[Any]) -> None:
    """Raise NotForMe unless these are NumPy's own arrays, aligned, and all of one of the types.

    None is passed over, but not as the first.
    """
    first = arrays[0]
    if type(first) not in PLAIN or first.dtype not in dtypes:
        raise NotForMe
    dtype = first.dtype
    for array in arrays:
        if array is not None and (
            type(array) not in PLAIN or array.dtype != dtype or not array.flags.aligned
        ):
            raise NotForMe


def check_int8(weight: Any) -> tuple[Array, Array]:
    """The integers (K, M) and the scales of a matrix of int8 (arrays/int8.py).

    NotForMe unless its groups lie along the first axis, and both are stored column after column.
    """
    if type(weight) is not Int8Matrix or weight.ndim != 2 or not weight.size:
        raise NotForMe
    values, scales = weight.values, weight.scales
    check_plain([values], [INT8])
    check_plain([scales], [FLOAT32])
    if scales.shape != (groups(len(values)), values.shape[1]):
        raise NotForMe
    if not (values.flags.f_contiguous and scales.flags.f_contiguous):
        raise NotForMe
    return values, scales


# ------------------------------------------------------------------------------ for a whole kernel


def fitting(definition: Callable[..., Any], *dtypes: Any) -> Callable[[F], F]:
    """Let the decorated kernel see only NumPy arrays that fit as SHAPES says, of one of the types.

    Beside arrays of half precision, weight and bias may be float32, which the kernel then rounds.
    A definition that is not in SHAPES has a kernel that checks its arguments itself.
    """
    has_labels = "labels" in SHAPES.get(definition, "")
    names = [array.split()[0] for array in SHAPES.get(definition, "-").split(", ")]

    def check(floats: Sequence[Any], last: Sequence[Any]) -> None:
        if is_half(floats[0]):
            named = [*zip(names, floats, strict=False)]
            check_plain([x for name, x in named if name not in OF_LAYERS], dtypes)
            weights = [x for name, x in named if name in OF_LAYERS]
            check_plain(weights or [floats[0]], [floats[0].dtype, FLOAT32])
        else:
            check_plain(floats, dtypes)
        if has_labels and any(type(array) not in PLAIN for array in last):
            raise NotForMe
        if last and not has_labels:  # statistics, which are not in half precision
            check_plain(last, [FLOAT32 if is_half(floats[0]) else floats[0].dtype])

    return _fitting(definition, check)


def fitting_on_gpu(definition: Callable[..., Any]) -> Callable[[F], F]:
    """The same for a kernel on a GPU, which looks at the types itself."""

    def check(floats: Sequence[Any], last: Sequence[Any]) -> None:
        kind = type(floats[0])
        if any(type(array) is not kind for array in (*floats, *last) if array is not None):
            raise NotForMe

    return _fitting(definition, check)


def _fitting(definition: Callable[..., Any], check: Callable[..., None]) -> Callable[[F], F]:
    """Let the decorated kernel see only arrays that pass check(floats, last) and fit; `last` are
    labels or statistics, whose type is another."""
    if definition not in SHAPES:
        return lambda kernel: kernel
    line, n_arrays, n_floats = _counted(definition)

    def decorate(kernel: F) -> F:
        @functools.wraps(kernel)
        def if_they_fit(*args: Any) -> Any:
            check(args[:n_floats], args[n_floats:n_arrays])
            check_fit(line, args[:n_arrays])
            return kernel(*args)

        return if_they_fit  # type: ignore[return-value]

    return decorate


def _counted(definition: Callable[..., Any]) -> tuple[str, int, int]:
    """A line of SHAPES, how many arrays it names, and how many have the type of the first."""
    line = SHAPES[definition]
    n_arrays = line.count(",") + 1
    return line, n_arrays, n_arrays - line.count("labels") - line.count("log_total")


# ------------------------------------------------------------------------ integers, by their values


def checked_labels(labels: Array, vocab_size: int) -> Array:
    """A copy of labels (N,), all IGNORE or in 0 … V-1; NotForMe for any others.

    It is the copy that is checked: another thread may write to the original meanwhile.
    """
    labels = _copied(labels)
    if not ((labels == IGNORE) | (labels >= 0) & (labels < vocab_size)).all():
        raise NotForMe
    return labels


def checked_rows(total: Array, index: Any, part: Array) -> Array:
    """The rows of total (V, C) to which add_at adds part (…, C), from 0 on: a copy of index (…).

    NotForMe unless they are rows of `total`, which can be written to and shares no memory with
    `part`.
    """
    if type(index) not in PLAIN or total.ndim != 2 or not total.flags.writeable:
        raise NotForMe
    if part.shape != (*index.shape, total.shape[1]) or not part.size:
        raise NotForMe
    rows = _copied(index)
    lowest, highest = rows.min(), rows.max()
    if not -len(total) <= lowest <= highest < len(total) or np.may_share_memory(total, part):
        raise NotForMe
    if lowest < 0:
        rows %= len(total)  # -1 is the last
    return rows


def _copied(integers: Array) -> Array:
    """A copy in int64; NotForMe for anything but integers that all fit into it."""
    if integers.dtype.kind not in "iu" or not np.can_cast(integers.dtype, np.int64):
        raise NotForMe
    return np.array(integers, np.int64, order="C", subok=False)


# ---------------------------------------------------------------------------- what AdamW writes to


def checked_update(rows: Any, *dtypes: Any) -> Array:
    """The addresses of p, grad, m and v in each row of adamw_update: (4, rows).

    NotForMe unless the four arrays have one type and shape, and p, m and v can be written to and
    share no memory with any other array.
    """
    if type(rows) not in (list, tuple) or not rows:  # some can be gone through only once
        raise NotForMe
    spans = []
    for *arrays, decay in rows:
        if not isinstance(decay, (int, float, np.floating)):
            raise NotForMe
        check_plain(arrays, dtypes)
        check_fit(ROW_OF_ADAMW, arrays)
        p, _, m, v = arrays
        if not (p.flags.writeable and m.flags.writeable and v.flags.writeable):
            raise NotForMe
        spans.append([_span(array) for array in arrays])
    starts, ends = np.array(spans, np.uintp).transpose(2, 1, 0).copy()  # each (4, rows)
    check_apart(starts, ends)
    return starts


def _span(array: Array) -> tuple[int, int]:
    """The addresses of an array's first byte, and of the one past its last."""
    if array.flags.forc:  # without gaps, which is quicker to say
        start = array.ctypes.data
        return start, start + array.nbytes
    return np.lib.array_utils.byte_bounds(array)


def check_apart(starts: Array, ends: Array) -> None:
    """NotForMe where an array of AdamW's that is written to shares memory with another.

    Both are (4, rows), for p, grad, m and v. Several rows may share a gradient, which is only read.
    """
    written = np.ones(starts.shape, bool)
    written[1] = False
    order = np.argsort(starts, axis=None)
    starts, ends, written = (x.reshape(-1)[order] for x in (starts, ends, written))
    # As far as any array, or any written one, before this one in memory reaches
    reached = np.maximum.accumulate(ends)
    reached_by_written = np.maximum.accumulate(np.where(written, ends, 0))
    limit = np.where(written[1:], reached[:-1], reached_by_written[:-1])
    if (starts[1:] < limit).any():
        raise NotForMe


# -------------------------------------------------------------------------------- a step of tokens


def checked_lengths(cache: Any, shape: tuple[int, ...], n_layer: int, n_head: int) -> Array:
    """A copy of the lengths of a KV cache for the blocks of a GPT-2 that read (B, T, C) = `shape`.

    NotForMe where it does not, or where its array's axes are not laid out in their order.
    """
    data, lengths = cache.data, cache.lengths
    if len(shape) != 3 or data.ndim != 6 or 0 in shape or not data.size:
        raise NotForMe
    (rows, tokens, width), (_, _, _, _, capacity, size) = shape, data.shape
    if data.shape[:4] != (n_layer, 2, rows, n_head) or n_head * size != width:
        raise NotForMe
    inner = data.itemsize
    for stride, count in zip(data.strides[::-1], data.shape[::-1], strict=True):
        if stride < inner:
            raise NotForMe
        inner = stride * count
    if type(lengths) not in PLAIN or lengths.shape != (rows,) or not lengths.flags.writeable:
        raise NotForMe
    lengths = _copied(lengths)
    if lengths.min() < 0 or lengths.max() > capacity - tokens:
        raise NotForMe
    return lengths
