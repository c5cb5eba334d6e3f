"""Graphs within a file: bodies of conditions and loops are rewritten too, and so is what stands in its functions;
what belongs to one graph stays there, and what nothing matches in survives."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_text import halved, model, random_inputs, rewritten
from onnx import parser

import trimaran

X, Y = "float[b, s, 8] x", "float[b, s, 8] y"
PARAMETERS = ", ".join(f"float[8] {name} = {{1.5, -0.5, 2.0, 0.25, 1.0, -1.25, 0.75, 3.0}}" for name in "wc")
NORM = "LayerNormalization ({}, w, c)"


def condition(then, otherwise="Identity (x)"):
    branches = f"""<then_branch = t () => (float[b, s, 8] ya) {{ {then} }},
        else_branch = e () => (float[b, s, 8] ye) {{ ye = {otherwise} }}>"""
    return f"yy = If (on) {branches}"


BODIES = {  # body, inputs, how many norms, how many of them outside of any body
    "a branch": (f"{condition('ya = ' + NORM.format('x'))} y = Identity (yy)", f"{X}, bool on", 1, 0),
    "a branch in a branch": (
        f"""{
            condition(
                "ya = If (on) <then_branch = u () => (float[b, s, 8] yb) { yb = " + NORM.format("x") + " }, "
                "else_branch = o () => (float[b, s, 8] yc) { yc = Identity (x) }>"
            )
        } y = Identity (yy)""",
        f"{X}, bool on",
        1,
        0,
    ),
    "a sum outside that others use": (
        f"t0 = Add (x, x2) u = Relu (t0) {condition('ya = ' + NORM.format('t0'))} y = Add (yy, u)",
        f"{X}, float[b, s, 8] x2, bool on",
        1,
        0,
    ),
    "a mean outside, the rest inside": (
        """m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) p = Mul (d, d) v = ReduceMean <axes = [-1]> (p)
        a = Add (v, eps) r = Sqrt (a) """
        + condition("n = Div (d, r) g = Mul (n, w) ya = Add (g, c)")
        + " y = Identity (yy)",
        f"{X}, bool on",
        1,
        0,
    ),
    "both branches": (
        f"{condition('ya = ' + NORM.format('x'), NORM.format('x'))} n = {NORM.format('yy')} y = Relu (n)",
        f"{X}, bool on",
        3,
        1,
    ),
    "a loop": (
        f"""y = Loop (three, true, x) <body = l (int64 i, bool go, float[b, s, 8] before)
        => (bool on2, float[b, s, 8] after) {{ on2 = Identity (go)
        t0 = Add (before, x) after = {NORM.format("t0")} }}>""",
        X,
        1,
        0,
    ),
    "a loop that stacks": (
        f"""last, all = Loop (three, true, x) <body = l (int64 i, bool go, float[b, s, 8] before)
        => (bool on2, float[b, s, 8] after, float[b, s, 8] kept)
        {{ on2 = Identity (go) after = {NORM.format("before")} kept = Identity (after) }}>
        y = ReduceSum <keepdims = 0> (all, zero)""",
        X,
        1,
        0,
    ),
    "a scan": (
        f"""last, y = Scan (start, x) <num_scan_inputs = 1, body = l (float[s, 8] sum, float[s, 8] row)
        => (float[s, 8] sum2, float[s, 8] out) {{ sum2 = Add (sum, row) out = {NORM.format("sum2")} }}>""",
        f"{X}, float[s, 8] start",
        1,
        0,
    ),
}


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("case", BODIES)
def test_bodies(case, on, tmp_path):
    body, inputs, count, outside = BODIES[case]
    constants = f"{PARAMETERS}, float eps = {{0.001}}, int64 three = {{3}}, bool true = {{1}}, int64[1] zero = {{0}}"
    proto = model(body, inputs, Y, constants)
    report, nodes = rewritten(proto, tmp_path, random_inputs(proto) | ({"on": np.array(on)} if "on" in inputs else {}))
    assert report.replaced == {"layer_norm": count}, report
    main = [node for node in ir.load(tmp_path / "out.onnx").graph if node.domain == "trimaran"]
    assert (len(nodes), len(main)) == (count, outside)


def test_a_layer_is_not_moved_into_a_body(tmp_path):
    """Which may run more often than it."""
    weight = "float[8, 8] k = {" + ", ".join(str((i % 7 - 3) / 8) for i in range(64)) + "}"
    body = """l = MatMul (x, k) y = Loop (three, true, l) <body = b0 (int64 i, bool go, float16[b, s, 8] before)
        => (bool on2, float16[b, s, 8] after) { on2 = Identity (go) r = Relu (l) after = Add (before, r) }>"""
    proto = halved(model(body, X, Y, f"{weight}, int64 three = {{3}}, bool true = {{1}}"))
    report, (node,) = rewritten(proto, tmp_path)
    assert report.replaced == {"linear": 1}
    assert "activation" not in node.attributes


# ---- functions

CALLS = {  # the graph, functions, what is replaced, functions that are left
    "a norm": ("y = my.norm (x, w, c)", ["norm"], {"layer_norm": 1}, []),
    "a norm twice": ("n = my.norm (x, w, c) y = my.norm (n, c, w)", ["norm"], {"layer_norm": 2}, []),
    "a norm with an attribute": ("y = my.norm_of <epsilon = 0.1> (x, w, c)", ["norm_of"], {"layer_norm": 1}, []),
    "a function in a function": ("y = my.outer (x, w, c)", ["outer", "norm"], {"layer_norm": 1}, []),
    "each step its own": (
        """p = my.square (x) q = ReduceMean <axes = [-1]> (p) e = Add (q, eps) r = my.root (e) n = Div (x, r)
        y = my.times (n, w)""",
        ["square", "root", "times"],
        {"rms_norm": 1},
        [],
    ),
    "one that has nothing to do with it": (
        "n = my.norm (x, w, c) y = my.twice (n)",
        ["norm", "twice"],
        {"layer_norm": 1},
        ["twice"],
    ),
    "one that sizes are known through": (
        "z = my.times (x, w) t0 = Add (x, z) n = LayerNormalization (t0, w, c) y = my.twice (n)",
        ["times", "twice"],
        {"layer_norm": 1},
        ["times", "twice"],
    ),
    "nothing but functions": ("y = my.twice (x)", ["twice"], {}, ["twice"]),
    "one of a newer opset with the same operators": ("y = my.newer (x, w, c)", ["newer"], {"layer_norm": 1}, []),
    "within a branch": (condition("ya = my.norm (x, w, c)") + " y = Identity (yy)", ["norm"], {"layer_norm": 1}, []),
}
FUNCTIONS = {
    "norm": "norm (x, w, c) => (y) { y = LayerNormalization <epsilon = 0.001> (x, w, c) }",
    "norm_of": "norm_of <epsilon> (x, w, c) => (y) { y = LayerNormalization <epsilon: float = @epsilon> (x, w, c) }",
    "outer": "outer (x, w, c) => (y) { n = my.norm (x, w, c) y = Relu (n) }",
    "square": "square (x) => (y) { y = Mul (x, x) }",
    "root": "root (x) => (y) { y = Sqrt (x) }",
    "times": "times (a, b) => (y) { y = Mul (a, b) }",
    "twice": "twice (x) => (y) { t = Add (x, x) y = Tanh (t) }",
    "newer": "newer (x, w, c) => (y) { y = LayerNormalization <epsilon = 0.001> (x, w, c) }",
    "older": "older (x, w, c) => (y) { m = Mul (x, w) y = Add (m, c) }",
}


def with_functions(body, names, inputs=X, outputs=Y):
    """A model that calls functions of domain `my`."""
    text = f"""<ir_version: 10, opset_import: ["" : 17, "my" : 1], producer_name: "somebody">
        g ({inputs}) => ({outputs}) <{PARAMETERS}, float eps = {{0.001}}> {{ {body} }}"""
    for name in names:
        opset = {"older": 13, "newer": 18}.get(name, 17)
        text += f' <domain: "my", opset_import: ["" : {opset}, "my" : 1]> {FUNCTIONS[name]}'
    return parser.parse_model(text)


@pytest.mark.parametrize("case", CALLS)
def test_functions(case, tmp_path):
    body, names, expected, left = CALLS[case]
    inputs = f"{X}, bool on" if "(on)" in body else X
    proto = with_functions(body, names, inputs)
    report, _ = rewritten(proto, tmp_path)
    assert dict(report.replaced) == expected, report
    written = onnx.load(tmp_path / "out.onnx")
    assert [f.name for f in written.functions if f.domain == "my"] == left
    assert {o.domain: o.version for o in written.opset_import}.items() >= {"": 17, "my": 1}.items()
    assert [v.name for v in written.graph.output] == ["y"]
    assert not any("trimaran" in prop.key for node in written.graph.node for prop in node.metadata_props)
    assert not [miss for miss in report.near_misses if miss.rule == "functions"]


def test_a_function_of_another_opset(tmp_path):
    """Its operators may mean something else there."""
    onnx.save(
        with_functions("n = my.older (x, w, c) y = LayerNormalization (n, w, c)", ["older"]), tmp_path / "in.onnx"
    )
    report = trimaran.rewrite_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert report.replaced == {"layer_norm": 1}
    (miss,) = report.near_misses
    assert (miss.rule, miss.node) == ("functions", "my::older")
    assert miss.reason == "it is written for version 13 of ai.onnx, the model for 17"
    assert [f.name for f in onnx.load(tmp_path / "out.onnx").functions if f.domain == "my"] == ["older"]


def test_outputs_of_functions_keep_their_names(tmp_path):
    proto = with_functions("n = my.norm (x, w, c) y = my.norm (n, w, c)", ["norm"], X, f"float[b, s, 8] n, {Y}")
    rewritten(proto, tmp_path)
    assert [value.name for value in ir.load(tmp_path / "out.onnx").graph.outputs] == ["n", "y"]


def test_a_function_of_an_operators_name_in_a_domain_of_its_own(tmp_path):
    """What it is called says nothing."""
    proto = with_functions("y = my.LayerNormalization (x, w, c)", [])
    function = parser.parse_function(
        '<domain: "my", opset_import: ["" : 17]> LayerNormalization (x, w, c) => (y) { s = Mul (x, w) y = Sub (s, c) }'
    )
    proto.functions.append(function)
    assert not rewritten(proto, tmp_path)[1]


def test_an_unknown_operator_with_a_known_name_says_nothing_of_shapes(tmp_path):
    """Its result may have any type and shape."""
    proto = model(f"t0 = other.Cast (x) n = {NORM.format('x')} y = Relu (n) z = Identity (t0)", X, f"{Y}, int64[k] z",
                  PARAMETERS)  # fmt: skip
    proto.opset_import.append(onnx.helper.make_opsetid("other", 1))
    onnx.save(proto, tmp_path / "in.onnx")
    trimaran.rewrite_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx")
    found = {
        value.name: value.type.tensor_type.elem_type for value in onnx.load(tmp_path / "out.onnx").graph.value_info
    }
    assert found.get("t0", 0) == 0
