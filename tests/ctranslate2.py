"""Whisper's weights from a model of CTranslate2, binary version 6: name, shape, dtype, bytes of one after another."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

DTYPES = ("<f4", "i1", "<i2", "<i4", "<f2")
NAMES = (  # of CTranslate2, of transformers; a + stands between parts that lie in one weight
    (r"/(gamma|encodings)$", "/weight"),
    (r"/beta$", "/bias"),
    (r"/layer_(\d)/", r"/layers/\1/"),
    (r"position_encodings", "embed_positions"),
    (r"embeddings", "embed_tokens"),
    (r"ffn/layer_norm", "final_layer_norm"),
    (r"ffn/linear_0", "fc1"),
    (r"ffn/linear_1", "fc2"),
    (r"self_attention/layer_norm", "self_attn_layer_norm"),
    (r"self_attention/linear_0", "self_attn/q_proj+k_proj+v_proj"),
    (r"self_attention/linear_1", "self_attn/out_proj"),
    (r"attention/layer_norm", "encoder_attn_layer_norm"),
    (r"attention/linear_0", "encoder_attn/q_proj"),
    (r"attention/linear_1", "encoder_attn/k_proj+v_proj"),
    (r"attention/linear_2", "encoder_attn/out_proj"),
)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    data, at, found = path.read_bytes(), 0, {}

    def take(form: str) -> tuple:
        nonlocal at
        at += struct.calcsize(f"<{form}")
        return struct.unpack_from(f"<{form}", data, at - struct.calcsize(f"<{form}"))

    def text() -> str:
        return take(f"{take('H')[0]}s")[0].rstrip(b"\0").decode()

    assert (take("I")[0], text()) == (6, "WhisperSpec")
    for _ in range(take("II")[1]):
        name, (rank,) = text(), take("B")
        shape, (kind, size) = take(f"{rank}I"), take("BI")
        array = np.frombuffer(take(f"{size}s")[0], DTYPES[kind]).reshape(shape)
        found[name] = torch.from_numpy(array.astype("f4"))
    return found


def whisper(path: Path, config: WhisperConfig) -> WhisperForConditionalGeneration:
    """The model with these weights. CTranslate2 keeps a bias of zeros for k, which transformers has not."""
    model, state = WhisperForConditionalGeneration(config), {}
    for name, tensor in read_tensors(path).items():
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        *place, parts, leaf = name.split("/")
        if leaf in ("weight", "bias"):
            pieces = zip(parts.split("+"), tensor.chunk(parts.count("+") + 1), strict=True)
            state |= {".".join(["model", *place, part, leaf]): piece for part, piece in pieces}
    state = {key: tensor for key, tensor in state.items() if not key.endswith("k_proj.bias")}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()
