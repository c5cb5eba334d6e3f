"""What `trimaran soak` runs: on a GPU a node of layer_norm and one of attention, elsewhere an addition in their place,
since interpreting a kernel takes tens of milliseconds."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from trimaran.kernels.contract import expect_shape
from trimaran.kernels.layer_norm import layer_norm_reference
from trimaran.kernels.sizes import cdiv, product
from trimaran.ort_ops.domain import Domain
from trimaran.ort_ops.triton_op import triton_op

COLUMNS = 64
EPS = 1e-5


def same_shape(i: Any) -> tuple[Any, ...]:
    expect_shape("layer_norm", "residual", i.residual, i.x.shape, "the shape of x")
    return tuple(i.x.shape)


@triton_op(
    shapes={"sum": same_shape},
    grid=lambda i: (cdiv(product(i.x.shape), 4096),),
    values={"n": lambda i: product(i.x.shape), "BLOCK": 4096},
    name="layer_norm",
)
@triton.jit  # type: ignore[untyped-decorator]
def add(x_ptr, residual_ptr, sum_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x_ptr + at, mask=at < n) + tl.load(residual_ptr + at, mask=at < n)
    tl.store(sum_ptr + at, total, mask=at < n)


STAND_IN = Domain("soak", [add])


def model(cuda: bool) -> bytes:
    """sum = x + residual; on a GPU also attention over the four heads of its layer_norm."""
    from onnx import TensorProto, helper

    element = TensorProto.FLOAT16 if cuda else TensorProto.FLOAT
    names = ["x", "weight", "", "residual"] if cuda else ["x", "residual"]
    norm = helper.make_node("layer_norm", names, ["y", "sum"] if cuda else ["sum"], name="norm", domain="soak")
    attend = helper.make_node("attention", ["y", "y", "y"], ["out"], name="attend", domain="trimaran")
    if cuda:
        norm.domain = "trimaran"
        norm.attribute.append(helper.make_attribute("eps", EPS))
        attend.attribute.extend([helper.make_attribute("scale", 0.25), helper.make_attribute("num_heads", 4)])
    shape: list[str | int | None] = ["batch", "length", COLUMNS]
    shapes = {name: [COLUMNS] if name == "weight" else shape for name in names if name}
    graph = helper.make_graph(
        [norm, attend] if cuda else [norm],
        "soak",
        [helper.make_tensor_value_info(name, element, dims) for name, dims in shapes.items()],
        [helper.make_tensor_value_info(name, element, shape) for name in (["sum", "out"] if cuda else ["sum"])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(norm.domain, 1)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return made


def reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The model's outputs in fp64."""
    if weight is None:
        return [x + residual]
    y, total = layer_norm_reference(x, weight, None, residual, eps=EPS)
    heads = y.unflatten(-1, (4, -1)).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, scale=0.25)
    return [total, out.transpose(1, 2).flatten(2)]
