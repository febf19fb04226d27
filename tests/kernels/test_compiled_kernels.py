"""The C kernels: how they are compiled and kept, and mistakes that only they can make."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import platform
import shlex
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from compilers import CC, REPORT, WITHOUT_PACKAGE, QuickCompiler, needs_cc, run_apart
from kernel_cases import parameters

from micrograd_gpt import functional as F
from micrograd_gpt import optim
from micrograd_gpt.arrays.memory import ROWS_AT_ONCE
from micrograd_gpt.arrays.stand_ins import NotForMe
from micrograd_gpt.kernels.in_c import compiler
from micrograd_gpt.kernels.in_c import kernels as compiled
from micrograd_gpt.kernels.linear_cross_entropy import linear_cross_entropy_forward

needs_compiler = pytest.mark.skipif(
    compiler.library() is None, reason=f"no compiled kernels: {compiler.report()}"
)

# Compares training steps in C with those in the definitions; run in a process of its own.
COMPARE = """if True:
    import numpy as np
    from micrograd_gpt import optim
    from micrograd_gpt.arrays.stand_ins import at_most
    from micrograd_gpt.gpt2 import GPT2, GPT2Config
    from micrograd_gpt.arrays import stand_ins
    print(stand_ins.report())
    def run():
        model = GPT2(GPT2Config(n_layer=2, n_head=3, n_embd=51, vocab_size=77, n_positions=90))
        ids = np.random.default_rng(0).integers(0, 77, (2, 91))
        optimizer = optim.AdamW(model.parameters())
        losses = []
        for _ in range(3):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            losses += [loss.item(), optim.clip_grad_norm(optimizer.parameters, 1.0)]
            optimizer.step()
            optimizer.zero_grad()
        return losses
    ours = run()
    with at_most("definitions"):
        np.testing.assert_allclose(ours, run(), rtol=2e-5)
"""


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype("float32")


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are for x86-64")
@pytest.mark.parametrize("option", ["-mno-avx512f", "-mno-avx"])
def test_every_width_of_vectors_gives_the_same(option: str, tmp_path: Path) -> None:
    result = run_apart(COMPARE, CC=f"{CC} {option}", XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("C, compiled by")


def test_without_a_compiler_numpy_does_it(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path)}
    result = run_apart(WITHOUT_PACKAGE + COMPARE, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("NumPy (there is no C compiler")
    assert 'pip install -e ".[compiler]"' in result.stdout  # Windows' cmd knows no other quotes


OWN_PARTS = f"PATH={shlex.quote(os.environ['PATH'])}"  # where a compiler finds them


def install_package(folder: Path) -> None:
    """A package in this folder that stands in for ziglang: it runs the compiler `package` there,
    which finds its own parts by the PATH of these tests."""
    QuickCompiler(folder, "package", first=OWN_PARTS)
    (folder / "ziglang").mkdir()
    (folder / "ziglang" / "__init__.py").touch()  # else an installed ziglang comes before it
    (folder / "ziglang" / "__main__.py").write_text(
        f"import os, sys; os.execv({str(folder / 'package')!r}, sys.argv[1:])\n"
    )


@pytest.mark.slow
@needs_cc
@pytest.mark.parametrize("names", [["named", "cc", "package"], ["cc", "package"], ["package"]])
def test_a_package_is_the_compiler_where_there_is_no_other(
    names: list[str], tmp_path: Path
) -> None:
    """CC comes before the system's compiler, and that before the package."""
    install_package(tmp_path)
    for name in names[:-1]:
        QuickCompiler(tmp_path, name, first=OWN_PARTS)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "PATH": str(tmp_path),
        "CC": str(tmp_path / "named") if "named" in names else "",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    said = run_apart(REPORT, **environment).stdout
    assert "C, compiled by quick 1" in said
    assert [log.stem for log in tmp_path.glob("*.log") if log.read_text()] == names[:1]


@pytest.mark.slow
@needs_cc
@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("says_its_version", [True, False])
def test_a_compiler_of_the_system_that_does_not_work_is_none(
    says_its_version: bool, installed: bool, tmp_path: Path
) -> None:
    """A Mac without Apple's tools for developers has a cc that cannot even say its version; one
    without the C library's headers can, but cannot compile."""
    version = '[ "$1" = --version ] && echo lame 1 && exit' if says_its_version else ""
    fails = f"echo $* >> {tmp_path}/tries; echo 'note: no developer tools' >&2; exit 1"
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{version}\n{fails}\n")
    (tmp_path / "cc").chmod(0o755)
    if installed:
        install_package(tmp_path)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "PATH": str(tmp_path),
        "CC": "",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    said = run_apart(REPORT if installed else WITHOUT_PACKAGE + REPORT, **environment).stdout
    assert ("C, compiled by quick 1" in said) == installed
    assert ('pip install -e ".[compiler]"' in said) == (not installed)
    assert "cc does not work: note: no developer tools" in said
    assert len((tmp_path / "tries").read_text().splitlines()) == 1  # of one line of C, or less


@needs_cc
def test_the_sources_have_no_line_that_a_stricter_compiler_refuses() -> None:
    """GCC 14 and clang 16 made errors of warnings, such as of a pointer to another type."""
    options = ["-fsyntax-only", "-std=gnu11", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror"]
    waived = ["-Wno-unused-parameter", "-Wno-missing-field-initializers"]
    target = ["-march=native"] if platform.machine() == "x86_64" else []
    sources = [str(source) for source in sorted(compiler.SOURCES.glob("*.c"))]
    result = subprocess.run(
        [CC, *options, *waived, *target, *sources], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="ziglang is not installed")
def test_the_packages_compiler_needs_neither_another_nor_a_home(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = f"import os; os.environ.pop('HOME', None)\n{COMPARE}"
    result = run_apart(code, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("C, compiled by clang")
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["micrograd-gpt"]  # not Zig's


@pytest.mark.skipif(os.name == "nt", reason="the failing compiler is a shell script")
def test_a_compiler_that_fails_is_reported_and_numpy_does_it(tmp_path: Path) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1 && exit\n'
        "echo 'fatal error: out of luck' >&2; exit 1\n"
    )
    broken.chmod(0o755)
    result = run_apart(COMPARE, CC=str(broken), XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    expected = "NumPy (the C kernels cannot be compiled: fatal error: out of luck)"
    assert result.stdout.strip() == expected


def test_the_environment_may_ask_for_numpy(tmp_path: Path) -> None:
    result = run_apart(COMPARE, MICROGRAD_GPT_KERNELS="numpy", XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("NumPy (as MICROGRAD_GPT_KERNELS asks)")
    assert list(tmp_path.iterdir()) == []


def test_the_definitions_need_no_compiler_and_the_report_says_so(tmp_path: Path) -> None:
    environment = {"MICROGRAD_GPT_KERNELS": "definitions", "XDG_CACHE_HOME": str(tmp_path)}
    result = run_apart(COMPARE, **environment)
    assert result.returncode == 0, result.stderr
    assert "C, compiled by" not in result.stdout and "layers.py" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_cc
def test_they_are_compiled_once_and_whole(tmp_path: Path) -> None:
    cc = QuickCompiler(tmp_path)
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CC": str(cc.path)}
    at_once = [
        subprocess.Popen(
            [sys.executable, "-c", REPORT],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = {process.communicate(timeout=300)[0] for process in at_once}
    assert said == {"'C, compiled by quick 1'\n"}
    files = sorted(file.name for file in (tmp_path / "micrograd-gpt" / "kernels").iterdir())
    assert len(files) == 2 and files[1] == f"{files[0]}.sha256"  # and no temporary file
    before = cc.compilations
    assert {run_apart(REPORT, **environment).stdout} == said
    assert cc.compilations == before


@pytest.mark.slow
@needs_compiler
def test_several_threads_may_use_them_first(tmp_path: Path) -> None:
    code = """if True:
        import threading
        from micrograd_gpt.kernels.in_c import compiler
        barrier, found = threading.Barrier(8), []
        def first_use():
            barrier.wait()
            found.append(compiler.library())
        callers = [threading.Thread(target=first_use) for _ in range(8)]
        [c.start() for c in callers], [c.join() for c in callers]
        assert len(found) == 8 and len(set(map(id, found))) == 1 and found[0] is not None
    """
    result = run_apart(code, XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@needs_compiler
def test_a_failure_that_passes_does_not_leave_slow_code(tmp_path: Path) -> None:
    """Once the compiler recovers, code for any processor does not stand for code for this one."""
    flaky = tmp_path / "flaky-cc"
    flaky.write_text(
        f'#!/bin/sh\ncase "$*" in *native*) [ -e "$0.fails" ] && exit 1;; esac\nexec {CC} "$@"\n'
    )
    flaky.chmod(0o755)
    (tmp_path / "flaky-cc.fails").write_text("")
    kept = []
    for _ in ("while it fails", "recovered"):
        run_apart(REPORT, CC=str(flaky), XDG_CACHE_HOME=str(tmp_path))
        kept.append(set((tmp_path / "micrograd-gpt" / "kernels").glob("*.so")))
        (tmp_path / "flaky-cc.fails").unlink(missing_ok=True)
    assert len(kept[0]) == 1 and len(kept[1]) == 2


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("command", ["cc 'open quote", "cc -fvisibility=hidden", "true", "false"])
def test_a_strange_compiler_is_no_hindrance(command: str, tmp_path: Path) -> None:
    result = run_apart(COMPARE, CC=command, XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("NumPy (")


@pytest.mark.slow
@needs_cc
def test_a_compiler_that_is_not_found_is_named(tmp_path: Path) -> None:
    missing = "CC names no-such-cc, which is not found"
    environment = {"CC": "no-such-cc -O2", "XDG_CACHE_HOME": str(tmp_path)}
    without = run_apart(WITHOUT_PACKAGE + REPORT, PATH=str(tmp_path), **environment).stdout
    assert "NumPy (there is no C compiler" in without and missing in without
    QuickCompiler(tmp_path, "cc")
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    said = run_apart(REPORT, PATH=path, **environment).stdout
    assert said == f"'C, compiled by quick 1 ({missing})'\n"


@needs_cc
@pytest.mark.parametrize("command", ["no-such-cc -O2", "false"])
def test_whoever_names_a_compiler_is_told_that_it_is_not_used(command: str, tmp_path: Path) -> None:
    """In any program, as a slower one would not be noticed."""
    said = run_apart(COMPARE, CC=command, XDG_CACHE_HOME=str(tmp_path))
    assert (said.returncode, said.stderr.count("\n")) == (0, 1)
    assert said.stderr.startswith("note: the compiler of CC is not used: CPU kernels: ")


@pytest.mark.slow
@needs_cc
def test_the_compiler_does_not_read_the_users_input(tmp_path: Path) -> None:
    cc = QuickCompiler(tmp_path, first="cat > /dev/null")
    code = f"{REPORT}; import sys; print(sys.stdin.read())"
    result = run_apart(code, stdin="a prompt", CC=str(cc.path), XDG_CACHE_HOME=str(tmp_path))
    assert result.stdout == "'C, compiled by quick 1'\na prompt\n"


@pytest.mark.slow
@needs_cc
@pytest.mark.parametrize("where", ["HOME", "XDG_CACHE_HOME", "TMPDIR", "CC"])
def test_a_path_need_not_be_utf8(where: str, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    cc = QuickCompiler(odd if where == "CC" else tmp_path)
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CC": str(cc.path)}
    environment[where] = str(cc.path if where == "CC" else odd)
    if where == "HOME":
        environment["XDG_CACHE_HOME"] = ""
    result = run_apart(COMPARE, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "C, compiled by quick 1\n"


@needs_cc
def test_a_report_about_a_path_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    missing = os.fsdecode(b"caf\xe9/cc")
    environment = {"CC": missing, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    said = run_apart(WITHOUT_PACKAGE + COMPARE, **environment)
    assert said.returncode == 0, said.stderr
    assert r"CC names caf\udce9/cc, which is not found" in said.stdout


@pytest.mark.slow
@needs_cc
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_while_a_thread_compiles_does_not_wait_for_it(tmp_path: Path) -> None:
    """The child has no such thread; it would wait forever."""
    cc = QuickCompiler(tmp_path, first=f'echo compiling > "{tmp_path}/started"; sleep 1')
    code = f"""if True:
        import os, pathlib, signal, threading, time
        from micrograd_gpt.kernels.in_c import compiler
        compiling = threading.Thread(target=compiler.report)
        compiling.start()
        while not pathlib.Path({str(tmp_path / "started")!r}).exists():
            time.sleep(0.01)
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends a child that hangs
            print(compiler.report(), flush=True)
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        compiling.join()
    """
    result = run_apart(code, CC=str(cc.path), XDG_CACHE_HOME=str(tmp_path))
    assert result.stdout == "C, compiled by quick 1\n0\n", result.stderr


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    x, w = numbers(100, 90), numbers(90, 80)
    expected = F.linear_forward(x, w, None)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(F.linear_forward(x, w, None), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_compiler
def test_callers_in_several_threads_get_their_own_results() -> None:
    inputs = [(numbers(150, 140, seed=i), numbers(140, 130, seed=i)) for i in range(4)]
    expected = [F.linear_forward(x, w, None) for x, w in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(50):
            if not np.array_equal(F.linear_forward(*inputs[i], None), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert wrong == []


@needs_compiler
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 12, 16, 17, 96, 385])
@pytest.mark.parametrize("k", [1, 31, 384, 385, 800])
def test_products_of_every_layout(n: int, k: int) -> None:
    """Operands in C order, in Fortran order and with gaps; results in both orders."""
    m = 67
    for a in (numbers(n, k), numbers(k, n).T, numbers(n, 2 * k)[:, ::2]):
        for b in (numbers(k, m), numbers(m, k).T, numbers(2 * k, m)[::2]):
            exact = a.astype("float64") @ b.astype("float64")
            results = [F.linear_forward(a, b, None)]
            for order in "CF":  # the gradient of a weight lies in memory as the weight does
                weight = np.zeros((n, m), "float32", order=order)  # type: ignore[call-overload]
                results.append(F.linear_backward(b, a.T, weight)[1])
                assert results[-1].flags[f"{order}_CONTIGUOUS"]
            for result in results:
                np.testing.assert_allclose(result, exact, rtol=0, atol=3e-6 * k**0.5 * 4)


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (31, 5), (768, 401)])
def test_a_matrix_in_half_precision_is_read_as_it_is(n: int, k: int, m: int, dtype: str) -> None:
    x, w, bias = (numbers(*s).astype(dtype) for s in ((n, k), (m, k), (m,)))
    for b in (bias, None):
        y = compiled.linear_forward(x, w.T, b)
        exact = x.astype("float64") @ w.T.astype("float64")
        exact += 0 if b is None else b.astype("float64")
        assert y.dtype == dtype
        one_bit = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
        np.testing.assert_allclose(y.astype("float64"), exact, rtol=one_bit, atol=1e-5 * k**0.5)


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits_is_read_right(dtype: str) -> None:
    """Subnormal numbers, infinities and NaN among them."""
    w = np.arange(2**16, dtype=np.uint16).view(dtype)[None, :]
    y = compiled.linear_forward(np.ones((1, 1), dtype), w, None)
    np.testing.assert_array_equal(y.astype("float32"), w.astype("float32"))


@needs_compiler
def test_other_products_in_half_precision_are_left_to_float32() -> None:
    x, w, many = (numbers(*s).astype("float16") for s in ((2, 30), (30, 5), (17, 30)))
    columns = np.asfortranarray(w)
    others = [(x, w), (many, w), (x[:0], columns), (x[:, :7], columns)]
    for a, b in [*others, (x.astype("float32"), columns), (x.astype("bfloat16"), columns)]:
        with pytest.raises(NotForMe):
            compiled.linear_forward(a, b, None)


@needs_compiler
def test_what_does_not_fit_is_refused_as_numpy_refuses_it() -> None:
    x, w = numbers(20, 3), numbers(3, 4)
    with pytest.raises(ValueError):
        F.linear_forward(x, numbers(5, 4), None)
    for few in (numbers(1, 7), numbers(1, 2)):
        with pytest.raises(ValueError):
            F.linear_forward(few, numbers(4, 3).T, None)
    with pytest.raises(ValueError):
        F.linear_backward(numbers(19, 4), x, w)


@needs_compiler
@pytest.mark.parametrize("n", [6, 96, 200])
def test_nothing_is_read_beyond_a_broadcast_input(n: int) -> None:
    """Stride 0 makes all columns one. Reading the guard page after it would end the process."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    at_end = np.frombuffer(memory, "float32", n, page - 4 * n)
    x = np.broadcast_to(at_end[:, None], (n, 50))
    guard(memory, page)
    w = numbers(50, 64)
    np.testing.assert_allclose(F.linear_forward(x, w, None), x @ w, rtol=0, atol=1e-4)
    dweight = F.linear_backward(w, x.T, numbers(n, 64))[1]
    np.testing.assert_allclose(dweight, x @ w, rtol=0, atol=1e-4)


def guard(memory: mmap.mmap, offset: int) -> None:
    """Forbid reading the page at `offset`."""
    mprotect = getattr(ctypes.CDLL(None), "mprotect", None)
    if mprotect is None:
        pytest.skip("this system has no mprotect")
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + offset
    assert mprotect(ctypes.c_void_p(start), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_a_thread_that_ends_gives_its_memory_back() -> None:
    q = numbers(1, 1, 300, 64)

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])  # KiB

    def call() -> None:
        F.attention_forward(q, q, q, 0.0, ())

    seen = []
    for _ in range(60):
        caller = threading.Thread(target=call)
        caller.start()
        caller.join()
        seen.append(resident())
    assert seen[-1] - seen[10] < 10_000  # without freeing, 500 KiB a thread


@needs_compiler
def test_many_chunks_of_many_arrays() -> None:
    """The optimizer works in chunks: these arrays are larger, smaller and exactly one chunk."""
    sizes = [1, compiled.CHUNK, 3 * compiled.CHUNK + 5, 7]
    grads = [numbers(size) for size in sizes]
    exact = np.sqrt(sum(float((g.astype("float64") ** 2).sum()) for g in grads))
    assert optim.clip_grad_norm(parameters(grads), 1e9) == pytest.approx(exact, rel=1e-6)
    results = []
    for update in (optim.adamw_update, optim.adamw_update.definition):  # type: ignore[attr-defined]
        p, m, v = ([numbers(size, seed=i) for size in sizes] for i in (1, 2, 3))
        v = [abs(x) for x in v]
        decays = (0.1, 0.0, 0.1, 0.2)
        update(list(zip(p, grads, m, v, decays, strict=True)), 1e-2, 0.9, 0.95, 1e-8, 3)
        results.append([*p, *m, *v])
    for ours, oracle in zip(*results, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-5, atol=1e-7)


@needs_compiler
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_is_not_lost(bad: float) -> None:
    """A run stops at a loss that is not finite, so no kernel may make it finite."""
    x = numbers(40, 50)
    x[7, 33] = bad
    targets = np.zeros(40, int)
    weight, bias = numbers(50), numbers(50)
    assert not np.isfinite(F.cross_entropy_forward(x, targets)[1])
    table = numbers(60, 50)
    assert not np.isfinite(linear_cross_entropy_forward(x, table, targets, True)[1])
    assert not np.isfinite(F.layer_norm_forward(x, weight, bias, 1e-5)[0][7]).any()
    assert not np.isfinite(F.linear_forward(x, numbers(50, 60), None)[7]).any()
    assert not np.isfinite(F.linear_forward(x[7:8], table.T, None)).any()
    assert not np.isfinite(optim.clip_grad_norm(parameters([x.copy()]), 1.0))
    assert not np.isfinite(F.gelu_forward(x)[7, 33])
    q, k, v = numbers(3, 1, 1, 40, 16)
    q[0, 0, 7, 3] = bad
    assert not np.isfinite(F.attention_forward(q, k, v, 0.0, ())[0][0, 0, 7]).all()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_over_many_rows_holds_few_logits(dtype: str) -> None:
    """Its gradients are those of all rows together."""
    n, vocab_size, width = 2 * ROWS_AT_ONCE + 77, 3001, 24
    x, table = numbers(n, width).astype(dtype), numbers(vocab_size, width).astype(dtype)
    labels = np.random.default_rng(0).integers(0, vocab_size, n)
    tracemalloc.start()
    ours = compiled.linear_cross_entropy_forward(x, table, labels, True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * vocab_size * (2 * ROWS_AT_ONCE + 3 * width)
    exact = linear_cross_entropy_forward.definition(  # type: ignore[attr-defined]
        x.astype("float64"), table.astype("float64"), labels, True
    )
    for one, other in zip(ours, exact, strict=True):
        tolerance = (1e-5 if dtype == "float32" else 2e-2) * np.abs(other).max()
        np.testing.assert_allclose(one.astype("float64"), other, rtol=0, atol=tolerance)


@needs_compiler
def test_exp_is_exact_to_a_few_roundings() -> None:
    """Tested through gelu, x / (1 + exp(-2u)); the rounding error of the exponent grows with it."""
    x = np.linspace(-6, 12, 100_001).astype("float32")
    u = F.GELU_SCALE * (x + F.GELU_CUBIC * x.astype("float64") ** 3)
    np.testing.assert_allclose(F.gelu_forward(x), x / (1 + np.exp(-2 * u)), rtol=5e-6)
