"""Products of bfloat16 in C, by each instruction for them that this processor has."""

from __future__ import annotations

import ctypes
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from compilers import CC, run_apart

from micrograd_gpt import Tensor, layers
from micrograd_gpt import functional as F
from micrograd_gpt.arrays.memory import ROWS_AT_ONCE
from micrograd_gpt.arrays.precision import compute_in, computed_wide, emulation_note
from micrograd_gpt.arrays.stand_ins import at_most
from micrograd_gpt.kernels.in_c import compiler, half
from micrograd_gpt.kernels.in_c import kernels as compiled
from micrograd_gpt.kernels.linear_cross_entropy import linear_cross_entropy_forward

pytestmark = pytest.mark.skipif(
    compiler.library() is None, reason=f"no compiled kernels: {compiler.report()}"
)

ONE_BIT = 2**-8
SMALL = [(9, 1, 1), (17, 3, 5), (33, 64, 32), (97, 95, 131), (200, 1601, 66), (64, 1, 64)]
SIZES = [*SMALL, (430, 1030, 300)]


@pytest.fixture(params=enumerate(compiler.WAYS), ids=lambda way: way[1], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[int]:
    """What the products are computed by: it is forced down to each that there is."""
    library = compiler.library()
    number, name = request.param
    try:
        if library.bfloat16_products(number) != number:
            pytest.skip(f"this processor does not multiply bfloat16 by {name}")
        yield number
    finally:
        library.bfloat16_products(len(compiler.WAYS) - 1)


@pytest.fixture(params=[1, 3], ids=lambda count: f"{count} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    use_threads = compiler.library().use_threads
    use_threads(ctypes.c_int64(request.param))
    yield
    use_threads(ctypes.c_int64(compiler.cores()))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return random.astype("float32").astype("bfloat16")


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    """Integers so small that float32 has all sums of their products, in any order."""
    return np.random.default_rng((seed, *shape)).integers(-9, 10, shape).astype("bfloat16")


def layouts(x: np.ndarray) -> Iterator[np.ndarray]:
    """The same numbers in C order, in Fortran order, backwards, with gaps, and at odd places."""
    n, k = x.shape
    yield x
    yield np.asfortranarray(x)
    yield x[::-1, ::-1].copy()[::-1, ::-1]
    gaps, odd, across = (np.full(s, np.nan, x.dtype) for s in ((n, 2 * k), (n, k + 6), (k, n + 3)))
    gaps[:, ::2] = odd[:, 3 : k + 3] = x
    across[:, 1 : n + 1] = x.T
    yield from (gaps[:, ::2], odd[:, 3 : k + 3], across[:, 1 : n + 1].T)


def as_defined(kernel: object, *args: object) -> tuple[np.ndarray, ...]:
    """What the definition computes in float32, rounded."""
    with at_most("definitions"):
        results = computed_wide(kernel, kernel.definition, args)  # type: ignore[attr-defined]
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.slow_after(12)
@pytest.mark.parametrize(("n", "k", "m"), SIZES)
def test_exact_sums_are_the_definitions_to_the_last_bit(
    n: int, k: int, m: int, threads: None
) -> None:
    """In every layout; only the rounding at the end can then differ, and it does not."""
    bias, grad, layouts_of_w = integers(m), integers(n, m), [*layouts(integers(k, m))]
    for i, x in enumerate(layouts(integers(n, k))):
        for w in (layouts_of_w[i], layouts_of_w[1]):
            for b in (bias, None):
                y = compiled.linear_forward(x, w, b)
                assert y.tobytes() == as_defined(F.linear_forward, x, w, b)[0].tobytes()
            ours = compiled.linear_backward(grad, x, w)
            expected = as_defined(F.linear_backward, grad, x, w)
            for result, defined in zip(ours, expected, strict=True):
                assert result.dtype == defined.dtype
                np.testing.assert_array_equal(result, defined)
            wide = half.multiply(x, w, np.dtype(np.float32))
            np.testing.assert_array_equal(wide, x.astype("float32") @ w.astype("float32"))


@pytest.mark.parametrize(("n", "k", "m"), SIZES)
def test_other_sums_differ_by_float32s_rounding(n: int, k: int, m: int) -> None:
    x, w, grad = numbers(n, k), np.asfortranarray(numbers(k, m)), numbers(n, m)
    exact = [a.astype("float64") for a in (x, w, grad)]
    np.testing.assert_allclose(
        half.multiply(x, w, np.dtype(np.float32)), exact[0] @ exact[1], rtol=0, atol=4e-6 * k**0.5
    )
    dx, dweight, dbias = compiled.linear_backward(grad, x, w)
    assert dweight.flags.f_contiguous
    np.testing.assert_allclose(dweight, exact[0].T @ exact[2], rtol=0, atol=4e-6 * n**0.5)
    np.testing.assert_allclose(dbias, exact[2].sum(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        dx.astype("float64"), exact[2] @ exact[1].T, rtol=ONE_BIT, atol=4e-6 * m**0.5
    )


@pytest.mark.parametrize(("n", "k", "m"), SIZES[1:])
def test_weights_of_float32_give_what_rounded_ones_give(
    n: int, k: int, m: int, threads: None
) -> None:
    """To the last bit, in every layout; the weights hold ties and infinity."""
    x, grad = numbers(n, k), numbers(n, m)
    wide = np.random.default_rng(k).standard_normal((k, m)).astype("float32")
    wide[::3] = np.float32(1 + 2**-8) * (1 + np.arange(m) % 2 * 2**-7)
    wide[k // 2, m // 2] = np.inf
    bias = wide[0].copy()
    for weight in layouts(wide):
        rounded = weight.astype("bfloat16")
        expected = compiled.linear_forward(x, rounded, bias.astype("bfloat16"))
        assert compiled.linear_forward(x, weight, bias).tobytes() == expected.tobytes()
        with np.errstate(invalid="ignore"):
            ours = compiled.linear_backward(grad, x, weight)
            theirs = compiled.linear_backward(grad, x, rounded)
        assert all(a.tobytes("A") == b.tobytes("A") for a, b in zip(ours, theirs, strict=True))


def test_few_rows_meet_rounded_weights_too() -> None:
    x, weight = numbers(3, 40), np.asfortranarray(numbers(40, 9).astype("float32") * 1.001)
    with compute_in("bfloat16"):
        y = layers.linear(Tensor(x), Tensor(weight))
    expected = compiled.linear_forward(x, weight.astype("bfloat16"), None)
    assert y.data.tobytes() == expected.tobytes()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinity_and_nan_go_where_they_belong(bad: float) -> None:
    """And nowhere else: not to the zeros that blocks are filled up with."""
    for row, column in ((0, 0), (16, 34), (32, 69)):
        x, w, grad = numbers(33, 70), np.asfortranarray(numbers(70, 35)), numbers(33, 35)
        x[row, column] = bad
        with np.errstate(invalid="ignore"):
            (expected,) = as_defined(F.linear_forward, x, w, None)
            _, expected_dweight, _ = as_defined(F.linear_backward, grad, x, w)
        y, dweight = compiled.linear_forward(x, w, None), compiled.linear_backward(grad, x, w)[1]
        for ours, defined in ((y, expected), (dweight, expected_dweight)):
            strange = ~np.isfinite(defined)
            assert strange.any()
            np.testing.assert_array_equal(
                ours[strange].astype("float32"), defined[strange].astype("float32")
            )
            assert np.isfinite(ours[~strange]).all()


def test_every_number_is_read_and_written_right(way: int) -> None:
    """Subnormal numbers may be taken for 0."""
    x = np.arange(2**16, dtype=np.uint16).view("bfloat16")[:, None]
    y = compiled.linear_forward(x, np.ones((1, 1), x.dtype), None)
    wide = x.astype("float32")
    if way > 0:
        wide[np.abs(wide) < 2.0**-126] = 0
    np.testing.assert_array_equal(y.astype("float32"), wide)


def test_results_are_rounded_to_nearest_and_of_two_to_the_even_one() -> None:
    x = np.stack([np.full(600, 256.0), np.arange(600.0)], axis=1).astype("bfloat16")
    big = np.array([[16, 1], [1, 3]], "bfloat16")
    y = compiled.linear_forward(x, big, None)
    exact = x.astype("float32") @ big.astype("float32")
    assert y.tobytes() == exact.astype("bfloat16").tobytes()


def test_the_loss_and_its_gradients_are_as_defined() -> None:
    """But for dlogits, which are rounded before they are multiplied."""
    x, weight = numbers(37, 40), numbers(301, 40)
    labels = np.arange(37) * 7 % 301
    labels[5] = F.IGNORE
    args = x, weight, labels, True
    with at_most("definitions"):
        exact = linear_cross_entropy_forward(*(a.astype("float32") for a in args[:2]), labels, True)
    dx, loss, dweight = compiled.linear_cross_entropy_forward(*args)
    assert dx.dtype == "bfloat16" and dweight.dtype == np.float32
    np.testing.assert_allclose(loss, exact[1], rtol=1e-5)
    for ours, expected in ((dx, exact[0]), (dweight, exact[2])):
        error = np.abs(ours.astype("float32") - expected).max()
        assert error < ONE_BIT * np.abs(expected).max()
    without = compiled.linear_cross_entropy_forward(*args[:3], False)
    assert without[0] is None and without[2] is None and without[1] == loss


def test_the_loss_of_float32_weights_is_that_of_rounded_ones() -> None:
    x, weight = numbers(300, 40), numbers(301, 40).astype("float32") * np.float32(1.001)
    labels = np.arange(300) * 7 % 301
    labels[5] = F.IGNORE
    ours = compiled.linear_cross_entropy_forward(x, weight, labels, True)
    narrow = compiled.linear_cross_entropy_forward(x, weight.astype("bfloat16"), labels, True)
    assert [a.tobytes() for a in ours] == [a.tobytes() for a in narrow]
    assert not ours[0][5].any()  # the row of an ignored label


def test_the_loss_holds_the_logits_of_some_rows_once(way: int) -> None:
    """In float32; their gradient takes the same memory, and is gone when the next rows come."""
    if way:
        pytest.skip("once is enough")
    x, weight = numbers(3 * ROWS_AT_ONCE, 4), numbers(4001, 4).astype("float32")
    labels = np.arange(len(x))
    compiled.linear_cross_entropy_forward(x, weight, labels, True)
    tracemalloc.start()
    try:
        results = compiled.linear_cross_entropy_forward(x, weight, labels, True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    logits = ROWS_AT_ONCE * len(weight) * 4
    assert logits < peak - sum(a.nbytes for a in results) < 1.1 * logits


def test_gelu_is_that_of_float32_rounded() -> None:
    x = np.arange(2**16, dtype=np.uint16).view("bfloat16")  # every number
    grad = np.random.default_rng(0).permutation(x)
    with np.errstate(invalid="ignore", over="ignore"):
        wide, wide_grad = x.astype("float32"), grad.astype("float32")
        for ours, exact in (
            (compiled.gelu_forward(x), compiled.gelu_forward(wide)),
            (compiled.gelu_backward(grad, x), compiled.gelu_backward(wide_grad, wide)),
        ):
            assert ours.dtype == "bfloat16"
            np.testing.assert_array_equal(
                ours.astype("float32"), exact.astype("bfloat16").astype("float32")
            )


ATTENTION = [
    (1, 3, 3, 2, 9),
    (1, 5, 5, 2, 7),
    (2, 33, 33, 2, 16),
    (1, 200, 200, 1, 65),
    (1, 70, 131, 3, 32),
]


def attention_inputs(b: int, t: int, s: int, h: int, d: int) -> tuple[np.ndarray, ...]:
    """Queries (B, H, T, D), keys and values (B, H, S, D), as parts of one array, and a gradient."""
    q = numbers(b, t, 3, h, d)[:, :, 0].swapaxes(1, 2)
    k, v = (numbers(b, s, 3, h, d, seed=1)[:, :, i].swapaxes(1, 2) for i in (1, 2))
    return q, k, v, numbers(b, t, h, d, seed=2).swapaxes(1, 2)


@pytest.mark.parametrize(("b", "t", "s", "h", "d"), ATTENTION)
def test_attention_and_its_gradients_are_as_defined(b: int, t: int, s: int, h: int, d: int) -> None:
    """Within roundings: those of its inputs, of weights that another product takes, of results."""
    *qkv, grad = attention_inputs(b, t, s, h, d)
    exact = [a.astype("float64") for a in qkv]
    out, log_total = F.attention_forward(*qkv, 0.0, ())
    expected, expected_log = F.attention_forward.definition(*exact, 0.0, ())
    assert out.dtype == "bfloat16" and log_total.dtype == np.float32
    assert np.abs(out - expected).max() < ONE_BIT * np.abs(expected).max()
    np.testing.assert_allclose(log_total, expected_log, rtol=0, atol=1e-5)
    if t < s:
        return  # a backward has as many queries as keys
    saved = *exact, out.astype("float64"), expected_log, 0.0, ()
    expected = F.attention_backward.definition(grad.astype("float64"), *saved)
    dqkv = F.attention_backward(grad, *qkv, out, log_total, 0.0, ())
    assert dqkv.dtype == "bfloat16"
    for i in range(3):
        error = np.abs(dqkv[:, :, i] - expected[:, :, i]).max()
        assert error < 2 * ONE_BIT * np.abs(expected[:, :, i]).max()


@pytest.mark.parametrize("d", [9, 32, 48, 64])
@pytest.mark.parametrize("t", [3, 8, 40])
def test_gradients_of_large_scores_take_the_forwards_weights(t: int, d: int) -> None:
    """Half a unit in the last place of a score of 10^7 would make a weight of 1 one of 1.6."""
    q, k, v, grad = attention_inputs(1, t, t, 2, d)
    q, k = ((3000 * a.astype("float32")).astype("bfloat16") for a in (q, k))
    exact = [a.astype("float64") for a in (q, k, v)]
    expected_out, expected_log = F.attention_forward.definition(*exact, 0.0, ())
    saved = *exact, expected_out, expected_log, 0.0, ()
    expected = F.attention_backward.definition(grad.astype("float64"), *saved)[:, :, 2]
    out, log_total = F.attention_forward(q, k, v, 0.0, ())
    dv = F.attention_backward(grad, q, k, v, out, log_total, 0.0, ())[:, :, 2]
    assert np.abs(dv - expected).max() < 2 * ONE_BIT * np.abs(expected).max()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_infinity_and_nan_in_a_query_stay_in_its_row(bad: float) -> None:
    q, k, v, _ = attention_inputs(1, 50, 50, 2, 20)
    q[0, 1, 40, 3] = bad
    out, log_total = F.attention_forward(q, k, v, 0.0, ())
    strange = np.zeros((1, 2, 50), bool)
    strange[0, 1, 40] = True
    np.testing.assert_array_equal(np.isnan(out.astype("float32")).all(axis=-1), strange)
    np.testing.assert_array_equal(np.isfinite(log_total), ~strange)
    assert np.isfinite(out.astype("float32")[~strange]).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
def test_infinity_and_nan_in_a_key_or_value_reach_all_that_see_it(which: int, bad: float) -> None:
    """As in the definition. Earlier queries have a weight of 0 for it, and 0 × NaN is NaN: they may
    become NaN too, as they do there, or not."""
    *qkv, grad = attention_inputs(1, 70, 70, 2, 20)
    qkv[which][0, 1, 40, 3] = bad
    wide = [a.astype("float32") for a in qkv]
    with np.errstate(invalid="ignore", over="ignore"):
        exact = F.attention_forward.definition(*wide, 0.0, ())
        saved = *wide, *exact, 0.0, ()
        exact_dqkv = F.attention_backward.definition(grad.astype("float32"), *saved)
        out, log_total = F.attention_forward(*qkv, 0.0, ())
        dqkv = F.attention_backward(grad, *qkv, out, log_total, 0.0, ())
    seeing, seen = slice(40, None), slice(None, 41)  # queries; keys that all of those see
    np.testing.assert_array_equal(np.isfinite(log_total), np.isfinite(exact[1]))
    assert strange_as_defined(out.swapaxes(1, 2), exact[0].swapaxes(1, 2), seeing)
    assert strange_as_defined(dqkv[:, :, 0], exact_dqkv[:, :, 0], seeing)
    assert strange_as_defined(dqkv[:, :, 1], exact_dqkv[:, :, 1], seen)
    assert strange_as_defined(dqkv[:, :, 2], exact_dqkv[:, :, 2], seen) == (which == 1)


def strange_as_defined(ours: np.ndarray, defined: np.ndarray, tokens: slice) -> bool:
    """Whether numbers of (B, T, H, D) are infinite or NaN: at these tokens just where they are as
    defined, at others nowhere else. All others are as defined, within two roundings."""
    ours = ours.astype("float32")
    strange, expected = ~np.isfinite(ours), ~np.isfinite(defined)
    np.testing.assert_array_equal(strange[:, tokens], expected[:, tokens])
    assert not (strange & ~expected).any()
    error = np.abs(ours[~expected] - defined[~expected]).max()
    assert error < 2 * ONE_BIT * np.abs(defined[~expected]).max()
    return bool(strange.any())


def test_the_report_names_what_multiplies(way: int) -> None:
    if way == 0:
        pytest.skip("then it names nothing")
    fast = emulation_note("bfloat16", "cpu") is None
    named = any(f"bfloat16 by {name}" in compiler.report() for name in compiler.WAYS[1:])
    assert fast == named
    with at_most("numpy"):
        assert "not faster" in str(emulation_note("bfloat16", "cpu"))


# Run in a process of its own, with kernels for less than this processor has.
LESS = """if True:
    import numpy as np
    from micrograd_gpt.kernels.in_c import compiler, kernels
    x, w = (np.random.default_rng(0).integers(-9, 10, s).astype("bfloat16")
            for s in ((70, 97), (97, 35)))
    y = kernels.linear_forward(x, w, None)
    exact = x.astype("float32") @ w.astype("float32")
    assert y.tobytes() == exact.astype("bfloat16").tobytes()
    print(compiler.library().bfloat16_products(2), compiler.report())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "highest"),
    [("-mno-amx-tile", 1), ("-mno-avx512f", 0), ("-mno-avx", 0)],
)
def test_code_for_a_lesser_processor_has_no_such_instructions(
    options: str, highest: int, tmp_path: object, way: int
) -> None:
    if way or "avx512" not in compiler._processor():
        pytest.skip("once is enough, and the options are for processors that have these")
    result = run_apart(LESS, CC=f"{CC} {options}", XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    number, report = result.stdout.split(" ", 1)
    assert int(number) <= highest and "AMX" not in report
