"""Bad files: each is refused by name, nothing is written, and the source is as it was."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import trimaran
from trimaran.export import files


def listing(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def refused(folder, error, message, source="src.onnx", **options):
    before = listing(folder)
    with pytest.raises(error, match=message):
        trimaran.rewrite_onnx(folder / source, folder / "dst.onnx", **options)
    assert listing(folder) == before


def norm(weight=None):
    """y = LayerNorm(x); its weight is the tensor, if one is given."""
    scale = weight if weight is not None else numpy_helper.from_array(np.ones(8, "f"), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("LayerNormalization", ["x", "w"], ["y"])], "g", [x], [y], [scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def external(**entries):
    """A weight of eight floats in a file of its own."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def save(folder, model):
    (folder / "src.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_truncated_files(tmp_path, keep):
    whole = norm().SerializeToString()
    (tmp_path / "src.onnx").write_bytes(whole[:keep])
    refused(tmp_path, ValueError, "src is .*, which is not an ONNX model|src: ")


@pytest.mark.parametrize(
    "magic", [b"\x89PNG\r\n\x1a\n" + bytes(99), b"PK\x03\x04" + bytes(99), b"GGUF" + bytes(99), b"\xff" * 99]
)
def test_other_kinds_of_files(tmp_path, magic):
    (tmp_path / "src.onnx").write_bytes(magic)
    refused(tmp_path, ValueError, "src is .*, which is not an ONNX model")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a = Add(x, b) b = Relu(a) y = Relu(b)", "goes in a circle: (Add -> Relu -> Add|Relu -> Add -> Relu)"),
        ("a = Relu(a) y = Relu(x)", "goes in a circle: Relu -> Relu"),
        ("y = Add(x, nowhere)", "node Add reads 'nowhere', which nothing makes"),
        ("a = Relu(x)", "output 'y' is made by nothing"),
        ("y = Relu(x) y = Exp(x)", "value 'y' is there twice"),
        ("x = Relu(x) y = Exp(x)", "value 'x' is there twice"),
        ("y = Softmax()", "node Softmax has 0 inputs, the operator 1 to 1"),
        ("y, z = Relu(x)", "node Relu has 2 outputs, the operator 1 to 1"),
        ("y = Relu<axis = 1>(x)", "node Relu has an attribute 'axis', the operator has none of that name"),
        ("y = Softmax<axis = 1.5>(x)", "node Softmax: attribute 'axis' is of another type than the operator's"),
        ("y = Cast(x)", "node Cast lacks the attribute 'to'"),
        ('y = Add("", x)', "node Add lacks A"),
        (
            "c = Constant<value = bool {1}>() y = If(c) <then_branch = g () => (float[8] t) { t = Relu(lost) }, "
            "else_branch = h () => (float[8] e) { e = Relu(x) }>",
            "graph 'g': node Relu reads 'lost', which nothing makes",
        ),
    ],
)
def test_graphs_that_are_none(tmp_path, body, message):
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[8] x) => (float[8] y) {{ {body} }}'
    save(tmp_path, parser.parse_model(text))
    refused(tmp_path, ValueError, message)


def test_nodes_in_another_order_are_a_graph(tmp_path):
    """onnxruntime sorts them itself."""
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[8] x) => (float[8] y) { y = Relu(a) a = Exp(x) }'
    save(tmp_path, parser.parse_model(text))
    trimaran.rewrite_onnx(tmp_path / "src.onnx", tmp_path / "dst.onnx")
    assert (tmp_path / "dst.onnx").read_bytes() == (tmp_path / "src.onnx").read_bytes()


def test_functions_that_call_each_other(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 17, "my" : 1]> g (float[8] x) => (float[8] y) { y = my.f(x) }
    <domain: "my", opset_import: ["" : 17, "my" : 1]> f (a) => (b) { b = my.h(a) }
    <domain: "my", opset_import: ["" : 17, "my" : 1]> h (a) => (b) { b = my.f(a) }"""
    save(tmp_path, parser.parse_model(text))
    refused(tmp_path, ValueError, "functions call each other in a circle: my::")


def test_two_functions_of_one_name(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 17, "my" : 1]> g (float[8] x) => (float[8] y) { y = my.f(x) }
    <domain: "my", opset_import: ["" : 17]> f (a) => (b) { b = Relu(a) }"""
    model = parser.parse_model(text)
    model.functions.append(model.functions[0])
    save(tmp_path, model)
    refused(tmp_path, ValueError, "src has two functions of one name")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raw_data": bytes(31)}, "weight 'w' has 31 bytes, its shape and type take 32"),
        ({"dims": [-8]}, r"weight 'w' has the shape \[-8\]"),
        ({"dims": [1 << 40]}, "its shape and type take"),
        ({"data_type": 0}, r"weight 'w' has no known type \(0\)"),
        ({"data_type": 99}, r"weight 'w' has no known type \(99\)"),
        ({"data_type": TensorProto.INT4}, "has 32 bytes, its shape and type take 4"),
    ],
)
def test_weights_that_are_not_what_they_say(tmp_path, change, message):
    tensor = numpy_helper.from_array(np.ones(8, "f"), "w")
    for field, value in change.items():
        if field == "dims":
            tensor.dims[:] = value
        else:
            setattr(tensor, field, value)
    save(tmp_path, norm(tensor))
    refused(tmp_path, ValueError, message)


def test_too_few_numbers(tmp_path):
    save(tmp_path, norm(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8], float_data=[1.0] * 7)))
    refused(tmp_path, ValueError, "weight 'w' has 7 numbers, its shape and type take 8")


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"location": "gone.data"}, FileNotFoundError, "weight 'w' is in 'gone.data', which does not exist beside"),
        ({}, ValueError, "weight 'w' is in '', expected a file in the model's folder"),
        ({"location": "../w.data"}, ValueError, r"is in '\.\./w\.data', expected a file in the model's folder"),
        ({"location": "sub/../../w.data"}, ValueError, "expected a file in the model's folder"),
        ({"location": "/etc/passwd"}, ValueError, "is in '/etc/passwd', expected a file in the model's folder"),
        ({"location": "C:\\w.data"}, ValueError, "expected a file in the model's folder"),
        ({"location": "linked.data"}, ValueError, "is in 'linked.data', a link: copy what it points to"),
        ({"location": "near.data"}, ValueError, "is in 'near.data', a link: copy what it points to"),
        ({"location": "folder/w.data"}, ValueError, "is in 'folder/w.data', a link: copy what it points to"),
        ({"location": "hard.data"}, ValueError, r"is in 'hard.data', which has other names \(hard links\): copy it"),
        ({"location": "sub"}, ValueError, "is in 'sub', expected a file"),
        ({"location": "good.data", "offset": 8}, ValueError, "is at 8 to 40 of 'good.data', which has 32 bytes"),
        ({"location": "good.data", "offset": -8}, ValueError, "is at -8 to 24 of 'good.data'"),
        ({"location": "good.data", "length": 16}, ValueError, "its shape and type take 32"),
        ({"location": "good.data", "length": "many"}, ValueError, "has no number as its offset or length"),
    ],
)
def test_weights_in_other_files(tmp_path, entries, error, message):
    folder, data = tmp_path / "models", np.ones(8, "f").tobytes()
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "w.data").write_bytes(data)
    (folder / "good.data").write_bytes(data)
    os.symlink(tmp_path / "w.data", folder / "linked.data")
    os.symlink(folder / "good.data", folder / "near.data")
    os.symlink(tmp_path, folder / "folder")
    (tmp_path / "other.data").write_bytes(data)
    os.link(tmp_path / "other.data", folder / "hard.data")
    save(folder, norm(external(**entries)))
    refused(folder, error, message)


def test_weights_in_a_file_beside_are_read(tmp_path):
    (tmp_path / "good.data").write_bytes(np.ones(8, "f").tobytes())
    save(tmp_path, norm(external(location="good.data", offset=0, length=32)))
    report = trimaran.rewrite_onnx(tmp_path / "src.onnx", tmp_path / "dst.onnx")
    assert report.replaced == {"layer_norm": 1}


def test_a_weight_inside_a_constant_is_looked_at_too(tmp_path):
    model = norm()
    del model.graph.initializer[:]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=external(location="/etc/passwd")))
    save(tmp_path, model)
    refused(tmp_path, ValueError, "is in '/etc/passwd', expected a file in the model's folder")


@pytest.fixture
def rewritten(tmp_path):
    save(tmp_path, norm())
    trimaran.rewrite_onnx(tmp_path / "src.onnx", tmp_path / "ours.onnx")
    model = onnx.load(tmp_path / "ours.onnx")
    (tmp_path / "ours.onnx").unlink()
    return model


def test_our_own_bodies_are_known(tmp_path, rewritten):
    save(tmp_path, rewritten)
    trimaran.rewrite_onnx(tmp_path / "src.onnx", tmp_path / "dst.onnx")


def spoil_body(model):
    next(a for a in model.functions[0].node[-1].attribute if a.name == "epsilon").f = 1.0


def rename_body(model):
    model.functions[0].name = model.graph.node[0].op_type = "norm_of_somebody"


def newer_version(model):
    next(o for o in model.opset_import if o.domain == "trimaran").version = 99


@pytest.mark.parametrize("spoil", [spoil_body, rename_body, newer_version])
def test_bodies_under_our_name_that_are_not_ours(tmp_path, rewritten, spoil):
    spoil(rewritten)
    save(tmp_path, rewritten)
    refused(tmp_path, ValueError, "src has a function trimaran::.* that this version of trimaran did not write")


def test_a_call_that_is_not_what_its_body_says(tmp_path, rewritten):
    next(a for a in rewritten.graph.node[0].attribute if a.name == "eps").f = 1.0
    save(tmp_path, rewritten)
    refused(tmp_path, ValueError, "says other than the function that it calls")


def test_a_call_with_types_that_the_op_has_not(tmp_path, rewritten):
    for value in (rewritten.graph.input[0], rewritten.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.INT64
    rewritten.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(8, np.int64), "w"))
    save(tmp_path, rewritten)
    refused(tmp_path, ValueError, "x is int64, supported are float32, float16, bfloat16")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    save(tmp_path, norm())

    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", denied)
    refused(tmp_path, PermissionError, "the folder of 'dst.onnx', cannot be written")


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    save(tmp_path, norm())

    def full(model, path, **_):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.ir, "save", full)
    refused(tmp_path, OSError, "No space left on device")


def test_old_weights_are_not_written_over(tmp_path):
    save(tmp_path, norm())
    (tmp_path / "dst.onnx.data").write_text("somebody's")
    refused(tmp_path, FileExistsError, "dst is .*, whose weights may go to .*dst.onnx.data', which exists")


def test_the_sources_weights_are_never_the_targets(tmp_path):
    (tmp_path / "dst.onnx.data").write_bytes(np.ones(8, "f").tobytes())
    save(tmp_path, norm(external(location="dst.onnx.data")))
    refused(tmp_path, ValueError, "dst.onnx.data are the weights of the source", overwrite=True)


@pytest.mark.parametrize("where", ["an unused weight", "a constant", "a body"])
@pytest.mark.parametrize("matched", [True, False])
def test_weights_beside_the_model_go_where_it_goes(tmp_path, where, matched):
    """Also those that no node of the graph reads, or that stand in attributes."""
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "sub").mkdir(parents=True)
    second.mkdir()
    (first / "sub" / "w.data").write_bytes(np.arange(8, dtype="f").tobytes())
    model = norm() if matched else norm_free()
    tensor = external(location="sub/w.data")
    tensor.name = "apart"
    if where == "an unused weight":
        model.graph.initializer.append(tensor)
    elif where == "a constant":
        model.graph.node.insert(0, helper.make_node("Constant", [], ["v"], value=tensor))
        model.graph.node.append(helper.make_node("Add", ["y", "v"], ["z"]))
        model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 8]))
    else:
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "on"))
        out = helper.make_tensor_value_info("t", TensorProto.FLOAT, [2, 8])
        body = helper.make_graph([helper.make_node("Add", ["y", "apart"], ["t"])], "b", [], [out], [tensor])
        other = helper.make_graph([helper.make_node("Identity", ["y"], ["t"])], "o", [], [out])
        model.graph.node.append(helper.make_node("If", ["on"], ["z"], then_branch=body, else_branch=other))
        model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 8]))
    save(first, model)
    report = trimaran.rewrite_onnx(first / "src.onnx", second / "dst.onnx")
    assert bool(report.replaced) == matched
    shutil.rmtree(first)
    session = onnxruntime.InferenceSession(second / "dst.onnx", providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, {"x": np.ones((2, 8), "f")})[-1]).all()


def norm_free():
    model = norm()
    model.graph.node[0].CopyFrom(helper.make_node("Mul", ["x", "w"], ["y"]))
    return model
