"""The Gluon kernel of attention: when it is chosen, that it compiles, and on a Hopper GPU what it computes."""

import itertools

import pytest
import torch
from oracle import assert_close, run_kernel, widened

from trimaran.kernels.attention import LONG, MEDIUM, attention, attention_reference
from trimaran.kernels.attention_hopper import attention_hopper_kernel
from trimaran.kernels.compiler import compile_launch
from trimaran.kernels.contract import Device, Tensor
from trimaran.kernels.plans import make_plan
from trimaran.kernels.sizes import contiguous_strides

HOPPER = Device("cuda", 0, 90, 132, 227 * 1024)
COMPILED = [(64, False, "float16"), (128, True, "bfloat16")]  # each takes seconds; all of them in the slow tests
ON_HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="this kernel is for Hopper"
)


def tensor(*shape, dtype="float16", aligned=True, strides=None):
    return Tensor(dtype, shape, strides or contiguous_strides(shape), aligned)


def launch_of(change=None, attrs=None, device=HOPPER, dtype="float16", head_dim=64, keys=2048, queries=300):
    q, kv = (tensor(2, 4, size, head_dim, dtype=dtype) for size in (queries, keys))
    inputs = {"q": q, "k": kv, "v": kv, "bias": None, "key_lengths": None, "key_mask": None} | (change or {})
    plan = make_plan(
        attention, list(inputs.values()), attention.attributes({"scale": 0.1} | (attrs or {})), device, (True,)
    )
    return plan.launches[0]


def is_hopper(launch):
    return launch.kernel is attention_hopper_kernel


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, True),
        ({"dtype": "bfloat16"}, True),
        ({"head_dim": 40}, True),
        ({"head_dim": 128}, True),
        ({"attrs": {"causal": True}}, True),
        ({"change": {"key_lengths": tensor(2, dtype="int32")}}, True),
        ({"dtype": "float32"}, False),
        ({"head_dim": 136}, False),
        ({"head_dim": 36}, False),  # rows of 72 bytes
        ({"keys": MEDIUM + 1}, True),
        ({"keys": MEDIUM}, False),
        ({"keys": LONG, "attrs": {"causal": True}}, False),
        ({"device": Device("cuda", 0, 80, 108, 160 * 1024)}, False),
        ({"device": Device("cuda", 0, 100, 148, 227 * 1024)}, False),
        ({"attrs": {"scale": -0.1}}, False),
        ({"attrs": {"softcap": 3.0}}, False),
        ({"attrs": {"window_left": 9}}, False),
        ({"attrs": {"window_right": 9}}, False),
        ({"attrs": {"masked_row": "mean"}}, False),
        ({"change": {"bias": tensor(1, 4, 300, 2048)}}, False),
        ({"change": {"key_mask": tensor(2, 2048, dtype="bool")}}, False),
        ({"change": {"v": tensor(2, 4, 2048, 64, aligned=False)}}, False),
        ({"change": {"q": tensor(2, 4, 300, 64, aligned=False)}}, False),
        ({"change": {"v": tensor(2, 4, 2048, 64, strides=(0, 2048 * 64, 64, 1))}}, False),  # one for all batches
        ({"change": {"v": tensor(2, 4, 2048, 64, strides=(4 * 2048 * 68, 2048 * 68, 68, 1))}}, False),
    ],
)
def test_when_it_is_chosen(given, chosen):
    assert is_hopper(launch_of(**given)) == chosen


@pytest.mark.parametrize(
    ("head_dim", "causal", "dtype"),
    [
        pytest.param(*case, marks=() if case in COMPILED else pytest.mark.slow)
        for case in itertools.product((64, 128), (False, True), ("float16", "bfloat16"))
    ],
)
def test_it_compiles_and_fits(head_dim, causal, dtype):
    given = {"key_lengths": tensor(2, dtype="int32")} if causal else {}
    launch = launch_of(given, {"causal": causal}, dtype=dtype, head_dim=head_dim)
    binary = compile_launch(launch, 90)
    assert binary.cubin.startswith(b"\x7fELF")
    assert binary.shared <= HOPPER.shared_memory
    assert binary.threads == (512 if head_dim == 64 and not causal else 384)  # the consumers' warps and four more


def test_one_plan_serves_every_size_beyond_its_bound():
    """Programs are as many as multiprocessors, or tiles where these are fewer."""
    q, kv = tensor(2, 2, 640, 64), tensor(2, 2, 2048, 64)
    plan = make_plan(attention, [q, kv, kv] + [None] * 3, attention.attributes({"scale": 1.0}), HOPPER, (True,))
    values = [(b, 4, s, 64, 4 * s * 64, s * 64, 64, 1) for b, s in ((3, 5000), (2, 1500))]
    grids = [plan.evaluate(size * 3).launches[0][0] for size in values]
    assert all(plan.holds(size * 3) for size in values)
    assert grids == [(132, 1, 1), (64, 1, 1)]


def operands(dtype, batch, heads, kv_heads, queries, keys, head_dim, spread=1.0):
    torch.manual_seed(queries + keys + head_dim)
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [(spread * torch.randn(batch, h, s, head_dim)).to("cuda", dtype) for h, s in sizes]


def check(q, k, v, key_lengths=None, key_mask=None, **attrs):
    """Compares with fp64; values of masked keys may be NaN for the kernel, and are zero for the oracle."""
    attrs = {"scale": 0.1} | attrs
    given = vars(attention.attributes(attrs))
    inputs = (q, k, v, None, key_lengths, key_mask)
    clean = [torch.nan_to_num(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]
    (exact,) = attention_reference(*map(widened, clean), **given)
    (peer,) = attention_reference(*clean, **given)
    got = run_kernel("attention", *inputs, **attrs)
    assert_close(got, exact, peer)
    return got


@ON_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 80, 96, 128])
def test_head_dimensions(head_dim, causal, dtype):
    check(*operands(dtype, 2, 4, 2, 500, 1500, head_dim), scale=head_dim**-0.5, causal=causal)


@ON_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1025), (64, 1152), (65, 1153), (1300, 1300), (3000, 1100), (500, 385), (512, 512)]
)
def test_sizes(queries, keys, causal):
    """Also more queries than keys: under causality the first ones see none, and are zero."""
    got = check(*operands(torch.float16, 1, 3, 3, queries, keys, 64), causal=causal)
    if causal and queries > keys:
        assert not got[:, :, : queries - keys].any()


@ON_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", [1500, 500])
def test_lengths_with_nan_beyond(keys, head_dim, causal):
    lengths = [keys, 0, 1, 128, 129, keys - 1, 400, 3000, -5]
    q, k, v = operands(torch.float16, len(lengths), 16, 16, 300, keys, head_dim)
    for number, length in enumerate(lengths):
        for tensor_ in (k, v):
            tensor_[number, :, max(length, 0) :] = float("nan")
    got = check(q, k, v, torch.tensor(lengths, dtype=torch.int32, device="cuda"), causal=causal)
    assert not got[1].any()
    assert not got[8].any()


@ON_HOPPER
@pytest.mark.gpu
def test_large_scores():
    check(*operands(torch.float16, 1, 4, 4, 400, 2000, 64, spread=30.0), scale=0.125)


@ON_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_layouts_and_strides_give_the_same_bits(causal):
    q, k, v = operands(torch.float16, 2, 4, 4, 1200, 1200, 64)
    first = check(q, k, v, causal=causal)
    rows = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    three = check(*rows, causal=causal, num_heads=4)
    packed = run_kernel("attention", torch.cat(rows, -1), None, None, scale=0.1, causal=causal, num_heads=4)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(first.transpose(1, 2).flatten(2), three)
    assert torch.equal(three, packed)
    assert torch.equal(run_kernel("attention", *strided, scale=0.1, causal=causal), first)


@ON_HOPPER
@pytest.mark.gpu
def test_more_tiles_than_programs_take_in_a_few_turns():
    """Rings, phases and turns go round many times, with tiles of every length among them."""
    lengths = torch.randint(0, 1300, (48,), generator=torch.Generator().manual_seed(0)).to("cuda", torch.int32)
    check(*operands(torch.float16, 48, 16, 16, 1100, 1300, 64), lengths)
    check(*operands(torch.float16, 24, 16, 16, 1100, 1300, 128), lengths[:24], causal=True)
