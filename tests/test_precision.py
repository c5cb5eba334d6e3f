"""Mixed precision as users have it: autocast, and optimize_model(dtype=...)."""

import contextlib
import copy

import pytest
import torch
from models import build, inputs, tensors
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import T5Config, T5EncoderModel

import trimaran
from trimaran.torch_path import autocast, ops
from trimaran.torch_path.optimize import untouched

pytestmark = pytest.mark.usefixtures("fresh_compiler")

HALVES = [torch.float16, torch.bfloat16]
NAMES = ["bert", "t5-gated", "llama", "vit"]


def error(got, exact):
    return max((a.double() - b).abs().max().item() / b.abs().max().item() for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("model", [*((name, "sdpa") for name in NAMES), ("llama", "eager")], ids="-".join)
def test_autocast(model, dtype):
    name, attention = model
    model, call = build(name, attention), inputs(name)
    report = trimaran.optimize_model(model)
    with torch.no_grad():
        exact = tensors(copy.deepcopy(model).double()(**{**call, **doubled(call)}), call)
    ours_fp32 = tensors(model(**call), call)
    with torch.autocast("cpu", dtype=dtype):
        ours = tensors(model(**call), call)
        with untouched(model), torch.no_grad():
            eager = tensors(model(**call), call)
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    assert error(ours, exact) <= 2 * error(eager, exact) + 1e-3
    assert error(ours_fp32, exact) < 1e-4
    assert error(tensors(model(**call), call), exact) < 1e-4, "outside of autocast nothing has changed"
    assert len(report.graphs) == 2
    full, mixed = (graph.replaced for graph in report.graphs)
    assert mixed == full
    assert not report.near_misses, report
    assert not report.fallbacks


def doubled(call):
    return {k: v.double() for k, v in call.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_a_dtype_of_its_own(name, dtype, monkeypatch):
    model, call = build(name), inputs(name)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        exact = tensors(copy.deepcopy(model).double()(**{**call, **doubled(call)}), call)
        with torch.autocast("cpu", dtype=dtype):
            eager = tensors(model(**call), call)
    trimaran.optimize_model(model, dtype=dtype)
    seen = dtypes_of("attention", monkeypatch)
    ours = tensors(model(**call), call)
    assert error(ours, exact) <= 2 * error(eager, exact) + 1e-3
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    assert seen == {dtype}
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    trimaran.restore(model)
    assert error(tensors(model(**call), call), exact) < 1e-4


def dtypes_of(op, monkeypatch):
    seen, reference = set(), ops.TORCH_OPS[op].reference

    def record(given, *rest):
        seen.add(given[0].dtype)
        return reference(given, *rest)

    monkeypatch.setattr(ops.TORCH_OPS[op], "reference", record)
    return seen


def test_layers_that_overflow_in_fp16_stay_in_fp32():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5EncoderModel(T5Config(**sizes)).eval()
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight *= 1e6  # its sums do not fit into fp16
        call = {"input_ids": torch.arange(3, 10)[None]}
        exact = model(**call).last_hidden_state
    trimaran.optimize_model(model, dtype=torch.float16)
    ours = model(**call).last_hidden_state
    assert ours.isfinite().all()
    assert error([ours], [exact.double()]) < 0.02


def test_weights_are_cast_once():
    model, call = build("bert"), inputs("bert")
    trimaran.optimize_model(model, dtype=torch.bfloat16)
    model(**call)
    with torch.profiler.profile(record_shapes=True) as profile:
        model(**call)
    casts = [event.input_shapes[0] for event in profile.events() if event.name == "aten::_to_copy"]
    assert [32, 32] not in casts
    assert [48, 32] not in casts


class Regions(nn.Module):
    """Autocast within the model: on for one layer, off for another, whatever it is outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.low, self.full, self.norm = nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.low(x)
        with torch.autocast("cpu", enabled=False):
            z = self.full(x.float())
        return self.norm(y + z), y, z


def test_casts_that_cannot_be_written_out_are_the_dispatchers(monkeypatch):
    def refuse(*_):
        raise RuntimeError("Expected attn_mask dtype")

    monkeypatch.setattr(autocast, "explicit_casts", refuse)
    model, call = build("bert", "sdpa"), inputs("bert")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = tensors(model(**call), call)
        report = trimaran.optimize_model(model)
        assert all(map(torch.equal, tensors(model(**call), call), expected))
    assert report.fallbacks == {"autocast's casts cannot be written out: Expected attn_mask dtype": 1}
    assert not report.replaced


LIBRARY = torch.library.Library("test_precision", "DEF")
LIBRARY.define("both(Tensor x) -> (Tensor, Tensor)")
LIBRARY.impl("both", lambda x: (x @ x, x.softmax(-1)), "CompositeImplicitAutograd")


def attend(x, half, mask):
    """With queries and keys that are in half precision already, which attention casts to fp32 itself, and such a mask
    that are not."""
    return torch.nn.functional.scaled_dot_product_attention(half, half, half, attn_mask=mask)


CALLS = {  # how many casts autocast makes, on either device
    "attention": (attend, 1),
    "attention in half precision": (lambda x, half, mask: attend(x, half, half), 0),
    "attention in fp32": (lambda x, half, mask: attend(x, x, mask), 2),
    "a product": (lambda x, half, mask: x @ half, 1),
    "one made of products": (lambda x, half, mask: torch.einsum("bhij,bhkj->bhik", x, mask), 2),
    "neither": (lambda x, half, mask: half + x.sin(), 0),
    "integers": (lambda x, half, mask: (x @ half).argmax(-1), 1),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", CALLS)
def test_casts_are_those_of_the_dispatcher(name, device):
    """On fake tensors, which need no such device."""
    function, count = CALLS[name]
    with FakeTensorMode(), autocast_on(device):
        x, half, mask = (torch.empty(2, 3, 8, 8, device=device, dtype=d) for d in (None, torch.bfloat16, None))
        graph = make_fx(function, pre_dispatch=True)(x, half, mask)
        expected = function(x, half, mask)
        autocast.explicit_casts(graph, lambda node: False)
        graph.recompile()
        ours = autocast.without(graph.forward)(x, half, mask)
    casts = [node for node in graph.graph.nodes if node.target is torch.ops.aten.to.dtype]
    assert (ours.dtype, len(casts)) == (expected.dtype, count), graph.code


def test_a_call_that_is_cast_in_pieces():
    with FakeTensorMode(), autocast_on("cpu"):
        graph = make_fx(torch.ops.test_precision.both, pre_dispatch=True)(torch.empty(8, 8))
        with pytest.raises(RuntimeError, match=r"test_precision.both.default gives torch.bfloat16, torch.float32 by"):
            autocast.explicit_casts(graph, lambda node: False)


@contextlib.contextmanager
def autocast_on(device):
    """As torch.autocast(device) does where there is such a device."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@pytest.mark.parametrize("outside", [False, True])
def test_regions_of_autocast_in_the_model(outside):
    model, x = Regions().eval(), torch.randn(2, 5, 32)
    report = trimaran.optimize_model(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside), torch.no_grad():
        with untouched(model):
            expected = model(x)
        ours = model(x)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert ours[2].dtype == torch.float32
    assert report.replaced["layer_norm"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "float16"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype is .*, expected torch.float16, torch.bfloat16 or None"):
        trimaran.optimize_model(build("bert"), dtype=dtype)


def test_another_dtype_wants_a_restored_model():
    model = build("bert")
    trimaran.optimize_model(model)
    with pytest.raises(ValueError, match="the model is optimized with None: restore it first"):
        trimaran.optimize_model(model, dtype=torch.float16)


class Product(nn.Module):
    """A product of fp32 within a region where autocast is off, which rules write anew."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            scores = torch.einsum("bid,bjd->bij", x, x)
        return scores.softmax(-1) + scores


def test_what_rules_write_is_not_cast_again():
    model, x = Product().eval(), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = model(x)
        trimaran.optimize_model(model)
        ours = model(x)
    assert ours.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(ours, expected)
