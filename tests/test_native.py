"""Where the C hot path comes from: prebuilt, compiled once and kept, compiled for one process, or nowhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimaran.kernels.folders import own_folder
from trimaran.ort_ops import native as module
from trimaran.ort_ops.native import COMPILERS, FLAGS, SOURCE, compile_to, file_name

compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
needs_compiler = pytest.mark.skipif(compiler is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home and a package folder of the test's own, and temporary files where they can be seen."""
    for name in ("home", "package", "tmp"):
        (tmp_path / name).mkdir()
    shutil.copy(SOURCE, tmp_path / "package")
    monkeypatch.setattr(module, "SOURCE", tmp_path / "package" / SOURCE.name)
    monkeypatch.setattr(module.Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    yield
    assert list((tmp_path / "tmp").iterdir()) == []


def found() -> module.Native:
    """What a new process would find."""
    return module.native.__wrapped__()


def works(native: module.Native) -> bool:
    table = native.library.trimaran_table(3)
    native.library.trimaran_table_free(table)
    return bool(table)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("compiled although there is a binary")


@needs_compiler
def test_it_is_compiled_once_into_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found()
    folder = tmp_path / "home" / ".cache" / "trimaran"
    assert first.how == f"compiled, {folder / file_name()}"
    assert works(first)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == [file_name()]
    monkeypatch.setattr(module, "compile_to", refuse)
    assert found() == first


@needs_compiler
def test_another_source_is_another_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    before = file_name()
    assert works(found())
    module.SOURCE.write_text(module.SOURCE.read_text() + "\n/* changed */\n")
    assert file_name() != before
    assert file_name() in found().how


@needs_compiler
def test_a_prebuilt_binary_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_to(module.SOURCE.with_name(file_name()))
    monkeypatch.setattr(module, "compile_to", refuse)
    native = found()
    assert native.how == f"prebuilt, {file_name()}"
    assert works(native)
    module.SOURCE.write_text(module.SOURCE.read_text() + "\n")
    with pytest.raises(AssertionError, match="compiled although"):
        found()  # the binary is of another source


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o755])
def test_a_folder_that_others_reach_into_is_not_used(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "home" / ".cache" / "trimaran"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    native = found()
    assert native.how == f"compiled by {compiler} for this process alone"
    assert works(native)
    assert list(folder.iterdir()) == []


@needs_compiler
def test_a_folder_of_somebody_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "geteuid", lambda: os.getuid() + 1)
    assert "for this process alone" in found().how


@needs_compiler
def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(module.Path, "home", homeless)
    assert "for this process alone" in found().how


@needs_compiler
def test_a_kept_file_that_is_broken_is_not_used(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "home" / ".cache" / "trimaran")
    (folder / file_name()).write_bytes(b"\x7fELF and no more")
    native = found()
    assert "for this process alone" in native.how
    assert works(native)


def test_without_a_compiler_nodes_run_through_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    native = found()
    assert native.library is None
    assert native.how == (
        "none, nodes run through ctypes: no prebuilt binary in the package; no C compiler (cc, gcc, clang)"
    )


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'cc: no space left' >&2\nexit 4\n")
    broken.chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(broken))
    native = found()
    assert native.library is None
    assert f"{broken} failed: cc: no space left" in native.how
    assert list((tmp_path / "home" / ".cache" / "trimaran").iterdir()) == []


@needs_compiler
def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    strict = [*FLAGS, "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
    done = subprocess.run(
        [str(compiler), *strict, "-o", str(tmp_path / "x.so"), str(SOURCE)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_includes_no_header_but_of_the_system() -> None:
    includes = [line for line in SOURCE.read_text().splitlines() if line.startswith("#include")]
    assert includes == ["#include <pthread.h>", "#include <stdint.h>", "#include <stdlib.h>", "#include <string.h>"]
