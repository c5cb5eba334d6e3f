"""rewrite_onnx: files as torch's exporter writes them, graphs written by hand for each near miss, and bad files."""

import dataclasses
import hashlib
import itertools
import os

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import BertConfig, BertModel

import trimaran
from trimaran.export.functions import count_nodes
from trimaran.export.rules import attention as attention_rule
from trimaran.export.verify import VerificationError, example_inputs

FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64


def run(path, feeds):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


def listing(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def bert(**options):
    torch.manual_seed(0)
    config = {
        "vocab_size": 50,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 64,
    }
    return BertModel(BertConfig(**config, **options)).eval()


OPSETS = [18, pytest.param(20, marks=pytest.mark.slow), 23]


@pytest.fixture(scope="module")
def bert_files(tmp_path_factory):
    """The same model as torch's exporter writes it, a file for each opset that is asked for."""
    folder = tmp_path_factory.mktemp("bert")
    ids = torch.randint(1, 50, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}

    def file(opset):
        path = folder / f"{opset}.onnx"
        if not path.exists():
            with torch.no_grad():
                torch.onnx.export(
                    bert(), (), str(path), kwargs=inputs, dynamo=True, opset_version=opset, dynamic_shapes=axes,
                    verbose=False, output_names=["hidden", "pooled"],
                )  # fmt: skip
        return path

    return file


@pytest.mark.parametrize("opset", OPSETS)
def test_bert_as_torch_exports_it(bert_files, tmp_path, opset):
    source, target = bert_files(opset), tmp_path / "out.onnx"
    before = listing(source.parent)
    report = trimaran.rewrite_onnx(source, target)
    assert report.replaced == {"attention": 2, "layer_norm": 5}
    assert not report.near_misses
    assert report.verified.startswith("verified against the source")
    assert listing(source.parent) == before
    onnx.checker.check_model(target)
    for proto in (onnx.load(source), onnx.load(target)):
        assert [value.name for value in proto.graph.input] == ["input_ids", "attention_mask"]
        assert [value.name for value in proto.graph.output] == ["hidden", "pooled"]
    for size, length in ((1, 1), (3, 12), (7, 5)):
        ids = np.random.default_rng(size).integers(1, 50, (size, length))
        mask = (np.arange(length) < np.maximum(1, length - np.arange(size)[:, None])).astype(np.int64)
        for ours, theirs in zip(
            *(run(f, {"input_ids": ids, "attention_mask": mask}) for f in (target, source)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("opset", [18, 23])
def test_the_rewritten_file_runs_on_the_kernels(bert_files, tmp_path, opset):
    target = tmp_path / "out.onnx"
    trimaran.rewrite_onnx(bert_files(opset), target)
    ids = np.arange(1, 13).reshape(2, 6)
    feeds = {"input_ids": ids, "attention_mask": np.array([[1] * 6, [0, 0, 1, 1, 0, 1]])}
    expected = run(target, feeds)
    with trimaran.interpret():
        session = trimaran.ort_session(target, ["CPUExecutionProvider"])
        got = session.run(None, feeds)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("opset", OPSETS)
def test_masks_travel_as_lengths_and_keys(bert_files, tmp_path, opset):
    trimaran.rewrite_onnx(bert_files(opset), tmp_path / "out.onnx")
    nodes = [node for node in ir.load(tmp_path / "out.onnx").graph if node.op_type == "attention"]
    for node in nodes:
        present = [value is not None for value in node.inputs]
        assert present == [True, True, True, False, True, True]
        assert node.attributes["num_heads"].value == 3
    assert nodes[0].inputs[4] is nodes[1].inputs[4], "layers share what is computed from the mask"
    assert not any(n.op_type == "Softmax" for n in ir.load(tmp_path / "out.onnx").graph)


def test_rewriting_twice_changes_nothing(bert_files, tmp_path):
    first, second = tmp_path / "1.onnx", tmp_path / "2.onnx"
    trimaran.rewrite_onnx(bert_files(18), first)
    report = trimaran.rewrite_onnx(first, second)
    assert count_nodes(ir.load(second)) == count_nodes(ir.load(first)) == report.replaced


class Forms(nn.Module):
    """A norm, a residual addition and an attention, whose mask is given."""

    def __init__(self, causal=False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.causal = nn.LayerNorm(32), causal
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, mask=None):
        q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        s = x + a.transpose(1, 2).flatten(2)
        return self.norm(s), s


def masks(name):
    torch.manual_seed(1)
    return {
        "none": None,
        "bias": torch.randn(2, 1, 6, 6),
        "bias of heads": torch.randn(1, 4, 6, 6),
        "bool": torch.rand(2, 1, 6, 6) > 0.3,
        "keys": (torch.rand(2, 1, 1, 6) > 0.3),
    }[name]


QUICK = [("none", 18), ("keys", 20), ("bias of heads", 23)]
FORMS = itertools.product(["none", "bias", "bias of heads", "bool", "keys"], [18, 20, 23])


@pytest.mark.parametrize(
    ("name", "opset"), [pytest.param(*form, marks=[] if form in QUICK else pytest.mark.slow) for form in FORMS]
)
def test_forms_of_attention(tmp_path, opset, name):
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    args = (torch.randn(2, 6, 32),) if name == "none" else (torch.randn(2, 6, 32), masks(name))
    torch.onnx.export(Forms().eval(), args, str(source), dynamo=True, opset_version=opset, verbose=False)
    report = trimaran.rewrite_onnx(source, target)
    assert report.replaced == {"attention": 1, "layer_norm": 1}, report
    node = next(n for n in ir.load(target).graph if n.op_type == "attention")
    given = [port for port, value in zip("qkvblm", node.inputs, strict=False) if value is not None]
    assert "".join(given) == {"none": "qkv", "keys": "qkvlm"}.get(name, "qkvb")


def test_a_sum_that_is_used_again_comes_out_of_the_norm(tmp_path):
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    torch.onnx.export(
        Forms().eval(), (torch.randn(2, 6, 32),), str(source), dynamo=True, opset_version=20, verbose=False
    )
    trimaran.rewrite_onnx(source, target)
    model = ir.load(target)
    node = next(n for n in model.graph if n.op_type == "layer_norm")
    assert node.inputs[3] is not None
    assert node.outputs[1] is model.graph.outputs[1]
    assert [v.name for v in model.graph.outputs] == [v.name for v in ir.load(source).graph.outputs]


def test_a_fully_masked_row_stays_what_it_was(tmp_path):
    """Below opset 23 torch's file gives the mean of v there, at 23 zero: the rewritten file says which."""
    wanted = {}
    for opset in (18, 23):
        source, target = tmp_path / f"{opset}.onnx", tmp_path / f"{opset}.out.onnx"
        mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
        args = (torch.randn(2, 6, 32), mask)
        torch.onnx.export(Forms().eval(), args, str(source), dynamo=True, opset_version=opset, verbose=False)
        trimaran.rewrite_onnx(source, target)
        node = next(n for n in ir.load(target).graph if n.op_type == "attention")
        wanted[opset] = node.attributes["masked_row"].value if "masked_row" in node.attributes else "zero"
        names = [value.name for value in ir.load(source).graph.inputs]
        feeds = dict(
            zip(names, (args[0].numpy(), np.array([True, False])[:, None, None, None].repeat(6, 3)), strict=True)
        )
        if opset == 18:
            for ours, theirs in zip(run(target, feeds), run(source, feeds), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert not np.isnan(run(target, feeds)[0]).any()
    assert wanted == {18: "mean", 23: "zero"}


# ---- graphs written by hand


def graph(nodes, inputs, outputs, constants=None, opset=18):
    made = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def rewritten(model, tmp_path, **options):
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.checker.check_model(model)
    onnx.save(model, source)
    return trimaran.rewrite_onnx(source, target, **options), source, target


def norm(*, shape=("b", "s", 8), axis=-1, stash=1, kind=FLOAT, scale=8, extra=False):
    outputs = ["y", "mean"] if extra else ["y"]
    node = helper.make_node("LayerNormalization", ["x", "scale"], outputs, axis=axis, stash_type=stash)
    out = [("y", shape)] + ([("mean", [*shape[:-1], 1])] if extra else [])
    numpy_type = np.float64 if kind == TensorProto.DOUBLE else np.float32
    made = graph([node], [("x", kind, shape)], out, {"scale": np.ones(scale, numpy_type)})
    made.graph.output[0].type.tensor_type.elem_type = kind
    return made


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"axis": 1, "scale": (5, 8), "shape": ("b", 5, 8)}, "it normalizes from axis 1 of 3"),
        ({"kind": TensorProto.DOUBLE}, "x is float64"),
        ({"extra": True}, "its mean or inverse standard deviation is used"),
        ({"stash": 11}, "its statistics are kept in type 11"),
        ({"scale": 1}, r"the scale has shape \[1\], expected"),
    ],
)
def test_norms_that_are_left(tmp_path, options, reason):
    report, source, target = rewritten(norm(**options), tmp_path)
    assert not report.replaced
    assert len(report.near_misses) == 1
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.near_misses[0].reason)
    assert target.read_bytes() == source.read_bytes(), "a file in which nothing matches is copied"
    assert report.near_misses[0].reason in str(report)


def test_a_norm_of_the_last_axis_by_its_number(tmp_path):
    report, _, _ = rewritten(norm(axis=2), tmp_path)
    assert report.replaced == {"layer_norm": 1}


@pytest.mark.parametrize(
    ("other", "fused"), [(("b", "s", 8), True), ((1, 1, 8), False), ((8,), False), (("b", "t", 8), False)]
)
def test_only_equal_shapes_are_a_residual(tmp_path, other, fused):
    nodes = [
        helper.make_node("Add", ["a", "x"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale"], ["y"]),
    ]
    model = graph(
        nodes, [("x", FLOAT, ("b", "s", 8)), ("a", FLOAT, other)], [("y", ("b", "s", 8))], {"scale": np.ones(8, "f")}
    )
    report, _, target = rewritten(model, tmp_path)
    assert report.replaced == {"layer_norm": 1}
    node = next(n for n in ir.load(target).graph if n.op_type == "layer_norm")
    assert (len(node.inputs) == 4) == fused


def test_unknown_dimensions_are_not_equal(tmp_path):
    nodes = [
        helper.make_node("Add", ["a", "x"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale"], ["y"]),
    ]
    shape = (None, None, 8)
    model = graph(nodes, [("x", FLOAT, shape), ("a", FLOAT, shape)], [("y", shape)], {"scale": np.ones(8, "f")})
    _, _, target = rewritten(model, tmp_path)
    assert [len(n.inputs) for n in ir.load(target).graph if n.op_type == "layer_norm"] == [2]


def attention(
    *, swap=False, scale_after=True, divide=False, softmax_axis=-1, mask=None, wrap=False, head=8, two=False, kind="f"
):
    """softmax(q k^T * 0.5 [+ mask]) v on [b, 4, s, 8] and [b, 4, t, 8], the way it is asked for."""
    constants = {"half": np.asarray(0.5, kind), "two": np.asarray([2.0], kind), "zero": np.asarray(0, kind)}
    rows = [("q", FLOAT, ("b", 4, "s", head)), ("k", FLOAT, ("b", 4, "t", head)), ("v", FLOAT, ("b", 4, "t", head))]
    nodes = [helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2])]
    if scale_after:
        nodes.append(helper.make_node("MatMul", ["q", "kt"], ["product"]))
        scaled = (
            ("Div", ["product", "two"]) if divide else ("Mul", ["half", "product"] if swap else ["product", "half"])
        )
        nodes.append(helper.make_node(scaled[0], scaled[1], ["scores"]))
    else:
        nodes.append(helper.make_node("Mul", ["q", "half"], ["qs"]))
        nodes.append(helper.make_node("MatMul", ["qs", "kt"], ["scores"]))
    scores = "scores"
    if mask is not None:
        rows.append(("mask", FLOAT, mask))
        nodes.append(helper.make_node("Add", ["mask", scores] if swap else [scores, "mask"], ["masked"]))
        scores = "masked"
    nodes.append(helper.make_node("Softmax", [scores], ["p"], axis=softmax_axis))
    p = "p"
    if wrap:
        nodes.append(helper.make_node("IsNaN", ["p"], ["nan"]))
        nodes.append(helper.make_node("Where", ["nan", "zero", "p"], ["safe"]))
        p = "safe"
    nodes.append(helper.make_node("MatMul", [p, "v"], ["y"]))
    outputs = [("y", ("b", 4, "s", head))]
    if two:
        outputs.append((p, ("b", 4, "s", "t")))
    return graph(nodes, rows, outputs, constants)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"swap": True},
        {"divide": True},
        {"scale_after": False},
        {"wrap": True},
        {"softmax_axis": 3},
        {"mask": ("b", 1, "s", "t")},
        {"mask": (1, 4, 1, "t"), "swap": True},
        {"mask": ("s", "t")},
        {"mask": ("b2", 1, "s", "t2")},
    ],
)
def test_attention_however_it_is_written(tmp_path, options):
    report, _, _ = rewritten(
        attention(**options), tmp_path, inputs=attention_inputs("mask" in options and options["mask"])
    )
    assert report.replaced == {"attention": 1}, report
    assert report.verified.startswith("verified")


def attention_inputs(mask=None):
    size = {"b": 2, "s": 5, "t": 7, "b2": 2, "t2": 7}
    generator = np.random.default_rng(0)
    shapes = {"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 8)}
    if mask:
        shapes["mask"] = tuple(size.get(axis, axis) for axis in mask)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softmax_axis": 1}, "a softmax over axis 1 of 4, not over the last"),
        ({"two": True}, "its weights are used by something else too"),
        ({"mask": ("b", 1, "s", 1)}, r"the mask's shape \[b, 1, s, 1\] is not provably"),
        ({"head": 300}, "the head dimension is 300"),
        ({"head": "d"}, "the heads of q .* are not known"),
    ],
)
def test_attentions_that_are_left(tmp_path, options, reason):
    report, source, target = rewritten(attention(**options), tmp_path, verify=False)
    assert not report.replaced
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.near_misses[0].reason)
    assert target.read_bytes() == source.read_bytes()


def operator(**attributes):
    inputs = [("q", FLOAT, ("b", 4, "s", 8)), ("k", FLOAT, ("b", 4, "t", 8)), ("v", FLOAT, ("b", 4, "t", 8))]
    names = ["q", "k", "v"]
    past = attributes.pop("past", False)
    if past:
        inputs += [(name, FLOAT, ("b", 4, "p", 8)) for name in ("pk", "pv")]
        names += ["", "pk", "pv"]
    outputs = ["y", "presentk", "presentv"] if past else ["y"]
    out = [("y", ("b", 4, "s", 8))] + [(name, ("b", 4, "u", 8)) for name in outputs[1:]]
    return graph([helper.make_node("Attention", names, outputs, **attributes)], inputs, out, opset=23)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"is_causal": 1}, "is_causal with different numbers of queries and keys"),
    ],
)
def test_operators_that_are_left(tmp_path, attributes, reason):
    report, _, _ = rewritten(operator(**attributes), tmp_path, verify=False)
    assert not report.replaced
    assert report.near_misses[0].reason.startswith(reason)


@pytest.mark.parametrize("attributes", [{"softcap": 5.0}, {"past": True}])
def test_operators_with_caps_and_caches(tmp_path, attributes):
    sizes = attention_inputs()
    if "past" in attributes:
        sizes |= dict.fromkeys(("pk", "pv"), sizes["k"][:, :, :3] * 0.5)
    report, _, target = rewritten(operator(**attributes), tmp_path, inputs=sizes)
    assert report.replaced == {"attention": 1}
    assert report.verified.startswith("verified")
    assert [value.name for value in ir.load(target).graph.outputs] == ["y", "presentk", "presentv"][
        : 1 + 2 * ("past" in attributes)
    ]


def test_the_operator_without_a_scale(tmp_path):
    report, _, target = rewritten(operator(), tmp_path, inputs=attention_inputs())
    assert report.replaced == {"attention": 1}
    node = next(n for n in ir.load(target).graph if n.op_type == "attention")
    assert node.attributes["scale"].value == pytest.approx(8**-0.5)


def test_an_old_opset_is_left(tmp_path):
    model = graph([helper.make_node("Relu", ["x"], ["y"])], [("x", FLOAT, (2,))], [("y", (2,))], opset=9)
    report, source, target = rewritten(model, tmp_path)
    assert report.near_misses[0].reason == "it is of opset 9, supported from 11"
    assert target.read_bytes() == source.read_bytes()


# ---- files


def test_a_wrong_rewrite_is_caught_and_leaves_nothing(bert_files, tmp_path, monkeypatch):
    right = attention_rule.rewrite_attention

    def wrong(node, match, cache, opset):
        right(node, dataclasses.replace(match, scale=match.scale * 300), cache, opset)

    monkeypatch.setattr(attention_rule, "rewrite_attention", wrong)
    with pytest.raises(VerificationError, match="output hidden differs by"):
        trimaran.rewrite_onnx(bert_files(18), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
    trimaran.rewrite_onnx(bert_files(18), tmp_path / "out.onnx", verify=False)


@pytest.mark.parametrize(
    ("source", "target", "error", "message"),
    [
        ("missing.onnx", "out.onnx", FileNotFoundError, "src is '.*missing.onnx', which does not exist"),
        (".", "out.onnx", ValueError, "expected a file, not a folder"),
        ("text.onnx", "out.onnx", ValueError, "which is not an ONNX model"),
        ("empty.onnx", "out.onnx", ValueError, "which is not an ONNX model"),
        ("cut.onnx", "out.onnx", ValueError, "which is not an ONNX model"),
        ("good.onnx", "no/such/folder.onnx", FileNotFoundError, "dst is .*, whose folder does not exist"),
        ("good.onnx", "text.onnx", FileExistsError, "dst is .*, which exists; overwrite=True replaces it"),
        ("good.onnx", "good.onnx", FileExistsError, "which exists"),
    ],
)
def test_bad_files(tmp_path, source, target, error, message):
    onnx.save(norm(), tmp_path / "good.onnx")
    (tmp_path / "text.onnx").write_text("this is no model, it is text " * 10)
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "good.onnx").read_bytes()[:-20])
    before = listing(tmp_path)
    with pytest.raises(error, match=message):
        trimaran.rewrite_onnx(tmp_path / source, tmp_path / target)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("src", "dst", "name"), [(None, "out.onnx", "src"), (b"x", "out.onnx", "src"), ("good.onnx", 3, "dst")]
)
def test_paths_are_paths(tmp_path, monkeypatch, src, dst, name):
    monkeypatch.chdir(tmp_path)
    onnx.save(norm(), tmp_path / "good.onnx")
    with pytest.raises(TypeError, match=rf"{name} is a \w+, expected a path"):
        trimaran.rewrite_onnx(src, dst)


def test_the_source_is_never_the_target(tmp_path):
    onnx.save(norm(), tmp_path / "good.onnx")
    before = listing(tmp_path)
    os.symlink(tmp_path / "good.onnx", tmp_path / "same.onnx")
    with pytest.raises(ValueError, match="which is src itself"):
        trimaran.rewrite_onnx(tmp_path / "good.onnx", tmp_path / "same.onnx", overwrite=True)
    assert listing(tmp_path)["good.onnx"] == before["good.onnx"]


def test_overwriting_is_asked_for(tmp_path):
    onnx.save(norm(), tmp_path / "good.onnx")
    (tmp_path / "out.onnx").write_text("old")
    trimaran.rewrite_onnx(tmp_path / "good.onnx", tmp_path / "out.onnx", overwrite=True)
    assert count_nodes(ir.load(tmp_path / "out.onnx")) == {"layer_norm": 1}


def test_generated_inputs_stay_within_what_they_index(bert_files):
    inputs = example_inputs(ir.load(bert_files(18)))
    assert inputs["input_ids"].max() < 50
    assert set(np.unique(inputs["attention_mask"])) <= {0, 1}
    assert (inputs["attention_mask"].max(1) == 1).all()
