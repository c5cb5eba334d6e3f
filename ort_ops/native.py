"""The C hot path as a loaded library: prebuilt beside this file, or compiled once and kept, or none.

A file is named by the digest of the source that it was compiled from, so an old one is never taken for the present.
Where the machine has no C compiler and the wheel came without a binary, nodes run through ctypes instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimaran.kernels.folders import cache_folder

SOURCE = Path(__file__).with_name("hot_path.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=c11", "-O2", "-fwrapv", "-fPIC", "-shared", "-s", "-pthread")


@dataclass(frozen=True)
class Native:
    """library: a ctypes library, None where nodes run through ctypes; `how` says what is used and why, for people."""

    library: Any
    how: str


@functools.cache
def native() -> Native:
    """The hot path of this process, compiled now where it must be."""
    reasons = []
    for find in (_prebuilt, _kept, _fresh):
        try:
            path, how = find()
            return Native(_load(path), how)
        except OSError as error:
            reasons.append(str(error))
    return Native(None, f"none, nodes run through ctypes: {'; '.join(dict.fromkeys(reasons))}")


def file_name() -> str:
    """The name of a binary of the present source for this machine."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()
    return f"hot_path-{digest[:16]}-{platform.machine()}.so"


def compile_to(path: Path) -> str:
    """Compile the hot path; the compiler that did. The file appears whole or not at all. OSError where it fails."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C compiler ({', '.join(COMPILERS)})")
    handle, unfinished = tempfile.mkstemp(prefix=f"{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", unfinished, str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise OSError(f"{compiler} failed: {(done.stderr.strip() or 'it said nothing').splitlines()[0]}")
        os.chmod(unfinished, 0o755)
        os.replace(unfinished, path)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{compiler} took more than {error.timeout:.0f} s") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return compiler


def _prebuilt() -> tuple[Path, str]:
    path = SOURCE.with_name(file_name())
    if not path.exists():
        raise OSError("no prebuilt binary in the package")
    return path, f"prebuilt, {path.name}"


def _kept() -> tuple[Path, str]:
    """In the user's cache, compiled into it where it is not there yet."""
    path = cache_folder() / file_name()
    if not path.exists():
        compile_to(path)
    return path, f"compiled, {path}"


def _fresh() -> tuple[Path, str]:
    """Where nothing can be kept: compiled for this process alone, and removed once it is loaded."""
    with tempfile.TemporaryDirectory(prefix="trimaran-") as folder:
        path = Path(folder) / file_name()
        compiler = compile_to(path)
        _load(path)
    return path, f"compiled by {compiler} for this process alone"


@functools.cache
def _load(path: Path) -> Any:
    """Loaded with the interpreter's lock kept: these functions are short, and the one that is not runs from ORT."""
    library = ctypes.PyDLL(str(path))
    pointer = ctypes.c_void_p
    library.trimaran_table.argtypes, library.trimaran_table.restype = (ctypes.c_int64,), pointer
    library.trimaran_table_free.argtypes, library.trimaran_table_free.restype = (pointer,), None
    arguments = (pointer, pointer, ctypes.c_char_p, ctypes.c_size_t)
    library.trimaran_table_add.argtypes, library.trimaran_table_add.restype = arguments, pointer
    return library
