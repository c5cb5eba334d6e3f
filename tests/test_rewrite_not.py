"""Graphs that look like a fusion and are none, or are one in another way than they look: each is left alone, or right.

Every case is run before and after (`rewritten`), so a wrong match fails whatever is counted here."""

from __future__ import annotations

import pytest
from graph_text import halved, model, rewritten

VECTORS = ", ".join(f"float[8] {name} = {{1.5, -0.5, 2.0, 0.25, 1.0, -1.25, 0.75, 3.0}}" for name in "wc")
NORM = f"{VECTORS}, float eps = {{0.001}}, float two = {{2.0}}"
X, Z, Y = "float[b, s, 8] x", "float[b, s, 8] z", "float[b, s, 8] y"
RMS = """p = Pow (x, two) q = ReduceMean <axes = [-1]> (p) a = Add (q, eps) r = Sqrt (a) n = Div (x, r)
    y = Mul (n, w)"""
LAYER = """m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) p = Pow (d, two) v = ReduceMean <axes = [-1]> (p)
    a = Add (v, eps) r = Sqrt (a) n = Div (d, r) g = Mul (n, w) y = Add (g, c)"""
NONE: dict[str, int] = {}
NORMS = {  # body, inputs, output, more constants, what is replaced
    "a weight of more dimensions than x": (
        f"w4 = Constant <value = int64[4] {{1, 1, 1, 8}}> () ww = Reshape (w, w4) {RMS.replace('(n, w)', '(n, ww)')}",
        X,
        "float[k, b, s, 8] y",
        "",
        {"rms_norm": 1},
    ),
    "a weight that widens x": (
        "w5 = Expand (w, wide) " + RMS.replace("(n, w)", "(n, w5)"),
        "float[1, s, 8] x",
        "float[5, s, 8] y",
        "int64[3] wide = {5, 1, 8}",
        {"rms_norm": 1},
    ),
    "a weight that varies": (RMS.replace("(n, w)", "(n, z)"), f"{X}, {Z}", Y, "", {"rms_norm": 1}),
    "eps outside of the root": (
        RMS.replace("a = Add (q, eps) r = Sqrt (a)", "t = Sqrt (q) r = Add (t, eps)"),
        X,
        Y,
        "",
        NONE,
    ),
    "eps at least": (RMS.replace("Add (q, eps)", "Max (q, eps)"), X, Y, "", NONE),
    "a mean over two axes": (RMS.replace("[-1]", "[1, 2]"), X, Y, "", NONE),
    "a mean over another axis": (RMS.replace("[-1]", "[1]"), X, Y, "", NONE),
    "a mean that keeps no axis": (
        RMS.replace("axes = [-1]", "axes = [-1], keepdims = 0"),
        "float[8, 8] x",
        "float[8, 8] y",
        "",
        NONE,
    ),
    "cubes": (RMS.replace("(x, two)", "(x, three)"), "float[b, s, 8] x", Y, "float three = {4.0}", NONE),
    "the mean of something else": (LAYER.replace("(x) d", "(z) d"), f"{X}, {Z}", Y, "", {"rms_norm": 1}),
    "an unbiased variance": (
        LAYER.replace("v = ReduceMean <axes = [-1]> (p)", "vs = ReduceSum (p, ax) v = Div (vs, seven)"),
        X,
        Y,
        "int64[1] ax = {-1}, float seven = {7.0}",
        NONE,
    ),
    "a bias by rows": (
        LAYER.replace("(g, c)", "(g, rows)"),
        "float[b, 5, 8] x",
        "float[b, 5, 8] y",
        "float[5, 1] rows = {1, 2, 3, 4, 5}",
        {"layer_norm": 1},
    ),
    "integers on the way": (
        f"xi = Cast <to = 6> (x) xf = Cast <to = 1> (xi) {RMS.replace('(x, two)', '(xf, two)')}",
        X,
        Y,
        "",
        NONE,
    ),
    "the root of something else": (RMS.replace("Sqrt (a)", "Sqrt (z)"), f"{X}, float[b, s, 1] z", Y, "", NONE),
    "the sum is a graph output, and x too": (
        "t = Add (x, z) y = LayerNormalization (t, w, c)",
        f"{X}, {Z}",
        f"{Y}, float[b, s, 8] t, float[b, s, 8] x",
        "",
        {"layer_norm": 1},
    ),
    "the norm is two graph outputs": (
        "n = LayerNormalization (x, w, c) y = Identity (n)",
        X,
        f"{Y}, float[b, s, 8] n",
        "",
        {"layer_norm": 1},
    ),
}


@pytest.mark.parametrize("case", NORMS)
def test_norms(case, tmp_path):
    body, inputs, outputs, constants, expected = NORMS[case]
    report, _ = rewritten(model(body, inputs, outputs, f"{NORM}, {constants}".rstrip(", ")), tmp_path)
    assert dict(report.replaced) == expected, report


FOUR = "float[b, 2, s, 8] q, float[b, 2, t, 8] k, float[b, 2, t, 8] v"
SQUARE = "float[b, 2, 8, 8] q, float[b, 2, 8, 8] k, float[b, 2, 8, 8] v"
OUT = "float[b, 2, s, 8] y"
PRODUCT = "kt = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (q, kt)"
ENDS = "w = Softmax <axis = -1> (s0) y = MatMul (w, v)"
FLOATS = {"low": -10000.0, "weak": -10.0, "high": 10000.0, "tiny": 1e-4, "zero": 0.0, "one": 1.0, "m2": -2.0, "p2": 2.0}
NUMBERS = ", ".join(f"float {name} = {{{value}}}" for name, value in FLOATS.items())
MASK, BIAS = ", bool[b, 1, s, t] m", ", float[b, 1, s, t] m"
FIVE = "float[b, 2, 5, 8] q, float[b, 2, 5, 8] k, float[b, 2, 5, 8] v"
TRIANGLE = """o = Expand (true, fives) m = Trilu <upper = {}> (o, shift) s0 = Where (m, p, low)"""
REPEAT = """u = Unsqueeze (k, ax) e = Expand (u, wide) kk = Reshape (e, heads) uv = Unsqueeze (v, ax)
    ev = Expand (uv, wide) vv = Reshape (ev, heads) kt = Transpose <perm = [0, 1, 3, 2]> (kk) s0 = MatMul (q, kt)
    w = Softmax (s0) y = MatMul (w, vv)"""
GROUPED = "float[b, 4, s, 8] q, float[b, 2, t, 8] k, float[b, 2, t, 8] v"
NO_PRODUCT = "the scores are not a product of queries and keys"
NO_VALUES = "the softmax is not multiplied with values"
WEAK = "masked scores become"
ATTENTIONS = {  # body, inputs, output, a reason or what is replaced
    "a scale that varies": (f"{PRODUCT} s0 = Mul (p, m) {ENDS}", f"{FOUR}, float[b, 2, s, 1] m", OUT, NO_PRODUCT),
    "a scale of each head": (f"{PRODUCT} s0 = Mul (p, each) {ENDS}", FOUR, OUT, NO_PRODUCT),
    "a mask after the softmax": (
        f"{PRODUCT} w = Softmax (p) x = Mul (w, m) y = MatMul (x, v)",
        FOUR + BIAS,
        OUT,
        NO_VALUES,
    ),
    "a choice after the softmax": (
        f"{PRODUCT} w = Softmax (p) x = Where (m, w, zero) y = MatMul (x, v)",
        FOUR + MASK,
        OUT,
        NO_VALUES,
    ),
    "another's NaN": (
        f"{PRODUCT} w = Softmax (p) n = IsNaN (p) x = Where (n, zero, w) y = MatMul (x, v)",
        FOUR,
        OUT,
        NO_VALUES,
    ),
    "NaN to one": (
        f"{PRODUCT} w = Softmax (p) n = IsNaN (w) x = Where (n, one, w) y = MatMul (x, v)",
        FOUR,
        OUT,
        NO_VALUES,
    ),
    "k as it is": (
        "s0 = MatMul (q, k) w = Softmax (s0) y = MatMul (w, v)",
        SQUARE,
        "float[b, 2, 8, 8] y",
        {"attention": 1},
    ),
    "a softmax over queries": (
        f"{PRODUCT} w = Softmax <axis = 2> (p) y = MatMul (w, v)",
        FOUR,
        OUT,
        "a softmax over axis 2",
    ),
    "weights on the right": (f"{PRODUCT} w = Softmax (p) y = MatMul (v, w)", SQUARE, "float[b, 2, 8, 8] y", NO_VALUES),
    "weights turned": (
        f"{PRODUCT} w = Softmax (p) x = Transpose <perm = [0, 1, 3, 2]> (w) y = MatMul (x, v)",
        SQUARE,
        "float[b, 2, 8, 8] y",
        NO_VALUES,
    ),
    "weights as integers": (
        f"{PRODUCT} w = Softmax (p) i = Cast <to = 6> (w) x = Cast <to = 1> (i) y = MatMul (x, v)",
        FOUR,
        OUT,
        NO_VALUES,
    ),
    "scores as integers": (f"{PRODUCT} i = Cast <to = 6> (p) s0 = Cast <to = 1> (i) {ENDS}", FOUR, OUT, NO_PRODUCT),
    "weights that are dropped out": (
        f"{PRODUCT} w = Softmax (p) x, n = Dropout (w, zero, true) y = MatMul (x, v)",
        FOUR,
        f"{OUT}, bool[b, 2, s, t] n",
        NO_VALUES,
    ),
    "a bias by queries": (
        f"{PRODUCT} s0 = Add (p, m) {ENDS}",
        f"{FOUR}, float[b, 1, s, 1] m",
        OUT,
        "the mask's shape [b, 1, s, 1] is not",
    ),
    "a mask of more rows than q": (
        f"{PRODUCT} s0 = Add (p, m) {ENDS}",
        FOUR.replace("b,", "1,") + ", float[3, 1, s, t] m",
        "float[3, 2, s, 8] y",
        "the scores [1, 2, s, t] become [3, 2, s, t]",
    ),
    "v of one row": (
        f"{PRODUCT} s0 = Mul (p, one) {ENDS}",
        FOUR.replace("[b, 2, t, 8] v", "[1, 2, t, 8] v"),
        OUT,
        "not provably",
    ),
    "v of another width": (
        f"{PRODUCT} s0 = Mul (p, one) {ENDS}",
        FOUR.replace("8] v", "4] v"),
        "float[b, 2, s, 4] y",
        "not provably",
    ),
    "one head of keys": (
        f"{PRODUCT} s0 = Mul (p, one) {ENDS}",
        FOUR.replace("2, t", "1, t"),
        OUT,
        {"attention": 1},
    ),
    "a mask that hides little": (f"{PRODUCT} s0 = Where (m, p, weak) {ENDS}", FOUR + MASK, OUT, WEAK),
    "a mask that shows": (f"{PRODUCT} s0 = Where (m, p, high) {ENDS}", FOUR + MASK, OUT, WEAK),
    "a mask made small": (f"{PRODUCT} n = Where (m, p, low) s0 = Mul (n, tiny) {ENDS}", FOUR + MASK, OUT, WEAK),
    "a bias made small": (
        f"n = Where (m, zero, low) {PRODUCT} o = Add (p, n) s0 = Mul (o, tiny) {ENDS}",
        FOUR + MASK,
        OUT,
        {"attention": 1},
    ),
    "the lowest bias made small": (
        f"n = Where (m, zero, lowest) {PRODUCT} o = Add (p, n) s0 = Mul (o, least) {ENDS}",
        FOUR + MASK,
        OUT,
        {"attention": 1},
    ),
    "a bias taken away": (
        f"n = Where (m, zero, low) {PRODUCT} s0 = Sub (p, n) {ENDS}",
        FOUR + MASK,
        OUT,
        {"attention": 1},
    ),
    "scores taken away": (f"{PRODUCT} s0 = Sub (m, p) {ENDS}", FOUR + BIAS, OUT, {"attention": 1}),
    "scores below": (f"{PRODUCT} s0 = Div (one, p) {ENDS}", FOUR, OUT, NO_PRODUCT),
    "scores squared": (f"{PRODUCT} s0 = Mul (p, p) {ENDS}", FOUR, OUT, NO_PRODUCT),
    "a cap below zero": (
        f"{PRODUCT} d = Div (p, m2) t = Tanh (d) s0 = Mul (t, m2) {ENDS}",
        FOUR,
        OUT,
        NO_PRODUCT,
    ),
    "a cap of two numbers": (
        f"{PRODUCT} d = Mul (p, p2) t = Tanh (d) s0 = Mul (t, p2) {ENDS}",
        FOUR,
        OUT,
        {"attention": 1},
    ),
    "scores in other rows": (
        f"{PRODUCT} s0 = Reshape (p, four) {ENDS}",
        "float[b, 2, 4, 8] q, float[b, 2, 5, 8] k, float[b, 4, 5, 8] v",
        "float[b, 4, 2, 8] y",
        "not provably",
    ),
    "heads merged without a transpose": (
        f"{PRODUCT} w = Softmax (p) o = MatMul (w, v) y = Reshape (o, rows)",
        FOUR,
        "float[b, s, 16] y",
        {"attention": 1},
    ),
    "heads in turn instead of in groups": (
        REPEAT.replace("ax)", "one_axis)").replace("wide)", "before)"),
        GROUPED,
        "float[b, 4, s, 8] y",
        {"attention": 1},
    ),
    "a triangle two to the right": (
        f"{PRODUCT} {TRIANGLE.format(0)} {ENDS}",
        FIVE,
        "float[b, 2, 5, 8] y",
        {"attention": 1},
    ),
    "a triangle above": (f"{PRODUCT} {TRIANGLE.format(1)} {ENDS}", FIVE, "float[b, 2, 5, 8] y", {"attention": 1}),
    "no attention at all": (f"{PRODUCT} w = LogSoftmax <axis = 3> (p) y = MatMul (w, v)", FOUR, OUT, NONE),
}
MORE = """float[2, 1, 1] each = {0.5, 2.0}, bool true = {1}, int64[2] fives = {5, 5}, int64 shift = {2},
    int64[4] four = {0, 4, 2, 5}, int64[3] rows = {0, -1, 16}, int64[1] ax = {2}, int64[1] one_axis = {1},
    int64[5] wide = {1, 1, 2, 1, 1}, int64[5] before = {1, 2, 1, 1, 1}, int64[4] heads = {0, 4, -1, 8},
    float lowest = {-3.4e38}, float least = {1e-38}"""


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attentions(case, tmp_path):
    body, inputs, outputs, expected = ATTENTIONS[case]
    report, _ = rewritten(model(body, inputs, outputs, f"{NUMBERS}, {MORE}"), tmp_path)
    if isinstance(expected, str):
        assert not report.replaced
        assert expected in report.near_misses[0].reason
    else:
        assert dict(report.replaced) == expected, report


WEIGHT = "float[8, 4] w = {" + ", ".join(str((i % 7 - 3) / 8) for i in range(32)) + "}"
ROWS, RESULT = "float[b, s, 8] x", "float[b, s, 4] y"
ERF = "d = Div (l, root) e = Erf (d) a = Add (e, one) m = Mul (l, a) y = Mul (m, half)"
TANH = """k0 = Pow (l, three) k1 = Mul (k0, cub) k2 = Add (l, k1) k3 = Mul (k2, sl) t = Tanh (k3) a = Add (t, one)
    h = Mul (l, half) y = Mul (h, a)"""
FACTORS = {"root": 1.4142135, "one": 1.0, "half": 0.5, "three": 3.0, "cub": 0.044715, "sl": 0.7978845}
LAYERS = {  # body, inputs, output, changed constants, what is replaced, the activation
    "gelu": (ERF, ROWS, RESULT, {}, "gelu"),
    "gelu of 1.41": (ERF, ROWS, RESULT, {"root": 1.41}, "none"),
    "gelu plus 1.01": (ERF, ROWS, RESULT, {"one": 1.01}, "none"),
    "gelu without the half": (ERF, ROWS, RESULT, {"half": 1.0}, "none"),
    "gelu of tanh": (TANH, ROWS, RESULT, {}, "gelu_tanh"),
    "gelu of another cube": (TANH, ROWS, RESULT, {"cub": 0.0455}, "none"),
    "gelu of squares": (TANH, ROWS, RESULT, {"three": 2.0}, "none"),
    "a sigmoid of twice": ("t = Add (l, l) g = Sigmoid (t) y = Mul (g, l)", ROWS, RESULT, {}, "none"),
    "a sigmoid of another": ("g = Sigmoid (z) y = Mul (g, l)", f"{ROWS}, float[b, s, 4] z", RESULT, {}, "none"),
    "silu times itself": ("g = Sigmoid (l) h = Mul (g, l) y = Mul (h, l)", ROWS, RESULT, {}, "none"),
    "a layer added to itself": ("y = Add (l, l)", ROWS, RESULT, {}, "none"),
    "a bias of more dimensions": ("y = Add (l, wide)", "float[s, 8] x", "float[1, s, 4] y", {}, "none"),
    "a residual of one row": ("y = Add (l, z)", f"{ROWS}, float[1, s, 4] z", RESULT, {}, "none"),
    "a relu whose layer is wanted": ("y = Relu (l)", ROWS, f"{RESULT}, float[b, s, 4] l", {}, "none"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case, tmp_path):
    body, inputs, outputs, changed, activation = LAYERS[case]
    constants = ", ".join(f"float {name} = {{{value}}}" for name, value in {**FACTORS, **changed}.items())
    constants = f"{WEIGHT}, float[1, 1, 4] wide = {{1, 2, 3, 4}}, {constants}"
    report, (node,) = rewritten(halved(model(f"l = MatMul (x, w) {body}", inputs, outputs, constants)), tmp_path)
    assert report.replaced == {"linear": 1}
    found = node.attributes.get("activation")
    assert (found.value if found else "none") == activation
    assert len(node.inputs) == 2, "no bias, no residual"


PRODUCTS = {  # node, inputs, output: no linear layers
    "one for each row of the batch": ("y = MatMul (x, stack)", "float[2, s, 8] x", "float[2, s, 4] y"),
    "of a vector": ("y = MatMul (x, w)", "float[8] x", "float[4] y"),
    "scaled": ("y = Gemm <alpha = 0.5> (x, w, c)", "float[s, 8] x", "float[s, 4] y"),
    "with a bias by rows": ("y = Gemm (x, w, rows)", "float[3, 8] x", "float[3, 4] y"),
    "turned": ("y = Gemm <transA = 1> (x, w)", "float[8, s] x", "float[s, 4] y"),
    "by what is no parameter": ("y = MatMul (x, z)", "float[b, s, 8] x, float[8, 4] z", "float[b, s, 4] y"),
    "by what an input may replace": ("y = MatMul (x, w)", "float[b, s, 8] x, float[8, 4] w", "float[b, s, 4] y"),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_that_are_no_layers(case, tmp_path):
    body, inputs, outputs = PRODUCTS[case]
    stack = "float[2, 8, 4] stack = {" + ", ".join(str(i % 5) for i in range(64)) + "}"
    constants = f"{WEIGHT}, {stack}, float[3, 1] rows = {{1, 2, 3}}, float[4] c = {{1, 2, 3, 4}}"
    assert not rewritten(halved(model(body, inputs, outputs, constants)), tmp_path)[1]


TURNED = """lo = Slice (x, n0, n4, n3) hi = Slice (x, n4, n8, n3) m = Neg (hi) r = Concat <axis = -1> (m, lo)
    a = Mul (x, cos) e = Mul (r, sin) y = Add (a, e)"""
PLACES = ", ".join(f"int64[1] n{n} = {{{n}}}" for n in (0, 1, 3, 4, 8))
HEADS = "float[b, 2, s, 8] x, float[{0}] cos, float[{1}] sin"
ROTARY = {  # body, inputs, whether it is one
    "halves of the tables that differ": (TURNED, HEADS.format("1, 1, s, 8", "1, 1, s, 8"), True),
    "tables of two batches": (TURNED, HEADS.format("1, 1, s, 8", "b, 1, s, 8"), True),
    "tables by heads": (TURNED, HEADS.format("1, 2, s, 8", "1, 2, s, 8"), False),
    "a table of one position": (TURNED, HEADS.format("1, 1, 1, 8", "1, 1, s, 8"), False),
    "tables of a batch in the place of heads": (TURNED, HEADS.format("2, s, 8", "2, s, 8"), False),
    "another x": (
        TURNED.replace("(x, cos)", "(z, cos)"),
        HEADS.format("1, 1, s, 8", "1, 1, s, 8") + ", float[b, 2, s, 8] z",
        False,
    ),
    "halves in their own order": (
        TURNED.replace("(m, lo)", "(lo, m)"),
        HEADS.format("1, 1, s, 8", "1, 1, s, 8"),
        False,
    ),
    "one table by positions, the other by heads": (
        TURNED,
        "float[b, 3, 3, 8] x, float[1, 3, 1, 8] cos, float[1, 1, 3, 8] sin",
        False,
    ),
}


@pytest.mark.parametrize("case", ROTARY)
def test_rotary_embeddings(case, tmp_path):
    body, inputs, expected = ROTARY[case]
    heads = 3 if "3, 3" in inputs else 2
    length = 3 if heads == 3 else "s"
    proto = model(body, inputs, f"float[b, {heads}, {length}, 8] y", PLACES)
    assert bool(rewritten(proto, tmp_path)[1]) == expected
