"""How linear is launched, and what each argument is. linear_norm builds on it; `linear_configs` has the tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from trimaran.kernels.contract import Device, Divisible, Launch, Scratch, Tensor
from trimaran.kernels.dependent import dependent
from trimaran.kernels.linear_configs import PARTS, config_of, weights_of
from trimaran.kernels.linear_few import linear_few_kernel
from trimaran.kernels.linear_many import linear_many_kernel, weight_blocks, x_blocks
from trimaran.kernels.linear_tiles import linear_kernel, sum_kernel
from trimaran.kernels.matmul import check_device, check_vectors, matrix_rows, weight_rows
from trimaran.kernels.sizes import cdiv, minimum, product

SUM_BLOCK = 256  # columns that a program of sum_kernel takes


def launches(inputs: Any, out: Tensor | Scratch, width: Any, attrs: Any, device: Device) -> list[Launch]:
    """The launches that write [rows, width] to `out`. Decline for what no kernel takes."""
    check_device("linear", device, product(inputs.x.shape[:-1]))
    check_vectors(inputs, "bias", "bias_1", "bias_2")
    config = config_of(inputs, width, attrs.activation, attrs.transpose_weight, device)
    split = config.get("SPLIT", 1) if inputs.weight_1 is None else 1
    if split == 1:
        return [tile_launch(inputs, out, attrs.activation, attrs.transpose_weight, config, device)]
    parts = Scratch("float32", product(inputs.x.shape[:-1]) * width * split)
    return [
        tile_launch(bare(inputs), parts, "none", attrs.transpose_weight, config, device, split),
        sum_launch(inputs, parts, out, width, attrs, device, split),
    ]


def sum_launch(
    inputs: Any, parts: Scratch, out: Tensor | Scratch, width: Any, attrs: Any, device: Device, split: int
) -> Launch:
    """The launch that adds the sums of the parts of the depth, in their order, and does what follows."""
    rows, pdl = product(inputs.x.shape[:-1]), dependent(device)
    return Launch(
        sum_kernel,
        grid=(rows, cdiv(width, SUM_BLOCK)),
        args={
            "parts_ptr": parts,
            "bias_ptr": inputs.bias,
            "residual_ptr": inputs.residual,
            "stride_residual": residual_rows(inputs.residual),
            "out_ptr": out,
            "rows": rows,
            "width": Divisible(width),
        },
        constexprs={
            "ACTIVATION": attrs.activation,
            "SPLIT": split,
            "PDL": pdl,
            "EARLY": pdl and constant(inputs.bias),
            "BLOCK": SUM_BLOCK,
        },
        options={"num_warps": 2, "launch_pdl": pdl},
    )


def constant(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.constant


def residual_rows(residual: Tensor | None) -> Divisible:
    return Divisible(0 if residual is None else matrix_rows("residual", residual))


def bare(inputs: Any) -> SimpleNamespace:
    """x and its one weight, without what follows the product."""
    absent = dict.fromkeys(
        ("bias", "residual", *(f"{name}{part}" for part in PARTS[1:] for name in ("weight", "bias")))
    )
    return SimpleNamespace(x=inputs.x, weight=inputs.weight, **absent)


def tile_launch(
    inputs: Any,
    out: Tensor | Scratch,
    activation: str,
    transpose: bool,
    config: Mapping[str, int],
    device: Device,
    split: int = 1,
) -> Launch:
    """The launch of the products; where the depth is split, `out` takes the sums of its parts."""
    rows, depth, pdl = product(inputs.x.shape[:-1]), inputs.x.shape[-1], dependent(device)
    weights = [weight for _, weight, _ in weights_of(inputs)]
    early = pdl and all(map(constant, weights))
    blocks = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    axis = 1 if transpose else 0
    columns = [0 if weight is None else weight.shape[axis] for weight in weights]
    tile_n = blocks["BLOCK_N"] + config.get("REST_N", 0)
    tiles: Any = sum(cdiv(rows, blocks["BLOCK_M"]) * cdiv(n, tile_n) for n in columns)
    args = arguments(inputs, out, columns)
    constexprs = {
        "ACTIVATION": activation,
        "TRANSPOSE": transpose,
        "PDL": pdl,
        "GROUP": config.get("GROUP", 8),
        **blocks,
    }
    options = {"num_warps": config.get("num_warps", 4), "num_stages": config.get("num_stages", 1), "launch_pdl": pdl}
    if "PINGPONG" in config:
        rest_n = config["REST_N"]
        rings = {"PINGPONG": bool(config["PINGPONG"]), "STAGES": config["STAGES"], "REST_N": rest_n, "EARLY": early}
        described: dict[str, Any] = {"x_desc": x_blocks(inputs.x, config)}
        for part, weight in zip(PARTS, weights, strict=True):
            described[f"weight{part}_desc"] = weight_blocks(weight, blocks["BLOCK_N"], config, transpose)
            described[f"rest{part}_desc"] = weight_blocks(weight, rest_n, config, transpose)
        args = {name: args[name] for name in linear_many_kernel.arg_names if name in args}
        programs = minimum(tiles, device.sm_count)
        return Launch(linear_many_kernel, (programs,), args | described, constexprs | rings, options)
    constexprs["SPLIT"] = split
    if "STAGES" in config:
        rings = {
            "STAGES": config["STAGES"],
            "WHOLE": bool(depth <= split * config["STAGES"] * blocks["BLOCK_K"]),
            "EARLY": early,
        }
        return Launch(linear_few_kernel, (tiles, split), args, constexprs | rings, options)
    constexprs["EVEN"] = bool(depth % blocks["BLOCK_K"] == 0)
    return Launch(linear_kernel, (tiles, split), args, constexprs, options)


def arguments(inputs: Any, out: Tensor | Scratch, columns: Sequence[Any]) -> dict[str, Any]:
    """What all three kernels take. columns: of each weight, 0 where there is none."""
    args: dict[str, Any] = {
        "x_ptr": inputs.x,
        "residual_ptr": inputs.residual,
        "out_ptr": out,
        "stride_x": Divisible(matrix_rows("x", inputs.x)),
        "stride_residual": residual_rows(inputs.residual),
        "rows": product(inputs.x.shape[:-1]),
        "width": Divisible(sum(columns)),
        "depth": Divisible(inputs.x.shape[-1]),
    }
    for (part, weight, bias), own in zip(weights_of(inputs), columns, strict=True):
        args |= {
            f"weight{part}_ptr": weight,
            f"bias{part}_ptr": bias,
            f"stride_weight{part}": Divisible(weight_rows(f"weight{part}", weight)),
            f"columns{part}": Divisible(own),
        }
    return args
