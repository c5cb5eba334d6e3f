"""A shared library without a compiler.

ONNX Runtime takes custom operators from a shared library that exports `RegisterCustomOps`. This module writes such a
file: about 500 bytes of ELF whose one function jumps to an address of this process, that of a ctypes callback.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_PAGE = 0x10000  # 64 KiB, the largest page of aarch64 kernels; what is mapped starts on such a boundary
_HEADER, _PROGRAM_HEADER, _SYMBOL = 64, 56, 24  # bytes
_EXECUTE, _WRITE, _READ = 1, 2, 4
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_DT_NULL, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT = 0, 4, 5, 6, 10, 11
_GLOBAL_FUNCTION = 0x12


def jump(machine: str, target: int) -> tuple[int, bytes]:
    """(ELF machine number, code that jumps to `target`). OSError for a machine that is neither x86-64 nor aarch64."""
    if machine in ("x86_64", "AMD64"):
        return 62, b"\xf3\x0f\x1e\xfa\x48\xb8" + struct.pack("<Q", target) + b"\xff\xe0"  # endbr64; movabs rax; jmp rax
    if machine in ("aarch64", "arm64"):
        # bti c; ldr x16, target; br x16; nop (so that the target stands on a multiple of 8)
        return 183, struct.pack("<IIIIQ", 0xD503245F, 0x58000070, 0xD61F0200, 0xD503201F, target)
    raise OSError(f"custom operators need x86-64 or aarch64, this machine is {machine}")


def elf(symbol: str, target: int, machine: str = "") -> bytes:
    """The shared library: `symbol` jumps to `target`. It has no sections, which only linkers read."""
    number, code = jump(machine or platform.machine(), target)
    names = b"\0" + symbol.encode() + b"\0"
    table = struct.pack("<5I", 1, 2, 1, 0, 0)  # hash table of one bucket: the null symbol and ours
    at_table = _HEADER + 4 * _PROGRAM_HEADER
    at_symbols = _aligned(at_table + len(table), 8)
    at_names = at_symbols + 2 * _SYMBOL
    at_code = _aligned(at_names + len(names), 16)
    at_dynamic = _aligned(at_code + len(code), 16)
    symbols = bytes(_SYMBOL) + struct.pack("<IBBHQQ", 1, _GLOBAL_FUNCTION, 0, 1, at_code, len(code))
    facts = [(_DT_HASH, at_table), (_DT_STRTAB, at_names), (_DT_SYMTAB, at_symbols), (_DT_STRSZ, len(names))]
    facts += [(_DT_SYMENT, _SYMBOL), (_DT_NULL, 0)]
    dynamic = b"".join(struct.pack("<QQ", *fact) for fact in facts)
    # The loader writes into the dynamic table, which lies in a page of its own: none is both writable and executable.
    segments = [
        (_PT_LOAD, _READ | _EXECUTE, 0, 0, at_code + len(code), _PAGE),
        (_PT_LOAD, _READ | _WRITE, at_dynamic, at_dynamic + _PAGE, len(dynamic), _PAGE),
        (_PT_DYNAMIC, _READ | _WRITE, at_dynamic, at_dynamic + _PAGE, len(dynamic), 8),
        (_PT_GNU_STACK, _READ | _WRITE, 0, 0, 0, 16),
    ]
    headers = b"".join(_program_header(*segment) for segment in segments)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bits, little endian, version 1
    sizes = (_HEADER, _PROGRAM_HEADER, len(segments), 64, 0, 0)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, number, 1, 0, _HEADER, 0, 0, *sizes)
    library = bytearray(at_dynamic + len(dynamic))
    parts = [(0, header + headers), (at_table, table), (at_symbols, symbols), (at_names, names), (at_code, code)]
    for offset, part in [*parts, (at_dynamic, dynamic)]:
        library[offset : offset + len(part)] = part
    return bytes(library)


@contextlib.contextmanager
def library_path(library: bytes) -> Iterator[str]:
    """A path by which the library can be loaded within the `with` block.

    It is an anonymous memory file, or where the system runs nothing from those, a temporary file that is removed after
    the block. OSError, saying what was tried, where neither can be loaded.
    """
    path, reasons = "", []
    places: list[tuple[str, Callable[[], str]]] = [("a memory file", functools.partial(_memory_file, library))]
    for folder in (tempfile.gettempdir(), "/dev/shm", "/var/tmp", str(Path.home())):
        places.append((folder, functools.partial(_temporary_file, library, folder)))
    for place, make in places:
        try:
            path = make()
            break
        except (OSError, AttributeError) as error:  # AttributeError: no memfd_create in this Python
            reasons.append(f"{place}: {error}")
    else:
        raise OSError("a shared library cannot be loaded from anywhere: " + "; ".join(reasons))
    try:
        yield path
    finally:
        if not path.startswith("/proc/"):
            Path(path).unlink(missing_ok=True)


@functools.cache
def _memory_file(library: bytes) -> str:
    """Stays open: the loader knows libraries by their paths, and a free number could become another file."""
    handle = os.memfd_create("trimaran")
    try:
        os.write(handle, library)
        return _loadable(f"/proc/self/fd/{handle}")
    except OSError:
        os.close(handle)
        raise


def _temporary_file(library: bytes, folder: str) -> str:
    handle, path = tempfile.mkstemp(prefix="trimaran-", suffix=".so", dir=folder)
    try:
        os.write(handle, library)
        return _loadable(path)
    except OSError:
        Path(path).unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _loadable(path: str) -> str:
    ctypes.CDLL(path)
    return path


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _program_header(kind: int, flags: int, offset: int, address: int, size: int, alignment: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, size, size, alignment)
