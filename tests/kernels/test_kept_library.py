"""A kept library is loaded only if it is whole and nobody else can have written it."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from compilers import CC, REPORT, QuickCompiler, needs_cc, run_apart
from threadpoolctl import ThreadpoolController

from micrograd_gpt.kernels.in_c import kept_library
from micrograd_gpt.kernels.in_c.kept_library import keep, kept, load

NAME, LIBRARY = "0123456789abcdef.so", bytes(range(256)) * 100
NOBODY = 65534

has_owners = pytest.mark.skipif(
    os.name == "nt", reason="Windows has no owners and modes like these"
)
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files to others"
)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The private folder for temporary files, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return kept_library.places()[1]


@pytest.fixture
def folder(tmp_path: Path, temporary: Path) -> Path:
    """The folder in the cache, not made yet."""
    return tmp_path / "cache" / "micrograd-gpt" / "kernels"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def compiled(folder: Path, code: str) -> bytes:
    """A library compiled from C."""
    source, library = folder / "small.c", folder / "small.so"
    source.write_text(code)
    subprocess.run([CC, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library.read_bytes()


# ------------------------------------------------------------------------------------ what is kept


def test_what_is_kept_is_found_with_its_checksum_beside_it(folder: Path) -> None:
    assert kept(NAME) is None
    assert keep(NAME, LIBRARY) and kept(NAME) == LIBRARY
    assert kept("another.so") is None
    checksum = f"{hashlib.sha256(LIBRARY).hexdigest()}  {NAME}\n"  # as sha256sum writes it
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        NAME: LIBRARY,
        f"{NAME}.sha256": checksum.encode(),
    }


def truncate(library: Path, checksum: Path) -> None:
    os.truncate(library, 5000)


def empty(library: Path, checksum: Path) -> None:
    os.truncate(library, 0)


def zero_the_tail(library: Path, checksum: Path) -> None:
    content = library.read_bytes()
    library.write_bytes(content[:5000] + bytes(len(content) - 5000))


def lose_the_checksum(library: Path, checksum: Path) -> None:
    checksum.unlink()


def damage_the_checksum(library: Path, checksum: Path) -> None:
    checksum.write_bytes(b"\xff" * 10)


def swap_for_another(library: Path, checksum: Path) -> None:
    assert keep("another.so", b"another")
    os.replace(library.with_name("another.so"), library)
    os.replace(library.with_name("another.so.sha256"), checksum)


DAMAGE = [truncate, empty, zero_the_tail, lose_the_checksum, damage_the_checksum, swap_for_another]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_not_found_until_it_is_kept_anew(
    damage: Callable[[Path, Path], None], folder: Path
) -> None:
    keep(NAME, LIBRARY)
    damage(folder / NAME, folder / f"{NAME}.sha256")
    assert kept(NAME) is None
    assert keep(NAME, LIBRARY) and kept(NAME) == LIBRARY


@has_owners
@pytest.mark.parametrize("which", ["", NAME, f"{NAME}.sha256"])
@pytest.mark.parametrize("opened", [0o020, 0o002])
def test_what_others_can_write_is_not_found_until_it_is_kept_anew(
    which: str, opened: int, folder: Path, temporary: Path
) -> None:
    keep(NAME, LIBRARY)
    path = folder / which
    path.chmod(mode(path) | opened)
    assert kept(NAME) is None
    assert keep(NAME, LIBRARY) and kept(NAME) == LIBRARY
    assert not mode(path) & 0o022 and not temporary.exists()


@has_owners
def test_what_is_kept_is_closed_to_others_whatever_the_umask(folder: Path) -> None:
    """Where every user's group is private, umask 002 is common."""
    before = os.umask(0)
    try:
        assert keep(NAME, LIBRARY)
    finally:
        os.umask(before)
    assert kept(NAME) == LIBRARY
    assert [mode(path) & 0o022 for path in (folder, *folder.iterdir())] == [0, 0, 0]


@needs_root
@pytest.mark.parametrize("which", ["", NAME, f"{NAME}.sha256"])
def test_what_belongs_to_another_user_is_not_found(which: str, folder: Path) -> None:
    keep(NAME, LIBRARY)
    os.chown(folder / which, NOBODY, NOBODY)
    assert kept(NAME) is None
    assert keep(NAME, LIBRARY) and kept(NAME) == LIBRARY


@needs_root
def test_another_users_folder_is_left_as_it_is(folder: Path, temporary: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    os.chown(folder, NOBODY, NOBODY)
    assert keep(NAME, LIBRARY) and kept(NAME) == LIBRARY
    assert list(folder.iterdir()) == [] and mode(folder) == 0o777
    assert (temporary / NAME).exists()


@needs_root
def test_every_user_trusts_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(NAME, LIBRARY)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert kept(NAME) == LIBRARY


@has_owners
def test_a_link_in_place_of_the_folder_is_not_followed(folder: Path, temporary: Path) -> None:
    keep(NAME, LIBRARY)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(elsewhere)
    assert kept(NAME) is None
    assert keep(NAME, b"new") and kept(NAME) == b"new"
    assert (elsewhere / NAME).read_bytes() == LIBRARY and (temporary / NAME).exists()


@has_owners
def test_the_folders_above_may_be_links(folder: Path, tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "large disk")
    assert keep(NAME, LIBRARY) and kept(NAME) == LIBRARY
    assert (folder / NAME).exists() and not temporary.exists()


def test_a_cache_that_cannot_be_written_is_replaced(folder: Path, temporary: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    assert keep(NAME, LIBRARY) and kept(NAME) == LIBRARY
    assert (temporary / NAME).exists()
    for file in temporary.iterdir():
        file.unlink()
    temporary.rmdir()
    temporary.write_text("a file here too")
    assert not keep(NAME, LIBRARY) and kept(NAME) is None


def test_a_user_without_a_home_has_the_temporary_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", no_home)
    assert keep(NAME, LIBRARY) and kept(NAME) == LIBRARY
    assert (temporary / NAME).exists()


def test_where_no_temporary_file_can_be_written_the_cache_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(NAME, LIBRARY)
    monkeypatch.setattr(tempfile, "gettempdir", no_temporary_folder)
    assert kept(NAME) == LIBRARY


def no_temporary_folder() -> str:
    raise FileNotFoundError("No usable temporary directory found")


# ----------------------------------------------------------------------------------------- loading


@pytest.fixture
def noexec(tmp_path: Path) -> Iterator[Path]:
    """A folder from which nothing can be executed or loaded."""
    place = tmp_path / "noexec"
    place.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "noexec", "none", str(place)]
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"no folder can be mounted here: {problem}")
    yield place
    # The system's loader may leave a part of a file mapped that it could not load.
    subprocess.run(["umount", "--lazy", str(place)], check=True)


ways = pytest.mark.parametrize("in_memory", [True, False])


def choose(monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    """Load from memory, or else act as a system where only files can be loaded."""
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("this system loads only files")


@needs_cc
@ways
def test_each_library_is_loaded_as_it_is_given(
    in_memory: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, in_memory)
    codes = [f"int number(void) {{ return {i}; }}" for i in range(3)]
    libraries = [load(compiled(tmp_path, code)) for code in codes]
    assert [library.number() for library in libraries] == [0, 1, 2]
    assert list((tmp_path / "tmp").iterdir()) == []


@needs_cc
@ways
def test_a_folder_that_forbids_loading_is_no_hindrance(
    in_memory: bool, folder: Path, noexec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, in_memory)
    library = compiled(noexec, "int number(void) { return 7; }")
    monkeypatch.setattr(tempfile, "tempdir", str(noexec))
    if in_memory:
        monkeypatch.setenv("XDG_CACHE_HOME", str(noexec))
    keep(NAME, LIBRARY)  # makes the folder in the cache
    assert load(library).number() == 7
    if not in_memory:
        assert len(list(folder.iterdir())) == 2
        monkeypatch.setenv("XDG_CACHE_HOME", str(noexec))
        with pytest.raises(OSError, match="failed to map segment"):
            load(library)


@needs_cc
@ways
def test_a_temporary_folder_whose_path_is_not_utf8_is_no_hindrance(
    in_memory: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """threadpoolctl, which the kernels in NumPy need, reads the paths of all loaded libraries."""
    choose(monkeypatch, in_memory)
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    try:
        os.mkdir(odd)
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    keep(NAME, LIBRARY)  # makes the folder in the cache
    monkeypatch.setattr(tempfile, "tempdir", odd)
    assert load(compiled(tmp_path, "int number(void) { return 8; }")).number() == 8
    assert ThreadpoolController().info()


@needs_cc
@ways
def test_what_is_no_library_is_an_error(
    in_memory: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, in_memory)
    with pytest.raises(OSError):
        load(LIBRARY)
    assert list((tmp_path / "tmp").iterdir()) == []


# ---------------------------------------------------------------------------- a program that starts


class Program:
    """A program that uses the kernels, and is started again and again."""

    def __init__(self, tmp_path: Path) -> None:
        self.cc = QuickCompiler(tmp_path)
        self.folder = tmp_path / "cache" / "micrograd-gpt" / "kernels"
        self.environment = {
            "CC": str(self.cc.path),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "TMPDIR": str(tmp_path / "tmp"),
        }
        (tmp_path / "tmp").mkdir()

    def start(self) -> str:
        """Start it; return what it reports."""
        result = run_apart(REPORT, **self.environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip().strip("'")

    def library(self) -> Path:
        (library,) = self.folder.glob("*.so")
        return library


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


@pytest.mark.slow
@needs_cc
@pytest.mark.parametrize("damage", [truncate, zero_the_tail])
def test_a_damaged_library_is_compiled_again_once(
    damage: Callable[[Path, Path], None], program: Program
) -> None:
    program.start()
    whole = program.library().read_bytes()
    damage(program.library(), program.library().with_suffix(".so.sha256"))
    for _ in range(2):
        assert program.start() == "C, compiled by quick 1"
        assert program.cc.compilations == 2
    assert program.library().read_bytes() == whole


@pytest.mark.slow
@needs_root
@needs_cc
@pytest.mark.parametrize("opened", [True, False])
def test_a_library_that_another_user_planted_does_not_run(
    opened: bool, program: Program, tmp_path: Path
) -> None:
    program.start()
    plant = program.library()
    ran = tmp_path / "ran"
    code = f'__attribute__((constructor)) static void run(void) {{ fopen("{ran}", "w"); }}'
    planted = compiled(tmp_path, f"#include <stdio.h>\n{code}")
    load(planted)
    assert ran.exists()  # this is what must not happen
    ran.unlink()
    plant.write_bytes(planted)
    checksum = plant.with_suffix(".so.sha256")
    checksum.write_text(f"{hashlib.sha256(planted).hexdigest()}  {plant.name}\n")
    for file in (plant, checksum):
        os.chown(file, NOBODY, NOBODY)
    if opened:
        program.folder.chmod(0o777)
    for _ in range(2):
        assert program.start() == "C, compiled by quick 1"
        assert program.cc.compilations == 2
    assert not ran.exists()


@pytest.mark.slow
@needs_cc
def test_a_cache_that_forbids_loading_costs_one_compilation(program: Program, noexec: Path) -> None:
    program.environment |= {"XDG_CACHE_HOME": str(noexec), "TMPDIR": str(noexec)}
    for _ in range(2):
        assert program.start() == "C, compiled by quick 1"
        assert program.cc.compilations == 1


@pytest.mark.slow
@needs_cc
def test_where_nothing_can_be_kept_the_report_says_so(program: Program, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert program.start() == "C, compiled by quick 1"
    (private,) = (tmp_path / "tmp").iterdir()
    for file in private.iterdir():
        file.unlink()
    private.rmdir()
    private.write_text("a file here too")
    for compilations in (2, 3):
        said = program.start()
        assert said.startswith("C, compiled by quick 1 (compiled again at every start: ")
        assert str(program.folder) in said and str(private) in said
        assert program.cc.compilations == compilations


@needs_cc
def test_what_the_system_does_not_load_is_not_compiled_again(program: Program) -> None:
    """Such as code for another processor."""
    output = 'while [ "$1" != -o ]; do shift; done; echo "no code for this processor" > "$2"; exit'
    program.cc = QuickCompiler(program.cc.path.parent, first=output)
    for _ in range(2):
        assert program.start().startswith("NumPy (the C kernels cannot be loaded: ")
        assert program.cc.compilations == 1
