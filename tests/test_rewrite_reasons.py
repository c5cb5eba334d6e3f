"""Operators that are left alone, each for a reason that names what is at fault, and masks made of positions."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graph_text import model, rewritten

from trimaran.export.rewrite_onnx import rewrite

MHA = "com.microsoft.MultiHeadAttention <num_heads = 2{}> ({})"
PACKED = "com.microsoft.Attention <num_heads = 2{}> ({})"
ROWS = "float[b, s, 16] q, float[b, t, 16] k, float[b, t, 16] v"
FOUR = "float[b, 2, s, 8] q, float[b, 2, t, 8] k, float[b, 2, t, 8] v"
X, Y3, Y4 = "float[b, s, 16] x", "float[b, s, 16] y", "float[b, 2, s, 8] y"
WIDE = "float[16, 48] w, float[48] c"
NORMED = "float[8] w, float[b, s, 8] x"
CASES = {  # body, inputs, output, opset, the reason
    "a rank that is none": (
        f"y = {MHA.format('', 'q, k, v')}",
        ROWS.replace("s, 16] q", "s, 2, 8] q"),
        Y3,
        17,
        "only [B, S, H*D]",
    ),
    "packed q, k and v": (f"y = {MHA.format('', 'q')}", "float[b, s, 2, 3, 8] q", Y3, 17, "only [B, S, H*D]"),
    "v of another width": (
        f"y = {MHA.format('', 'q, k, v')}",
        ROWS.replace("16] v", "32] v"),
        "float[b, s, 32] y",
        17,
        "or differ",
    ),
    "a past of another shape": (
        f"y, a, c = {MHA.format('', 'q, k, v, , , , pk, pv')}",
        f"{ROWS}, float[b, 2, p, 8] pk, float[b, 2, r, 8] pv",
        f"{Y3}, float[b, 2, u, 8] a, float[b, 2, u, 8] c",
        17,
        "the shapes of past keys",
    ),
    "a bias of rows and keys of heads": (
        f"y = {MHA.format('', 'q, k, v, bias')}",
        "float[b, s, 16] q, float[b, 2, t, 8] k, float[b, 2, t, 8] v, float[48] bias",
        Y3,
        17,
        "a bias of its own",
    ),
    "a mask of three": (
        f"y = {MHA.format('', 'q, k, v, , m')}",
        f"{ROWS}, int32[b, s, t] m",
        Y3,
        17,
        "its key padding mask is int32",
    ),
    "a mask of 64 bits": (
        f"y = {MHA.format('', 'q, k, v, , m')}",
        f"{ROWS}, int64[b, t] m",
        Y3,
        17,
        "its key padding mask is int64",
    ),
    "one direction, other lengths": (
        f"y = {MHA.format(', unidirectional = 1', 'q, k, v')}",
        ROWS,
        Y3,
        17,
        "it is unidirectional, with different numbers",
    ),
    "scores that are used": (
        f"y, , , z = {MHA.format('', 'q, k, v')}",
        ROWS,
        f"{Y3}, float[b, 2, s, t] z",
        17,
        "or its scores are used",
    ),
    "heads too wide": (
        f"y = {MHA.format('', 'q, k, v')}",
        ROWS.replace("16]", "600]"),
        "float[b, s, 600] y",
        17,
        "the head dimension is 300",
    ),
    "integers": (
        f"y = {MHA.format('', 'q, k, v')}",
        ROWS.replace("float", "double"),
        "double[b, s, 16] y",
        17,
        "q is float64",
    ),
    "a bias of other rows": (
        f"y = {MHA.format('', 'q, k, v, , , bias')}",
        f"{ROWS}, float[1, 2, 3, 9] bias",
        Y3,
        17,
        "the mask's shape",
    ),
    "x of two dimensions": (
        f"y = {PACKED.format('', 'x, w, c')}",
        f"float[s, 16] x, {WIDE}",
        "float[s, 16] y",
        17,
        "expected [B, S, K]",
    ),
    "a packed past": (
        f"y, z = {PACKED.format('', 'x, w, c, , pp')}",
        f"{X}, {WIDE}, float[2, b, 2, p, 8] pp",
        f"{Y3}, float[2, b, 2, r, 8] z",
        17,
        "it keeps a cache of past keys",
    ),
    "q, k and v of their own widths": (
        f"y = {PACKED.format(', qkv_hidden_sizes = [8, 8, 32]', 'x, w, c')}",
        f"{X}, {WIDE}",
        "float[b, s, 32] y",
        17,
        "different widths",
    ),
    "turned by itself": (
        f"y = {PACKED.format(', do_rotary = 1', 'x, w, c')}",
        f"{X}, {WIDE}",
        Y3,
        17,
        "or it turns them itself",
    ),
    "a packed mask of three": (
        f"y = {PACKED.format('', 'x, w, c, m')}",
        f"{X}, {WIDE}, int32[b, s, s] m",
        Y3,
        17,
        "its mask is int32",
    ),
    "packed heads too wide": (
        f"y = {PACKED.format('', 'x, w, c')}",
        f"{X}, float[16, 1800] w, float[1800] c",
        "float[b, s, 600] y",
        17,
        "dimension is 300",
    ),
    "a cache in place": (
        "y = com.microsoft.DecoderMaskedMultiHeadAttention <num_heads = 2> (q, k, v)",
        ROWS,
        Y3,
        17,
        "keeps its cache in place",
    ),
    "scores of the operator": (
        "y, , , z = Attention (q, k, v)",
        FOUR,
        f"{Y4}, float[b, 2, s, t] z",
        23,
        "its scores are used",
    ),
    "rows without heads": ("y = Attention (q, k, v)", ROWS, Y3, 23, "or [B, S, H*D] and numbers of heads"),
    "heads that do not divide": (
        "y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v)",
        ROWS,
        Y3,
        23,
        "the heads of q [b, s, 16]",
    ),
    "values of other heads": (
        "y = Attention (q, k, v)",
        FOUR.replace("8] v", "4] v"),
        "float[b, 2, s, 4] y",
        23,
        "v has heads of",
    ),
    "unknown heads": ("y = Attention (q, k, v)", FOUR.replace("8]", "d]"), Y4, 23, "the head dimension is not known"),
    "causal, other lengths": (
        "y = Attention <is_causal = 1> (q, k, v)",
        FOUR,
        Y4,
        23,
        "is_causal with different numbers",
    ),
    "a mask of other keys": (
        "y = Attention (q, k, v, m)",
        f"{FOUR}, bool[s, 9] m",
        Y4,
        23,
        "does not end in the number of keys",
    ),
    "a mask of other types": ("y = Attention (q, k, v, m)", f"{FOUR}, float16[s, t] m", Y4, 23, "the mask is float16"),
    "a norm of another axis": (
        "y = RMSNormalization <axis = 1> (x, w)",
        "float[b, 5, 8] x, float[5, 8] w",
        "float[b, 5, 8] y",
        23,
        "axis 1 of 3",
    ),
    "a norm of another type": (
        "y = RMSNormalization <stash_type = 10> (x, w)",
        NORMED,
        "float[b, s, 8] y",
        23,
        "kept in type 10",
    ),
    "a norm by rows": (
        "y = RMSNormalization (x, z)",
        "float[b, s, 8] x, float[b, s, 8] z",
        "float[b, s, 8] y",
        23,
        "the scale has shape",
    ),
    "doubles": (
        "y = RMSNormalization (x, w)",
        NORMED.replace("float", "double"),
        "double[b, s, 8] y",
        23,
        "x is float64",
    ),
    "a skip of another shape": (
        "y = com.microsoft.SkipSimplifiedLayerNormalization (x, z, w)",
        f"{NORMED}, float[1, s, 8] z",
        "float[b, s, 8] y",
        17,
        "not provably of one shape",
    ),
    "a skip by layer, of another shape": (
        "y = com.microsoft.SkipLayerNormalization (x, z, w)",
        f"{NORMED}, float[1, s, 8] z",
        "float[b, s, 8] y",
        17,
        "not provably",
    ),
    "a skip whose mean is used": (
        "y, m = com.microsoft.SkipLayerNormalization (x, z, w)",
        f"{NORMED}, float[b, s, 8] z",
        "float[b, s, 8] y, float[b, s, 1] m",
        17,
        "its mean or inverse standard deviation is used",
    ),
    "a root that is used": (
        "y, m = com.microsoft.SkipSimplifiedLayerNormalization (x, z, w)",
        f"{NORMED}, float[b, s, 8] z",
        "float[b, s, 8] y, float[b, s, 1] m",
        17,
        "its inverse root mean square is used",
    ),
    "rows that are turned without heads": (
        "y = com.microsoft.RotaryEmbedding (x, at, cos, sin)",
        f"{X}, int64[b, s] at, float[9, 4] cos, float[9, 4] sin",
        Y3,
        17,
        "the number of heads is not known",
    ),
    "positions of 32 bits": (
        "y = com.microsoft.RotaryEmbedding (q, at, cos, sin)",
        "float[b, 2, s, 8] q, int32[b, s] at, float[9, 4] cos, float[9, 4] sin",
        Y4,
        17,
        "its positions are int32",
    ),
    "positions of another batch": (
        "y = com.microsoft.RotaryEmbedding (q, at, cos, sin)",
        "float[b, 2, s, 8] q, int64[3, s] at, float[9, 4] cos, float[9, 4] sin",
        Y4,
        17,
        "and its positions [3, s]",
    ),
    "tables wider than heads": (
        "y = com.microsoft.RotaryEmbedding (q, at, cos, sin)",
        "float[b, 2, s, 8] q, int64[b, s] at, float[9, 8] cos, float[9, 8] sin",
        Y4,
        17,
        "and cos [9, 8]",
    ),
    "a scale": (
        "y = com.microsoft.RotaryEmbedding <scale = 2.0> (q, at, cos, sin)",
        "float[b, 2, s, 8] q, int64[b, s] at, float[9, 4] cos, float[9, 4] sin",
        Y4,
        17,
        "it scales, or its rows are packed",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_reason(case):
    body, inputs, outputs, opset, reason = CASES[case]
    found = rewrite(ir.from_proto(model(body, inputs, outputs, opset=opset)))
    assert [miss for miss in found if reason in miss.reason], found
    assert all(miss.value for miss in found)


PLACES = """sz = Shape (q) n0 = Gather (sz, two) kz = Shape (k) t0 = Gather (kz, two) i = Range (zero, n0, one)
    j = Range (zero, t0, one) iu = Unsqueeze (i, ax1) ju = Unsqueeze (j, ax0)"""
MASKS = {  # condition from rows i [S, 1] and keys j [1, S], the mask of the op or None where it is a bias
    "up to the query": ("m = LessOrEqual (ju, iu)", {"causal": 1}),
    "commuted": ("m = GreaterOrEqual (iu, ju)", {"causal": 1}),
    "not beyond": ("o = Greater (ju, iu) m = Not (o)", {"causal": 1}),
    "less than one more": ("k1 = Add (iu, one) m = Less (ju, k1)", {"causal": 1}),
    "by a difference": ("d = Sub (ju, iu) m = LessOrEqual (d, zero)", {"causal": 1}),
    "two to the left": (
        "d = Sub (iu, ju) m1 = LessOrEqual (d, two) m2 = LessOrEqual (ju, iu) m = And (m1, m2)",
        {"causal": 1, "window_left": 2},
    ),
    "within two": ("d = Sub (iu, ju) e = Abs (d) m = LessOrEqual (e, two)", {"window_left": 2, "window_right": 2}),
    "nearer than two": ("d = Sub (iu, ju) e = Abs (d) m = Less (e, two)", {"window_left": 1, "window_right": 1}),
    "from the query on": ("m = GreaterOrEqual (ju, iu)", {"window_left": 0}),
    "a triangle of a table": ("tz = Concat <axis = 0> (n1, t1) m = Slice (table, start, tz, both)", {"causal": 1}),
    "every second": ("d = Mul (ju, two) m = LessOrEqual (d, iu)", None),
    "the sum": ("d = Add (ju, iu) m = LessOrEqual (d, five)", None),
    "the other way": ("m = Equal (ju, iu)", None),
}
NUMBERS = ", ".join(f"int64 {name} = {{{n}}}" for name, n in {"zero": 0, "one": 1, "two": 2, "five": 5}.items())
TABLE = ", ".join(str(int(j <= i)) for i in range(9) for j in range(9))


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_positions(case, tmp_path):
    condition, expected = MASKS[case]
    if "table" in condition:
        condition = "n1 = Unsqueeze (n0, ax0) t1 = Unsqueeze (t0, ax0) " + condition
    body = f"""{PLACES} {condition} kt = Transpose <perm = [0, 1, 3, 2]> (k) p = MatMul (q, kt) s0 = Where (m, p, low)
        w = Softmax (s0) y = MatMul (w, v)"""
    inputs = "float[b, 2, s, 8] q, float[b, 2, s, 8] k, float[b, 2, s, 8] v"
    constants = f"""{NUMBERS}, int64[1] ax0 = {{0}}, int64[1] ax1 = {{1}}, float low = {{-3.4e38}},
        int64[2] start = {{0, 0}},
        int64[2] both = {{0, 1}}, bool[9, 9] table = {{{TABLE}}}"""
    report, (node,) = rewritten(model(body, inputs, Y4, constants), tmp_path)
    assert report.replaced == {"attention": 1}
    names = ("causal", "window_left", "window_right")
    found = {name: node.attributes[name].value for name in names if name in node.attributes}
    assert found == (expected or {})
    assert (len(node.inputs) > 3) == (expected is None)
