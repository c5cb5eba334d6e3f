"""The rules of the house: lean imports, floors, no package named `kernels`, and one wheel however it is built."""

import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimaran.ort_ops.native import file_name, native

ROOT = Path(__file__).resolve().parents[1]
FACE = "src/trimaran"
FLOORS = {"kernels": 1, "torch_path": 2, "ort_ops": 2, "export": 3, "benchmarks": 4}
FACE_FLOOR = 5
FOLDERS = sorted(FLOORS)
VERBS = {"optimize_model", "restore", "report", "Report", "interpret", "ort_session", "export_onnx", "rewrite_onnx"}
VERBS |= {"Runner", "Domain", "triton_op"}
HEAVY = {"torch", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "triton", "transformers", "numpy"}


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """The output of a command, or a failed test that shows why it ended."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, **environment: str) -> str:
    """Run `code` in a process of its own, from the repository's root."""
    return run(sys.executable, "-c", code, **environment)


# The face


def test_importing_trimaran_is_lean() -> None:
    code = f"import sys, trimaran; dir(trimaran); print(*({HEAVY!r} & set(sys.modules)))"
    assert python(code, PYTHONPATH=str(ROOT / "src")).split() == []


def test_dir_lists_the_verbs() -> None:
    import trimaran

    assert set(dir(trimaran)) >= {*VERBS, "__version__"}
    assert trimaran.__version__


@pytest.mark.parametrize("name", sorted(VERBS))
def test_a_verb_is_never_the_module_of_its_name(name: str) -> None:
    import trimaran

    for _ in range(2):  # looked up, then remembered
        value = getattr(trimaran, name)
        assert callable(value)
        assert not isinstance(value, types.ModuleType)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import trimaran

    with pytest.raises(AttributeError, match="no attribute 'optimise_model'"):
        trimaran.optimise_model  # noqa: B018


# What is installed here


def info(prelude: str = "pass") -> dict[str, Any]:
    """What `trimaran info --json` says in a process that ran `prelude` first."""
    code = f"import sys\n{prelude}\nsys.argv[1:] = ['info', '--json']\nfrom trimaran.cli import main; main()"
    found: dict[str, Any] = json.loads(python(code, PYTHONPATH=str(ROOT / "src")))
    return found


def test_info_tells_what_is_here() -> None:
    found = info()
    assert {package["name"] for package in found["packages"] if package["version"]} >= {"torch", "triton", "onnx"}
    assert bool(found["devices"]) != bool(found["no_devices"])
    assert "CPUExecutionProvider" in found["providers"]
    assert {"attention", "layer_norm"} <= {op["name"] for op in found["ops"]}
    assert found["hot_path"].split(",")[0].split(" by ")[0] in ("prebuilt", "compiled", "none")
    for op in found["ops"]:
        runtimes = {registration["runtime"]: registration for registration in op["registrations"]}
        assert runtimes["torch"]["registered"], runtimes["torch"]["reason"]
        assert runtimes["onnxruntime"]["registered"] == ("CUDAExecutionProvider" in found["providers"])


@pytest.mark.parametrize(
    ("cuda", "note"),
    [
        (None, "built without CUDA"),
        ("13.0", "built for CUDA 13.0"),
        ("12.8", "built for CUDA 12.8, which is unmeasured"),
    ],
)
def test_info_says_which_cuda_was_never_run(cuda: str | None, note: str) -> None:
    from trimaran import info

    assert info._torch_build(types.SimpleNamespace(version=types.SimpleNamespace(cuda=cuda))) == note


def test_info_without_packages() -> None:
    gone = HEAVY | {"cupy"}
    found = info(f"""
from importlib import metadata
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {gone!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
def version(name):
    raise metadata.PackageNotFoundError(name)
sys.meta_path.insert(0, Nothing())
metadata.version = version
""")
    assert [package["version"] for package in found["packages"]] == [None] * len(found["packages"])
    assert found["no_ops"] == "triton is not installed"
    assert bool(found["devices"]) != bool(found["no_devices"]), "which the driver tells without Triton"
    assert "triton" not in found["no_devices"]
    assert found["no_providers"] == "onnxruntime is not installed"


def test_info_with_broken_packages() -> None:
    found = info("""
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "onnxruntime"):
            raise OSError(f"lib{name}.so: undefined symbol\\nand more")
sys.meta_path.insert(0, Broken())
""")
    notes = {package["name"]: package["note"] for package in found["packages"]}
    assert notes["torch"] == "torch cannot be imported: OSError: libtorch.so: undefined symbol"
    assert found["no_providers"] == "onnxruntime cannot be imported: OSError: libonnxruntime.so: undefined symbol"
    for op in found["ops"]:
        assert not any(registration["registered"] for registration in op["registrations"])


def test_info_tells_devices() -> None:
    found = info("""
from trimaran.kernels import contract, cuda
def call(name, *arguments):
    if name == "cuDeviceGetCount":
        arguments[0]._obj.value = 2
    elif name == "cuDeviceGet":
        arguments[0]._obj.value = arguments[1]
    else:
        arguments[0].value = b"GPU %d" % arguments[2].value
cuda.call = call
cuda.device = lambda index: contract.Device("cuda", index, 100 + index)
""")
    assert found["no_devices"] == ""
    assert found["devices"] == [
        {"index": 0, "name": "GPU 0", "capability": [10, 0]},
        {"index": 1, "name": "GPU 1", "capability": [10, 1]},
    ]


def test_info_for_a_terminal() -> None:
    code = "import sys; sys.argv[1:] = ['info']; from trimaran.cli import main; main()"
    text = python(code, PYTHONPATH=str(ROOT / "src"), COLUMNS="200")
    for word in ("torch", "attention", "CUDA device", "ONNX Runtime's providers", "C hot path"):
        assert word in text


# The floors


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Each imported name (dotted, also what a `from` takes), its line, and whether importing the file runs it."""
    later = {id(inner) for node in ast.walk(tree) for part in postponed(node) for inner in ast.walk(part)}
    for node in ast.walk(tree):
        for name, line in imported(node):
            yield name, line, id(node) not in later


def postponed(node: ast.AST) -> list[ast.stmt]:
    """The statements under `node` that importing the file does not run."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return node.body
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return node.body
    return []


def imported(node: ast.AST) -> list[tuple[str, int]]:
    """What one statement or call imports, with leading dots as written, and its line."""
    if isinstance(node, ast.Import):
        return [(alias.name, node.lineno) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = "." * node.level + (f"{node.module}." if node.module else "")
        return [(base + alias.name, node.lineno) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
        return [(str(argument.value), node.lineno) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def absolute(name: str, path: str) -> str:
    """`name` without leading dots, as imported by the file at `path`."""
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    module = path.removeprefix("src/trimaran/").removesuffix(".py").split("/")
    package = ["trimaran", *module[:-1]]
    return ".".join([*package[: len(package) - level + 1], name[level:]])


def complaint(path: str, name: str, on_import: bool) -> str:
    """Why the file at `path` may not import `name`; empty where it may."""
    here = path.split("/")[0]
    top, _, rest = name.partition(".")
    if top in FLOORS:
        return f"the bare name {top}, which is another package's: write trimaran.{top}"
    if here == "kernels" and top in ("onnx", "onnxruntime", "onnxscript", "onnx_ir"):
        return f"{top} in kernels/"
    if here == "kernels" and top == "torch" and on_import:
        return "torch outside a function of kernels/"
    if top != "trimaran" or here == "tests":
        return ""
    there = rest.split(".")[0]
    if FLOORS.get(there, FACE_FLOOR) > FLOORS.get(here, FACE_FLOOR):
        return f"{name}, which stands on a higher floor"
    if {here, there} == {"torch_path", "ort_ops"}:
        return f"{name}: torch_path and ort_ops never import each other"
    return ""


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (from the repository's root) imports against the rules."""
    found = []
    for name, line, on_import in imports(ast.parse(source)):
        if reason := complaint(path, absolute(name, path), on_import):
            found.append(f"{path}:{line} imports {reason}")
    return found


def sources() -> list[Path]:
    """Every Python file of the project; pathlib does not follow the symlinks in src/trimaran."""
    return sorted(path for folder in (*FOLDERS, FACE, "tests") for path in (ROOT / folder).rglob("*.py"))


def test_a_floor_imports_only_lower_floors() -> None:
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sources()}
    assert len(files) > 10
    assert [line for path, source in files.items() for line in violations(path, source)] == []


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("kernels/a.py", "from trimaran.torch_path import optimize", "higher floor"),
        ("kernels/a.py", "def f():\n    from trimaran import export", "higher floor"),
        ("kernels/a.py", "from ..ort_ops import session", "higher floor"),
        ("kernels/a.py", "from .. import benchmarks", "higher floor"),
        ("torch_path/rules/a.py", "from ...export import names", "higher floor"),
        ("ort_ops/a.py", "import trimaran", "higher floor"),
        ("ort_ops/a.py", "from trimaran import ort_session", "higher floor"),
        ("export/a.py", "if TYPE_CHECKING:\n    import trimaran.benchmarks.table", "higher floor"),
        ("benchmarks/a.py", "from trimaran.cli import app", "higher floor"),
        ("export/a.py", "import importlib\nimportlib.import_module('trimaran.benchmarks.table')", "higher floor"),
        ("torch_path/a.py", "from trimaran.ort_ops import session", "never import each other"),
        ("ort_ops/a.py", "def f():\n    import trimaran.torch_path.report", "never import each other"),
        ("kernels/a.py", "import onnx.helper", "onnx in kernels/"),
        ("kernels/a.py", "def f():\n    from onnxruntime import OrtValue", "onnxruntime in kernels/"),
        ("kernels/a.py", "import torch", "torch outside a function"),
        ("kernels/a.py", "try:\n    from torch import nn\nexcept ImportError:\n    pass", "torch outside a function"),
        ("kernels/a.py", "class A:\n    import torch.nn", "torch outside a function"),
        ("kernels/a.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "torch outside a function"),
        ("kernels/a.py", "if not TYPE_CHECKING:\n    import torch", "torch outside a function"),
        ("tests/a.py", "from kernels.attention import attention", "bare name kernels"),
        ("src/trimaran/a.py", "import export", "bare name export"),
        ("benchmarks/a.py", "def f():\n    __import__('benchmarks.table')", "bare name benchmarks"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str, reason: str) -> None:
    (found,) = violations(path, source)
    assert reason in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/a.py", "import triton\nfrom trimaran.kernels.contract import Op\nfrom .sizes import differ"),
        ("kernels/a.py", "def f():\n    import torch"),
        ("kernels/a.py", "if TYPE_CHECKING:\n    import torch"),
        ("torch_path/rules/a.py", "import torch\nfrom trimaran.kernels import catalog\nfrom ..report import Report"),
        ("export/a.py", "from trimaran.torch_path import rules\nfrom trimaran.ort_ops.session import ort_session"),
        ("benchmarks/a.py", "from torch import export"),
        ("src/trimaran/a.py", "import trimaran\nfrom trimaran.info import collect\nfrom . import benchmarks"),
        ("tests/a.py", "import trimaran\nfrom trimaran.benchmarks import table"),
    ],
)
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert violations(path, source) == []


# The folder named kernels


def test_the_folders_are_symlinked_and_have_no_init() -> None:
    """With an __init__.py, transformers would take `kernels` for Hugging Face's package of that name."""
    for folder in FOLDERS:
        link = ROOT / FACE / folder
        assert link.is_symlink()
        assert os.readlink(link) == f"../../{folder}"
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertModel"])
def test_transformers_imports_from_the_repository_root(name: str) -> None:
    pytest.importorskip("transformers")
    code = f"import os, sys; assert {{'', os.getcwd()}} & set(sys.path); from transformers import {name}; print({name})"
    assert name in python(code)


# Packaging


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, since building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (*FOLDERS, "src", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def from_tree(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("from_tree"), "--wheel")


def build_wheel(source: Path, out: Path, *options: str) -> Path:
    """The wheel that `python -m build` makes: of the sdist that it makes first, or of the tree with --wheel."""
    run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), str(source))
    (wheel,) = out.glob("*.whl")
    return wheel


def wheel_contents(path: Path) -> dict[str, str]:
    """Name -> digest of each file in a wheel."""
    with zipfile.ZipFile(path) as wheel:
        return {name: hashlib.sha256(wheel.read(name)).hexdigest() for name in wheel.namelist()}


def package_files(checkout: Path) -> dict[str, Path]:
    """Each Python file of the package: where it stands in a wheel -> where it stands in the checkout."""
    paths = [path for folder in (*FOLDERS, FACE) for path in (checkout / folder).rglob("*.py")]
    return {f"trimaran/{path.relative_to(checkout).as_posix().removeprefix(FACE + '/')}": path for path in paths}


@pytest.mark.slow
def test_the_wheel_holds_the_folders_as_files_and_no_tests(checkout: Path, from_tree: Path) -> None:
    contents = wheel_contents(from_tree)
    for name, path in package_files(checkout).items():
        assert contents.get(name) == hashlib.sha256(path.read_bytes()).hexdigest(), name
    assert {"trimaran/py.typed", "trimaran/ort_ops/hot_path.c"} <= {*contents}
    assert (file_name() in {name.split("/")[-1] for name in contents}) == (from_tree.name != pure_name(from_tree))
    tops = {name.split("/")[0] for name in contents}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"trimaran"}
    assert not [name for name in contents if "__pycache__" in name or "/tests/" in name]


def pure_name(wheel: Path) -> str:
    """The name that a wheel without the compiled hot path has."""
    return f"{'-'.join(wheel.name.split('-')[:2])}-py3-none-any.whl"


@pytest.mark.slow
@pytest.mark.skipif(native().library is None, reason="no C compiler here")
def test_a_wheel_brings_the_hot_path_compiled(from_tree: Path, tmp_path: Path) -> None:
    """Into an environment of its own, which has neither a compiler nor a binary that was compiled before."""
    assert re.fullmatch(
        r"trimaran-[^-]+-py3-none-(manylinux_2_\d+|linux)_" + platform.machine() + ".whl", from_tree.name
    )
    with zipfile.ZipFile(from_tree) as wheel:
        assert b"libcuda" not in wheel.read(f"trimaran/ort_ops/{file_name()}")
    executable, _ = borrowing(tmp_path / "venv")
    install(executable, str(from_tree))
    code = """
import numpy, onnx, trimaran
from trimaran.ort_ops.kernel import KERNELS
from trimaran.ort_ops.native import native
model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 17, "trimaran" : 1]>'
    'net (float[n, 8] x) => (float[n, 8] y) { y = trimaran.layer_norm <eps = 1.0> (x) }')
with trimaran.interpret():
    session = trimaran.ort_session(model.SerializeToString())
assert not session.run(None, {"x": numpy.ones((3, 8), "f")})[0].any()
print(trimaran.__file__, [type(kernel).__name__ for kernel in KERNELS.values()], native().how, sep="\\n")
"""
    environment = {"PYTHONPATH": "", "HOME": str(tmp_path), "PATH": str(tmp_path)}
    file, kernels, how = run(str(executable), "-c", code, cwd=tmp_path, **environment).splitlines()
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert (kernels, how) == ("['HotKernel']", f"prebuilt, {file_name()}")


@pytest.mark.slow
def test_the_wheel_from_the_sdist_is_the_wheel_from_the_tree(checkout: Path, from_tree: Path, tmp_path: Path) -> None:
    assert wheel_contents(build_wheel(checkout, tmp_path)) == wheel_contents(from_tree)


@pytest.mark.slow
def test_every_module_imports_from_a_wheel_without_its_checkout(
    checkout: Path, from_tree: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    install(sys.executable, "--target", str(target), str(from_tree))
    check_modules(checkout, sys.executable, target / "trimaran", cwd=tmp_path, PYTHONPATH=str(target))


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["regular", "editable"])
def test_every_module_imports_from_an_installed_checkout(checkout: Path, tmp_path: Path, editable: bool) -> None:
    executable, site = borrowing(tmp_path / "venv")
    install(executable, "--no-build-isolation", *(["--editable"] if editable else []), str(checkout))
    home = checkout if editable else site / "trimaran"
    check_modules(checkout, executable, home, cwd=tmp_path, PYTHONPATH="")
    assert (tmp_path / "venv" / "bin" / "trimaran").exists()


def borrowing(home: Path) -> tuple[Path, Path]:
    """A new environment: its Python, and the folder of its packages."""
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    # What the package needs is borrowed from the environment of the tests. As a .pth file's entry its own .pth files do
    # not count, so an editable install there does not show through.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return home / "bin" / "python", site


def install(executable: str | Path, *arguments: str) -> None:
    run(str(executable), "-m", "pip", "install", "--quiet", "--no-deps", *arguments)


def check_modules(checkout: Path, executable: str | Path, home: Path, cwd: Path, **environment: str) -> None:
    """Import every module in one process, and see that it came from `home`."""
    names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in package_files(checkout)]
    code = f"""
import importlib, pathlib
home = pathlib.Path({str(home)!r}).resolve()
for name in {names!r}:
    path = pathlib.Path(importlib.import_module(name).__file__).resolve()
    assert home in path.parents, f"{{name}} came from {{path}}, expected {{home}}"
"""
    run(str(executable), "-c", code, cwd=cwd, **environment)
