"""Every CUDA kernel against its definition in float64, emulated on the CPU and on a GPU.

Host code and device code run together, at sizes that fit no tile and no vector. In whichever order
threads take turns, a kernel must give the same bits. It must also fill every new array, which holds
NaN at first, and must not write outside of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cuda_emulator
import numpy as np
import pytest
from gpu_machine import EmulatedGPU, Machine, RealGPU

from micrograd_gpt import Tensor, optim, tensor
from micrograd_gpt import functional as F
from micrograd_gpt.arrays.stand_ins import NotForMe
from micrograd_gpt.generation import filters
from micrograd_gpt.kernels import linear_cross_entropy
from micrograd_gpt.kernels.in_cuda import cublas_lt
from micrograd_gpt.kernels.in_cuda import kernels as gpu
from micrograd_gpt.kernels.in_cuda import modules as cuda_modules
from micrograd_gpt.kernels.in_cuda.matvec import multiply_few_rows
from micrograd_gpt.kernels.in_cuda.residual import (
    Normed,
    add_and_normalise,
    add_and_normalise_backward,
    narrowed,
)
from micrograd_gpt.kernels.in_cuda.token_step import attend, embed, likeliest, normalise_few_rows
from micrograd_gpt.layers import IGNORE

# Of the largest element: a few hundred float32 roundings, or two roundings to the result's type
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "TF32": 2e-3}
DTYPES = ["float32", "float16", "bfloat16"]
WHERE = [
    pytest.param(
        "emulated",
        marks=[
            pytest.mark.slow,  # a kernel compiles for the CPU in a second, for each type
            pytest.mark.skipif(cuda_emulator.COMPILER is None, reason=cuda_emulator.MISSING),
        ],
    ),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=WHERE)
def any_machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Machine:
    if request.param == "gpu":
        return RealGPU()
    return EmulatedGPU(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def on(any_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    any_machine.install(monkeypatch)
    yield any_machine
    any_machine.arrays.check()


def numbers(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def doubles(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(np.float64) for array in arrays]


def assert_close(ours: Any, reference: Any, tolerance: float, name: str = "") -> None:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, name
    assert np.isfinite(ours).all(), f"{name}: not every element was written"
    size = np.abs(reference).max(initial=0) + 1e-30
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * size, err_msg=name)


# ------------------------------------------------------------------------- rows and elements

SHAPES = [(1, 1), (3, 37), (9, 64), (5, 300), (130, 72)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_conversion(shape: tuple[int, int], dtype: str, on: Machine) -> None:
    """As NumPy rounds, in both directions, and with the layout that the array has."""
    wide = numbers(*shape) * 100
    wide.flat[:4] = np.array([np.inf, -np.inf, np.nan, 1e-7])[: wide.size]
    for array in (wide, np.asfortranarray(wide), wide[0]):
        half = on.repeated(lambda array=array: gpu.converted(*on.put(array), np.dtype(dtype)))
        again = on.repeated(lambda half=half: gpu.converted(*on.put(half), np.dtype(np.float32)))
        rounded = array.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(half.astype(np.float32), rounded)
        np.testing.assert_array_equal(again, rounded)
        assert half.dtype == dtype and again.dtype == np.float32
        assert half.flags.f_contiguous == again.flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_of_a_token_a_row(dtype: str, on: Machine) -> None:
    wte, wpe = numbers(9, 44, dtype=dtype), numbers(6, 44, dtype=dtype, seed=1)
    tokens, positions = np.array([8, 0, 8]), np.array([5, 0, 2])

    def embedded() -> Any:
        (stream,) = on.put(np.full((3, 44), np.nan, np.float32))
        embed(*on.put(tokens, positions, wte, wpe), stream)
        return stream

    expected = wte[tokens].astype(np.float32) + wpe[positions].astype(np.float32)
    np.testing.assert_array_equal(on.repeated(embedded), expected)


def test_conversions_that_no_kernel_does(on: Machine) -> None:
    (wide,) = on.put(numbers(6, 8))
    for array, dtype in ((wide, np.float64), (wide[:, ::2], np.float16), (wide[:0], np.float16)):
        with pytest.raises(NotForMe):
            gpu.converted(array, np.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, int], dtype: str, on: Machine) -> None:
    """The rows are also written in two bytes, as the token step needs them for its matrices."""
    x, w, b = numbers(*shape) * 3 + 1, numbers(shape[1]), numbers(shape[1], seed=2)

    def forward() -> Any:
        if dtype == "float32":
            return gpu.layer_norm_forward(*on.put(x, w, b), 1e-5)
        results = [on.arrays.empty(shape, dtype)]
        results += [on.arrays.empty((shape[0], 1), np.float32) for _ in range(2)]
        gpu.normalise(*on.put(x, w, b), 1e-5, *results)
        return tuple(results)

    y, mean, rstd = on.repeated(forward)
    expected = F.layer_norm_forward.definition(*doubles(x, w, b), 1e-5)
    assert y.dtype == dtype and mean.dtype == rstd.dtype == np.float32
    for ours, other, t in zip(
        (y, mean, rstd), expected, (dtype, "float32", "float32"), strict=True
    ):
        assert_close(ours, other, TOLERANCE[t])


@pytest.mark.parametrize("number", [0.1, -1e6, 12345.678])
def test_a_row_of_equal_numbers_is_normalised_to_zeros(number: float, on: Machine) -> None:
    x, weight, bias = np.full((3, 300), number, np.float32), numbers(300), numbers(300, seed=1)
    y, mean, _ = on.repeated(lambda: gpu.layer_norm_forward(*on.put(x, weight, bias), 1e-5))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    np.testing.assert_array_equal(mean, x[:, :1])


def test_sums_of_many_parts_keep_their_digits(on: Machine) -> None:
    """A million rows make thousands of parts, which are added one after another."""
    partials = np.full((30_000, 3), 0.1, np.float32)
    partials[::7] = 0.3
    partials[:, 2] *= 2
    sums = on.repeated(lambda: gpu.sum_partials(*on.put(partials), 2))
    expected = partials.sum(axis=0, dtype=np.float64)
    np.testing.assert_allclose(np.concatenate(sums), expected, rtol=1e-7)
    total = on.repeated(lambda: gpu._total(*on.put(partials)))
    np.testing.assert_allclose(total, partials.sum(dtype=np.float64), rtol=1e-7)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1])
def test_layer_norm_backward(shape: tuple[int, int], on: Machine) -> None:
    """Without a single channel, which is always 0: its gradient is all cancellation."""
    x, grad, w = numbers(*shape) * 3 + 1, numbers(*shape, seed=1), numbers(shape[1])
    _, mean, rstd = F.layer_norm_forward.definition(x, w, w, 1e-5)
    ours = on.repeated(lambda: gpu.layer_norm_backward(*on.put(grad, x, w, mean, rstd)))
    oracle = F.layer_norm_backward.definition(*doubles(grad, x, w, mean, rstd))
    for a, other, name in zip(ours, oracle, ("dx", "dweight", "dbias"), strict=True):
        assert a.dtype == np.float32
        assert_close(a, other, TOLERANCE["float32"], name)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1300), (3, 1029)])
def test_a_branch_is_added_to_the_stream_and_normalised(
    shape: tuple[int, int], dtype: str, on: Machine
) -> None:
    """Also rows that are too wide to be held whole, and rows at odd places."""
    x, branch = numbers(*shape) * 3 + 1, numbers(*shape, dtype=dtype, seed=1)
    w, b = numbers(shape[1]), numbers(shape[1], seed=2)
    y, total, mean, rstd = on.repeated(
        lambda: tuple(add_and_normalise(*on.put(x, branch, w, b), 1e-5))
    )
    expected = F.layer_norm_forward.definition(*doubles(total, w, b), 1e-5)
    np.testing.assert_array_equal(total, x + branch.astype(np.float32))
    assert y.dtype == dtype and mean.dtype == rstd.dtype == np.float32
    for ours, other, t in zip(
        (y, mean, rstd), expected, (dtype, "float32", "float32"), strict=True
    ):
        assert_close(ours, other, TOLERANCE[t])


def test_a_sum_of_equal_numbers_is_normalised_to_zeros(on: Machine) -> None:
    x, branch = np.full((3, 300), 12345.678, np.float32), np.full((3, 300), 1.5, np.float16)
    weight, bias = numbers(300), numbers(300, seed=1)
    y, *_ = on.repeated(lambda: tuple(add_and_normalise(*on.put(x, branch, weight, bias), 1e-5)))
    np.testing.assert_array_equal(y, np.broadcast_to(bias.astype(np.float16), y.shape))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", [*(s for s in SHAPES if s[1] > 1), (2, 1300), (19, 1029)])
def test_the_gradient_of_a_sum_that_is_normalised(
    shape: tuple[int, int], dtype: str, on: Machine
) -> None:
    x, grad, w = numbers(*shape) * 3 + 1, numbers(*shape, dtype=dtype, seed=1), numbers(shape[1])
    along = numbers(*shape, seed=2)
    _, mean, rstd = F.layer_norm_forward.definition(x, w, w, 1e-5)

    def backward() -> Any:
        normed = Normed(None, *on.put(x, mean, rstd))
        return add_and_normalise_backward(*on.put(grad), normed, *on.put(w, along))

    dx, rounded, *of_parameters = on.repeated(backward)
    through, *others = F.layer_norm_backward.definition(*doubles(grad, x, w, mean, rstd))
    assert_close(dx, along + through, TOLERANCE["float32"])
    np.testing.assert_array_equal(rounded, dx.astype(dtype))
    assert dx.dtype == np.float32 and rounded.dtype == dtype
    for a, other, name in zip(of_parameters, others, ("dweight", "dbias"), strict=True):
        assert a.dtype == np.float32
        assert_close(a, other, TOLERANCE["float32"], name)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_many_arrays_are_rounded_at_once(dtype: str, on: Machine) -> None:
    """With the layouts they have, and sizes that are no multiple of anything."""
    arrays = [numbers(5, 7), np.asfortranarray(numbers(70, 41)), numbers(3), numbers(64, 64)]
    copies = on.repeated(lambda: tuple(narrowed(on.put(*arrays), np.dtype(dtype))))
    for copy, array in zip(copies, arrays, strict=True):
        np.testing.assert_array_equal(copy, array.astype(dtype))
        assert copy.flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 5), (33, 130)])
def test_gelu(shape: tuple[int, ...], dtype: str, on: Machine) -> None:
    x, grad = numbers(*shape, dtype=dtype) * 2, numbers(*shape, dtype=dtype, seed=1)
    x = x.astype(dtype)
    y = on.repeated(lambda: gpu.gelu_forward(*on.put(x)))
    assert y.dtype == dtype
    assert_close(y, F.gelu_forward.definition(*doubles(x)), TOLERANCE[dtype])
    dx = on.repeated(lambda: gpu.gelu_backward(*on.put(grad, x)))
    assert_close(dx, F.gelu_backward.definition(*doubles(grad, x)), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_out_gelu_has_slope_1_or_0(dtype: str, on: Machine) -> None:
    sizes = (21, 1e3, 6e4) if dtype == "float16" else (21, 1e13, 1e20, 1e38)
    x = np.array([s * size for size in sizes for s in (1, -1)]).astype(dtype)
    dx = on.repeated(lambda: gpu.gelu_backward(*on.put(np.full_like(x, 3), x)))
    assert_close(dx, np.where(x.astype(float) > 0, 3.0, 0.0), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (4, 9), (3, 2051), (6, 4096), (2, 16411)])
def test_cross_entropy(shape: tuple[int, int], dtype: str, on: Machine) -> None:
    logits = (numbers(*shape) * 3).astype(dtype)
    labels = np.random.default_rng(0).integers(0, shape[1], shape[0])
    labels[2::3] = IGNORE
    dlogits, loss = on.repeated(lambda: gpu.cross_entropy_forward(*on.put(logits, labels)))
    gradient, expected = F.cross_entropy_forward.definition(*doubles(logits), labels)
    assert loss.dtype == np.float32 and dlogits.dtype == dtype
    assert_close(loss, expected, TOLERANCE["float32"], "loss")
    assert_close(dlogits, gradient, TOLERANCE[dtype], "dlogits")
    in_place, same_labels = on.put(logits.copy(), labels)
    again = gpu._cross_entropy(in_place, same_labels, in_place, logits.shape[1])
    assert float(again) == float(loss)
    assert on.get(in_place).tobytes() == dlogits.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "channels", "vocab_size"), [(3, 5, 9), (40, 33, 131), (9, 8, 128)])
def test_linear_cross_entropy(
    n: int, channels: int, vocab_size: int, dtype: str, on: Machine
) -> None:
    """With few rows and with many; the weight's gradient is not rounded on the way."""
    x, weight = numbers(n, channels, dtype=dtype), numbers(vocab_size, channels, dtype=dtype)
    labels = np.random.default_rng(0).integers(0, vocab_size, n)
    labels[1] = IGNORE
    arguments = (x, weight, labels)
    ours = on.repeated(lambda: gpu.linear_cross_entropy_forward(*on.put(*arguments), True))
    definition = linear_cross_entropy.linear_cross_entropy_forward.definition
    oracle = definition(*doubles(x, weight), labels, True)
    names = ("dx", "loss", "dweight")
    for a, other, kept, name in zip(
        ours, oracle, (dtype, "float32", "float32"), names, strict=True
    ):
        assert a.dtype == kept
        # the logits and their gradient have been rounded before the products
        assert_close(a, other, 2 * TOLERANCE[dtype], name)
    dx, loss, dweight = gpu.linear_cross_entropy_forward(*on.put(*arguments), False)
    assert dx is dweight is None and on.get(loss).tobytes() == ours[1].tobytes()


def test_cross_entropy_of_what_is_not_finite(on: Machine) -> None:
    logits = numbers(3, 40)
    logits[0, 3], logits[1] = np.nan, -np.inf
    dlogits, loss = on.repeated(
        lambda: gpu.cross_entropy_forward(*on.put(logits, np.array([1, 2, 3])))
    )
    assert not np.isfinite(loss)
    assert np.isnan(dlogits[0]).all() and np.isfinite(dlogits[2]).all()


def test_the_loss_of_a_target_outside_the_vocabulary_is_not_a_number(on: Machine) -> None:
    """To raise an error would be to wait for the GPU; below 0, targets count from the end."""
    logits = numbers(2, 5)
    for wrong in (5, -6, 2**40, -(2**40)):
        on_gpu = on.put(logits, np.array([1, wrong]))
        assert np.isnan(on.repeated(lambda on_gpu=on_gpu: gpu.cross_entropy_forward(*on_gpu))[1])
    from_the_end, as_usual = (
        on.repeated(lambda last=last: gpu.cross_entropy_forward(*on.put(logits, np.array(last))))
        for last in ([-1, -5], [4, 0])
    )
    for a, b in zip(from_the_end, as_usual, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("logit", [np.inf, np.nan])
def test_an_ignored_row_has_no_gradient_whatever_its_logits(logit: float, on: Machine) -> None:
    logits = numbers(2, 40)
    logits[1, 3] = logit
    labels = np.array([1, IGNORE])
    dlogits, loss = on.repeated(lambda: gpu.cross_entropy_forward(*on.put(logits, labels)))
    assert np.isfinite(loss) and dlogits[0].all() and not dlogits[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (40, 37), (300, 64)])
def test_rows_added_to_a_table(rows: int, width: int, dtype: str, on: Machine) -> None:
    ids = np.random.default_rng(0).integers(0, 9, (rows, 1))
    ids[rows // 2 :] = 4  # a frequent one
    ids[: rows // 4] -= 11  # counted from the end
    grad = numbers(rows, 1, width, dtype=dtype, seed=1)

    def added() -> np.ndarray:
        (total,) = on.put(numbers(11, width, seed=2))
        gpu.add_at(total, *on.put(ids, grad))
        return total

    expected = numbers(11, width, seed=2).astype(np.float64)
    tensor.add_at.definition(expected, ids, *doubles(grad))
    assert_close(on.repeated(added), expected, TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_additions_at_any_index(dtype: str, on: Machine) -> None:
    """Where no kernel does it, CuPy adds: in half precision by way of float32."""
    ids, places = np.array([3, 0, 3]), (np.array([3, 0, 3]), np.array([1, 1, -1]))
    for index in (2, slice(1, 3), (slice(None), None, slice(2)), (..., 1), ids, places):
        part = numbers(*numbers(4, 5)[index].shape, dtype=dtype, seed=1)
        total, given = on.put(numbers(4, 5, dtype=dtype, seed=2), part)
        moved = tuple(on.put(*places)) if index is places else index
        gpu.add_at(total, on.put(ids)[0] if index is ids else moved, given)
        (expected,) = doubles(numbers(4, 5, dtype=dtype, seed=2))
        tensor.add_at.definition(expected, index, *doubles(part))
        assert total.dtype == dtype
        assert_close(on.get(total), expected, TOLERANCE.get(dtype, 1e-12))


# --------------------------------------------------------------------------- matrix products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (1, 70, 129), (3, 64, 96), (8, 33, 50)])
def test_products_of_few_rows(n: int, k: int, m: int, dtype: str, on: Machine) -> None:
    x, weight, bias = (numbers(*s, dtype=dtype) for s in ((n, k), (k, m), (m,)))
    table = numbers(m, k, dtype=dtype, seed=3)
    y = on.repeated(lambda: gpu.linear_forward(*on.put(x, weight, bias)))
    assert y.dtype == dtype
    assert_close(y, F.linear_forward.definition(*doubles(x, weight, bias)), TOLERANCE[dtype])
    y = on.repeated(lambda: gpu.linear_forward(*on.put(x, weight), None))
    assert_close(y, np.matmul(*doubles(x, weight)), TOLERANCE[dtype])
    columns = np.asfortranarray(weight)
    y = on.repeated(lambda: gpu.linear_forward(*on.put(x, columns, bias)))
    assert_close(y, F.linear_forward.definition(*doubles(x, weight, bias)), TOLERANCE[dtype])
    logits = on.repeated(lambda: gpu.linear_forward(*on.put(x, table.T), None))
    assert logits.dtype == dtype
    assert_close(logits, np.matmul(*doubles(x, table.T)), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_may_follow_a_product_of_few_rows(order: str, dtype: str, on: Machine) -> None:
    """GELU, or the addition to the residual stream: the same bits as from a separate kernel."""
    x, weight, bias = (numbers(*s, dtype=dtype) for s in ((3, 70), (70, 129), (129,)))
    x, weight, bias = on.put(x, np.asarray(weight, order=order), bias)
    y, stream = gpu.linear_forward(x, weight, bias), numbers(3, 129, seed=4)

    def activated() -> Any:
        out = on.arrays.empty((3, 129), dtype)
        multiply_few_rows(x, weight, bias, out, gelu=True)
        return out

    def added() -> Any:
        (out,) = on.put(stream.copy())
        multiply_few_rows(x, weight, bias, None, stream=out)
        return out

    assert on.repeated(activated).tobytes() == on.get(gpu.gelu_forward(y)).tobytes()
    expected = stream + on.get(y).astype(np.float32)
    assert on.repeated(added).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("n", "k", "m"), [(9, 808, 40), (35, 70, 17)])
def test_products_of_a_batch(n: int, k: int, m: int, dtype: str, on: Machine) -> None:
    """On tensor cores, and what may follow: the same bits as from a separate kernel."""
    x, columns, bias = (numbers(*s, dtype=dtype) for s in ((n, k), (m, k), (m,)))
    stream = numbers(n, m, seed=4)
    given = on.put(x, columns, bias)

    def multiplied(gelu: bool) -> Any:
        out = on.arrays.empty((n, m), dtype)
        multiply_few_rows(given[0], given[1].T, given[2], out, gelu=gelu)
        return out

    def added() -> Any:
        (out,) = on.put(stream.copy())
        multiply_few_rows(given[0], given[1].T, given[2], None, stream=out)
        return out

    y = on.repeated(lambda: multiplied(gelu=False))
    expected = F.linear_forward.definition(*doubles(x, columns.T, bias))
    assert_close(y, expected, TOLERANCE[dtype])
    (again,) = on.put(y)
    assert on.get(multiplied(gelu=True)).tobytes() == on.get(gpu.gelu_forward(again)).tobytes()
    assert on.repeated(added).tobytes() == (stream + y.astype(np.float32)).tobytes()


@pytest.mark.parametrize("order", ["C", "F"])
def test_more_rows_are_multiplied_in_groups(order: str, on: Machine) -> None:
    """The same bits as from a product of each group."""
    x, weight = numbers(19, 70), np.asarray(numbers(70, 33), order=order)
    x, weight, bias = on.put(x, weight, numbers(33))

    def together() -> Any:
        out = on.arrays.empty((19, 33), "float32")
        multiply_few_rows(x, weight, bias, out)
        return out

    parts = [on.get(gpu.linear_forward(x[i : i + 8], weight, bias)) for i in (0, 8, 16)]
    assert on.repeated(together).tobytes() == np.concatenate(parts).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("n", "k", "m"), [(9, 3, 5), (200, 33, 70), (200, 32, 72)])
@pytest.mark.parametrize("beside", [True, False])
def test_linear(
    beside: bool,
    n: int,
    k: int,
    m: int,
    order: str,
    dtype: str,
    on: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the bias beside the product, where cuBLASLt does that, and with launches for it."""
    if not beside:
        monkeypatch.setattr(cublas_lt, "product", lambda *_, **__: False)
    x, weight, bias = (numbers(*s, dtype=dtype) for s in ((n, k), (k, m), (m,)))
    grad, weight = numbers(n, m, dtype=dtype, seed=1), np.asarray(weight, order=order)
    y = on.repeated(lambda: gpu.linear_forward(*on.put(x, weight, bias)))
    assert y.dtype == dtype
    # the product is rounded, and the sum with the bias again
    assert_close(y, F.linear_forward.definition(*doubles(x, weight, bias)), 2 * TOLERANCE[dtype])
    ours = on.repeated(lambda: gpu.linear_backward(*on.put(grad, x, weight)))
    oracle = F.linear_backward.definition(*doubles(grad, x, weight))
    for a, other, kept in zip(ours, oracle, (dtype, "float32", "float32"), strict=True):
        assert a.dtype == kept
        assert other is not oracle[1] or a.flags[f"{order}_CONTIGUOUS"]
        assert_close(a, other, TOLERANCE[kept])
    (out,) = on.put(np.full((k, m), np.nan, np.float32))
    assert gpu._product(*on.put(x.T, grad), out) is out
    assert_close(on.get(out), oracle[1], TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 300, 1600])
def test_normalisation_of_few_rows(width: int, dtype: str, on: Machine) -> None:
    arguments = 3 + numbers(2, width), numbers(width, seed=1), numbers(width, seed=2)
    given = on.put(*arguments)

    def normalised() -> Any:
        y = on.arrays.empty((2, width), dtype)
        normalise_few_rows(*given, 1e-5, y)
        return y

    expected, _, _ = F.layer_norm_forward.definition(*doubles(*arguments), 1e-5)
    assert_close(on.repeated(normalised), expected, TOLERANCE[dtype])


# -------------------------------------------------------------------------------- greedy choices


@pytest.mark.parametrize(("n", "v", "allowed"), [(3, 1, None), (2, 70, 69), (1, 4101, 9000)])
def test_the_likeliest_tokens(n: int, v: int, allowed: int | None, on: Machine) -> None:
    """In rows that are not all aligned, and where many are equally likely."""
    scores = numbers(n, 2, v)
    scores[0, 0, v // 3 - 2 :] = 9.0
    found = on.repeated(lambda: likeliest(*on.put(scores), allowed))
    expected = filters.likeliest.definition(*doubles(scores), allowed)
    np.testing.assert_array_equal(found[::2], expected[::2])
    assert_close(found[1], expected[1], TOLERANCE["float32"])
    for damage in (np.nan, np.inf, -np.inf):
        scores[-1, 1, v // 2] = damage
        finite = on.repeated(lambda: likeliest(*on.put(scores), allowed))[2]
        assert finite.sum() == 2 * n - 1 and not finite[-1, 1]


# --------------------------------------------------------------------------------- attention


def split_heads(qkv: np.ndarray, n_head: int) -> tuple[np.ndarray, ...]:
    """(B, T, 3C) -> queries, keys and values, each (B, H, T, D): views, as in the model."""
    b, t, width = qkv.shape
    q, k, v = qkv.reshape(b, t, 3, n_head, width // 3 // n_head).transpose(2, 0, 3, 1, 4)
    return q, k, v


HEADS = [(1, 1, 1, 64), (2, 3, 17, 32), (1, 2, 66, 64), (1, 1, 130, 64), (1, 2, 45, 16)]
HEADS += [(1, 1, 70, 128), (1, 1, 33, 80)]
ATTENTION = [(*shape, p) for shape in HEADS for p in (0.0, 0.4) if p == 0 or shape[3] in (32, 64)]


@pytest.mark.parametrize("dtype", [*DTYPES, "TF32"])
@pytest.mark.parametrize(("b", "h", "t", "d", "p"), ATTENTION)
def test_attention(
    b: int, h: int, t: int, d: int, p: float, dtype: str, on: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CUPY_TF32", "1" if dtype == "TF32" else "0")
    precision, dtype = dtype, "float32" if dtype == "TF32" else dtype
    monkeypatch.setattr(F, "dropout_factors", lambda _, p, key: attention_mask(key, b, h, t, p))
    qkv = (numbers(b, t, 3 * h * d) * 1.5).astype(dtype)
    q, k, v = split_heads(qkv, h)
    out, log_total = on.repeated(lambda: gpu.attention_forward(*on.put(q, k, v), p, (1, 2)))
    expected, log_sum = F.attention_forward.definition(*doubles(q, k, v), p, (1, 2))
    assert out.dtype == dtype and log_total.dtype == np.float32
    assert out.swapaxes(1, 2).flags.c_contiguous  # the heads join without a copy
    assert_close(out, expected, TOLERANCE[precision], "out")
    exact = TOLERANCE["TF32" if precision == "TF32" else "float32"]
    assert_close(log_total, log_sum, exact, "log_total")
    if isinstance(on, EmulatedGPU):
        file, _, options = on.emulator.launched[-1]
        assert ("-DTF32" in options) == (precision == "TF32" and file == "attention")

    grad = numbers(b, t, h, d, dtype=dtype, seed=1).swapaxes(1, 2)
    saved = (grad, q, k, v, out, log_total)
    ours = on.repeated(lambda: gpu.attention_backward(*on.put(*saved), p, (1, 2)))
    oracle = F.attention_backward.definition(*doubles(*saved), p, (1, 2))
    assert ours.shape == (b, t, 3, h, d) and ours.flags.c_contiguous
    ours, oracle = (dqkv.transpose(2, 0, 3, 1, 4) for dqkv in (ours, oracle))
    largest = max(np.abs(other).max() for other in oracle)
    for a, other, name in zip(ours, oracle, ("dq", "dk", "dv"), strict=True):
        assert a.dtype == dtype
        if t == 1 and name != "dv":  # a single weight is always 1, so dq and dk cancel out
            assert np.abs(a.astype(float)).max() <= TOLERANCE[precision] * max(largest, 1)
        else:
            assert_close(a, other, 2 * TOLERANCE[precision], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "keys"), [(1, 9), (1, 200), (5, 9), (70, 150), (1, 1)])
@pytest.mark.parametrize("d", [48, 64, 128])
def test_attention_over_a_cache(t: int, keys: int, d: int, dtype: str, on: Machine) -> None:
    cache = numbers(2, 2, 3, keys + 4, d, dtype=dtype)
    k, v = cache[:, :, :, :keys]
    q, _, _ = split_heads(numbers(2, t, 3 * 3 * d, dtype=dtype, seed=1), 3)
    out, log_total = on.repeated(lambda: gpu.attention_forward(*on.put(q, k, v), 0.0, ()))
    expected, log_sum = F.attention_forward.definition(*doubles(q, k, v), 0.0, ())
    assert_close(out, expected, TOLERANCE[dtype], "out")
    assert_close(log_total, log_sum, TOLERANCE["float32"], "log_total")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 64])
def test_attention_of_one_token_a_row(d: int, dtype: str, on: Machine) -> None:
    """Rows of different lengths in part of a larger cache; nothing else in it is written."""
    lengths, h, capacity = [0, 40, 7], 2, 41
    cache, qkv = numbers(2, 5, h, capacity, d, dtype=dtype), numbers(3, 3 * h * d, dtype=dtype)
    expected = cache.copy()
    for row, length in enumerate(lengths):
        expected[:, row + 1, :, length] = qkv[row].reshape(3, h, d)[1:]

    def attended() -> tuple[Any, Any]:
        (whole,) = on.put(cache.copy())
        out = on.arrays.empty((3, h * d), dtype)
        attend(*on.put(qkv), *whole[:, 1:4], *on.put(np.array(lengths)), out)
        return out, whole

    out, written = on.repeated(attended)
    assert written.tobytes() == expected.tobytes()
    for row, length in enumerate(lengths):
        keys, values = expected[:, row + 1 : row + 2, :, : length + 1]
        query = qkv[row].reshape(3, 1, h, 1, d)[0]
        oracle, _ = F.attention_forward.definition(*doubles(query, keys, values), 0.0, ())
        assert_close(out[row], oracle.reshape(-1), TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_an_infinite_gradient_stops_at_a_dropped_weight(on: Machine) -> None:
    """Value 0 is huge: the gradient of the weights that see it is infinite."""
    t, p, key = 6, 0.5, (7,)
    q, k, v, grad = (numbers(1, 1, t, 16, seed=i) for i in range(4))
    v[0, 0, 0], grad[...] = 3e38, 2
    out, log_total = on.repeated(lambda: gpu.attention_forward(*on.put(q, k, v), p, key))
    dropped = attention_mask(key, 1, 1, t, p)[0, 0, :, 0] == 0
    assert dropped.any() and not dropped.all() and np.isfinite(out[0, 0, dropped]).all()
    saved = (grad, q, k, v, out, log_total)
    dqkv = on.repeated(lambda: gpu.attention_backward(*on.put(*saved), p, key))
    assert np.isfinite(dqkv[0, dropped, 0]).all()
    # Key 5 is seen by query 5 alone, and value 0 by those for whom it has not been dropped
    assert np.isfinite(dqkv[0, 5, 1]).all() == dropped[5]


def test_attention_of_arrays_that_no_kernel_reads_as_they_are(on: Machine) -> None:
    """Unaligned rows, strides that differ and gradients with gaps: these arrays are copied."""
    whole = numbers(1, 2, 20, 3 * 32 + 1)
    q, k, v = whole[..., 1:33], whole[..., 33:65], np.asfortranarray(whole[..., 65:])
    out, log_total = on.repeated(lambda: gpu.attention_forward(*on.put(q, k, v), 0.0, ()))
    assert_close(out, F.attention_forward.definition(q, k, v, 0.0, ())[0], 2e-5)
    saved = numbers(1, 2, 20, 33, seed=1)[..., 1:], q, k, v, np.ascontiguousarray(out), log_total
    ours = on.repeated(lambda: gpu.attention_backward(*on.put(*saved), 0.0, ()))
    oracle = F.attention_backward.definition(*saved, 0.0, ())
    for a, other in zip(ours.swapaxes(0, 2), oracle.swapaxes(0, 2), strict=True):
        assert_close(a, other, 5e-5)


def test_rows_too_far_apart_for_32_bit_offsets_are_copied() -> None:
    """Such an array is too large for a test: these are views, and only the decision is seen."""
    views = [
        np.lib.stride_tricks.as_strided(numbers(8), (1, 1, 2, 4), (0, 0, stride, 4))
        for stride in (16, 2**25)
    ]
    as_they_are = [gpu._are_aligned(view) for view in views]
    assert as_they_are == [True, False]


# ----------------------------------------------------------------------------------- dropout


def philox(counters: np.ndarray, key: int) -> np.ndarray:
    """Philox 4x32-10 of counters (n, 4), as in section 3 of the paper."""
    mask, (low, high) = np.uint64(0xFFFFFFFF), (key & 0xFFFFFFFF, key >> 32)
    c = [column.astype(np.uint64) for column in counters.T]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            second >> np.uint64(32) ^ c[1] ^ np.uint64(low), second & mask,
            first >> np.uint64(32) ^ c[3] ^ np.uint64(high), first & mask,
        ]  # fmt: skip
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=1)


def factors(random: np.ndarray, p: float) -> np.ndarray:
    return ((random >> np.uint64(8)).astype(float) / 2**24 >= p) / (1 - p)


def attention_mask(key: tuple[int, ...], b: int, h: int, t: int, p: float) -> np.ndarray:
    """A counter's four words are for two queries 8 apart and two keys 8 apart."""
    head, query, column = np.indices((b * h, t, t))
    counters = np.stack([column & ~8, query & ~8, head, head * 0], axis=-1).reshape(-1, 4)
    random = philox(counters, gpu._seed(key)).reshape(*head.shape, 4)
    word = query // 8 % 2 * 2 + column // 8 % 2
    chosen = np.take_along_axis(random, word[..., None], axis=-1)
    return factors(chosen.reshape(b, h, t, t), p)


def test_the_reference_draws_the_published_numbers() -> None:
    """The known answers of the authors' own library, Random123 (kat_vectors)."""
    digits_of_pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, answer in (
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (digits_of_pi, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        assert (
            " ".join(f"{int(word):08x}" for word in philox(np.array([counter]), key)[0]) == answer
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 50, 5000])
def test_dropout(size: int, dtype: str, on: Machine) -> None:
    """Of contiguous arrays, and of one with gaps, as a gradient may have."""
    x, grad = numbers(size, dtype=dtype), numbers(size, 2, dtype=dtype, seed=1)[:, 1]
    counters = np.zeros((-(-size // 4), 4), np.uint64)
    counters[:, 0] = np.arange(len(counters))
    mask = factors(philox(counters, gpu._seed((3, 4))).reshape(-1)[:size], 0.3)
    for array in (x, grad):
        y = on.repeated(lambda array=array: gpu.dropout_forward(*on.put(array), 0.3, (3, 4)))
        assert y.dtype == dtype
        assert_close(y, array.astype(float) * mask, TOLERANCE[dtype])


# --------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("norm", [0.2, 3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_clipping(norm: float, loss_scale: float, on: Machine) -> None:
    squares = np.full((3, 2), (norm * loss_scale) ** 2 / 6)
    found = on.repeated(lambda: gpu._norm_and_factor(*on.put(squares), 0.5, loss_scale))
    factor = (0.5 / norm if norm > 0.5 else 1) / loss_scale if np.isfinite(norm) else 1
    assert [x.dtype for x in found] == [np.float32] * 2
    np.testing.assert_allclose(found, [norm, factor], rtol=1e-6)
    grads = [numbers(3, 5), np.asfortranarray(numbers(7, 2)), np.asarray(numbers())]
    grads[0] *= np.float32(norm * loss_scale)

    def clipped() -> tuple[Any, ...]:
        tensors = with_gradients(on.put(*(grad.copy(order="K") for grad in grads)))
        norm = gpu.clip_grad_norm(tensors, 0.5, loss_scale)
        return norm, *(tensor.grad for tensor in tensors if tensor.grad is not None)

    ours, oracle = on.repeated(clipped), with_gradients(doubles(*grads))
    with np.errstate(invalid="ignore"):
        length = optim.clip_grad_norm.definition(oracle, 0.5, loss_scale)
    np.testing.assert_allclose(ours[0], length, rtol=1e-5)
    for a, other in zip(ours[1:], oracle[1:], strict=True):
        np.testing.assert_allclose(a, other.grad, rtol=1e-5)


def with_gradients(grads: list[Any]) -> list[Tensor]:
    """A tensor without a gradient, and then one with each of these."""
    tensors = [Tensor(1.0), *map(Tensor, grads)]
    for x, grad in zip(tensors[1:], grads, strict=True):
        x.grad = grad
    return tensors


@pytest.mark.parametrize("size", [1e-25, 1.0, 3e19, 1e30])
def test_gradients_of_any_size_are_clipped(size: float, on: Machine) -> None:
    grad = numbers(70, 50) * np.float32(size)
    exact = np.sqrt((grad.astype(np.float64) ** 2).sum())

    def clipped() -> tuple[Any, Any]:
        tensors = with_gradients(on.put(grad.copy()))
        return gpu.clip_grad_norm(tensors, size), tensors[1].grad

    norm, ours = on.repeated(clipped)
    np.testing.assert_allclose(norm, exact, rtol=1e-6)
    np.testing.assert_allclose(ours, grad * np.float32(size / exact), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 5, 50])
def test_optimizer(count: int, on: Machine) -> None:
    rng = np.random.default_rng(count)
    shapes = [tuple(rng.integers(1, 60, n % 3)) for n in range(count)]
    grads = [numbers(*s, seed=1) for s in shapes]
    decays = [0.1 * (len(s) == 2) for s in shapes]

    def clipped() -> tuple[Any, ...]:
        tensors = with_gradients(on.put(*(grad.copy() for grad in grads)))
        return gpu.clip_grad_norm(tensors, 0.5), *(tensor.grad for tensor in tensors[1:])

    norm, *ours = on.repeated(clipped)
    length = np.sqrt(sum((g.astype(float) ** 2).sum() for g in grads))
    assert_close(norm, length, 1e-6)
    for a, grad in zip(ours, grads, strict=True):
        assert_close(a, grad * min(1, 0.5 / length), 1e-6)

    def start(kind: str) -> list[list[np.ndarray]]:
        p, m, v = (
            [np.asarray(numbers(*s, seed=i), kind, order="CF"[n % 2]) for n, s in enumerate(shapes)]
            for i in (2, 3, 4)
        )
        return [p, m, [np.asarray(abs(x)) for x in v]]

    def updated() -> tuple[Any, ...]:
        p, m, v = (on.put(*arrays) for arrays in start("float32"))
        rows = list(zip(p, on.put(*grads), m, v, decays, strict=True))
        for step in (3, 4):
            gpu.adamw_update(rows, 1e-2, 0.9, 0.95, 1e-8, step)
        return (*p, *m, *v)

    p, m, v = start("float64")
    for step in (3, 4):
        rows = list(zip(p, doubles(*grads), m, v, decays, strict=True))
        optim.adamw_update.definition(rows, 1e-2, 0.9, 0.95, 1e-8, step)
    ours = on.repeated(updated)
    for a, other in zip(ours, [*p, *m, *v], strict=True):
        assert_close(a, other, 1e-5)


def test_optimizer_with_a_gradient_that_is_not_contiguous(on: Machine) -> None:
    p, m, v = (numbers(6, 4, seed=i) for i in range(3))
    arrays = [p.copy(), numbers(4, 6).T, m.copy(), abs(v)]
    ours, settings = on.put(*arrays), (1e-2, 0.9, 0.95, 1e-8, 2)
    gpu.adamw_update([(*ours, 0.1)], *settings)
    optim.adamw_update.definition([(*arrays, 0.1)], *settings)
    assert_close(on.get(ours[0]), arrays[0], 1e-6)


# ---------------------------------------------------------------------------- what is refused


def test_what_no_kernel_does_is_refused_before_anything_is_written(on: Machine) -> None:
    x, w = on.put(numbers(4, 24, dtype="float64"), numbers(24, dtype="float64"))
    q, strided, labels = on.put(numbers(1, 2, 5, 24), numbers(4, 6).T, np.zeros(4, int))
    fine = on.put(numbers(1, 2, 5, 32))[0]
    for call in (
        lambda: gpu.layer_norm_forward(x, w, w, 1e-5),
        lambda: gpu.gelu_forward(x),
        lambda: gpu.gelu_forward(strided),
        lambda: gpu.linear_forward(x, x.T, None),
        lambda: gpu.linear_forward(*on.put(numbers(4, 24), numbers(23, 5)), None),
        lambda: gpu.cross_entropy_forward(x, labels),
        lambda: gpu.linear_cross_entropy_forward(x, x, labels, True),
        lambda: gpu.attention_forward(q, q, q, 0.0, ()),  # 24 channels are not a multiple of 16
        lambda: gpu.attention_forward(fine, fine, fine, 1.0, (1,)),  # not in [0, 1)
        lambda: gpu.clip_grad_norm(with_gradients([x]), 1.0),
        lambda: gpu.clip_grad_norm([Tensor(1.0)], 1.0),
        lambda: gpu.clip_grad_norm(with_gradients([fine[..., ::2]]), 1.0),  # it has gaps
        lambda: gpu.clip_grad_norm(with_gradients([fine, fine[:, 1:]]), 1.0),  # memory in common
        lambda: gpu.adamw_update([(x, x, x, x, 0.1)], 1e-2, 0.9, 0.95, 1e-8, 1),
        lambda: gpu.dropout_forward(x, 0.5, (1,)),
        lambda: gpu.dropout_forward(fine, 1.0, (1,)),
    ):
        with pytest.raises(NotForMe):
            call()


def fitting() -> dict[str, tuple[Any, list[Any]]]:
    """Kernels, and arguments that fit."""
    q, k = numbers(1, 2, 5, 32), numbers(1, 2, 7, 32)
    labels, rows = np.array([1, IGNORE, 3, 0]), numbers(4, 24)
    w, b, row = numbers(24, 9), numbers(9), numbers(24)
    many = numbers(9, 24)
    return {
        "linear_forward, few rows": (gpu.linear_forward, [rows, w, b]),
        "linear_forward": (gpu.linear_forward, [many, w, b]),
        "linear_backward": (gpu.linear_backward, [numbers(4, 9), rows, w]),
        "layer_norm_forward": (gpu.layer_norm_forward, [rows, row, row, 1e-5]),
        "layer_norm_backward": (
            gpu.layer_norm_backward,
            [rows, rows, row, numbers(4, 1), abs(numbers(4, 1))],
        ),
        "gelu_backward": (gpu.gelu_backward, [rows, rows]),
        "attention_forward": (gpu.attention_forward, [q, k, k, 0.0, ()]),
        "attention_backward": (
            gpu.attention_backward,
            [q, q, q, q, q, numbers(1, 2, 5), 0.0, ()],
        ),
        "cross_entropy_forward": (gpu.cross_entropy_forward, [rows, labels]),
        "linear_cross_entropy_forward": (
            gpu.linear_cross_entropy_forward,
            [rows, many, labels, True],
        ),
    }


# An array and an axis along which it may be longer: no other array has that size
FREE = {
    "linear_forward, few rows": (0, 0),
    "linear_forward": (0, 0),
    "layer_norm_forward": (0, 0),
    "attention_forward": (0, 2),  # at most as many queries as keys
    "cross_entropy_forward": (0, 1),
    "linear_cross_entropy_forward": (1, 0),
}


@pytest.mark.parametrize("name", fitting())
def test_sizes_that_do_not_fit_are_refused(name: str, on: Machine) -> None:
    kernel, good = fitting()[name]

    def call(arguments: list[Any]) -> None:
        kernel(*(on.put(x)[0] if isinstance(x, np.ndarray) else x for x in arguments))

    call(good)
    for i, array in enumerate(good):
        if not isinstance(array, np.ndarray):
            continue
        wrong = [array[None], array[..., 0], array[:0]]
        for axis in range(array.ndim):
            if FREE.get(name) != (i, axis):
                wrong.append(np.concatenate([array, array.take([0], axis)], axis))
        for other in wrong:
            with pytest.raises(NotForMe):
                call([*good[:i], other, *good[i + 1 :]])


def test_queries_without_a_key_of_their_own_are_refused(on: Machine) -> None:
    q, k = on.put(numbers(1, 2, 7, 32), numbers(1, 2, 6, 32))
    with pytest.raises(NotForMe):
        gpu.attention_forward(q, k, k, 0.0, ())


def test_arrays_that_are_written_to_are_apart(on: Machine) -> None:
    p, grad, m, v = on.put(*(abs(numbers(6, 4, seed=i)) for i in range(4)))
    settings = 1e-2, 0.9, 0.95, 1e-8, 2
    for rows in (
        [(p, grad, m, m, 0.1)],
        [(p, p, m, v, 0.1)],
        [(p, grad, m, v, 0.1), (p, grad, m, v, 0.1)],
        [(p, grad[:3], m, v, 0.1)],
        [(p.T, grad, m, v, 0.1)],
        [],
    ):
        before = on.get(p).copy()
        with pytest.raises(NotForMe):
            gpu.adamw_update(rows, *settings)
        np.testing.assert_array_equal(on.get(p), before)
    (ids,) = on.put(np.array([1, 0]))
    with pytest.raises(NotForMe):
        gpu._add_rows(p, ids, p[:2])


def test_every_kernel_was_run(on: Machine) -> None:
    """The last test of this file: every kernel has been launched by some test above."""
    if not isinstance(on, EmulatedGPU):
        return
    run = {(file, kernel) for file, kernel, _ in on.emulator.launched}
    all_of_them = {(f, k) for f in cuda_modules.FILES for k in cuda_modules.declarations(f)}
    if len(run) > 10:  # only when the whole file runs
        assert run == all_of_them
