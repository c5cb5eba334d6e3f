"""Which kernel linear is launched with, and which tiles.

A configuration says what is launched:
    linear_many   has PINGPONG: persistent, on Hopper
    linear_few    has STAGES, and no PINGPONG: on Hopper; SPLIT parts of the depth, each by programs of its own
    linear_kernel any other; on any GPU
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimaran.kernels.configs import Row, lookup
from trimaran.kernels.contract import Device, Tensor
from trimaran.kernels.matmul import CONFIGS, whole_vectors
from trimaran.kernels.sizes import cdiv, product

PARTS = ("", "_1", "_2")  # of the names of weights and biases


def few(block_m: int, block_k: int, stages: int, split: int = 1) -> Mapping[str, int]:
    """For linear_few_kernel: 64 columns of the weight, `stages` blocks of the depth in the ring."""
    return {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": block_k, "STAGES": stages, "SPLIT": split}


def many(block_m: int, block_n: int, rest_n: int, stages: int, by_turns: bool) -> Mapping[str, int]:
    """For linear_many_kernel: tiles of block_n + rest_n columns."""
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "REST_N": rest_n, "BLOCK_K": 64}
    return {**tile, "STAGES": stages, "PINGPONG": int(by_turns)}


# On Hopper, in half precision, measured on an H200 (132 multiprocessors, Triton 3.6). tiles_16: how many tiles of 16
# rows and 64 columns there are, and so on: the smallest tiles that have a multiprocessor each are done soonest.
HOPPER: list[Row] = [
    ({"depth": 768, "tiles_16": 132}, few(16, 256, 3)),
    ({"depth": 768, "tiles_32": 132}, few(32, 256, 3)),
    ({"depth": 768, "tiles_64": 132}, few(64, 64, 12)),
    ({"depth": 1024, "tiles_16": 132}, few(16, 256, 4)),
    ({"depth": 1024, "tiles_32": 132}, few(32, 256, 4)),
    ({"depth": 3072, "tiles_16": 33, "weights": 1}, few(16, 256, 4, split=3)),
    ({"depth": 4096, "tiles_16": 33, "weights": 1}, few(16, 256, 4, split=4)),
    ({"tiles_16": 33, "weights": 1}, few(16, 128, 5, split=8)),
    ({"rows": 16}, few(16, 128, 6)),
    ({"depth": 3072, "tiles_32": 33, "weights": 1}, few(32, 256, 3, split=4)),
    ({"depth": 4096, "tiles_64": 33, "weights": 1}, few(64, 128, 6, split=4)),
    ({"depth": 4096, "tiles_64": 66, "weights": 1}, few(64, 128, 3, split=4)),
    ({"rows": 64, "tiles_64": 33, "weights": 1}, few(64, 128, 6, split=4)),
    ({"rows": 64}, few(64, 128, 6)),
    ({}, {}),  # then what `soonest` says
]


@dataclass(frozen=True)
class Tile:
    """A configuration, and what it takes, in ns: to start; for 64 of the depth of a tile in all multiprocessors; and to
    finish the tile, with a bias alone, with a residual, with an activation."""

    config: Mapping[str, int]
    start: int
    step: int
    finish: tuple[int, int, int]


# Fitted to 90 sizes on an H200 (Triton 3.6): the choice is 2 % slower than the best of them on average, 11 % at most.
TILES = [
    Tile(many(64, 64, 0, 8, by_turns=True), 2000, 156, (280, 400, 320)),
    Tile(many(64, 128, 0, 8, by_turns=True), 1700, 219, (460, 880, 920)),
    Tile(many(64, 128, 64, 6, by_turns=True), 1750, 293, (810, 1890, 1700)),
    Tile(many(128, 128, 0, 6, by_turns=True), 2260, 341, (650, 2660, 1930)),
    Tile(many(128, 128, 0, 6, by_turns=False), 910, 346, (1620, 2760, 3180)),
    Tile(many(128, 128, 64, 5, by_turns=False), 400, 496, (2930, 4270, 5000)),
    Tile(many(128, 128, 128, 4, by_turns=False), 90, 652, (3460, 4870, 6310)),
]


def weights_of(inputs: Any) -> list[tuple[str, Tensor | None, Tensor | None]]:
    """(suffix of the name, weight, bias) of each part."""
    return [(part, getattr(inputs, f"weight{part}"), getattr(inputs, f"bias{part}")) for part in PARTS]


def config_of(inputs: Any, width: Any, activation: str, transpose: bool, device: Device) -> Mapping[str, int]:
    """The configuration for these sizes; with DECLINE where the vendor's library is faster, which linear leaves it."""
    x = inputs.x
    weights = [weight for _, weight, _ in weights_of(inputs) if weight is not None]
    rows, depth = product(x.shape[:-1]), x.shape[-1]
    facts = {"rows": rows, "columns": width, "depth": depth, "weights": len(weights)}
    if device.capability != 90 or x.dtype == "float32" or not whole_vectors(x, weights):
        return lookup(CONFIGS, products=1, **facts)
    tiles = {f"tiles_{block}": cdiv(rows, block) * cdiv(width, 64) for block in (16, 32, 64)}
    if found := lookup(HOPPER, **facts, **tiles):
        return found
    after = 2 if activation != "none" else int(inputs.residual is not None)
    columns = [weight.shape[1 if transpose else 0] for weight in weights]
    found = soonest(rows, columns, depth, after, device)
    return {**found, "DECLINE": 1} if after == 0 and len(weights) == 1 else found


def soonest(rows: Any, columns: Sequence[Any], depth: Any, after: int, device: Device) -> Mapping[str, int]:
    """The configuration of the tiles that are done first. columns: of each weight; after: which of Tile.finish."""
    found, least = TILES[0], None
    for tile in TILES:
        width = tile.config["BLOCK_N"] + tile.config.get("REST_N", 0)
        tiles = cdiv(rows, tile.config["BLOCK_M"]) * sum(cdiv(own, width) for own in columns)
        waves = cdiv(tiles, device.sm_count)
        time = waves * (cdiv(depth, 64) * tile.step + tile.finish[after]) + tile.start
        if least is None or time < least:
            found, least = tile, time
    return found.config
