"""GroupQueryAttention of onnxruntime: what our op can say is rewritten and compared, the rest is left with a reason."""

from __future__ import annotations

import numpy as np
import pytest
from graph_text import halved, model, random_inputs, rewritten

GQA = "com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2{}> ({})"
ROWS = "float[b, s, 64] q, float[b, s, 32] k, float[b, s, 32] v"
TABLES = "float[16, 8] cos, float[16, 8] sin"
PAST = "float[b, 2, p, 16] pk, float[b, 2, p, 16] pv"
Y, PRESENT = "float[b, s, 64] y", "float[b, 2, t, 16] kk, float[b, 2, t, 16] vv"
LENGTHS = """sz = Shape (q) b1 = Gather (sz, zero) s1 = Gather (sz, one) total = Cast <to = 6> (s1)
    last0 = Sub (total, one32) last = Expand (last0, b1)"""
GROWN = """sz = Shape (q) b1 = Gather (sz, zero) s1 = Gather (sz, one) pz = Shape (pk) p1 = Gather (pz, two)
    t1 = Add (p1, s1) total = Cast <to = 6> (t1) last0 = Sub (total, one32) last = Expand (last0, b1)"""
CONSTANTS = "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int32[1] one32 = {1}"
SIZES = {"b": 2, "s": 5, "p": 4, "t": 5}


def inputs_of(proto, **sizes):
    found = random_inputs(proto, {**SIZES, **sizes})
    if "sin" in found:
        angles = np.arange(16)[:, None] / 3 ** np.arange(found["sin"].shape[1])
        found |= {"cos": np.cos(angles).astype(found["cos"].dtype), "sin": np.sin(angles).astype(found["sin"].dtype)}
    return found


PROMPTS = {  # attributes, operands, inputs
    "plain": ("", "q, k, v, , , last, total", ROWS),
    "windowed, capped, scaled": (
        ", local_window_size = 3, softcap = 2.0, scale = 0.5",
        "q, k, v, , , last, total",
        ROWS,
    ),
    "packed": ("", "q, , , , , last, total", "float[b, s, 128] q"),
    "with a bias": ("", "q, k, v, , , last, total, , , , bias", f"{ROWS}, float[b, 1, s, s] bias"),
    "rotary": (", do_rotary = 1", "q, k, v, , , last, total, cos, sin", f"{ROWS}, {TABLES}"),
    "rotary, interleaved, packed": (
        ", do_rotary = 1, rotary_interleaved = 1",
        "q, , , , , last, total, cos, sin",
        f"float[b, s, 128] q, {TABLES}",
    ),
}


@pytest.mark.parametrize("form", PROMPTS)
def test_prompts(form, tmp_path):
    attributes, operands, inputs = PROMPTS[form]
    proto = model(f"{LENGTHS} y = {GQA.format(attributes, operands)}", inputs, Y, CONSTANTS)
    report, nodes = rewritten(proto, tmp_path, inputs_of(proto))
    rotary = {"rotary_embedding": 1} if "rotary" in form else {}
    assert report.replaced == {"attention": 1, **rotary}, report
    attention = nodes[-1]
    assert attention.attributes["causal"].value == 1
    assert (attention.inputs[1] is None if len(attention.inputs) > 1 else True) == (form == "packed")
    assert not (len(attention.inputs) > 4 and attention.inputs[4]), "every row has all keys"


def test_a_prompt_that_starts_a_cache(tmp_path):
    outs = f"{LENGTHS} y, kk, vv = {GQA.format(', do_rotary = 1', 'q, k, v, , , last, total, cos, sin')}"
    proto = model(outs, f"{ROWS}, {TABLES}", f"{Y}, {PRESENT}", CONSTANTS)
    assert rewritten(proto, tmp_path, inputs_of(proto))[0].replaced == {"attention": 1, "rotary_embedding": 1}


def test_rows_of_a_prompt_that_end_sooner(tmp_path):
    body = GQA.format("", "q, k, v, , , last, total")
    proto = model(f"y = {body}", f"{ROWS}, int32[b] last, int32[1] total", Y)
    feeds = inputs_of(proto) | {"last": np.array([4, 2], np.int32), "total": np.array([5], np.int32)}
    report, (node,) = rewritten(proto, tmp_path, feeds)
    assert report.replaced == {"attention": 1}
    assert node.inputs[4] is not None


STEPS = {  # attributes, operands, inputs, new keys, rows
    "one token": ("", "q, k, v, pk, pv, last, total", f"{ROWS}, {PAST}", 1, 2),
    "several tokens of one row": ("", "q, k, v, pk, pv, last, total", f"{ROWS}, {PAST}", 3, 1),
    "rotary": (", do_rotary = 1", "q, k, v, pk, pv, last, total, cos, sin", f"{ROWS}, {PAST}, {TABLES}", 1, 2),
    "rotary of positions": (
        ", do_rotary = 1",
        "q, k, v, pk, pv, last, total, cos, sin, at",
        f"{ROWS}, {PAST}, {TABLES}, int64[b, s] at",
        1,
        2,
    ),
}


@pytest.mark.parametrize("form", STEPS)
def test_steps_behind_a_past(form, tmp_path):
    attributes, operands, inputs, new, rows = STEPS[form]
    body = f"{GROWN} y, kk, vv = {GQA.format(attributes, operands)}"
    proto = model(body, inputs, f"{Y}, {PRESENT}", CONSTANTS)
    feeds = inputs_of(proto, s=new, b=rows)
    if "at" in feeds:
        feeds["at"] = np.array([[4], [2]])
    report, _ = rewritten(proto, tmp_path, feeds)
    rotary = {"rotary_embedding": 1} if "rotary" in form else {}
    assert report.replaced == {"attention": 1, **rotary}, report


def test_a_part_of_the_head_is_turned(tmp_path):
    rows = "float[b, s, 128] q, float[b, s, 64] k, float[b, s, 64] v, float[b, 2, p, 32] pk, float[b, 2, p, 32] pv"
    body = f"{GROWN} y, kk, vv = {GQA.format(', do_rotary = 1', 'q, k, v, pk, pv, last, total, cos, sin')}"
    outputs = f"float[b, s, 128] y, {PRESENT.replace('16', '32')}"
    proto = model(body, f"{rows}, {TABLES}", outputs, CONSTANTS)
    report, nodes = rewritten(proto, tmp_path, inputs_of(proto, s=1))
    assert report.replaced == {"attention": 1, "rotary_embedding": 1}
    assert nodes[0].attributes["rotary_dim"].value == 16


def test_in_half_precision_all_of_a_layer_is_ours(tmp_path):
    numbers = ", ".join(str((i % 11 - 5) / 16) for i in range(64 * 128))
    operands = "qkv, , , , , last, total, cos, sin"
    body = f"qkv = MatMul (q, w) {LENGTHS} y = {GQA.format(', do_rotary = 1', operands)}"
    constants = f"{CONSTANTS}, float[64, 128] w = {{{numbers}}}"
    proto = halved(model(body, f"float[b, s, 64] q, {TABLES}", Y, constants))
    report, _ = rewritten(proto, tmp_path, inputs_of(proto))
    assert report.replaced == {"attention": 1, "rotary_embedding": 1, "linear": 1}


BUFFER = "its present may be one buffer with its past (of p keys, the total length is unknown), written in place"
OTHERS = "it has sinks, a quantized cache, norms of q and k, or gives its scores"
LEFT = {  # attributes, operands, more inputs, the reason
    "one buffer": ("", "q, k, v, pk, pv, l, n", f"{PAST}, int32[b] l, int32[1] n", BUFFER),
    "rows of their own lengths": (
        "",
        "q, k, v, pk, pv, l, total",
        f"{PAST}, int32[b] l",
        "its rows are not known to be as long as past and new keys",
    ),
    "a past of unknown heads": (
        "",
        "q, k, v, pk, pv, l, total",
        "float[b, 2, p, 16] pk, float[b, 2, r, 16] pv, int32[b] l",
        "the shapes of past keys",
    ),
    "sinks": ("", "q, k, v, , , l, total, , , , , sink", f"{PAST}, int32[b] l, float[4] sink", OTHERS),
    "a smooth softmax": (
        ", smooth_softmax = 1",
        "q, k, v, , , l, total",
        f"{PAST}, int32[b] l",
        "an attribute 'smooth_",
    ),
    "positions of a prompt": (
        ", do_rotary = 1",
        "q, k, v, , , l, total, cos, sin, at",
        f"{PAST}, {TABLES}, int32[b] l, int64[b, s] at",
        "of the positions of a prompt it reads the first alone",
    ),
    "a past without a present": (
        ", one",
        "q, k, v, pk, pv, last, total",
        PAST,
        "it has a past and no present, which onnxruntime reads in its own way",
    ),
    "no tables": (", do_rotary = 1", "q, k, v, , , l, total", f"{PAST}, int32[b] l", "cos and sin have shapes unknown"),
    "wide tables": (
        ", do_rotary = 1",
        "q, k, v, , , l, total, cos, sin",
        f"{PAST}, float[9, 16] cos, float[9, 16] sin, int32[b] l",
        "cos and sin have shapes [9, 16] and [9, 16], expected [max, R/2]",
    ),
    "fewer values than keys": (
        "",
        "q, k, z, , , l, total",
        f"{PAST}, int32[b] l, float[b, t, 32] z",
        "are not known, or differ",
    ),
    "a bias of nothing": (
        "",
        "q, k, v, , , l, total, , , , bias",
        f"{PAST}, int32[b] l, float[b, 1, s, 9] bias",
        "the mask's shape [b, 1, s, 9]",
    ),
}


@pytest.mark.parametrize("form", LEFT)
def test_what_is_left(form, tmp_path):
    import onnx_ir as ir

    from trimaran.export.rewrite_onnx import rewrite

    attributes, operands, inputs, reason = LEFT[form]
    outs = "y" if attributes == ", one" else "y, kk, vv"
    body = f"{GROWN} {outs} = {GQA.format(attributes.removesuffix(', one'), operands)}"
    proto = model(body, f"{ROWS}, {inputs}", Y, CONSTANTS)
    (miss,) = rewrite(ir.from_proto(proto))
    assert reason in miss.reason
