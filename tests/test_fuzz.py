"""Mutants of valid files: each is rewritten right, or refused; never a crash, never wrong."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

import trimaran

WORKER = Path(__file__).with_name("fuzz.py")
SHARD = 250
KINDS = ("right", "copied", "refused", "unjudged")
LAYER = """<ir_version: 8, opset_import: ["" : 17]> layer (float[batch, n, 16] x, bool[batch, n] mask)
    => (float[batch, n, 16] y) {
    axes = Constant<value = int64[2] {1, 2}>() low = Constant<value = float {-10000.0}>()
    zero = Constant<value = float {0.0}>() half = Constant<value = float {0.5}>() one = Constant<value = float {1.0}>()
    root = Constant<value = float {1.4142135}>() scale = Constant<value = float {0.5}>()
    two = Constant<value = float {2.0}>()
    eps = Constant<value = float {0.00001}>()
    split = Constant<value = int64[4] {0, 0, 4, 4}>() joined = Constant<value = int64[3] {0, 0, 16}>()
    wide = Unsqueeze(mask, axes) bias = Where(wide, zero, low)
    q0 = MatMul(x, wq) q1 = Add(q0, bq) q2 = Reshape(q1, split) q = Transpose<perm = [0, 2, 1, 3]>(q2)
    k0 = MatMul(x, wk) k1 = Add(bk, k0) k2 = Reshape(k1, split) k = Transpose<perm = [0, 2, 3, 1]>(k2)
    v0 = MatMul(x, wv) v1 = Add(v0, bv) v2 = Reshape(v1, split) v = Transpose<perm = [0, 2, 1, 3]>(v2)
    s0 = MatMul(q, k) s1 = Mul(s0, scale) s2 = Add(s1, bias) p = Softmax<axis = -1>(s2) o0 = MatMul(p, v)
    o1 = Transpose<perm = [0, 2, 1, 3]>(o0) o2 = Reshape(o1, joined) o3 = MatMul(o2, wo) o4 = Add(o3, bo)
    r = Add(o4, x) n1 = LayerNormalization<axis = -1, epsilon = 0.00001>(r, g1, b1)
    h0 = MatMul(n1, wi) h1 = Add(h0, bi) e0 = Div(h1, root) e1 = Erf(e0) e2 = Add(e1, one) e3 = Mul(h1, e2)
    h2 = Mul(e3, half)
    m0 = MatMul(h2, wm) m1 = Add(m0, bm) t = Add(m1, n1)
    u0 = ReduceMean<axes = [-1]>(t) u1 = Sub(t, u0) u2 = Pow(u1, two) u3 = ReduceMean<axes = [-1]>(u2) u4 = Add(u3, eps)
    u5 = Sqrt(u4) u6 = Div(u1, u5) u7 = Mul(u6, g2) n2 = Add(u7, b2)
    z0 = Pow(n2, two) z1 = ReduceMean<axes = [-1]>(z0) z2 = Add(z1, eps) z3 = Sqrt(z2) z4 = Reciprocal(z3)
    z5 = Mul(n2, z4) y = Mul(z5, g1) }"""
WEIGHTS = {"wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "wo": (16, 16), "wi": (16, 24), "wm": (24, 16), "bi": (24,),
           **dict.fromkeys(("bq", "bk", "bv", "bo", "bm", "g1", "b1", "g2", "b2"), (16,))}  # fmt: skip


VECTOR = "float[16] w = {" + ", ".join(str(i % 5 - 2) for i in range(16)) + "}"
OTHERS = {
    "scopes": f"""<ir_version: 10, opset_import: ["" : 17, "my" : 1]> g (float[b, n, 16] x, bool on)
        => (float[b, n, 16] y) <{VECTOR}> {{
        s = Add (x, x) h = my.norm (s, w) u = If (on) <then_branch = t () => (float[b, n, 16] a)
        {{ a = LayerNormalization (h, w, w) }}, else_branch = e () => (float[b, n, 16] c) {{ c = Relu (s) }}>
        y = my.twice (u) }}
        <domain: "my", opset_import: ["" : 17]> norm (x, w) => (y) {{ p = Mul (x, x) m = ReduceMean <axes = [-1]> (p)
        k = Constant <value = float {{0.001}}> () e = Add (m, k) r = Sqrt (e) d = Div (x, r) y = Mul (d, w) }}
        <domain: "my", opset_import: ["" : 17]> twice (x) => (y) {{ t = Add (x, x) y = Tanh (t) }}""",
    "group": """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[b, s, 64] q, float[b, s, 32] k,
        float[b, s, 32] v, float[32, 8] cos, float[32, 8] sin) => (float[b, s, 64] y, float[b, 2, s, 16] kk)
        <int64[1] zero = {0}, int64[1] one = {1}, int32[1] one32 = {1}> {
        sz = Shape (q) b1 = Gather (sz, zero) s1 = Gather (sz, one) total = Cast <to = 6> (s1)
        last0 = Sub (total, one32) last = Expand (last0, b1)
        y, kk, vv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1>
            (q, k, v, , , last, total, cos, sin) }""",
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A transformer's layer as exporters write it out, and as it is rewritten."""
    folder, generator = tmp_path_factory.mktemp("seeds"), np.random.default_rng(0)
    model = parser.parse_model(LAYER)
    for name, shape in WEIGHTS.items():
        model.graph.initializer.append(numpy_helper.from_array(generator.standard_normal(shape).astype("f") / 4, name))
    onnx.save(model, folder / "layer.onnx")
    onnx.save(in_half(model), folder / "half.onnx")
    report = trimaran.rewrite_onnx(folder / "layer.onnx", folder / "rewritten.onnx")
    assert report.replaced["attention"] == 1
    report = trimaran.rewrite_onnx(folder / "half.onnx", folder / "rewritten_half.onnx")
    assert report.replaced["linear"] > 0
    for name, text in OTHERS.items():
        onnx.save(parser.parse_model(text), folder / f"{name}.onnx")
        assert trimaran.rewrite_onnx(folder / f"{name}.onnx", folder / "gone.onnx").replaced
        (folder / "gone.onnx").unlink()
    return folder


def in_half(model):
    """The same in fp16, in which linear layers are rewritten too."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    constants = [a.t for node in model.graph.node for a in node.attribute if a.name == "value"]
    for tensor in [*model.graph.initializer, *constants]:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    return model


def outcomes(folder: Path, first: int, last: int) -> Counter[str]:
    """What came of the mutants with these numbers. A worker that dies or hangs is one of the outcomes."""
    found: Counter[str] = Counter()
    while first < last:
        command = [sys.executable, str(WORKER), str(folder), str(first), str(last)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            errors.seek(0)
            complaint = errors.read()[-2000:]
        events = [json.loads(line) for line in process.stdout.splitlines()]
        for event in events:
            if "end" in event:
                kind = event["outcome"]
                found[kind if kind in KINDS else f"{event['end']}: {kind}"] += 1
        first = events[-1].get("start", last - 1) + 1 if events else last
        if process.returncode != 0:
            found[f"{first - 1}: died with {process.returncode}: {complaint}"] += 1
    return found


def check(found: Counter[str], count: int) -> None:
    failures = [text for text in found if text not in KINDS]
    assert not failures, "\n".join(failures[:5])
    assert sum(found.values()) == count
    assert found["right"] > count / 10, found
    assert found["refused"] > count / 10, found


def test_mutants(seeds):
    check(outcomes(seeds, 0, 200), 200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(1000, 11000, SHARD))
def test_many_mutants(seeds, first):
    """In shards, which pytest-xdist can share out: about 0.1 s of CPU time a mutant."""
    check(outcomes(seeds, first, first + SHARD), SHARD)


def test_a_worker_that_dies_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "fuzz.py").write_text("import os\nprint('{\"start\": 3}', flush=True)\nos.abort()")
    monkeypatch.setattr(sys.modules[__name__], "WORKER", tmp_path / "fuzz.py")
    (failure,) = outcomes(tmp_path, 3, 4)
    assert failure.startswith("3: died with -6")
