"""The user's own folder for what is compiled once and kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`~/.cache/trimaran`, made where it is missing. OSError where there is none, or others might write into it."""
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(f"no home folder: {error}") from error
    return own_folder(home / ".cache" / "trimaran")


def own_folder(path: Path) -> Path:
    """The folder, made where it is missing. OSError where others than this user might write into it: what lies there
    is loaded as code."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OSError(f"{path} is not a folder of this user's alone (mode 700)")
    return path


def write_whole(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    handle, unfinished = tempfile.mkstemp(prefix=f"{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
