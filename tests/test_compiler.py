"""Compiling without a GPU, in the process that interprets, and launching with every option on one."""

import threading

import pytest
import torch
import triton
import triton.language as tl

from trimaran.kernels.catalog import OPS
from trimaran.kernels.compiler import compile_launch
from trimaran.kernels.contract import Attr, Device, Input, Launch, Op, Output, Scratch, Tensor
from trimaran.kernels.execute import execute
from trimaran.kernels.interpreter import interpret, interpreting
from trimaran.kernels.plans import make_plan
from trimaran.kernels.sizes import contiguous_strides
from trimaran.torch_path.ops import TORCH_OPS

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may have


def tensor(dtype, *shape, aligned=True):
    return Tensor(dtype, shape, contiguous_strides(shape), aligned)


def plans(capability, dtype):
    """A plan of each op with every optional input, and one with none, at the sizes that need most."""
    device = Device("cuda", 0, capability, 100, SHARED_MEMORY[capability] * 1024)
    rows = [tensor(dtype, 2, 128, 512)] * 3
    masks = [tensor(dtype, 2, 4, 128, 128), tensor("int32", 2), tensor("bool", 2, 128)]
    attrs = {"scale": 0.1, "num_heads": 4, "causal": True, "masked_row": "mean"}
    yield make_plan(OPS["attention"], [*rows, *masks], OPS["attention"].attributes(attrs), device, (True,))
    wide = [tensor(dtype, 2, 128, 4, 256)] * 3
    yield make_plan(OPS["attention"], wide + [None] * 3, OPS["attention"].attributes({"scale": 0.1}), device, (True,))
    norm = [tensor(dtype, 64, 768), tensor(dtype, 768), tensor(dtype, 768), tensor(dtype, 64, 768)]
    yield make_plan(OPS["layer_norm"], norm, OPS["layer_norm"].attributes({"eps": 1e-5}), device, (True, True))
    yield from linear_plans(device, dtype)
    q, angles = tensor(dtype, 2, 128, 12, 96), [tensor("float32", 512, 40)] * 2
    rotary = OPS["rotary_embedding"].attributes({"rotary_dim": 80, "interleaved": True})
    yield make_plan(OPS["rotary_embedding"], [q, *angles, q, tensor("int64", 2, 12)], rotary, device, (True, True))


def linear_plans(device, dtype):
    """The linear ops for one row, some and many, with constant weights and others, as they are and transposed."""
    for rows, constant, transpose in ((1, True, False), (128, False, True), (5000, True, False)):

        def weight(columns, depth, constant=constant, transpose=transpose):
            size = (depth, columns) if transpose else (columns, depth)
            return Tensor(dtype, size, contiguous_strides(size), constant=constant)

        attrs = {"activation": "gelu", "transpose_weight": transpose}
        x, up, bias = tensor(dtype, rows, 768), weight(3072, 768), tensor(dtype, 3072)
        linear = [x, up, bias, tensor(dtype, rows, 9216), up, None, up, bias]
        yield make_plan(OPS["linear"], linear, OPS["linear"].attributes(attrs), device, (True,))
        gated = [x, up, up, bias, bias]
        yield make_plan(OPS["gated_linear"], gated, OPS["gated_linear"].attributes(attrs), device, (True,))
        wide, sum, norm = tensor(dtype, rows, 3072), tensor(dtype, rows, 768), tensor(dtype, 768)
        end = [wide, weight(768, 3072), norm, sum, norm, norm]
        attrs = {"eps": 1e-5, "norm": "layer", "transpose_weight": transpose}
        yield make_plan(OPS["linear_norm"], end, OPS["linear_norm"].attributes(attrs), device, (True, False))


# Every architecture in half precision; the other dtypes on the oldest and on Hopper, whose tables are its own.
COMPILED = [(capability, "float16") for capability in SHARED_MEMORY]
COMPILED += [(capability, dtype) for capability in (80, 90) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        pytest.param(capability, dtype, marks=() if (capability, dtype) in COMPILED else pytest.mark.slow)
        for capability in SHARED_MEMORY
        for dtype in ("float32", "float16", "bfloat16")
    ],
)
def test_every_op_compiles_and_fits(capability, dtype):
    for launch in (launch for plan in plans(capability, dtype) for launch in plan.launches):
        binary = compile_launch(launch, capability)
        assert binary.cubin.startswith(b"\x7fELF")
        assert binary.shared <= SHARED_MEMORY[capability] * 1024, (launch.kernel.fn.__name__, launch.constexprs)
        own = 32 * launch.options["num_warps"]
        assert binary.threads == own or (
            binary.threads > own and launch.kernel.is_gluon()
        )  # its fetching warps come on top
        assert compile_launch(launch, capability) is binary


def test_what_is_stated_divisible_is_loaded_in_vectors():
    loads = []
    for aligned in (True, False):
        inputs = [tensor("float16", 64, 1024, aligned=aligned), None, None, None]
        device = Device("cuda", 0, 90, 132, 227 * 1024)
        attrs = OPS["layer_norm"].attributes({"eps": 1e-5})
        (launch,) = make_plan(OPS["layer_norm"], inputs, attrs, device, (True, False), aligned).launches
        assert [p.divisible for p in launch.params if p.place] == [aligned, aligned]
        loads.append(compile_launch(launch, 90))
    assert loads[0] is not loads[1]
    assert len(loads[0].cubin) < len(loads[1].cubin), "a few wide loads are less code than many narrow ones"


def test_interpreting_and_compiling_take_turns():
    x = torch.randn(3, 40)
    device = Device("cuda", 0, 90, 132, 227 * 1024)
    for columns in (40, 96, 200):
        with interpret():
            got, _ = TORCH_OPS["layer_norm"].overload(x, eps=1e-5)
        torch.testing.assert_close(got, torch.nn.functional.layer_norm(x, (40,)))
        inputs = [tensor("float32", 7, columns), None, None, None]
        attrs = OPS["layer_norm"].attributes({"eps": 1e-5})
        (launch,) = make_plan(OPS["layer_norm"], inputs, attrs, device, (True, False)).launches
        assert compile_launch(launch, 90).cubin


def test_interpretation_is_switched_and_switched_back():
    assert not interpreting()
    with interpret():
        assert interpreting()
        with interpret(False):
            assert not interpreting()
        assert interpreting()
    assert not interpreting()
    interpret()
    assert interpreting()
    interpret(False)
    assert not interpreting()


def test_threads_take_turns_in_the_interpreter():
    x = torch.randn(8, 33)
    expected = torch.nn.functional.layer_norm(x, (33,))
    right = []

    def work():
        got, _ = TORCH_OPS["layer_norm"].overload(x, eps=1e-5)
        right.append(torch.allclose(got, expected, atol=1e-5))

    with interpret():
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == [True] * 8


# ---- launching, with every option


@triton.jit
def double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def barrier_kernel(x_ptr, y_ptr, counter_ptr, n, BLOCK: tl.constexpr):
    """Every program waits for all others, which only a cooperative launch guarantees to end."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < tl.num_programs(0):
        pass
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def descriptor_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Tensor descriptors made on the device live in global memory that the launcher provides."""
    x = tl.make_tensor_descriptor(x_ptr, shape=[n], strides=[1], block_shape=[BLOCK])
    y = tl.make_tensor_descriptor(y_ptr, shape=[n], strides=[1], block_shape=[BLOCK])
    start = tl.program_id(0) * BLOCK
    y.store([start], 2 * x.load([start]))


def doubling(kernel, **options):
    """An op that doubles x [n] by the kernel."""

    def plan(inputs, outputs, attrs, device):
        n = inputs.x.shape[0]
        args = {"x_ptr": inputs.x, "y_ptr": outputs.y, "n": n}
        if "counter_ptr" in kernel.arg_names:
            args["counter_ptr"] = Scratch("int32", 1, zero=True)
        return [Launch(kernel, (n // 64,), args, {"BLOCK": 64}, options)]

    infer = lambda inputs, attrs: (Tensor(inputs.x.dtype, inputs.x.shape),)  # noqa: E731
    none = lambda *_, **__: None  # noqa: E731
    attrs = (Attr("unused", "int", 0),)
    return Op("double", 1, (Input("x"),), (Output("y"),), attrs, {"T": ("float32",)}, infer, plan, none, none)


CASES = {
    "plain": (double_kernel, {}),
    "dependent launch": (double_kernel, {"launch_pdl": True}),
    "cluster": (double_kernel, {"num_ctas": 2}),
    "few registers": (double_kernel, {"maxnreg": 32}),
    "cooperative": (barrier_kernel, {"launch_cooperative_grid": True}),
    "global scratch": (descriptor_kernel, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_options_reach_the_binary(case):
    kernel, options = CASES[case]
    device = Device("cuda", 0, 90, 132, 227 * 1024)
    op = doubling(kernel, **options)
    (launch,) = make_plan(op, [tensor("float32", 4096)], op.attributes({}), device, (True,)).launches
    binary = compile_launch(launch, 90)
    assert binary.launch_pdl == options.get("launch_pdl", False)
    assert binary.launch_cooperative_grid == options.get("launch_cooperative_grid", False)
    assert binary.num_ctas == options.get("num_ctas", 1)
    assert (binary.global_scratch > 0) == (case == "global scratch")


def launch_on_gpu(case, x, index=0):
    from trimaran.kernels.driver import driver

    kernel, options = CASES[case]
    op, executor = doubling(kernel, **options), driver(index)
    plan = make_plan(op, [tensor("float32", *x.shape)], op.attributes({}), executor.device, (True,))
    y = torch.full_like(x, float("nan"))
    held = []

    def allocate(count):
        held.append(torch.full((count,), 255, dtype=torch.uint8, device=x.device))
        return held[-1].data_ptr()

    stream = torch.cuda.current_stream().cuda_stream
    work = plan.evaluate((x.shape[0], 1))
    execute(plan, work, [x.data_ptr()], [y.data_ptr()], executor, allocate, stream)
    torch.cuda.synchronize()
    return y, held


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_options_on_a_gpu(case):
    x = torch.randn(4096, device="cuda")
    for _ in range(3):
        y, held = launch_on_gpu(case, x)
        assert torch.equal(y, 2 * x)
    assert len(held) == (1 if case in ("cooperative", "global scratch") else 0)


@pytest.mark.gpu
def test_a_thread_without_a_context():
    x = torch.randn(4096, device="cuda")
    results = []
    thread = threading.Thread(target=lambda: results.append(bare_launch(x)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(results[0], 2 * x)


def bare_launch(x):
    """As ONNX Runtime's own threads would: nothing of torch's has run on this thread."""
    from trimaran.kernels.driver import driver

    op = doubling(double_kernel)
    plan = make_plan(op, [tensor("float32", *x.shape)], op.attributes({}), driver(0).device, (True,))
    y = torch.empty_like(x)
    execute(plan, plan.evaluate((x.shape[0], 1)), [x.data_ptr()], [y.data_ptr()], driver(0), lambda count: 0)
    return y


@pytest.mark.gpu
def test_driver_errors_say_what_failed():
    from trimaran.kernels import cuda

    with pytest.raises(cuda.CudaError, match=r"cuDeviceGet: .*\(CUresult \d+\)"):
        cuda.device(99)
