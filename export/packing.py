"""What an exported graph takes over from the rules for files, as a file has no views and its weights are constants.

PyTorch's rules cut a wide layer's output into views, which cost nothing; in a file each cut would be a copy. So the
layers of an exported graph are joined as the rules for files join them: attention takes the wide output whole. Layer
scales go into their layers, and what norms and residuals these can take in then, go in too.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimaran.export.functions import our_nodes
from trimaran.export.onnx_graph import attribute, used
from trimaran.export.rules.attention import packed_source
from trimaran.export.rules.layer_scale import Scaled, check_scale, rewrite_scale
from trimaran.export.rules.linear import (
    check_linear_norm,
    check_residual,
    check_shared,
    rewrite_linear_norm,
    rewrite_residual,
    rewrite_shared,
)
from trimaran.export.shapes import infer


def pack(model: ir.Model) -> None:
    """Join the q, k and v layers of the model's attention nodes, in place, and take what is split apart whole."""
    infer(model.graph, model.opset_imports[""])
    fold_scales(model)
    for node in [node for node in our_nodes(model) if node.op_type == "attention"]:
        match = check_shared(node)
        if match is not None:
            rewrite_shared(node, match)
        elif attribute(node, "num_heads", 0) and node.inputs[1] is not None:
            whole = packed_source(list(node.inputs[:3]))
            if whole is not None:
                for index, value in enumerate((whole, None, None)):
                    node.replace_input_with(index, value)
    RemoveUnusedNodesPass()(model)


def fold_scales(model: ir.Model) -> None:
    """Layer scales into their layers."""
    layers = [node for node in our_nodes(model) if node.op_type == "linear"]
    matches = [(node, match) for node in layers if isinstance(match := check_scale(node), Scaled)]
    for node, match in matches:
        rewrite_scale(node, match)
    if not matches:
        return
    for node in [node for node in our_nodes(model) if node.op_type in ("layer_norm", "rms_norm")]:
        if (joined := check_linear_norm(node)) is not None:
            rewrite_linear_norm(node, joined)
    for node in [node for node in our_nodes(model) if node.op_type == "linear"]:
        if used(node.outputs[0]) and (residual := check_residual(node)) is not None:
            rewrite_residual(node, residual)
