"""q, k and v that lie side by side are read there.

PyTorch's rules cut a wide layer's output into views, which cost nothing; in a file each cut would be a copy. So the
layers of an exported graph are joined as the rules for files join them: attention takes the wide output whole.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimaran.export.functions import our_nodes
from trimaran.export.onnx_graph import attribute
from trimaran.export.rules.attention import packed_source
from trimaran.export.rules.linear import check_shared, rewrite_shared
from trimaran.export.shapes import infer


def pack(model: ir.Model) -> None:
    """Join the q, k and v layers of the model's attention nodes, in place, and take what is split apart whole."""
    infer(model.graph, model.opset_imports[""])
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
