"""The library that is written without a compiler, and loaded without a file where that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from ort import CPU, failure, model, quiet, session_of

from trimaran.kernels.catalog import OPS
from trimaran.kernels.layer_norm import layer_norm
from trimaran.ort_ops import stub_library
from trimaran.ort_ops.session import register

pytestmark = pytest.mark.usefixtures("interpreted")


def test_a_temporary_file_where_memory_files_do_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(13, "memfd_noexec")

    monkeypatch.setattr(stub_library.os, "memfd_create", refuse)
    monkeypatch.setattr(stub_library.tempfile, "gettempdir", lambda: str(tmp_path))
    stub_library._memory_file.cache_clear()
    session = session_of(model(layer_norm, {"x": torch.zeros(2, 8)}, ["y"], eps=1e-5))
    assert list(tmp_path.iterdir()) == []
    assert session.run(None, {"x": torch.zeros(2, 8).numpy()})[0].shape == (2, 8)
    stub_library._memory_file.cache_clear()


def test_no_library_can_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: operation not permitted")

    monkeypatch.setattr(stub_library.ctypes, "CDLL", refuse)
    monkeypatch.setattr(stub_library.tempfile, "gettempdir", lambda: str(tmp_path))
    stub_library._memory_file.cache_clear()
    options = quiet()
    with pytest.raises(OSError, match=r"a memory file: .*not permitted; .*" + str(tmp_path)):
        register(options, [CPU])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert register(options, [CPU]) == tuple(OPS)  # nothing was left half done


def test_the_code_of_the_stub() -> None:
    target = 0x0123456789ABCDEF
    assert stub_library.jump("x86_64", target)[1][4:].hex() == "48b8" + target.to_bytes(8, "little").hex() + "ffe0"
    machine, code = stub_library.jump("aarch64", target)
    words = [int.from_bytes(code[at : at + 4], "little") for at in range(0, 16, 4)]
    load = words[1]
    assert load >> 24 == 0x58  # ldr of 64 bits, relative to its own address
    assert load & 31 == 16  # into x16, which a jump between functions may overwrite
    assert 4 + 4 * (load >> 5 & 0x7FFFF) == 16  # the target's offset
    assert words[2] == 0xD61F0000 | 16 << 5  # br x16
    assert int.from_bytes(code[16:], "little") == target
    library = stub_library.elf("RegisterCustomOps", target, "aarch64")
    assert (machine, library[18], library[:4]) == (183, 183, b"\x7fELF")
    assert library.index(code) % 8 == 0
    with pytest.raises(OSError, match="riscv64"):
        stub_library.elf("RegisterCustomOps", target, "riscv64")


def test_the_library_by_its_path_is_refused() -> None:
    from trimaran.ort_ops.domain import _stub

    session_of(model(layer_norm, {"x": torch.zeros(2, 8)}, ["y"], eps=1e-5))
    with stub_library.library_path(_stub()) as path:
        text = failure(lambda: onnxruntime.SessionOptions().register_custom_ops_library(path))
    assert "cannot be registered by its path" in text
