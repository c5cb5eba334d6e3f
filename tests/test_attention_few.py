"""The Gluon kernel of attention to few keys: when it is chosen, that it compiles, and what it computes on Hopper."""

import pytest
import torch
from oracle import run_kernel
from test_attention_hopper import HOPPER, ON_HOPPER, check, launch_of, operands, tensor

from trimaran.kernels.attention import attention
from trimaran.kernels.attention_few import MAX_KEYS, attention_few_kernel
from trimaran.kernels.compiler import compile_launch
from trimaran.kernels.contract import Device
from trimaran.kernels.plans import make_plan

MASK = tensor(2, 100, dtype="bool")


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, True),
        ({"dtype": "bfloat16", "head_dim": 48}, True),
        ({"head_dim": 128, "keys": MAX_KEYS, "queries": 1000}, True),
        ({"attrs": {"causal": True}}, True),
        ({"attrs": {"masked_row": "mean"}}, True),
        ({"change": {"key_lengths": tensor(2, dtype="int32"), "key_mask": MASK}}, True),
        ({"dtype": "float32"}, False),
        ({"head_dim": 136}, False),
        ({"head_dim": 40}, False),  # rows of 80 bytes
        ({"keys": 256, "queries": 1200}, False),  # 152 blocks
        ({"keys": 128, "queries": 1200}, True),
        ({"keys": MAX_KEYS + 1}, False),
        ({"keys": 0}, False),
        ({"device": Device("cuda", 0, 80, 108, 160 * 1024)}, False),
        ({"attrs": {"scale": -0.1}}, False),
        ({"attrs": {"softcap": 3.0}}, False),
        ({"attrs": {"window_left": 9}}, False),
        ({"attrs": {"window_right": 9}}, False),
        ({"attrs": {"masked_row": "mean", "causal": True}}, False),
        ({"change": {"bias": tensor(1, 4, 300, 100)}}, False),
        ({"change": {"v": tensor(2, 4, 100, 64, aligned=False)}}, False),
    ],
)
def test_when_it_is_chosen(given, chosen):
    launch = launch_of(**{"keys": 100} | given)
    assert (launch.kernel is attention_few_kernel) == chosen


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_and_fits(batch, masked):
    """Also for a batch of one, whose strides are never read: copies need them to be known as multiples of 16."""
    masks = [tensor(batch, dtype="int32"), tensor(batch, 256, dtype="bool")] if masked else [None, None]
    attrs = attention.attributes({"scale": 0.1, "num_heads": 4, "masked_row": "mean" if masked else "zero"})
    packed = tensor(batch, 256, 3 * 4 * 128)
    (launch,) = make_plan(attention, [packed, None, None, None, *masks], attrs, HOPPER, (True,)).launches
    assert launch.kernel is attention_few_kernel
    assert compile_launch(launch, 90).shared <= HOPPER.shared_memory


@ON_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 96, 128])
def test_head_dimensions(head_dim, causal, dtype):
    check(*operands(dtype, 3, 4, 2, 130, 130, head_dim), scale=head_dim**-0.5, causal=causal)


@ON_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (16, 16), (1, 77), (65, 17), (200, 255), (256, 256), (300, 33)])
@pytest.mark.parametrize("batch", [1, 5])
def test_sizes(batch, queries, keys, causal):
    check(*operands(torch.float16, batch, 12, 12, queries, keys, 64), causal=causal)


@ON_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("masked_row", ["zero", "mean"])
@pytest.mark.parametrize("keys", [100, 256])
def test_masked_keys_may_be_nan(keys, masked_row):
    """By lengths, by holes, by both, and rows that see nothing; a mean is over all values, so there they are finite."""
    lengths = torch.tensor([keys, 0, 1, 50, 3 * keys, -5], dtype=torch.int32, device="cuda")
    holes = torch.rand(6, keys, generator=torch.Generator().manual_seed(0)) < 0.5
    holes[2], holes[3] = False, True
    q, k, v = operands(torch.float16, 6, 12, 12, 70, keys, 64)
    seen = (torch.arange(keys)[None] < lengths.cpu()[:, None]) & holes
    for number in range(6):
        if seen[number].any() or masked_row == "zero":
            for part in (k, v):
                part[number, :, ~seen[number].cuda()] = float("nan")
    got = check(q, k, v, lengths, holes.cuda(), masked_row=masked_row)
    if masked_row == "zero":
        assert not got[[1, 2, 5]].any()
    clean = [torch.nan_to_num(part) for part in (k, v)]
    check(q, *clean, lengths, masked_row=masked_row)
    check(q, *clean, None, holes.cuda(), masked_row=masked_row)


@ON_HOPPER
@pytest.mark.gpu
def test_large_scores():
    check(*operands(torch.float16, 2, 4, 4, 100, 200, 64, spread=30.0), scale=0.125)


@ON_HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_layouts_and_strides_give_the_same_bits(batch):
    q, k, v = operands(torch.float16, batch, 4, 4, 120, 120, 64)
    first = check(q, k, v)
    rows = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    three = check(*rows, num_heads=4)
    packed = run_kernel("attention", torch.cat(rows, -1), None, None, scale=0.1, num_heads=4)
    assert torch.equal(first.transpose(1, 2).flatten(2), three)
    assert torch.equal(three, packed)
