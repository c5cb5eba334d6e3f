"""Architectures that no rule was written for: as right as before, and what is left alone has its reason."""

import pytest
import torch
import transformers as hf
from models import DECODER, MARKS, SIZES, VISION, padding, tensors

import trimaran
from trimaran.torch_path import optimize
from trimaran.torch_path.ops import TORCH_OPS

pytestmark = pytest.mark.usefixtures("fresh_compiler")
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, **MARKS}
PARTIAL = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}, **MARKS}
BART = {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **MARKS}  # fmt: skip
GATED = {"attention": 2, "gated_linear": 2, "linear": 2, "linear_norm": 4, "rms_norm": 1, "rotary_embedding": 2}

# name: (configuration's class, its sizes, its inputs, what is replaced)
MODELS = {
    "GPTJModel": (hf.GPTJConfig, {**GPT, "rotary_dim": 4}, "decoder",
                  {"attention": 2, "layer_norm": 3, "linear": 8, "rotary_embedding": 2}),
    "CodeGenModel": (hf.CodeGenConfig, {**GPT, "n_ctx": 64, "rotary_dim": 4}, "decoder",
                     {"attention": 2, "layer_norm": 3, "linear": 8, "rotary_embedding": 2}),
    "GPTNeoXModel": (hf.GPTNeoXConfig, {**SIZES, **PARTIAL}, "decoder",
                     {"attention": 2, "layer_norm": 5, "linear": 8, "rotary_embedding": 2}),
    "PhiModel": (hf.PhiConfig, {**SIZES, **PARTIAL}, "decoder",
                 {"attention": 2, "layer_norm": 3, "linear": 8, "rotary_embedding": 2}),
    "Phi3Model": (hf.Phi3Config, DECODER, "decoder", GATED),
    "GlmModel": (hf.GlmConfig, {**DECODER, "head_dim": 8}, "decoder", GATED),
    "CohereModel": (hf.CohereConfig, DECODER, "decoder",
                    {"attention": 2, "gated_linear": 2, "layer_norm": 1, "linear": 4, "linear_norm": 2,
                     "rotary_embedding": 2}),
    "Olmo2Model": (hf.Olmo2Config, DECODER, "decoder", {**GATED, "rms_norm": 5}),
    "GraniteModel": (hf.GraniteConfig, DECODER, "decoder", GATED),
    "MixtralModel": (hf.MixtralConfig, {**DECODER, "num_local_experts": 4}, "decoder",
                     {"attention": 2, "linear": 4, "linear_norm": 2, "rms_norm": 3, "rotary_embedding": 2}),
    "FalconModel": (hf.FalconConfig, {**SIZES, **MARKS}, "decoder",
                    {"attention": 2, "layer_norm": 3, "linear": 8, "rotary_embedding": 2}),
    "BloomModel": (hf.BloomConfig, {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4, **MARKS}, "decoder",
                   {"attention": 2, "layer_norm": 2, "linear": 4, "linear_norm": 4}),
    "BartModel": (hf.BartConfig, BART, "pairs", {"attention": 6, "layer_norm": 2, "linear": 12, "linear_norm": 10}),
    "RoFormerModel": (hf.RoFormerConfig, SIZES, "text",
                      {"attention": 2, "layer_norm": 1, "linear": 4, "linear_norm": 4, "rotary_embedding": 2}),
    "XLNetModel": (hf.XLNetConfig, {"vocab_size": 50, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "text",
                   {"attention": 2, "layer_norm": 2, "linear": 2, "linear_norm": 2}),
    "SwinModel": (hf.SwinConfig, {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
                                  "num_heads": [2, 4], "window_size": 4}, "image",
                  {"attention": 4, "layer_norm": 8, "linear": 14, "linear_norm": 3}),
    "BeitModel": (hf.BeitConfig, {**VISION, "use_relative_position_bias": True}, "image",
                  {"attention": 2, "layer_norm": 5, "linear": 8}),
    "MobileBertModel": (hf.MobileBertConfig, {**SIZES, "embedding_size": 16, "intra_bottleneck_size": 16}, "text",
                        {"attention": 2, "linear": 30}),
}  # fmt: skip
# Where attention is of another kind: the reason that the report gives, or what it says of the pieces
OTHERWISE = {
    "GptOssModel": (hf.GptOssConfig, {**DECODER, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
                    "decoder", "its weights go through aten.slice.Tensor before they are multiplied with values"),
    "LongformerModel": (hf.LongformerConfig, {**SIZES, "attention_window": 4}, "text",
                        "graph break: Unsupported Tensor.item"),
    "DebertaModel": (hf.DebertaConfig, {**SIZES, "relative_attention": True, "pos_att_type": "p2c|c2p"}, "text",
                     "graph break: Unsupported Tensor.item"),
}  # fmt: skip
QUICK = {"GPTJModel", "PhiModel", "CohereModel", "FalconModel", "XLNetModel", "LongformerModel"}


def cases(table):
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in table]


def optimized(name, config, sizes, kind):
    """The report of a random model whose outputs are the same before and after."""
    torch.manual_seed(0)
    model = getattr(hf, name)(config(**sizes)).eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 50, (3, 8), generator=generator)
    call = {"input_ids": ids, "attention_mask": padding(3, 8, "right")}
    if kind == "image":
        call = {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    if kind == "pairs":
        call["decoder_input_ids"] = ids[:, :5]
    if kind in ("pairs", "decoder"):
        call["use_cache"] = False
    with torch.no_grad():
        before = tensors(model(**call), call)
    report = trimaran.optimize_model(model)
    for ours, expected in zip(tensors(model(**call), call), before, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item())
    assert not report.fallbacks, report
    return report


@pytest.mark.parametrize("name", cases(MODELS))
def test_a_model(name):
    report = optimized(name, *MODELS[name][:3])
    assert report.replaced == MODELS[name][3], report
    assert not report.near_misses, report
    assert not report.graph_breaks, report


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["GPTJModel", "CodeGenModel"])
def test_queries_and_keys_in_fp32(name, dtype):
    """Of models in half precision, which multiply them so."""
    config, sizes, *_ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(hf, name)(config(**sizes)).eval().to(dtype)
    call = {"input_ids": torch.arange(3, 27).view(3, 8), "attention_mask": padding(3, 8, "right"), "use_cache": False}
    with torch.no_grad():
        before = tensors(model(**call), call)[0]
    report = trimaran.optimize_model(model)
    torch.testing.assert_close(tensors(model(**call), call)[0], before, rtol=0.03, atol=0.03)
    assert report.replaced == MODELS[name][3], report


@pytest.mark.parametrize("name", cases(OTHERWISE))
def test_a_model_whose_attention_is_another(name):
    report = optimized(name, *OTHERWISE[name][:3])
    assert OTHERWISE[name][3] in str(report)
    assert sum(graph.replaced["linear"] + graph.replaced["linear_norm"] for graph in report.graphs) >= 4, report
    assert not sum(graph.replaced["attention"] for graph in report.graphs)


def masks_of(kind):
    """(key_padding_mask, attn_mask) of nn.MultiheadAttention: two rows that are shorter, and every query's past."""
    hidden, future = padding(3, 8, "right") == 0, torch.ones(8, 8).triu(1).bool()
    if kind == "bool":
        return hidden, future
    return [torch.zeros(mask.shape).masked_fill(mask, float("-inf")) for mask in (hidden, future)]


class Pool(torch.nn.Module):
    """Attention whose weights nobody uses, though they may be asked for."""

    def __init__(self, weights):
        super().__init__()
        self.attention, self.weights = torch.nn.MultiheadAttention(32, 4, batch_first=True), weights

    def forward(self, x, hidden, future):
        return self.attention(x, x, x, key_padding_mask=hidden, attn_mask=future, need_weights=self.weights)[0]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_multi_head_attention_with_two_masks(kind, weights):
    torch.manual_seed(0)
    model = Pool(weights).eval()
    call = (torch.randn(3, 8, 32), *masks_of(kind))
    with torch.no_grad():
        before = model(*call)
    report = trimaran.optimize_model(model)
    torch.testing.assert_close(model(*call), before, rtol=1e-5, atol=2e-6 * before.abs().max().item())
    assert report.replaced == {"attention": 1, "linear": 2}, report
    assert not report.near_misses, report
    assert not report.fallbacks, report


def test_t5_builds_its_position_bias_once(monkeypatch):
    """Whatever the layers: one embedding of relative positions, and one bias that all attentions take."""
    seen, rewrite = [], optimize.rewrite

    def watched(module, rules):
        found = rewrite(module, rules)
        seen.append(module.graph)
        return found

    monkeypatch.setattr(optimize, "rewrite", watched)
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4}
    model = hf.T5EncoderModel(hf.T5Config(**sizes)).eval()
    report = trimaran.optimize_model(model)
    ids = torch.arange(3, 27).view(3, 8)
    model(input_ids=ids, attention_mask=padding(3, 8, "right"))
    assert report.replaced["attention"] == 4, report
    [graph] = seen
    op = TORCH_OPS["attention"]
    at = [port.name for port in op.op.inputs].index("bias")
    biases = {node.args[at] for node in graph.nodes if node.target is op.overload}
    assert len(biases) == 1
    assert None not in biases
    targets = [getattr(node.target, "_opname", "") for node in graph.nodes]
    assert targets.count("embedding") == 2, "of tokens, and of relative positions"
    assert targets.count("log") == 1, "of the distances that share buckets"
