"""One rule set written twice, for FX graphs and for files: the export of a model and the rewrite of its plain export
carry the same nodes."""

from collections import Counter

import models
import onnx_ir as ir
import pytest
import torch
from exports import exported

import trimaran
from trimaran.export.functions import our_nodes
from trimaran.kernels.catalog import OPS

# transpose_weight: torch's exporter turns weights round. scale: a file in fp16 holds it in fp16, perhaps as two roots.
# masked_row: in a file of an opset below 23 a masked row is a mean, under PyTorch it is zero.
FREE = ("transpose_weight", "scale", "masked_row")
NORMS = "files compute these norms with weights in another order of casts, which their rule does not join to a layer"
PRODUCT = "a file multiplies two integer masks before it asks what is not 0, which its rule keeps as a bias"
DIFFERENCES = {"gemma2": NORMS, "gemma3": NORMS, "deberta-v2": PRODUCT}
QUICK = ["bert"]


def nodes_of(path):
    found = Counter()
    for node in our_nodes(ir.load(path)):
        attrs = vars(OPS[node.op_type].attributes({key: a.value for key, a in node.attributes.items()}))
        said = tuple(
            f"{key}={round(x, 4) if isinstance(x, float) else x}" for key, x in attrs.items() if key not in FREE
        )
        found[node.op_type, tuple(value is not None for value in node.inputs), said] += 1
    return found


def both(folder, name):
    attention = models.FAMILIES[name].attentions[0]
    plain = exported(folder, name, "dynamo", 20, attention=attention, dtype=torch.float16)
    trimaran.rewrite_onnx(plain, folder / "rewritten.onnx")
    model, call = models.build(name, attention), models.inputs(name)
    trimaran.export_onnx(model, call, folder / "exported.onnx", opset=20, dtype=torch.float16, verify=False)
    return nodes_of(folder / "exported.onnx"), nodes_of(folder / "rewritten.onnx")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in models.FAMILIES]
)
def test_exporting_is_as_rewriting_the_plain_export(tmp_path, name):
    exported_nodes, rewritten_nodes = both(tmp_path, name)
    if name in DIFFERENCES:  # no longer one: take it out of the list
        assert exported_nodes != rewritten_nodes
        assert (
            sum(n for (op, *_), n in exported_nodes.items() if op == "attention")
            == models.FAMILIES[name].counts["attention"]
        )
        return
    assert exported_nodes == rewritten_nodes
