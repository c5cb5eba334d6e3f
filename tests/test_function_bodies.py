"""Function bodies: what a runtime without our library computes is what the op's reference does, at every opset."""

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from oracle import assert_close, widened

from trimaran.export.functions import attach_functions, count_nodes
from trimaran.export.schemas import DOMAIN, register_schemas
from trimaran.kernels.catalog import OPS

OPSETS = [11, 12, 13, 17, 18, 20, 23]
SYMBOLS = "abcdefg"


@pytest.fixture(autouse=True)
def schemas():
    register_schemas()


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))).to(dtype)


def symbols(name, tensor):
    return [f"{name}_{SYMBOLS[axis]}" for axis in range(tensor.dim())]


def model_of(op, inputs, attrs, outputs, opset, static=False):
    """A model of one trimaran node; axes are symbolic unless static."""
    values = []
    for port, tensor in zip(op.inputs, inputs, strict=False):
        if tensor is None:
            values.append(None)
            continue
        shape = list(tensor.shape) if static else symbols(port.name, tensor)
        values.append(ir.val(port.name, ir.DataType.from_numpy(tensor.numpy().dtype), shape))
    node = ir.node(op.name, values, attrs, domain=DOMAIN, num_outputs=outputs)
    for port, value in zip(op.outputs, node.outputs, strict=False):
        value.name, value.dtype = f"{port.name}_out", values[0].dtype
        value.shape = ir.Shape(symbols(port.name, inputs[0]))
    graph = ir.Graph(
        [v for v in values if v is not None], node.outputs, nodes=[node], opset_imports={"": opset, DOMAIN: 1}, name="g"
    )
    return ir.Model(graph, ir_version=8)


def run(op, inputs, attrs, outputs=1, opset=20, static=False):
    model = model_of(op, inputs, attrs, outputs, opset, static)
    attach_functions(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {port.name: t.numpy() for port, t in zip(op.inputs, inputs, strict=False) if t is not None}
    return [torch.from_numpy(array) for array in session.run(None, feeds)]


def check(op, inputs, given, outputs=1, **options):
    attrs = vars(op.attributes(given))
    written = {k: int(v) if isinstance(v, bool) else v for k, v in attrs.items()}
    got = run(op, inputs, written, outputs, **options)
    padded = [*inputs, *[None] * (len(op.inputs) - len(inputs))]
    exact = op.reference(*map(widened, padded), **attrs)
    peer = op.reference(*padded, **attrs)
    for ours, right, same_dtype in zip(got, exact, peer, strict=False):
        assert_close(ours, right, same_dtype)
    return got


X, W, B, R = draw(2, 3, 40), draw(40), draw(40) + 1, draw(2, 3, 40) * 2
NORMS = {
    "x": (X,),
    "weight": (X, W),
    "weight and bias": (X, W, B),
    "bias": (X, None, B),
    "residual": (X, W, B, R),
    "residual alone": (X, None, None, R),
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("case", NORMS)
def test_layer_norm(opset, case):
    inputs = NORMS[case]
    check(OPS["layer_norm"], inputs, {"eps": 1e-3}, outputs=2 if "residual" in case else 1, opset=opset)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("cast", ["torch", "llama", "gemma"])
@pytest.mark.parametrize("case", [case for case in NORMS if "bias" not in case])
def test_rms_norm(opset, cast, case):
    inputs = tuple(t for i, t in enumerate(NORMS[case]) if i != 2)
    check(OPS["rms_norm"], inputs, {"eps": 1e-3, "cast": cast}, outputs=2 if "residual" in case else 1, opset=opset)


@pytest.mark.parametrize("cast", ["torch", "llama", "gemma"])
@pytest.mark.parametrize("opset", OPSETS)
def test_rms_norm_in_half_precision(opset, cast):
    x, weight, residual = X.half(), W.half(), R.half()
    check(OPS["rms_norm"], (x, weight, residual), {"eps": 1e-3, "cast": cast}, outputs=2, opset=opset)
    if cast != "llama":
        check(OPS["rms_norm"], (x, W), {"eps": 1e-3, "cast": cast}, opset=opset)


Q, K, V = draw(2, 4, 5, 8), draw(2, 4, 7, 8), draw(2, 4, 7, 8) + 1
LENGTHS, MASK = (
    torch.tensor([7, 3], dtype=torch.int32),
    torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1]]).bool(),
)
NOTHING = torch.zeros(2, 7, dtype=torch.bool)
BIAS = draw(1, 4, 5, 7)
HIDDEN = torch.where(torch.arange(7) < 2, 0.0, -torch.inf).expand(2, 1, 5, 7).contiguous()
ATTENTIONS = {
    "plain": ((Q, K, V), {}),
    "lengths": ((Q, K, V, None, LENGTHS), {}),
    "mask": ((Q, K, V, None, None, MASK), {}),
    "nothing visible": ((Q, K, V, None, None, NOTHING), {}),
    "nothing visible, mean": ((Q, K, V, None, None, NOTHING), {"masked_row": "mean"}),
    "lengths, mask and bias, causal": ((Q, K, V, BIAS, LENGTHS, MASK), {"causal": True}),
    "bias of -inf": ((Q, K, V, HIDDEN), {}),
    "causal": ((Q, K, V), {"causal": True}),
    "causal, mean": ((K, Q, Q), {"causal": True, "masked_row": "mean"}),
    "window": ((K, Q, Q), {"window_left": 1, "window_right": 2}),
    "causal window, soft cap": ((Q, K, V, None, LENGTHS), {"causal": True, "window_left": 2, "softcap": 1.5}),
    "grouped": ((Q, K[:, :2], V[:, :2]), {}),
    "rows": (tuple(t.transpose(1, 2).flatten(2) for t in (Q, K, V)), {"num_heads": 4}),
    "rows, grouped": (
        tuple(t.transpose(1, 2).flatten(2) for t in (Q, K[:, :2], V[:, :2])),
        {"num_heads": 4, "kv_num_heads": 2},
    ),
    "packed": (
        (draw(2, 5, 48), None, None, None, torch.tensor([5, 2], dtype=torch.int32)),
        {"num_heads": 4, "kv_num_heads": 1},
    ),
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention(opset, case):
    inputs, attrs = ATTENTIONS[case]
    check(OPS["attention"], inputs, {"scale": 0.3, **attrs}, opset=opset)


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_with_known_shapes(case):
    inputs, attrs = ATTENTIONS[case]
    check(OPS["attention"], inputs, {"scale": 0.3, **attrs}, static=True)


@pytest.mark.parametrize("name", ["layer_norm", "attention"])
def test_half_precision(name):
    inputs, attrs = (
        ((X, W, B, R), {"eps": 1e-5}) if name == "layer_norm" else ((Q, K, V, BIAS, LENGTHS, MASK), {"scale": 0.3})
    )
    halves = [t.half() if t is not None and t.is_floating_point() else t for t in inputs]
    check(OPS[name], halves, attrs)


LX, LW, LB = draw(2, 3, 24), draw(10, 24) / 5, draw(10)
LINEARS = {
    "plain": ((LX, LW), {}),
    "bias and residual": ((LX, LW, LB, draw(2, 3, 10)), {}),
    "transposed": ((LX, LW.T.contiguous(), LB), {"transpose_weight": True}),
    "three": ((LX, LW, LB, draw(2, 3, 25), LW[:5] * 2, None, LW + 1, LB - 1), {"activation": "relu"}),
    **{
        name: ((LX, LW, LB), {"activation": name})
        for name in ("relu", "gelu", "gelu_tanh", "silu", "tanh", "quick_gelu")
    },
}
GATED = {
    "two weights": ((LX, LW, LW * 2, LB, LB + 1), {}),
    "no bias": ((LX, LW, LW * 2), {"activation": "gelu"}),
    "chunked": ((LX, LW, None, LB), {}),
    "chunked, the second half": ((LX, LW, None, LB), {"gate": "second"}),
    "chunked, transposed": ((LX, LW.T.contiguous()), {"transpose_weight": True}),
}
ENDS = {
    "layer": ((LX, LW, LB, draw(2, 3, 10), LB + 1, LB), {"norm": "layer"}),
    "bare": ((LX, LW), {"norm": "layer"}),
    "rms": ((LX, LW, None, draw(2, 3, 10), LB + 1), {"norm": "rms", "cast": "llama"}),
}
ANGLE = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
COS, SIN, WIDE = ANGLE.cos(), ANGLE.sin(), (torch.cat([ANGLE, ANGLE], -1).cos(), torch.cat([ANGLE, ANGLE], -1).sin())
PAIRED = tuple(t.repeat_interleave(2, -1) for t in (COS, SIN))
PLACES = torch.tensor([[0, 4, 2, 2, 1], [1, 2, 3, 4, 0]])
ROTARIES = {
    "half": ((Q, *WIDE, Q[:, :2]), {}),
    "half, narrow": ((Q, COS, SIN, Q[:, :2]), {}),
    "a batch": ((Q, WIDE[0][None], WIDE[1][None], Q), {}),
    "interleaved": ((Q, *PAIRED, Q), {"interleaved": True}),
    "interleaved, narrow": ((Q, COS, SIN, Q), {"interleaved": True}),
    "positions": ((Q, COS, SIN, Q[:, :1], PLACES), {}),
    "partial": ((draw(2, 4, 5, 12), *WIDE, Q[..., [0] * 12]), {"rotary_dim": 8}),
    "rows": ((draw(2, 5, 32), *WIDE, draw(2, 5, 16)), {"num_heads": 4, "kv_num_heads": 2}),
    "packed": ((draw(2, 5, 48), *PAIRED), {"num_heads": 4, "kv_num_heads": 1, "packed": True, "interleaved": True}),
}
OTHERS = {
    **{f"linear, {case}": ("linear", *given) for case, given in LINEARS.items()},
    **{
        f"gated_linear, {case}": ("gated_linear", given[0], {"activation": "silu"} | given[1])
        for case, given in GATED.items()
    },
    **{f"linear_norm, {case}": ("linear_norm", given[0], {"eps": 1e-3} | given[1]) for case, given in ENDS.items()},
    **{f"rotary_embedding, {case}": ("rotary_embedding", *given) for case, given in ROTARIES.items()},
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("case", OTHERS)
def test_linears_and_rotary(opset, case):
    name, inputs, attrs = OTHERS[case]
    two = name == "linear_norm" or (name == "rotary_embedding" and len(inputs) > 3)
    check(OPS[name], inputs, attrs, outputs=2 if two else 1, opset=opset)


@pytest.mark.parametrize(
    "case", ["linear, gelu", "gated_linear, chunked", "linear_norm, layer", "rotary_embedding, half"]
)
def test_linears_and_rotary_in_half_precision(case):
    name, inputs, attrs = OTHERS[case]
    halves = [t.half() if t is not None and t.is_floating_point() else t for t in inputs]
    check(OPS[name], halves, attrs)


def test_nan_in_padding_stays_there():
    k, v = K.clone(), V.clone()
    for tensor in (k, v):
        tensor.masked_fill_(~(torch.arange(7) < LENGTHS[:, None])[:, None, :, None], float("nan"))
    (got,) = check(OPS["attention"], (Q, k, v, None, LENGTHS), {"scale": 0.3})
    assert not got.isnan().any()


def test_nodes_alike_share_a_body_and_others_do_not():
    op = OPS["layer_norm"]
    x = ir.val("x", ir.DataType.FLOAT, ["n", 8])
    nodes = []
    for eps in (1e-5, 1e-5, 1e-6):
        nodes.append(ir.node(op.name, [nodes[-1].outputs[0] if nodes else x], {"eps": eps}, domain=DOMAIN))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].dtype = f"y{len(nodes)}", ir.DataType.FLOAT
        nodes[-1].outputs[0].shape = ir.Shape(["n", 8])
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": 20, DOMAIN: 1}, name="g")
    model = ir.Model(graph, ir_version=8)
    attach_functions(model)
    assert [n.overload == nodes[0].overload for n in nodes] == [True, True, False]
    assert len(model.functions) == 2
    assert model.ir_version >= 10
    assert count_nodes(model) == {"layer_norm": 3}
    before = dict(model.functions)
    attach_functions(model)
    assert model.functions.keys() == before.keys(), "attaching twice changes nothing"


def test_an_unused_sum_is_not_an_output():
    op = OPS["layer_norm"]
    model = model_of(op, (X, W, B, R), {"eps": 1e-5}, 2, 20)
    model.graph.outputs.pop()
    attach_functions(model)
    node = next(iter(model.graph))
    assert len(node.outputs) == 1
    (body,) = model.functions.values()
    assert [value.name for value in body.outputs] == ["y"]


def test_schemas_know_the_ops():
    for op in OPS.values():
        schema = onnx.defs.get_schema(op.name, op.version, DOMAIN)
        assert [port.name for port in schema.inputs] == [port.name for port in op.inputs]
        assert {name for name, a in schema.attributes.items() if a.required} == {
            a.name for a in op.attrs if a.default is None
        }


def test_a_wrong_node_does_not_pass_the_checker():
    model = model_of(OPS["layer_norm"], (X, W), {"eps": 1e-5, "epsilon": 1.0}, 1, 20)
    with pytest.raises(onnx.checker.ValidationError, match="epsilon"):
        onnx.checker.check_model(ir.to_proto(model))


@pytest.mark.parametrize("opset", [17, 20])
def test_the_body_is_written_for_the_models_opset(opset):
    model = model_of(OPS["attention"], (Q, K, V, BIAS), {"scale": 0.3}, 1, opset)
    attach_functions(model)
    (body,) = model.functions.values()
    assert body.opset_imports[""] == opset
    reductions = [node for node in body if node.op_type == "ReduceMax"]
    assert reductions
    assert all(("axes" in node.attributes) == (opset < 18) for node in reductions)
