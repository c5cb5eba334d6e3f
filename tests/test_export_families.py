"""export_onnx over the families: every fusion that PyTorch gets, at every opset, in every dtype; verified at batch 1
and 7 as a part of it."""

import models
import pytest
import torch

import trimaran

# What a file has otherwise than its optimized model, and why.
CLAMPED = "in fp16 the model clamps infinities between a layer and the next norm, so they are not joined"
SCALED = "layer scales go into the weights of a file, and the norm after them into the layer"
IN_WEIGHTS = {"attention": 2, "layer_norm": 1, "linear": 4, "linear_norm": 4}
DIFFERENCES = {
    ("dinov2", torch.float16): (IN_WEIGHTS, SCALED),
    ("dinov2", torch.bfloat16): (IN_WEIGHTS, SCALED),
    ("whisper", torch.float16): ({"attention": 6, "layer_norm": 4, "linear": 14, "linear_norm": 8}, CLAMPED),
    ("t5", torch.float16): ({"attention": 6, "linear": 18, "rms_norm": 12}, CLAMPED),
    ("t5-encoder", torch.float16): ({"attention": 2, "linear": 6, "rms_norm": 5}, CLAMPED),
    ("t5-gated", torch.float16): (
        {"attention": 6, "gated_linear": 4, "linear": 14, "rms_norm": 12},
        CLAMPED,
    ),
}
# Layers that PyTorch's rules join and a file keeps apart, as cutting the wide output would cost a copy: k and v of an
# encoder, q and k that are normed before they are used.
APART = {"t5": 2, "t5-gated": 2, "whisper": 2, "qwen3": 4, "gemma3": 4, "deberta-v2": 6}
IN_FP32 = ("attention", "layer_norm", "rms_norm", "rotary_embedding")
QUICK = [
    ("deberta-v2", "eager", 18, torch.float16),
    ("llama", "sdpa", 23, torch.float16),
    ("gemma2", "eager", 20, torch.bfloat16),
    ("whisper", "sdpa", 20, torch.float32),
]
ALL = [
    (name, attention, opset, dtype)
    for number, (name, family) in enumerate(models.FAMILIES.items())
    for attention in family.attentions
    for opset in (18, 20, 23, 24)
    for dtype in ((torch.float16, torch.bfloat16, torch.float32)[(number + opset) % 3],)
]


def export_and_count(path, name, attention, opset, dtype):
    model, call = models.build(name, attention), models.inputs(name)
    report = trimaran.export_onnx(model, call, path, opset=opset, dtype=dtype)
    expected, _ = DIFFERENCES.get((name, dtype), (models.FAMILIES[name].counts, ""))
    expected = {**expected, "linear": expected["linear"] + APART.get(name, 0)}
    if dtype is torch.float32:
        joined = {"layer": "layer_norm", "rms": "rms_norm"}["rms" if "rms_norm" in expected else "layer"]
        alone = {op: count for op, count in expected.items() if op in IN_FP32}
        expected = {**alone, joined: alone.get(joined, 0) + expected.get("linear_norm", 0)}
    assert report.replaced == expected
    assert "at batch 1 and 7 too" in report.verified


@pytest.mark.parametrize(("name", "attention", "opset", "dtype"), QUICK)
def test_a_few_families(tmp_path, name, attention, opset, dtype):
    export_and_count(tmp_path / "m.onnx", name, attention, opset, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention", "opset", "dtype"), ALL)
def test_every_family(tmp_path, name, attention, opset, dtype):
    export_and_count(tmp_path / "m.onnx", name, attention, opset, dtype)
