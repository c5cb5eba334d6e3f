"""Layer scales, as CaiT, DINOv2 and ConvNeXt have them, go into the weights of their layers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_text import halved, model, rewritten

WEIGHT = "float[8, 4] w = {" + ", ".join(str((i % 7 - 3) / 8) for i in range(32)) + "}"
TURNED = WEIGHT.replace("[8, 4] w", "[4, 8] wt")
VECTORS = "float[4] c = {0.5, -0.5, 0.25, 1}, float[4] g = {0.5, 2, -1, 0.125}, float[4] tiny = {1e-6, 1e-6, 1, 1}"
X, Y = "float[b, s, 8] x", "float[b, s, 4] y"
FOLDED = {  # body, inputs, outputs, the op
    "after the bias": ("m = MatMul (x, w) l = Add (m, c) y = Mul (l, g)", X, Y, "linear"),
    "before the bias, commuted": ("m = MatMul (x, w) l = Mul (g, m) y = Add (l, c)", X, Y, "linear"),
    "without a bias": ("m = MatMul (x, w) y = Mul (m, g)", X, Y, "linear"),
    "wide": ("m = MatMul (x, w) l = Add (m, c) y = Mul (l, wide)", X, Y, "linear"),
    "of rows": ("m = Gemm <transB = 1> (x, wt, c) y = Mul (m, g)", "float[s, 8] x", "float[s, 4] y", "linear"),
    "with a residual": (
        "m = MatMul (x, w) l = Add (m, c) n = Mul (l, g) y = Add (r, n)", f"{X}, float[b, s, 4] r", Y, "linear",
    ),
    "with a residual and a norm": (
        "m = MatMul (x, w) l = Add (m, c) n = Mul (l, g) t = Add (r, n) y = LayerNormalization (t, g, c)",
        f"{X}, float[b, s, 4] r", f"{Y}, float[b, s, 4] t", "linear_norm",
    ),
}  # fmt: skip


def constants():
    more = "float[1, 1, 4] wide = {0.5, 2, -1, 0.125}, float[5, 1] rows = {1, 2, 3, 4, 5}"
    return f"{WEIGHT}, {TURNED}, {VECTORS}, {more}"


@pytest.mark.parametrize("form", FOLDED)
def test_scales_that_go_into_their_layer(form, tmp_path):
    body, inputs, outputs, op = FOLDED[form]
    report, (node,) = rewritten(halved(model(body, inputs, outputs, constants())), tmp_path)
    assert report.replaced == {op: 1}
    assert not any(n.op_type == "Mul" for n in ir.load(tmp_path / "out.onnx").graph)
    assert node.inputs[1].const_value is not None
    assert (node.inputs[2] is not None if len(node.inputs) > 2 else False) == (form != "without a bias")


LEFT = {
    "that vary": ("m = MatMul (x, w) y = Mul (m, z)", f"{X}, float[4] z", Y),
    "of rows of x": ("m = MatMul (x, w) y = Mul (m, rows)", "float[b, 5, 8] x", "float[b, 5, 4] y"),
    "whose layer is wanted": ("m = MatMul (x, w) y = Mul (m, g)", X, f"{Y}, float[b, s, 4] m"),
    "after an activation": ("m = MatMul (x, w) l = Relu (m) y = Mul (l, g)", X, Y),
    "of more dimensions": ("m = MatMul (x, w) y = Mul (m, wide)", "float[s, 8] x", "float[1, s, 4] y"),
}


@pytest.mark.parametrize("form", LEFT)
def test_products_that_are_none(form, tmp_path):
    report, (node,) = rewritten(halved(model(*LEFT[form], constants())), tmp_path)
    assert report.replaced == {"linear": 1}
    assert any(n.op_type == "Mul" for n in ir.load(tmp_path / "out.onnx").graph)
    assert [miss for miss in report.near_misses if miss.rule == "layer_scale"] == []
    assert node.inputs[1].name == "w"


def test_what_would_be_lost_to_rounding_stays(tmp_path):
    """1e-6 times a weight is no normal number in fp16."""
    proto = halved(model("m = MatMul (x, w) y = Mul (m, tiny)", X, Y, constants()))
    report, _ = rewritten(proto, tmp_path)
    (miss,) = report.near_misses
    assert (miss.rule, miss.value) == ("layer_scale", "tiny")
    assert miss.reason == "in its weight, the layer scale would be lost to rounding"


def test_two_scales_of_one_weight(tmp_path):
    body = "m = MatMul (x, w) a = Mul (m, g) k = MatMul (x, w) b0 = Mul (k, c) n = Relu (a) y = Sub (n, b0)"
    rewritten(halved(model(body, X, Y, constants())), tmp_path)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert {"w_scaled", "w_scaled_2"} <= {*found}
    assert "w" not in found
    assert not np.array_equal(found["w_scaled"], found["w_scaled_2"])
