"""Products with weights of 16 or 8 bits in C, of a few rows and of many; how float16 is rounded."""

from __future__ import annotations

import ctypes
import tracemalloc
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from compilers import CC, run_apart

from micrograd_gpt import functional as F
from micrograd_gpt.arrays import int8
from micrograd_gpt.arrays.precision import HALF, computed_wide, emulation_note
from micrograd_gpt.arrays.stand_ins import NotForMe, at_most
from micrograd_gpt.kernels.in_c import compiler, half
from micrograd_gpt.kernels.in_c import int8 as in_c
from micrograd_gpt.kernels.in_c import kernels as compiled

pytestmark = pytest.mark.skipif(
    compiler.library() is None, reason=f"no compiled kernels: {compiler.report()}"
)

SIZES = [
    *((1, 1, 1), (1, 64, 16), (2, 33, 17), (3, 95, 131), (4, 1601, 66), (5, 768, 48)),
    *((6, 770, 35), (7, 1602, 34), (16, 65, 3), (16, 130, 700), (9, 64, 32), (12, 70, 33)),
    *((17, 1, 1), (17, 33, 65), (18, 64, 64), (40, 837, 131), (75, 1100, 17)),
]


# The ways to multiply bfloat16 (compiler.WAYS) that this processor has beside its best
OTHER_WAYS = {"in float32": 0, "in pairs": 1}
BEST = compiler.library().bfloat16_products(2) if compiler.library() else 0
WAYS = ["1 thread", "3 threads", *(name for name, way in OTHER_WAYS.items() if way < BEST)]


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """On one thread and on several, and as on a processor that can do less for bfloat16."""
    library = compiler.library()
    library.use_threads(ctypes.c_int64(3 if request.param == "3 threads" else 1))
    try:
        if (number := OTHER_WAYS.get(request.param)) is not None:
            assert library.bfloat16_products(number) == number
        yield request.param
    finally:
        library.bfloat16_products(len(compiler.WAYS) - 1)
        library.use_threads(ctypes.c_int64(compiler.cores()))


def integers(*shape: int) -> np.ndarray:
    """Integers so small that float32 has all sums of their products, in any order."""
    return np.random.default_rng(shape).integers(-9, 10, shape).astype("float32")


def int8_of_integers(k: int, m: int) -> int8.Int8Matrix:
    """A matrix whose scales are powers of two, so that all products are exact."""
    values = np.asfortranarray(integers(k, m).astype(np.int8))
    scales = 2.0 ** np.random.default_rng(0).integers(-2, 3, (int8.groups(k), m))
    return int8.int8_matrix(values, np.asfortranarray(scales.astype("float32")))


def layouts(x: np.ndarray) -> Iterator[np.ndarray]:
    n, k = x.shape
    odd = np.full((n, k + 3), np.nan, x.dtype)
    odd[:, 3:] = x
    yield from (x, np.asfortranarray(x), x[::-1, ::-1].copy()[::-1, ::-1], odd[:, 3:])


@pytest.mark.parametrize(("n", "k", "m"), SIZES)
def test_exact_sums_are_the_definitions_to_the_last_bit(n: int, k: int, m: int) -> None:
    whole, weight = integers(n, k), np.asfortranarray(integers(k, m)).astype("bfloat16")
    bias, eighths = integers(m).astype("bfloat16"), int8_of_integers(k, m)
    for x in layouts(whole):
        np.testing.assert_array_equal(in_c.product(x, eighths), x @ eighths.astype("float32"))
        for narrow, b in product(HALF, (bias, bias[::-1], None)):
            args = [None if a is None else a.astype(narrow) for a in (x, weight, b)]
            ours = compiled.linear_forward(*args)
            expected = computed_wide(F.linear_forward, F.linear_forward.definition, tuple(args))
            assert ours.dtype == expected.dtype and ours.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("n", "m"), [(1, 2**16), (16, 48), (17, 2**16)])
def test_weights_of_float16_are_read_right(n: int, m: int) -> None:
    """Every number of it, subnormal ones too, and those that follow the last whole register."""
    halves = np.arange(2**16, dtype=np.uint16).view("float16")
    weight = np.asfortranarray(np.tile(halves[np.isfinite(halves)][:m], (37, 1)))
    x = np.full((n, 37), 2.0**-8, "float16")
    y = compiled.linear_forward(x, weight, None)
    exact = 37 * 2.0**-8 * weight[:1].astype("float32")
    np.testing.assert_array_equal(y, np.repeat(exact.astype("float16"), n, axis=0))


def gaps(x: np.ndarray) -> np.ndarray:
    """The same numbers where others lie between them, and with their axes in another order."""
    wide = np.full((3, 2, len(x) // 3 + 5), np.nan, x.dtype)
    wide[:, 0, 5:] = x[: len(x) // 3 * 3].reshape(3, -1)
    return wide.transpose(2, 1, 0)[5:, :1]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_weights_of_16_bits_may_lie_at_any_even_address(n: int) -> None:
    x, w = integers(n, 770), integers(770, 33)
    for dtype in HALF:
        memory = np.empty(w.size + 1, dtype)
        shifted = memory[memory.ctypes.data % 4 == 0 :][: w.size].reshape(33, 770).T
        shifted[...] = w
        assert shifted.ctypes.data % 4 == 2
        y = F.linear_forward(x.astype(dtype), shifted, None)
        np.testing.assert_array_equal(y, (x @ w).astype(dtype))


def test_float16_is_rounded_and_widened_as_numpy_does() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view("float16")  # every number
    exact = halves[np.isfinite(halves)].astype("float32")
    between = (exact[1:] + exact[:-1]) / 2  # where rounding goes one way or the other, or to even
    floats = [exact, between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.inf)]
    large = [65519.99, 65520, 1e30, 3e38, np.inf, np.nan, 1e-30, 2.0**-25, 2.0**-149, 0]
    wide = np.concatenate([*floats, np.array(large, "float32"), -np.array(large, "float32")])
    with np.errstate(over="ignore"):
        for array, dtype in ((wide, "float16"), (halves, "float32")):
            for x in (array, gaps(array), gaps(array).T):
                ours = half.converted(x, np.dtype(dtype))
                assert ours is not None and ours.dtype == dtype and ours.shape == x.shape
                np.testing.assert_array_equal(ours, x.astype(dtype))
                assert (np.signbit(ours) == np.signbit(x)).all()


@pytest.mark.parametrize("n", [3, 9, 20])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinity_and_nan_go_where_they_belong(bad: float, n: int) -> None:
    for place in (0, 63, 64, 69):
        x, weight = integers(n, 70), int8_of_integers(70, 35)
        x[1, place] = bad
        with np.errstate(invalid="ignore"):
            expected = x @ weight.astype("float32")
        np.testing.assert_array_equal(in_c.product(x, weight), expected)
        for half_type in HALF:
            narrow = np.asfortranarray(weight.astype(half_type))
            ours = compiled.linear_forward(x.astype(half_type), narrow, None)
            finite = np.isfinite(ours.astype("float32"))
            np.testing.assert_array_equal(finite, np.isfinite(expected))
            narrow[place, 34] = bad
            ours = compiled.linear_forward(integers(n, 70).astype(half_type), narrow, None)
            finite = np.isfinite(ours.astype("float32"))
            assert finite[:, :34].all() and not finite[:, 34].any()
    weight.scales[1, 7] = np.nan
    ours = in_c.product(integers(n, 70), weight)
    assert np.isnan(ours[:, 7]).all() and np.isfinite(np.delete(ours, 7, axis=1)).all()


@pytest.mark.parametrize("exponent", [-120, -101, -100, -60, 60, 110])
def test_each_row_may_be_of_a_size_of_its_own(exponent: int) -> None:
    x, weight = integers(21, 70), int8_of_integers(70, 35)
    x[[1, 20]] *= np.float32(2) ** exponent
    x[2] = 0
    for n in (3, 8, 21):
        expected = x[:n] @ weight.astype("float32")
        np.testing.assert_array_equal(in_c.product(x[:n], weight), expected)


def test_small_numbers_beside_a_large_one_keep_their_bits() -> None:
    """Those that are not below a 2**30th of it."""
    x, weight = integers(20, 70) * 51, int8_of_integers(70, 35)
    values = weight.values.copy(order="F")
    x[:, 3], values[3] = 2.0**29, 0
    weight = int8.int8_matrix(values, weight.scales)
    for n in (1, 4, 9, 20):
        expected = x[:n] @ weight.astype("float32")
        np.testing.assert_array_equal(in_c.product(x[:n], weight), expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_subnormal_numbers_are_not_zero(rows: int, way: str) -> None:
    """But for bfloat16 in pairs and in AMX tiles, which several rows meet where there are such."""
    weight = np.asfortranarray(np.full((64, 32), 2.0**-130, "float32")).astype("bfloat16")
    x = np.full((rows, 64), 2.0**10, "float32")
    y = compiled.linear_forward(x.astype("bfloat16"), weight, None).astype("float32")
    assert np.isin(y, [2.0**-114] if rows < 3 or way == "in float32" else [2.0**-114, 0]).all()
    wide = in_c.product(x, int8.quantised(np.full((64, 16), 2.0**-130, "float32"), 0))
    np.testing.assert_allclose(wide, 2.0**-114, rtol=1e-2)  # a subnormal scale has few digits


@pytest.mark.parametrize("k", [70, 768, 3072])
def test_a_row_depends_in_its_last_bits_alone_on_how_many_are_beside_it(k: int) -> None:
    """It is added up in another order: the difference is within 2**-20 of the sum of all products'
    sizes, and in 16 bits within one more step of the result."""
    random = np.random.default_rng(k)
    x, w = (random.standard_normal(s).astype("float32") for s in ((40, k), (k, 48)))
    weight, sizes = int8.quantised(w, 0), 2.0**-20 * np.abs(x[0]) @ np.abs(w)
    alone = in_c.product(x[:1], weight)[0]
    narrow = {half: (x.astype(half), np.asfortranarray(w.astype(half))) for half in HALF}
    for n in (2, 3, 4, 5, 9, 16, 17, 40):
        assert (np.abs(in_c.product(x[:n], weight)[0] - alone) <= sizes).all()
        for half_x, half_w in narrow.values():
            ours, one = (F.linear_forward(half_x[:i], half_w, None)[0] for i in (n, 1))
            step = np.abs(np.spacing(one)).astype("float32")
            assert (np.abs(ours.astype("float32") - one.astype("float32")) <= sizes + step).all()


def test_many_rows_make_no_wide_copy_of_the_weights() -> None:
    x, wide = integers(17, 512), integers(512, 600)
    halves, eighths = np.asfortranarray(wide.astype("float16")), int8.quantised(wide, 0)
    half_x = x.astype("float16")
    for multiply in (lambda: F.linear_forward(half_x, halves, None), lambda: x @ eighths):
        tracemalloc.start()
        try:
            multiply()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < wide.nbytes / 4


@pytest.mark.parametrize(("k", "m"), [(1, 16), (70, 35), (768, 48), (1601, 66)])
def test_a_row_of_float32_is_the_same_to_the_last_bit_beside_any_others(k: int, m: int) -> None:
    random = np.random.default_rng(k)
    x, w = (random.standard_normal(s).astype("float32") for s in ((16, k), (m, k)))
    alone = compiled.linear_forward(x[:1], w.T, None)
    for n in range(2, 17):
        assert compiled.linear_forward(x[:n], w.T, None)[:1].tobytes() == alone.tobytes()


def test_what_it_does_not_compute_is_refused() -> None:
    x, weight = integers(2, 130), int8_of_integers(130, 33)
    no_scales = int8.int8_matrix(weight.values, weight.scales[:2])
    for bad in (
        (x.astype("float64"), weight),
        (x[:, :5], weight),
        (x[:0], weight),
        (x[0], weight),
        (x, weight.values),
        (x, no_scales),
        (x, int8.int8_matrix(weight.values, weight.scales.astype("float64"))),
        (x, int8.int8_matrix(weight.values, weight.scales.copy(order="C"))),
    ):
        with pytest.raises(NotForMe):
            in_c.product(*bad)


def test_the_note_says_where_it_would_be_slower() -> None:
    assert emulation_note("int8", "cpu", decoding=True) is None
    assert emulation_note("bfloat16", "cpu", decoding=True) is None
    with at_most("numpy"):
        assert "not faster" in str(emulation_note("int8", "cpu", decoding=True))
        assert "not faster" in str(emulation_note("bfloat16", "cpu", decoding=True))


# Run in a process of its own, with kernels for less than this processor has.
LESS = """if True:
    import numpy as np
    from micrograd_gpt.arrays import int8
    from micrograd_gpt.kernels.in_c import compiler, int8 as in_c, kernels
    x, w = (np.random.default_rng(0).integers(-9, 10, s).astype("float32")
            for s in ((5, 195), (195, 35)))
    for half in ("bfloat16", "float16"):
        for some in (x, np.repeat(x, 9, 0)):
            y = kernels.linear_forward(some.astype(half), np.asfortranarray(w).astype(half), None)
            assert y.tobytes() == (some @ w).astype(half).tobytes()
    ones = np.ones((4, 35), "float32", order="F")
    weight = int8.int8_matrix(np.asfortranarray(w.astype("int8")), ones)
    assert (in_c.product(x, weight) == x @ w).all()
    assert (in_c.product(np.repeat(x, 9, 0), weight) == np.repeat(x, 9, 0) @ w).all()
    print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", ["-mno-avx512f", "-mno-avx2", "-mno-avx"])
def test_code_for_a_lesser_processor(options: str, tmp_path: object, way: str) -> None:
    if way != "1 thread" or "avx512" not in compiler._processor():
        pytest.skip("once is enough, and the options are for processors that have these")
    result = run_apart(LESS, CC=f"{CC} {options}", XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0 and "equal" in result.stdout, result.stderr
