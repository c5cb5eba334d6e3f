"""One formula, many spellings: graphs by hand, as exporters other than torch's write them. Each is rewritten, and gives
what it gave before (the rewriter runs both)."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graph_text import halved, model, random_inputs, rewritten

import trimaran
from trimaran.cli import app
from trimaran.export.rewrite_onnx import rewrite

VECTOR = "{1.5, -0.5, 2.0, 0.25, 1.0, -1.25, 0.75, 3.0}"
PARAMETERS = (
    f"float[8] w = {VECTOR}, float[8] c = {VECTOR}, float eps = {{0.001}}, float two = {{2.0}}, float one = {{1.0}}"
)
NORMS = {
    "the operator": "y = LayerNormalization <epsilon = 0.001> (x, w, c)",
    "pow, sqrt, div": """m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) p = Pow (d, two)
        v = ReduceMean <axes = [-1]> (p) a = Add (v, eps) r = Sqrt (a) n = Div (d, r) g = Mul (n, w) y = Add (g, c)""",
    "mul self, reciprocal, operands commuted": """m = ReduceMean <axes = [2]> (x) d = Sub (x, m) p = Mul (d, d)
        v = ReduceMean <axes = [2]> (p) a = Add (eps, v) r = Sqrt (a) i = Reciprocal (r) n = Mul (i, d) g = Mul (w, n)
        y = Add (c, g)""",
    "mean of squares minus square of mean": """m = ReduceMean <axes = [-1]> (x) p = Mul (x, x)
        q = ReduceMean <axes = [-1]> (p) mm = Mul (m, m) v = Sub (q, mm) a = Add (v, eps) r = Sqrt (a) d = Sub (x, m)
        n = Div (d, r) g = Mul (n, w) y = Add (g, c)""",
    "tensorflow's batch normalization": """m = ReduceMean <axes = [2]> (x) d = Sub (x, m) p = Mul (d, d)
        v = ReduceMean <axes = [2]> (p) a = Add (v, eps) r = Sqrt (a) i = Reciprocal (r) k = Mul (i, w) u = Mul (x, k)
        mk = Mul (m, k) o = Sub (c, mk) y = Add (u, o)""",
    "a sum divided by its number": """eight = Constant <value = float {8.0}> () ax = Constant <value = int64[1] {-1}> ()
        t = ReduceSum <keepdims = 1> (x, ax) m = Div (t, eight) d = Sub (x, m) p = Mul (d, d)
        tt = ReduceSum <keepdims = 1> (p, ax) v = Div (tt, eight) a = Add (v, eps) r = Sqrt (a) n = Div (d, r)
        g = Mul (n, w) y = Add (g, c)""",
    "a power of minus one half": """h = Constant <value = float {-0.5}> () m = ReduceMean <axes = [-1]> (x)
        d = Sub (x, m) p = Mul (d, d) v = ReduceMean <axes = [-1]> (p) a = Add (v, eps) i = Pow (a, h)
        n = Mul (d, i) g = Mul (n, w) y = Add (g, c)""",
    "an exporter's identities and wide parameters": """w3 = Constant <value = int64[3] {1, 1, 8}> () wi = Identity (w)
        ww = Reshape (wi, w3) m = ReduceMean <axes = [-1]> (x) xi = Identity (x) d = Sub (xi, m) p = Mul (d, d)
        v = ReduceMean <axes = [-1]> (p) a = Add (v, eps) r = Sqrt (a) ri = Identity (r) n = Div (d, ri) g = Mul (n, ww)
        y = Add (g, c)""",
    "global average pooling": """m = GlobalAveragePool (x) d = Sub (x, m) p = Mul (d, d) v = GlobalAveragePool (p)
        a = Add (v, eps) r = Sqrt (a) n = Div (d, r) g = Mul (n, w) y = Add (g, c)""",
}
NORMS["jax: sums that lose their axis, a choice that is known, wide parameters"] = """
    n = Constant <value = float {8.0}> () zero = Constant <value = float {0.0}> ()
    ax = Constant <value = int64[1] {2}> ()
    t = ReduceSum <keepdims = 0> (x, ax) tu = Unsqueeze (t, ax) m = Div (tu, n) d = Sub (x, m)
    q = ReduceSumSquare <keepdims = 0, axes = [2]> (d) qu = Unsqueeze (q, ax) v0 = Div (qu, n) g0 = Greater (n, zero)
    v = Where (g0, v0, zero) a = Add (v, eps) r = Sqrt (a) e = Div (d, r)
    w3 = Constant <value = int64[3] {1, 1, 8}> () ww = Expand (w, w3) g = Mul (e, ww) y = Add (g, c)"""
NORMS["flax: a variance kept above zero"] = """zero = Constant <value = float {0.0}> () m = ReduceMean <axes = [2]> (x)
    d = Sub (x, m) p = Mul (x, x) q = ReduceMean <axes = [2]> (p) mm = Mul (m, m) v0 = Sub (q, mm) v = Max (zero, v0)
    a = Add (v, eps) r = Sqrt (a) e = Div (d, r) g = Mul (e, w) y = Add (g, c)"""
RMS = {
    "pow, reciprocal": """p = Pow (x, two) q = ReduceMean <axes = [-1]> (p) a = Add (q, eps) r = Sqrt (a)
        i = Reciprocal (r) n = Mul (x, i) y = Mul (n, w)""",
    "one over the root, commuted": """p = Mul (x, x) q = ReduceMean <axes = [-1]> (p) a = Add (eps, q) r = Sqrt (a)
        i = Div (one, r) k = Mul (w, i) y = Mul (k, x)""",
    "gemma": """k = Add (one, w) p = Mul (x, x) q = ReduceMean <axes = [-1]> (p) a = Add (q, eps) r = Sqrt (a)
        n = Div (x, r) y = Mul (n, k)""",
    "sum of squares": """eighth = Constant <value = float {0.125}> () q = ReduceSumSquare <axes = [-1]> (x)
        f = Mul (q, eighth) a = Add (f, eps) r = Sqrt (a) n = Div (x, r) y = Mul (w, n)""",
    "onnxruntime's": "y = SimplifiedLayerNormalization <epsilon = 0.001> (x, w)",
}


@pytest.mark.parametrize("form", NORMS)
def test_layer_norms(form, tmp_path):
    report, (node,) = rewritten(model(NORMS[form], "float[b, s, 8] x", "float[b, s, 8] y", PARAMETERS), tmp_path)
    assert report.replaced == {"layer_norm": 1}
    assert [value is not None for value in node.inputs] == [True, True, True]
    assert node.attributes["eps"].value == pytest.approx(1e-3)


@pytest.mark.parametrize("form", RMS)
def test_rms_norms(form, tmp_path):
    report, (node,) = rewritten(model(RMS[form], "float[b, s, 8] x", "float[b, s, 8] y", PARAMETERS), tmp_path)
    assert report.replaced == {"rms_norm": 1}
    assert node.attributes["cast"].value == ("gemma" if form == "gemma" else "torch")


@pytest.mark.parametrize("skip", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
@pytest.mark.parametrize("summed", [False, True])
def test_onnxruntimes_norms_of_a_sum(skip, summed, tmp_path):
    parameters = "w, c" if skip == "SkipLayerNormalization" else "w"
    outs, outputs = ("y, , , t", "float[b, s, 8] y, float[b, s, 8] t") if summed else ("y", "float[b, s, 8] y")
    body = f"{outs} = com.microsoft.{skip} <epsilon = 0.001> (x, z, {parameters})"
    proto = model(body, "float[b, s, 8] x, float[b, s, 8] z", outputs, PARAMETERS)
    report, (node,) = rewritten(proto, tmp_path)
    assert [*report.replaced] == ["layer_norm" if skip == "SkipLayerNormalization" else "rms_norm"]
    assert node.inputs[-1].name == "z"
    assert len(node.outputs) == 1 + summed


def test_a_skipped_norm_with_a_bias_of_its_own(tmp_path):
    body = "y = com.microsoft.SkipLayerNormalization <epsilon = 0.001> (x, z, w, c, w)"
    proto = model(body, "float[b, s, 8] x, float[b, s, 8] z", "float[b, s, 8] y", PARAMETERS)
    assert rewritten(proto, tmp_path)[0].replaced == {"layer_norm": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (NORMS["pow, sqrt, div"].replace("-1", "1"), r"it normalizes over axes \[1\] of 3, only the last one"),
        (NORMS["pow, sqrt, div"].replace("Add (v, eps)", "Add (v, e)"), "eps is computed at run time"),
        (RMS["pow, reciprocal"].replace("Mul (x, i)", "Mul (z, i)"), "what is multiplied with the inverse root is not"),
        (RMS["pow, reciprocal"].replace("Add (q, eps)", "Sub (q, eps)"), "eps is -0.001"),
    ],
)
def test_norms_that_are_none(body, reason, tmp_path):
    proto = model(body, "float[b, s, 8] x, float[b, s, 8] z, float e", "float[b, s, 8] y", PARAMETERS)
    report, nodes = rewritten(proto, tmp_path)
    assert not nodes
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(str(report))
    assert (tmp_path / "in.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


# ---- linear layers and activations, in half precision

WEIGHT = ", ".join(str((i % 7 - 3) / 8) for i in range(32))
HALF = f"float[8, 4] w = {{{WEIGHT}}}, float[4] c = {{0.5, -0.5, 0.25, 1.0}}"
NUMBERS_OF = {"half": 0.5, "one": 1.0, "root": 1.4142, "inv": 0.7071, "three": 3.0, "cub": 0.044715, "sl": 0.79788}
CONSTANTS = {
    name: f"{name} = Constant <value = float {{{value}}}> ()" for name, value in {**NUMBERS_OF, "q": 1.702}.items()
}
ACTIVATED = {
    "relu": "y = Relu (l)",
    "tanh": "y = Tanh (l)",
    "silu": "g = Sigmoid (l) y = Mul (g, l)",
    "silu by exp": "n = Neg (l) e = Exp (n) d = Add (one, e) y = Div (l, d)",
    "quick_gelu": "k = Mul (q, l) g = Sigmoid (k) y = Mul (l, g)",
    "quick_gelu of onnxruntime": "y = com.microsoft.QuickGelu <alpha = 1.702> (l)",
    "gelu": "d = Div (l, root) e = Erf (d) a = Add (e, one) m = Mul (l, a) y = Mul (m, half)",
    "gelu, half inside": "d = Mul (l, inv) e = Erf (d) a = Add (one, e) m = Mul (a, half) y = Mul (m, l)",
    "gelu_tanh": """p = Pow (l, three) k = Mul (cub, p) s = Add (l, k) i = Mul (s, sl) t = Tanh (i) a = Add (one, t)
        h = Mul (l, half) y = Mul (h, a)""",
    "gelu_tanh, multiplied out": """s2 = Mul (l, l) k = Mul (s2, cub) o = Add (k, one) z = Mul (o, l) i = Mul (z, sl)
        t = Tanh (i) a = Add (t, one) h = Mul (a, half) y = Mul (l, h)""",
}


@pytest.mark.parametrize("form", ACTIVATED)
def test_activations_go_into_their_layer(form, tmp_path):
    used = " ".join(
        text for name, text in CONSTANTS.items() if f"{name}," in ACTIVATED[form] or f"{name})" in ACTIVATED[form]
    )
    body = f"{used} m0 = MatMul (x, w) l = Add (c, m0) {ACTIVATED[form]}"
    proto = halved(model(body, "float[b, s, 8] x", "float[b, s, 4] y", HALF))
    report, (node,) = rewritten(proto, tmp_path)
    assert report.replaced == {"linear": 1}
    assert node.attributes["activation"].value == form.split()[0].rstrip(",")
    assert node.attributes["transpose_weight"].value == 1


def test_a_layer_whose_result_is_wanted_keeps_it(tmp_path):
    body = "m0 = MatMul (x, w) l = Add (c, m0) y = Relu (l)"
    proto = model(body, "float[b, s, 8] x", "float[b, s, 4] y, float[b, s, 4] l", HALF)
    report, (node,) = rewritten(halved(proto), tmp_path)
    assert report.replaced == {"linear": 1}
    assert "activation" not in node.attributes


GATED = {
    "two layers": "a = MatMul (x, w) u = MatMul (x, v) g = Sigmoid (a) s = Mul (a, g) y = Mul (s, u)",
    "one layer split": """z = MatMul (x, wide) a, u = Split <axis = -1> (z) g = Sigmoid (a) s = Mul (a, g)
        y = Mul (u, s)""",
    "one layer sliced": """zero = Constant <value = int64[1] {0}> () four = Constant <value = int64[1] {4}> ()
        eight = Constant <value = int64[1] {8}> () ax = Constant <value = int64[1] {2}> () z = MatMul (x, wide)
        u = Slice (z, zero, four, ax) a = Slice (z, four, eight, ax) g = Sigmoid (a) s = Mul (a, g) y = Mul (u, s)""",
}


@pytest.mark.parametrize("form", GATED)
def test_gated_layers(form, tmp_path):
    more = ", ".join(str((i % 5 - 2) / 8) for i in range(64))
    constants = f"{HALF}, float[8, 4] v = {{{', '.join(more.split(', ')[:32])}}}, float[8, 8] wide = {{{more}}}"
    proto = halved(model(GATED[form], "float[b, s, 8] x", "float[b, s, 4] y", constants))
    report, (node,) = rewritten(proto, tmp_path)
    assert report.replaced == {"gated_linear": 1}
    assert node.attributes["activation"].value == "silu"
    assert ("gate" in node.attributes) == (form == "one layer sliced")


def test_fp32_layers_are_left(tmp_path):
    proto = model("y = MatMul (x, w)", "float[b, s, 2] x", "float[b, s, 2] y", "float[2, 2] w = {1.0, 2.0, 3.0, 4.0}")
    assert not rewritten(proto, tmp_path)[1]


QUANTIZED = {
    "cast and scaled": "f = Cast <to = 1> (w8) d = Mul (f, k) y = MatMul (x, d)",
    "dequantized": "d = DequantizeLinear (w8, k) y = MatMul (x, d)",
}


@pytest.mark.parametrize("form", QUANTIZED)
def test_quantized_weights_are_left_with_the_reason(form, tmp_path):
    constants = "int8[2, 2] w8 = {1, 2, 3, 4}, float k = {0.5}"
    report, nodes = rewritten(model(QUANTIZED[form], "float[b, s, 2] x", "float[b, s, 2] y", constants), tmp_path)
    assert not nodes
    (miss,) = report.near_misses
    assert miss.reason == "its weight is dequantized from int8, which no op here multiplies yet"
    assert (miss.rule, miss.value) == ("linear", "d")


# ---- rotary embeddings

HEADS = "float[b, 2, s, 8] x, float[1, 1, s, 8] cos, float[1, 1, s, 8] sin"
NUMBERS = " ".join(f"n{n} = Constant <value = int64[1] {{{n}}}> ()" for n in (0, 1, 2, 3, 4, 8))
ROTARY = {
    "slices": """lo = Slice (x, n0, n4, n3) hi = Slice (x, n4, n8, n3) m = Neg (hi) r = Concat <axis = -1> (m, lo)
        a = Mul (x, cos) e = Mul (r, sin) y = Add (a, e)""",
    "slices whose bounds are cast": """a0 = CastLike (n0, n1) a4 = Cast <to = 7> (n4) lo = Slice (x, a0, a4, n3)
        hi = Slice (x, a4, n8, n3) m = Neg (hi) r = Concat <axis = -1> (m, lo) a = Mul (x, cos) e = Mul (r, sin)
        y = Add (a, e)""",
    "a split, commuted": """lo, hi = Split <axis = 3> (x) m = Neg (hi) r = Concat <axis = 3> (m, lo) a = Mul (cos, x)
        e = Mul (sin, r) y = Add (e, a)""",
}


@pytest.mark.parametrize("form", ROTARY)
def test_rotary_embeddings(form, tmp_path):
    report, _ = rewritten(model(f"{NUMBERS} {ROTARY[form]}", HEADS, "float[b, 2, s, 8] y"), tmp_path)
    assert report.replaced == {"rotary_embedding": 1}


def test_the_original_rotary_embedding(tmp_path):
    """Of halves, with tables half as wide, of the first part of the head."""
    body = f"""{NUMBERS} p = Slice (x, n0, n4, n3) rest = Slice (x, n4, n8, n3) lo, hi = Split <axis = -1> (p)
        a = Mul (lo, cos) e = Mul (hi, sin) f = Sub (a, e) g = Mul (hi, cos) h = Mul (lo, sin) k = Add (g, h)
        t = Concat <axis = -1> (f, k) y = Concat <axis = -1> (t, rest)"""
    inputs = "float[b, 2, s, 8] x, float[1, 1, s, 2] cos, float[1, 1, s, 2] sin"
    report, (node,) = rewritten(model(body, inputs, "float[b, 2, s, 8] y"), tmp_path)
    assert report.replaced == {"rotary_embedding": 1}
    assert node.attributes["rotary_dim"].value == 4


@pytest.mark.parametrize(("rows", "shape"), [(False, "b, 2, s, 8"), (True, "b, s, 16")])
def test_onnxruntimes_rotary_embedding_from_a_position_on(rows, shape, tmp_path):
    heads = " <num_heads = 2>" if rows else ""
    body = f"y = com.microsoft.RotaryEmbedding{heads} (x, first, cos, sin)"
    inputs = f"float[{shape}] x, int64[1] first, float[16, 4] cos, float[16, 4] sin"
    proto = model(body, inputs, f"float[{shape}] y")
    report, (node,) = rewritten(proto, tmp_path, random_inputs(proto) | {"first": np.array([3])})
    assert report.replaced == {"rotary_embedding": 1}
    assert len(node.inputs) == 5


def test_interleaved_rotary_embeddings(tmp_path):
    """As GPT-J turns neighbours."""
    body = f"""{NUMBERS} end = Constant <value = int64[1] {{9223372036854775807}}> () even = Slice (x, n0, end, n3, n2)
        odd = Slice (x, n1, end, n3, n2) m = Neg (odd) u = Unsqueeze (m, n4) v = Unsqueeze (even, n4)
        r5 = Concat <axis = -1> (u, v) sh = Shape (x) r = Reshape (r5, sh) a = Mul (x, cos) e = Mul (r, sin)
        y = Add (a, e)"""
    report, (node,) = rewritten(model(body, HEADS, "float[b, 2, s, 8] y"), tmp_path)
    assert report.replaced == {"rotary_embedding": 1}
    assert node.attributes["interleaved"].value == 1


@pytest.mark.parametrize(
    "change", [("m = Neg (hi)", "m = Identity (hi)"), ("n0, n4", "n1, n4"), ("(m, lo)", "(lo, m)")]
)
def test_what_does_not_turn_is_left(change, tmp_path):
    body = ROTARY["slices"].replace(*change)
    if change[0] == "n0, n4":
        body = body.replace("Slice (x, n4, n8, n3)", "Slice (x, n3, n8, n3)")
    proto = model(f"{NUMBERS} {body}", HEADS, "float[b, 2, s, 8] y")
    assert not rewritten(proto, tmp_path)[1]


# ---- attention of other exporters

ROWS = "float[b, s, 16] x, float[b, t, 16] z"
SPLIT = "four = Constant <value = int64[4] {0, 0, 2, 8}> () half = Constant <value = float {0.5}> ()"
MERGE = "three = Constant <value = int64[3] {0, 0, 16}> ()"
FLAT = " ".join(
    [f"ax{n} = Constant <value = int64[1] {{{n}}}> () c{n} = Identity (ax{n})" for n in (1, 2, 3, 4, 8)]
    + ["c01 = Constant <value = int64[2] {0, 1}> () m1 = Constant <value = int64[1] {-1}> ()"]
    + ["three0 = Constant <value = int64[3] {0, 0, 16}> ()"]
)


def flattened(x, out):
    """[B, H, .., D] as [B*H, S, D], its sizes computed."""
    return f"""{out}s = Shape ({x}) {out}f = Gather ({out}s, c01) {out}p = ReduceProd <keepdims = 1> ({out}f)
        {out}l = Gather ({out}s, m1) {out}c = Concat <axis = 0> ({out}p, m1, {out}l) {out} = Reshape ({x}, {out}c)"""


ATTENTION = {
    "tensorflow: einsum": f"""{SPLIT} {MERGE} q = Reshape (x, four) k = Reshape (z, four) qs = Mul (q, half)
        p = Einsum <equation = "bqhd,bkhd->bhqk"> (qs, k) w = Softmax <axis = 3> (p)
        o = Einsum <equation = "bhqk,bkhd->bqhd"> (w, k) y = Reshape (o, three)""",
    "paddle: transposed products, scale first": f"""{SPLIT} {MERGE} qr = Reshape (x, four)
        q = Transpose <perm = [0, 2, 1, 3]> (qr) kr = Reshape (z, four) k = Transpose <perm = [0, 2, 1, 3]> (kr)
        qs = Mul (half, q) kt = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (qs, kt) w = Softmax (p)
        o = MatMul (w, k) t0 = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape (t0, three)""",
    "keys transposed twice": f"""{SPLIT} {MERGE} qr = Reshape (x, four) q = Transpose <perm = [0, 2, 1, 3]> (qr)
        kr = Reshape (z, four) k1 = Transpose <perm = [0, 2, 3, 1]> (kr) v = Transpose <perm = [0, 2, 1, 3]> (kr)
        p = MatMul (q, k1) ps = Mul (p, half) w = Softmax (ps) o = MatMul (w, v)
        t0 = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape (t0, three)""",
    "onnxruntime's product": f"""{SPLIT} {MERGE} qr = Reshape (x, four) q = Transpose <perm = [0, 2, 1, 3]> (qr)
        kr = Reshape (z, four) k = Transpose <perm = [0, 2, 1, 3]> (kr)
        p = com.microsoft.FusedMatMul <transB = 1, alpha = 0.5> (q, k) w = Softmax (p) o = MatMul (w, k)
        t0 = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape (t0, three)""",
    "onnxruntime's operator": "y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.5> (x, z, z)",
    "tf2onnx: einsum as products of flattened heads": f"""{SPLIT} {FLAT} q1 = Reshape (x, four) q2 = Unsqueeze (q1, ax3)
        q3 = Transpose <perm = [0, 2, 1, 3, 4]> (q2) {flattened("q3", "q")} k1 = Reshape (z, four)
        k2 = Transpose <perm = [0, 2, 1, 3]> (k1) {flattened("k2", "k")} kt = Transpose <perm = [0, 2, 1]> (k)
        p0 = MatMul (q, kt) qz = Shape (q3) kz = Shape (k2) front = Gather (qz, c01) back = Gather (qz, c2)
        keys = Gather (kz, c2) s5 = Concat <axis = 0> (front, back, keys, c1) p1 = Reshape (p0, s5)
        p2 = Squeeze (p1, ax4) p3 = Mul (p2, half) w = Softmax (p3) w1 = Unsqueeze (w, ax3) {flattened("w1", "w2")}
        o0 = MatMul (w2, k) o5 = Concat <axis = 0> (front, back, c8, c1) o1 = Reshape (o0, o5) o2 = Squeeze (o1, ax4)
        o3 = Unsqueeze (o2, ax1) o4 = Transpose <perm = [0, 3, 1, 2, 4]> (o3) y = Reshape (o4, three0)""",
    "a softmax over the keys of keys by queries": f"""{SPLIT} {MERGE} q1 = Reshape (x, four) k1 = Reshape (z, four)
        k = Transpose <perm = [0, 2, 1, 3]> (k1) qt = Transpose <perm = [0, 2, 3, 1]> (q1) p = MatMul (k, qt)
        ps = Mul (half, p) w = Softmax <axis = 2> (ps) wt = Transpose <perm = [0, 1, 3, 2]> (w) o = MatMul (wt, k)
        t0 = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape (t0, three)""",
    "values on the left": f"""{SPLIT} {MERGE} qr = Reshape (x, four) q = Transpose <perm = [0, 2, 1, 3]> (qr)
        kr = Reshape (z, four) kt = Transpose <perm = [0, 2, 3, 1]> (kr) p = MatMul (q, kt) ps = Mul (p, half)
        w = Softmax (ps) wt = Transpose <perm = [0, 1, 3, 2]> (w) o = MatMul (kt, wt)
        t0 = Transpose <perm = [0, 3, 1, 2]> (o) y = Reshape (t0, three)""",
}


@pytest.mark.parametrize("form", ATTENTION)
def test_attention_of_other_exporters(form, tmp_path):
    report, (node,) = rewritten(model(ATTENTION[form], ROWS, "float[b, s, 16] y"), tmp_path)
    assert report.replaced == {"attention": 1}
    assert node.attributes["scale"].value == pytest.approx(0.5)
    assert node.attributes["num_heads"].value == 2, "rows in, rows out"
    assert not any(n.op_type == "Transpose" for n in ir.load(tmp_path / "out.onnx").graph)


MASKS = {
    "a bool, switched on": ("bool[b, t] m", "a = Constant <value = int64[2] {1, 2}> () u = Unsqueeze (m, a) "
                            "n = Not (u) f = Cast <to = 1> (n) low = Constant <value = float {-3.4028235e38}> () "
                            "bias = Mul (f, low)", "lm"),
    "an integer, switched on": ("int64[b, t] m", "a = Constant <value = int64[2] {1, 2}> () u = Unsqueeze (m, a) "
                                "f = Cast <to = 1> (u) one = Constant <value = float {1.0}> () d = Sub (one, f) "
                                "low = Constant <value = float {-10000.0}> () bias = Mul (d, low)", "b"),
}  # fmt: skip


BY = "g = Cast <to = 1> (m) h = Mul (ps, g)"
GATES = {  # written into scores by a product with the mask, as TensorFlow does
    "by what hides": f"n = Not (m) f = Cast <to = 1> (n) low = Mul (f, far) {BY} pm = Add (h, low)",
    "by one minus": f"{BY} i = Sub (one, g) low = Mul (i, near) pm = Sub (h, low)",
    "by nothing low": "g = Cast <to = 1> (m) pm = Mul (g, ps)",
    "by another mask": f"n = Not (m2) f = Cast <to = 1> (n) low = Mul (f, far) {BY} pm = Add (h, low)",
    "by its opposite": f"f = Cast <to = 1> (m) low = Mul (f, far) {BY} pm = Add (h, low)",
    "by little": f"n = Not (m) f = Cast <to = 1> (n) {BY} pm = Sub (h, f)",
}
REASONS = ["does not hide them", "nothing low is added", "by another", "by another", "become -1, which does not hide"]


RENORMALIZED = {  # jax2onnx's dot_product_attention: (what is changed, whether it is one)
    "as it is": ({}, True),
    "the sum of the weights": ({"ReduceSum (wm, last)": "ReduceSum (w, last)"}, False),
    "over queries": ({"ReduceSum (wm, last)": "ReduceSum (wm, second)"}, False),
    "one where nothing is seen": ({"Where (nz, d, zero)": "Where (nz, d, one)"}, False),
    "by two": ({"Where (nz, t, one)": "Where (nz, t, two)"}, False),
    "more than one": ({"Greater (t, zero)": "Greater (t, one)"}, False),
    "by a float": ({"f = Cast <to = 1> (m)": "f = Identity (m3)"}, False),
}


@pytest.mark.parametrize("form", RENORMALIZED)
def test_weights_that_are_masked_and_made_to_sum_up_again(form, tmp_path):
    changes, expected = RENORMALIZED[form]
    body = """kt = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (q, kt) w = Softmax <axis = 3> (p)
        f = Cast <to = 1> (m) wm = Mul (w, f) t = ReduceSum (wm, last) nz = Greater (t, zero) n = Where (nz, t, one)
        d = Div (wm, n) z = Where (nz, d, zero) y = MatMul (z, v)"""
    for old, new in changes.items():
        body = body.replace(old, new)
    inputs = (
        """float[b, 2, 7, 8] q, float[b, 2, 7, 8] k, float[b, 2, 7, 8] v, bool[b, 1, 1, 7] m, float[b, 1, 1, 7] m3"""
    )
    constants = (
        """float zero = {0.0}, float one = {1.0}, float two = {2.0}, int64[1] last = {-1}, int64[1] second = {2}"""
    )
    _, nodes = rewritten(model(body, inputs, "float[b, 2, 7, 8] y", constants), tmp_path)
    assert bool(nodes) == expected
    if nodes:
        assert "".join(p for p, value in zip("qkvblm", nodes[0].inputs, strict=False) if value) == "qkvlm"


@pytest.mark.parametrize("form", GATES)
def test_masks_by_which_scores_are_multiplied(form, tmp_path):
    body = f"""{SPLIT} qr = Reshape (x, four) q = Transpose <perm = [0, 2, 1, 3]> (qr) kr = Reshape (z, four)
        k = Transpose <perm = [0, 2, 1, 3]> (kr) kt = Transpose <perm = [0, 2, 3, 1]> (kr) p = MatMul (q, kt)
        ps = Mul (p, half) {GATES[form]} w = Softmax (pm) y = MatMul (w, k)"""
    constants = "float far = {-3.0e38}, float near = {1e10}, float one = {1.0}"
    inputs = f"{ROWS}, bool[b, 1, 1, t] m, bool[b, 1, 1, t] m2"
    report, nodes = rewritten(model(body, inputs, "float[b, 2, s, 8] y", constants), tmp_path)
    assert len(nodes) == (form in ("by what hides", "by one minus"))
    if nodes:
        given = "".join(port for port, value in zip("qkvblm", nodes[0].inputs, strict=False) if value is not None)
        assert given == "qkvlm"
    else:
        assert any(reason in report.near_misses[0].reason for reason in REASONS), report


@pytest.mark.parametrize("form", MASKS)
def test_a_mask_becomes_keys_only_where_it_is_one(form, tmp_path):
    """An integer may be neither 0 nor 1."""
    extra, made, ports = MASKS[form]
    body = f"""{made} {SPLIT} qr = Reshape (x, four) q = Transpose <perm = [0, 2, 1, 3]> (qr) kr = Reshape (z, four)
        k = Transpose <perm = [0, 2, 1, 3]> (kr) kt = Transpose <perm = [0, 2, 3, 1]> (kr) p = MatMul (q, kt)
        ps = Mul (p, half) pm = Add (bias, ps) w = Softmax (pm) y = MatMul (w, k)"""
    report, (node,) = rewritten(model(body, f"{ROWS}, {extra}", "float[b, 2, s, 8] y"), tmp_path)
    assert report.replaced == {"attention": 1}
    given = "".join(port for port, value in zip("qkvblm", node.inputs, strict=False) if value is not None)
    assert given == "qkv" + ports


def test_onnxruntimes_packed_attention(tmp_path):
    numbers = ", ".join(str((i % 11 - 5) / 16) for i in range(8 * 24))
    constants = f"float[8, 24] w = {{{numbers}}}, float[24] c = {{{', '.join(['0.25'] * 24)}}}"
    body = "y = com.microsoft.Attention <num_heads = 2, unidirectional = 1> (x, w, c)"
    report, (node,) = rewritten(model(body, "float[b, s, 8] x", "float[b, s, 8] y", constants), tmp_path)
    assert report.replaced == {"attention": 1}
    assert node.attributes["causal"].value == 1


def test_grouped_keys_are_not_repeated(tmp_path):
    body = """five = Constant <value = int64[5] {1, 1, 2, 1, 1}> () ax = Constant <value = int64[1] {2}> ()
        sh = Shape (q) s0 = Constant <value = int64[4] {0, 4, -1, 8}> () u = Unsqueeze (k, ax) e = Expand (u, five)
        r = Reshape (e, s0) kt = Transpose <perm = [0, 1, 3, 2]> (r) uv = Unsqueeze (v, ax) ev = Expand (uv, five)
        rv = Reshape (ev, s0) p = MatMul (q, kt) w = Softmax (p) y = MatMul (w, rv)"""
    inputs = "float[b, 4, s, 8] q, float[b, 2, t, 8] k, float[b, 2, t, 8] v"
    report, (node,) = rewritten(model(body, inputs, "float[b, 4, s, 8] y"), tmp_path)
    assert report.replaced == {"attention": 1}
    assert [value.name for value in node.inputs] == ["q", "k", "v"]


# ---- what survives


def test_inside_of_a_condition(tmp_path):
    then = "a () => (float[b, s, 8] ya) { ya = LayerNormalization (x, w, c) }"
    other = "e () => (float[b, s, 8] ye) { ye = Identity (x) }"
    body = f"y = If (on) <then_branch = {then}, else_branch = {other}>"
    proto = model(body, "float[b, s, 8] x, bool on", "float[b, s, 8] y", PARAMETERS)
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(proto, source)
    report = trimaran.rewrite_onnx(source, target, inputs={"x": random_inputs(proto)["x"], "on": np.array(True)})
    assert report.replaced == {"layer_norm": 1}
    assert report.verified.startswith("verified")
    branch = next(n for n in ir.load(target).graph if n.op_type == "If").attributes["then_branch"].value
    assert [node.domain for node in branch] == ["trimaran"]


def test_names_metadata_and_unknown_nodes_survive(tmp_path):
    body = "n = LayerNormalization (x, w, c) u = other.domain.Mystery <level = 3> (n) y = Relu (n)"
    proto = model(body, "float[b, s, 8] x", "float[b, s, 8] y, float[b, s, 8] n, float[b, s, 8] u", PARAMETERS)
    proto.opset_import.append(onnx.helper.make_opsetid("other.domain", 2))
    onnx.helper.set_model_props(proto, {"author": "somebody"})
    proto.doc_string, proto.producer_name = "a doc", "by hand"
    after = ir.from_proto(proto)
    assert not rewrite(after)
    made = ir.to_proto(after)
    assert [o.name for o in made.graph.output] == ["y", "n", "u"]
    assert {p.key: p.value for p in made.metadata_props} == {"author": "somebody"}
    assert (made.doc_string, made.producer_name) == ("a doc", "by hand")
    assert {o.domain: o.version for o in made.opset_import}.items() >= {
        "": 17,
        "other.domain": 2,
        "trimaran": 1,
    }.items()
    mystery = next(node for node in made.graph.node if node.op_type == "Mystery")
    assert mystery.SerializeToString() == proto.graph.node[1].SerializeToString()


def test_an_old_onnxruntime_form_of_opset_11(tmp_path):
    """Softmax flattens from axis 1 there unless told otherwise: one without an axis is no attention."""
    body = f"""{SPLIT} kt = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (q, kt) ps = Mul (p, half)
        w = Softmax <axis = 3> (ps) y = MatMul (w, v)"""
    inputs = "float[b, 2, s, 8] q, float[b, 2, t, 8] k, float[b, 2, t, 8] v"
    assert rewritten(model(body, inputs, "float[b, 2, s, 8] y", opset=11), tmp_path)[0].replaced == {"attention": 1}
    plain = model(body.replace("<axis = 3>", ""), inputs, "float[b, 2, s, 8] y", opset=11)
    (tmp_path / "plain").mkdir()
    report, nodes = rewritten(plain, tmp_path / "plain")
    assert not nodes
    assert report.near_misses[0].reason == "a softmax over axis 1 of 4, not over the last"


def test_the_kernels_give_the_same(tmp_path):
    proto = model(NORMS["tensorflow's batch normalization"], "float[b, s, 8] x", "float[b, s, 8] y", PARAMETERS)
    rewritten(proto, tmp_path)
    feeds = random_inputs(proto)
    expected = onnxruntime.InferenceSession(tmp_path / "in.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)
    with trimaran.interpret():
        got = trimaran.ort_session(tmp_path / "out.onnx", ["CPUExecutionProvider"]).run(None, feeds)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)


# ---- the report


def test_the_report_as_json_and_as_a_page(tmp_path):
    body = NORMS["pow, sqrt, div"] + " f = Cast <to = 1> (w8) d2 = Mul (f, eps) z = MatMul (y, d2)"
    constants = f"{PARAMETERS}, int8[8, 2] w8 = {{{', '.join(map(str, range(16)))}}}"
    proto = model(body, "float[b, s, 8] x", "float[b, s, 2] z", constants)
    onnx.save(proto, tmp_path / "in.onnx")
    report = trimaran.rewrite_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx")
    found = json.loads(json.dumps(report.as_dict()))
    assert found["replaced"] == {"layer_norm": 1}
    reason = "its weight is dequantized from int8, which no op here multiplies yet"
    assert found["near_misses"] == [{"rule": "linear", "node": "z", "reason": reason, "value": "d2"}]
    page = report.page()
    assert page.count("<li ") == len(report.before) + len(report.after)
    assert "<b>trimaran.layer_norm</b>" in page
    assert "<b>ReduceMean</b>" in page
    assert reason in page
    assert "http" not in page, "nothing from outside"


def test_names_in_a_page_are_text(tmp_path):
    proto = model("y = Relu (x)", "float[b] x", "float[b] y")
    proto.graph.node[0].name = "<script>alert(1)</script>"
    onnx.save(proto, tmp_path / "in.onnx")
    assert "<script>" not in trimaran.rewrite_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx").page()


def test_the_command(tmp_path, monkeypatch, capsys):
    onnx.save(model(NORMS["the operator"], "float[b, s, 8] x", "float[b, s, 8] y", PARAMETERS), tmp_path / "in.onnx")
    monkeypatch.chdir(tmp_path)
    app(["rewrite", "in.onnx", "out.onnx", "--html", "page.html", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["replaced"] == {"layer_norm": 1}
    assert "trimaran.layer_norm" in (tmp_path / "page.html").read_text()
    assert app(["rewrite", "in.onnx", "out.onnx"], standalone_mode=False) == 2, "it exists"
    assert "which exists" in capsys.readouterr().err


def test_progress_is_told(tmp_path):
    onnx.save(model(NORMS["the operator"], "float[b, s, 8] x", "float[b, s, 8] y", PARAMETERS), tmp_path / "in.onnx")
    told = []
    trimaran.rewrite_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx", progress=lambda *now: told.append(now))
    assert told[0] == ("shapes", 0.0)
    assert told[-1] == ("done", 1.0)
    assert [done for _, done in told] == sorted(done for _, done in told)
