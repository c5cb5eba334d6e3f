"""Binaries on disk: compiled once, by what they depend on, in a folder that is the user's own, and never half there."""

import threading

import pytest
import triton
import triton.language as tl
from test_compiler import doubling, tensor

from trimaran.kernels import compiler
from trimaran.kernels.compiler import compile_all, compile_launch, file_name
from trimaran.kernels.contract import Device
from trimaran.kernels.plans import make_plan

HOPPER = Device("cuda", 0, 90, 132, 227 * 1024)


@triton.jit
def factor():
    return 2


@triton.jit
def double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, factor() * tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def wrong_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), nothing_of_that_name)  # noqa: F821


def launch_of(kernel=double_kernel, aligned=True, **options):
    op = doubling(kernel, **options)
    (launch,) = make_plan(op, [tensor("float32", 4096, aligned=aligned)], op.attributes({}), HOPPER, (True,)).launches
    return launch


class Processes:
    """What a new process would do; counts what it compiles."""

    def __init__(self, monkeypatch, home):
        self.patch, self.compiled, self.compile = monkeypatch, [], compiler._compile
        monkeypatch.setattr(compiler, "_compile", self.counted)
        monkeypatch.setattr("pathlib.Path.home", lambda: home)
        self.folder = home / ".cache" / "trimaran" / "kernels"

    def counted(self, launch, capability):
        self.compiled.append(launch.kernel.__name__)
        return self.compile(launch, capability)

    def new(self):
        self.patch.setattr(compiler, "_BINARIES", {})
        self.compiled.clear()


@pytest.fixture
def processes(monkeypatch, tmp_path):
    made = Processes(monkeypatch, tmp_path)
    made.new()
    return made


def test_a_second_process_compiles_nothing(processes):
    first = compile_launch(launch_of(), 90)
    assert compile_launch(launch_of(), 90) is first
    assert processes.compiled == ["double_kernel"]
    assert processes.folder.stat().st_mode & 0o777 == 0o700
    processes.new()
    second = compile_launch(launch_of(), 90)
    assert processes.compiled == []
    assert vars(second) == vars(first)


@pytest.mark.parametrize("change", ["cut off", "another byte", "no JSON", "another field", "empty"])
def test_a_damaged_file_is_made_again(processes, change):
    whole = compile_launch(launch_of(), 90)
    (path,) = processes.folder.iterdir()
    content = path.read_bytes()
    damaged = {
        "cut off": content[:-100],
        "another byte": content[:-1] + bytes([content[-1] ^ 1]),
        "no JSON": b"?" + content,
        "another field": content.replace(b'"shared"', b'"shores"'),
        "empty": b"",
    }[change]
    path.write_bytes(damaged)
    processes.new()
    assert vars(compile_launch(launch_of(), 90)) == vars(whole)
    assert processes.compiled == ["double_kernel"]
    assert path.read_bytes() == content


def test_a_folder_that_others_may_write_into_is_not_used(processes):
    processes.folder.mkdir(parents=True)
    processes.folder.chmod(0o777)
    assert compile_launch(launch_of(), 90).cubin
    assert list(processes.folder.iterdir()) == []


def test_a_name_for_all_that_a_binary_depends_on(monkeypatch):
    name = file_name(launch_of(), 90)
    assert file_name(launch_of(), 90) == name
    others = [
        file_name(launch_of(), 80),
        file_name(launch_of(aligned=False), 90),
        file_name(launch_of(num_warps=8), 90),
        file_name(launch_of(launch_pdl=True), 90),
    ]
    compiler._triton.cache_clear()
    monkeypatch.setattr(triton, "__version__", "0.0")
    others.append(file_name(launch_of(), 90))
    compiler._triton.cache_clear()
    assert len({name, *others}) == 6


def test_a_name_for_what_a_kernel_calls(monkeypatch):
    """The source of a function that it calls, too."""
    name = file_name(launch_of(), 90)
    monkeypatch.setattr(double_kernel, "hash", None)
    changed = factor.src.replace("return 2", "return 3")
    factor._unsafe_update_src(changed)
    try:
        assert file_name(launch_of(), 90) != name
    finally:
        factor._unsafe_update_src(changed.replace("return 3", "return 2"))


def test_many_are_made_side_by_side_and_each_once(processes):
    launches = [launch_of(num_warps=warps) for warps in (1, 2, 4, 8, 4, 2)] + [launch_of(wrong_kernel)]
    threads = [threading.Thread(target=compile_all, args=(launches, 90)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert processes.compiled.count("double_kernel") == 4
    assert compile_all(launches[:-1], 90) == 0
    with pytest.raises(Exception, match="nothing_of_that_name"):  # as ever, where it is needed
        compile_launch(launches[-1], 90)
    processes.new()
    assert compile_all(launches[:-1], 90) == 4
    assert processes.compiled == []
