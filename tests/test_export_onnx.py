"""export_onnx: a model's file carries trimaran nodes and computes what the model does, in any onnxruntime."""

import models
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

import trimaran
from trimaran.export.functions import count_nodes
from trimaran.export.verify import VerificationError, compare


def bert():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 64,
    }
    return BertModel(BertConfig(**sizes)).eval()


def inputs(size=2, length=7):
    ids = torch.randint(1, 50, (size, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < length - torch.arange(size)[:, None]).long()}


def run(session, call):
    return session.run(None, {name: tensor.numpy() for name, tensor in call.items()})


@pytest.mark.parametrize("opset", [18, 24])
def test_bert(tmp_path, opset):
    model, path = bert(), tmp_path / "bert.onnx"
    report = trimaran.export_onnx(model, inputs(), path, opset=opset)
    assert report.replaced == {"attention": 2, "layer_norm": 5}
    assert report.verified.startswith("verified against the model")
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
    assert session.get_inputs()[0].shape == ["batch", "sequence"]
    for size, length in ((1, 1), (1, 9), (7, 4)):
        call = inputs(size, length)
        with torch.no_grad():
            expected = model(**call)
        for ours, theirs in zip(run(session, call), expected.to_tuple(), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


def test_one_example_sentence_makes_a_dynamic_file(tmp_path):
    report = trimaran.export_onnx(bert(), inputs(1, 5), tmp_path / "bert.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "bert.onnx", providers=["CPUExecutionProvider"])
    assert run(session, inputs(3, 8))[0].shape == (3, 8, 48)
    assert "is fixed" not in str(report)


def test_a_static_file(tmp_path):
    trimaran.export_onnx(bert(), inputs(1, 5), tmp_path / "bert.onnx", dynamic=False)
    session = onnxruntime.InferenceSession(tmp_path / "bert.onnx", providers=["CPUExecutionProvider"])
    assert [value.shape for value in session.get_inputs()] == [[1, 5], [1, 5]]


def test_the_kernels_run_in_the_exported_file(tmp_path):
    model, call = bert(), inputs()
    trimaran.export_onnx(model, call, tmp_path / "bert.onnx")
    with trimaran.interpret(), torch.no_grad():
        got = run(trimaran.ort_session(tmp_path / "bert.onnx", ["CPUExecutionProvider"]), call)
    with torch.no_grad():
        np.testing.assert_allclose(got[0], model(**call).last_hidden_state.numpy(), atol=2e-5)


def test_an_optimized_model_exports_the_same_and_stays_optimized(tmp_path):
    model = bert()
    trimaran.export_onnx(model, inputs(), tmp_path / "plain.onnx")
    report = trimaran.optimize_model(model)
    model(**inputs())
    trimaran.export_onnx(model, inputs(), tmp_path / "optimized.onnx")
    files = [ir.load(tmp_path / f"{name}.onnx") for name in ("plain", "optimized")]
    plain, optimized = ([(n.op_type, n.overload) for n in file.graph] for file in files)
    assert plain == optimized
    assert trimaran.report(model) is report
    model(**inputs())
    assert len(report.graphs) == 1


class Two(nn.Module):
    """Positional arguments, outputs without names, one of them a norm that a rule replaces."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, a, b):
        return self.norm(a + b), (a * b,)


@pytest.mark.parametrize(
    "call", [(torch.randn(2, 3, 8), torch.randn(2, 3, 8)), [torch.randn(2, 3, 8), torch.randn(2, 3, 8)]]
)
def test_positional_inputs_and_unnamed_outputs(tmp_path, call):
    trimaran.export_onnx(Two().eval(), call, tmp_path / "two.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "two.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["a", "b"]
    assert [value.name for value in session.get_outputs()] == ["output_0", "output_1"]
    assert count_nodes(ir.load(tmp_path / "two.onnx")) == {"layer_norm": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_the_linear_layers_too(tmp_path, dtype):
    model, path = bert(), tmp_path / "half.onnx"
    report = trimaran.export_onnx(model, inputs(), path, dtype=dtype)
    assert report.replaced == {"attention": 2, "layer_norm": 1, "linear": 5, "linear_norm": 4}
    assert report.verified.startswith("verified against the model, at batch 1 and 7 too")
    assert model.dtype is torch.float32
    stored = {value.dtype for value in ir.load(path).graph.initializers.values() if value.name.endswith(".weight")}
    assert stored == {ir.DataType.FLOAT16 if dtype is torch.float16 else ir.DataType.BFLOAT16}


def test_a_half_precision_model_needs_no_dtype(tmp_path):
    report = trimaran.export_onnx(bert().half(), inputs(), tmp_path / "half.onnx")
    assert report.replaced["linear"] == 5


def test_layers_that_a_model_keeps_in_fp32_stay_there(tmp_path):
    report = trimaran.export_onnx(
        models.build("t5-encoder"), models.inputs("t5-encoder"), tmp_path / "t5.onnx", dtype=torch.float16
    )
    assert report.replaced == {"attention": 2, "linear": 5, "linear_norm": 1, "rms_norm": 4}
    assert "2 linear layers stay as they are: in fp32 onnxruntime's own" in str(report)


def test_names_are_the_models_own(tmp_path):
    trimaran.export_onnx(bert(), inputs(), tmp_path / "bert.onnx", dtype=torch.float16)
    graph = ir.load(tmp_path / "bert.onnx").graph
    weights = {name for name, tensor in bert().named_parameters() if tensor.dim() == 2}
    assert weights <= graph.initializers.keys()
    nodes = [node.name for node in graph]
    assert len({*nodes}) == len(nodes)
    assert "encoder.layer.1.attention.self/attention" in nodes
    assert "encoder.layer.0.attention.self.query/linear" in nodes
    assert "/" not in str(graph.initializers.keys())
    assert not any("stack_trace" in key for node in graph for key in node.metadata_props)


def test_near_misses_are_reported(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.softmax(nn.functional.layer_norm(x, (4, 8)), -1)

    report = trimaran.export_onnx(Odd().eval(), (torch.randn(2, 4, 8),), tmp_path / "odd.onnx")
    assert not report.replaced
    assert "it normalizes the last 2 dimensions" in str(report)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "bert-base"}, TypeError, "model is a str, expected a torch.nn.Module"),
        ({"model": bert().train()}, ValueError, "model is in training mode"),
        ({"inputs": {}}, TypeError, "inputs is a dict without a tensor"),
        ({"inputs": None}, TypeError, "inputs is a NoneType without a tensor"),
        ({"path": 7}, TypeError, "path is a int, expected a path"),
        ({"path": "no/such/folder/x.onnx"}, FileNotFoundError, "path is .*, whose folder does not exist"),
        ({"path": "old.onnx"}, FileExistsError, "which exists; overwrite=True replaces it"),
        ({"opset": 17}, ValueError, "opset is 17, expected 18 to 24"),
        ({"dtype": torch.int8}, ValueError, "dtype is torch.int8, expected torch.float32, torch.float16 or torch.bfl"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path, monkeypatch, change, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.onnx").write_text("old")
    call = {"model": bert(), "inputs": inputs(), "path": "new.onnx", **change}
    with pytest.raises(error, match=message):
        trimaran.export_onnx(**call)
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_text() == "old"


def test_a_file_that_disagrees_with_the_model_is_not_written(tmp_path, monkeypatch):
    from trimaran.export import export_onnx as module

    monkeypatch.setattr(module, "attach_functions", spoiled(module.attach_functions))
    with pytest.raises(VerificationError, match="output last_hidden_state differs by"):
        trimaran.export_onnx(bert(), inputs(), tmp_path / "bert.onnx")
    assert not list(tmp_path.iterdir())


def spoiled(attach):
    def wrong(model):
        for node in model.graph:
            if node.op_type == "layer_norm":
                node.attributes["eps"] = ir.AttrFloat32("eps", 1.0)
        attach(model)

    return wrong


@pytest.mark.parametrize(
    ("got", "expected", "message"),
    [
        (np.ones(3, "f"), np.ones(4, "f"), r"output y is float32\[3\], expected float32\[4\]"),
        (np.ones(3), np.ones(3, "f"), "output y is float64"),
        (np.full(3, np.nan, "f"), np.ones(3, "f"), "differs by nan|differs by inf"),
        (np.ones(3, "f"), np.array([1, np.nan, 1], "f"), "differs by inf"),
        (np.ones(3, "f") * 1.01, np.ones(3, "f"), "differs by 0.01"),
    ],
)
def test_comparing_notices(got, expected, message):
    with pytest.raises(VerificationError, match=message):
        compare({"y": got}, {"y": expected})


def test_equal_infinities_and_nan_are_equal():
    odd = np.array([1.0, np.inf, -np.inf, np.nan], "f")
    assert compare({"y": odd.copy()}, {"y": odd}) == 0.0


@pytest.mark.zoo
def test_a_tokenizers_batch_is_an_example_call(tmp_path):
    from trimaran.demo import load, model_folder

    model, tokenizer = load(model_folder())
    assert isinstance(tokenizer, BertTokenizerFast)
    report = trimaran.export_onnx(
        model, tokenizer(["a", "b c"], padding=True, return_tensors="pt"), tmp_path / "m.onnx"
    )
    assert report.replaced == {"attention": 6, "layer_norm": 13}
