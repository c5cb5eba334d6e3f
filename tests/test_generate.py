"""generate() on an optimized model: the same tokens, from every kind of cache."""

import pytest
import torch
from models import DECODER, MARKS, T5, WHISPER
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import trimaran

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MODELS = {
    "t5": (T5ForConditionalGeneration, T5Config, T5),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **MARKS},
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, DECODER),
    "whisper": (WhisperForConditionalGeneration, WhisperConfig, WHISPER),
}
ATTENTIONS = {"t5": 4, "gpt2": 2, "llama": 2, "whisper": 4}  # of a decoding step
EVERY = [(name, cache, beams) for name in MODELS for cache in ("dynamic", "static") for beams in (1, 3)]
CHOSEN = [("t5", "dynamic", 3), ("gpt2", "static", 1), ("llama", "dynamic", 1), ("whisper", "static", 3)]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in CHOSEN else pytest.mark.slow) for case in EVERY],
    ids=lambda case: "-".join(map(str, case)),
)
def test_the_same_tokens(case):
    name, cache, beams = case
    model, call = build(name), prompt(name)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    if cache == "static":
        options["cache_implementation"] = "static"
    expected = model.generate(**call, **options)
    report = trimaran.optimize_model(model)
    assert torch.equal(model.generate(**call, **options), expected)
    decoding = [graph for graph in report.graphs if graph.replaced["attention"] == ATTENTIONS[name]]
    assert len(decoding) >= 2, report
    assert not [miss for graph in report.graphs for miss in graph.near_misses], report
    assert not report.fallbacks
    assert not report.graph_breaks


def test_the_encoder_that_generate_calls_is_optimized_and_restored():
    model, call = build("t5"), prompt("t5")
    report = trimaran.optimize_model(model)
    model.get_encoder()(**call)
    assert report.replaced == {"attention": 2, "linear": 4, "linear_norm": 4, "rms_norm": 1}
    trimaran.restore(model)
    assert all(module._compiled_call_impl is None for module in model.modules())


def build(name):
    torch.manual_seed(0)
    model, config, sizes = MODELS[name]
    return model(config(**sizes)).eval()


def prompt(name):
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator)}
    mask = torch.arange(5) >= torch.tensor([[0], [2]])
    return {"input_ids": torch.randint(3, 50, (2, 5), generator=generator), "attention_mask": mask.long()}
