"""The ops under other releases of onnxruntime, each in an environment of its own, on the CPU."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ["1.20.1", "1.22.1", "1.24.4", "1.28.0"]  # beside the one that the other tests run with
FILES = [*sorted(path.name for path in ROOT.glob("tests/test_ort_*.py")), "test_runner.py", "test_triton_op.py"]
FILES.remove("test_ort_versions.py")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_of_onnxruntime(release: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", f"onnxruntime=={release}"]
    subprocess.run(install, check=True, timeout=600)
    scheme = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    # Everything else is borrowed from the environment of the tests; what is installed here comes first.
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT / 'src'}\n", encoding="utf-8")
    version = [python, "-c", "import onnxruntime; print(onnxruntime.__version__)"]
    found = subprocess.run(version, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert found.strip() == release
    tests = [str(ROOT / "tests" / name) for name in FILES]
    fewer = ["-k", "not torch.float16"]  # to ONNX Runtime fp16 is what bf16 and fp32 are
    command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *fewer, *tests]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
