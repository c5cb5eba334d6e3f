"""How linear is launched: which kernel, which tile, and what each argument is. linear_norm builds on it.

A row of the tables says where it holds and what is launched there:
    linear_many   has PINGPONG: persistent, on Hopper
    linear_few    has STAGES, and no PINGPONG: on Hopper; SPLIT parts of the depth, each by programs of its own
    linear_kernel any other; on any GPU
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from trimaran.kernels.configs import Row, lookup
from trimaran.kernels.contract import Device, Divisible, Launch, Scratch, Tensor
from trimaran.kernels.dependent import dependent
from trimaran.kernels.linear_few import linear_few_kernel
from trimaran.kernels.linear_many import linear_many_kernel
from trimaran.kernels.linear_tiles import linear_kernel, sum_kernel
from trimaran.kernels.matmul import CONFIGS, check_device, check_vectors, matrix_rows, weight_rows, whole_vectors
from trimaran.kernels.sizes import cdiv, maximum, minimum, product

SUM_BLOCK = 256  # columns that a program of sum_kernel takes
PARTS = ("", "_1", "_2")  # of the names of weights and biases


def few(block_m: int, block_k: int, stages: int, split: int = 1) -> Mapping[str, int]:
    """A row for linear_few_kernel: 64 columns of the weight, `stages` blocks of the depth in the ring."""
    return {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": block_k, "STAGES": stages, "SPLIT": split}


def many(block_m: int, rest_n: int, stages: int, by_turns: bool) -> Mapping[str, int]:
    """A row for linear_many_kernel: tiles of 128 + rest_n columns."""
    tile = {"BLOCK_M": block_m, "BLOCK_N": 128, "REST_N": rest_n, "BLOCK_K": 64}
    return {**tile, "STAGES": stages, "PINGPONG": int(by_turns)}


def declined(config: Mapping[str, int]) -> Mapping[str, int]:
    """A row where the vendor's library is faster: linear leaves it, linear_norm takes this."""
    return {**config, "DECLINE": 1}


# On Hopper, in half precision, measured on an H200 (132 multiprocessors, Triton 3.6). tiles_16: how many tiles of 16
# rows and 64 columns there are, and so on: the smallest tiles that have a multiprocessor each are done soonest.
# waste_128_192: percent of what the GPU could compute in as many waves of such tiles as it takes, and does not. after:
# 0 where nothing follows the bias, 1 where a residual does, 2 where an activation does.
HOPPER: list[Row] = [
    ({"depth": 768, "tiles_16": 132}, few(16, 256, 3)),
    ({"depth": 768, "tiles_32": 132}, few(32, 256, 3)),
    ({"depth": 768, "tiles_64": 132}, few(64, 64, 12)),
    ({"depth": 1024, "tiles_16": 132}, few(16, 256, 4)),
    ({"depth": 1024, "tiles_32": 132}, few(32, 256, 4)),
    ({"depth": 3072, "tiles_16": 33, "weights": 1}, few(16, 256, 3, split=4)),
    ({"depth": 4096, "tiles_16": 33, "weights": 1}, few(16, 256, 4, split=4)),
    ({"tiles_16": 33, "weights": 1}, few(16, 128, 5, split=8)),
    ({"rows": 16}, few(16, 128, 6)),
    ({"depth": 3072, "tiles_32": 33, "weights": 1}, few(32, 256, 3, split=4)),
    ({"depth": 4096, "tiles_64": 33, "weights": 1}, few(64, 128, 6, split=4)),
    ({"depth": 4096, "tiles_64": 66, "weights": 1}, few(64, 128, 3, split=4)),
    ({"rows": 64, "tiles_64": 33, "weights": 1}, few(64, 128, 6, split=4)),
    ({"rows": 64}, few(64, 128, 6)),
    ({"after": 0, "weights": 1}, declined(many(128, 0, 6, by_turns=True))),
    ({"rows": 256, "depth": 1024, "tiles_64": 264}, few(64, 128, 3)),
    ({"rows": 1024, "depth": 1024}, many(64, 0, 6, by_turns=True)),
    ({"rows": 1024, "after": 1, "weights": 1}, declined(many(64, 0, 6, by_turns=True))),
    ({"after": 1, "weights": 1, "waste_128_192": 5}, many(128, 64, 5, by_turns=False)),
    ({"after": 1, "weights": 1, "waste_64_192": 5, "rows": 2048}, many(64, 64, 6, by_turns=True)),
    ({"after": 1, "weights": 1, "waste_128_128": 6, "depth": 4096}, many(128, 0, 6, by_turns=True)),
    ({"after": 1, "weights": 1}, declined(many(128, 64, 5, by_turns=False))),
    ({}, many(128, 0, 6, by_turns=True)),
]


def weights_of(inputs: Any) -> list[tuple[str, Tensor | None, Tensor | None]]:
    """(suffix of the name, weight, bias) of each part."""
    return [(part, getattr(inputs, f"weight{part}"), getattr(inputs, f"bias{part}")) for part in PARTS]


def config_of(inputs: Any, width: Any, activation: str, device: Device) -> Mapping[str, int]:
    """The row of the tables for these sizes."""
    x = inputs.x
    weights = [weight for _, weight, _ in weights_of(inputs) if weight is not None]
    rows = product(x.shape[:-1])
    facts = {"rows": rows, "columns": width, "depth": x.shape[-1], "weights": len(weights)}
    if device.capability != 90 or x.dtype == "float32" or not whole_vectors(x, weights):
        return lookup(CONFIGS, products=1, **facts)
    after = 2 if activation != "none" else int(inputs.residual is not None)
    tiles = {f"tiles_{block}": cdiv(rows, block) * cdiv(width, 64) for block in (16, 32, 64)}
    waste = {f"waste_{m}_{n}": wasted(rows, width, m, n, device) for m, n in ((128, 192), (64, 192), (128, 128))}
    return lookup(HOPPER, after=after, **facts, **tiles, **waste)


def wasted(rows: Any, columns: Any, block_m: int, block_n: int, device: Device) -> Any:
    """Percent of the waves of such tiles that compute nothing."""
    waves = cdiv(cdiv(rows, block_m) * cdiv(columns, block_n), device.sm_count)
    return 100 - rows * columns * 100 // maximum(waves * (device.sm_count * block_m * block_n), 1)


def launches(inputs: Any, out: Tensor | Scratch, width: Any, attrs: Any, device: Device) -> list[Launch]:
    """The launches that write [rows, width] to `out`. Decline for what no kernel takes."""
    check_device("linear", device, product(inputs.x.shape[:-1]))
    check_vectors(inputs, "bias", "bias_1", "bias_2")
    config = config_of(inputs, width, attrs.activation, device)
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
    blocks = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    axis = 1 if transpose else 0
    columns = [0 if weight is None else weight.shape[axis] for _, weight, _ in weights_of(inputs)]
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
        rings = {"PINGPONG": bool(config["PINGPONG"]), "STAGES": config["STAGES"], "REST_N": config["REST_N"]}
        return Launch(linear_many_kernel, (minimum(tiles, device.sm_count),), args, constexprs | rings, options)
    constexprs["SPLIT"] = split
    if "STAGES" in config:
        rings = {
            "STAGES": config["STAGES"],
            "WHOLE": bool(depth <= split * config["STAGES"] * blocks["BLOCK_K"]),
            "EARLY": pdl and all(constant(weight) for _, weight, _ in weights_of(inputs)),
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
