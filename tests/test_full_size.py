"""Models of full size, random weights, on a GPU: as right as before, and the kernels are really launched."""

import copy
from collections import Counter

import pytest
import torch
import transformers as hf

import trimaran

pytestmark = pytest.mark.gpu
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 32000, "head_dim": 64}  # fmt: skip


def bert():
    return hf.BertModel(hf.BertConfig()), tokens(8, 384, 30000), {"attention": 12, "linear": 25, "linear_norm": 24}


def t5():
    ids = tokens(4, 256, 32000)
    call = {**ids, "decoder_input_ids": ids["input_ids"][:, :64], "use_cache": False}
    return hf.T5Model(hf.T5Config(num_layers=12, d_model=768, d_ff=3072, num_heads=12)), call, {"attention": 36}


def llama():
    call = {**tokens(2, 512, 32000, "left"), "use_cache": False}
    counts = {"attention": 16, "rotary_embedding": 16, "gated_linear": 16, "linear_norm": 32}
    return hf.LlamaModel(hf.LlamaConfig(**LLAMA_1B)), call, counts


def vit():
    return hf.ViTModel(hf.ViTConfig()), {"pixel_values": torch.randn(8, 3, 224, 224, device="cuda")}, {"attention": 12}


def tokens(size, length, vocabulary, side="right"):
    ids = torch.randint(3, vocabulary, (size, length), device="cuda")
    lacking = torch.arange(size, device="cuda")[:, None] * (length // (2 * size))
    position = torch.arange(length, device="cuda")
    mask = position >= lacking if side == "left" else position < length - lacking
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [bert, t5, llama, vit], ids=lambda make: make.__name__)
def test_a_model(make, dtype):
    with torch.device("cuda"):
        model, call, counts = make()
    model = model.eval().to(dtype)
    half = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
    with torch.no_grad():
        wide = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in half.items()}
        exact = rows(copy.deepcopy(model).float()(**wide), call)
        eager = rows(model(**half), call)
    report = trimaran.optimize_model(model)
    ours = rows(model(**half), call)
    assert {name: report.replaced[name] for name in counts} == counts, report
    assert not report.near_misses, report
    assert rms(ours - exact) <= 1.25 * rms(eager - exact), (rms(ours - exact), rms(eager - exact))
    launched = kernels(model, half)
    assert sum(n for name, n in launched.items() if name.startswith("attention")) == counts["attention"], launched
    fallen = {reason for reason in report.fallbacks if reason.startswith("attention")}
    assert not fallen, report


@pytest.mark.parametrize("make", [bert, t5, llama, vit], ids=lambda make: make.__name__)
def test_under_autocast(make):
    """fp32 weights, residuals and norms; layers and attention in half precision."""
    with torch.device("cuda"):
        model, call, counts = make()
    model.eval()
    with torch.no_grad():
        exact = rows(model(**call), call)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            eager = rows(model(**call), call)
    report = trimaran.optimize_model(model)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = rows(model(**call), call)
        launched = kernels(model, call)
    assert {name: report.replaced[name] for name in counts} == counts, report
    assert not report.near_misses, report
    assert rms(ours - exact) <= 1.25 * rms(eager - exact), (rms(ours - exact), rms(eager - exact))
    assert sum(n for name, n in launched.items() if name.startswith("attention")) == counts["attention"], launched


def rows(output, call):
    """The last hidden states, of rows that are no padding."""
    states = output.last_hidden_state.float()
    mask = call.get("attention_mask")
    return states[mask.bool()] if mask is not None and mask.shape == states.shape[:2] else states


def rms(tensor):
    return tensor.double().square().mean().sqrt().item()


def kernels(model, call):
    for _ in range(2):
        model(**call)  # one of these is captured; what follows is a replay
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(**call)
        torch.cuda.synchronize()
    return Counter(event.name for event in profile.events() if event.name.endswith("_kernel"))
