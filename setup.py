"""Puts the C hot path into the wheel, compiled, where the building machine has a C compiler; the rest is in
pyproject.toml.

The binary links the C library alone, so such a wheel is one for each platform, not for each Python. Its tag names the
oldest C library that has what the binary asks for (PEP 600).
"""

import platform
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDER = "trimaran/ort_ops"

sys.path.insert(0, str(Path(__file__).parent / "src"))
from trimaran.ort_ops.native import compile_to, file_name  # noqa: E402  # it needs nothing but the standard library


class BuildWithHotPath(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout compiles its own on first use
            return
        try:
            compile_to(Path(self.build_lib) / FOLDER / file_name())
        except OSError as error:
            self.warn(f"the wheel gets no compiled hot path: {error}")


class WheelWithHotPath(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        binary = next((Path(self.bdist_dir) / FOLDER).glob("hot_path-*.so"), None)
        return ("py3", "none", platform_tag(binary.read_bytes())) if binary else super().get_tag()


def platform_tag(binary: bytes) -> str:
    asked = [int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", binary)]
    if not asked:  # of another C library
        return sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"manylinux_2_{max(5, *asked)}_{platform.machine()}"


setup(cmdclass={"build_py": BuildWithHotPath, "bdist_wheel": WheelWithHotPath})
