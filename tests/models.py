"""Tiny random models of every usual family, their inputs, and how many of each op they hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
      "eos_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
          "image_size": 16, "patch_size": 8}  # fmt: skip
DEBERTA = {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
           "pos_att_type": "p2c|c2p", "position_biased_input": False, "max_relative_positions": -1}  # fmt: skip
GEMMA = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WHISPER = {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
           "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1, "suppress_tokens": [],
           "begin_suppress_tokens": [], **MARKS}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """kind: what its inputs are. counts: the ops of a whole model. attentions: the implementations it has."""

    build: Callable[[str], nn.Module]
    counts: dict[str, int]
    kind: str = "text"
    attentions: tuple[str, ...] = ("sdpa", "eager")


def family(model: Any, config: Any, sizes: dict[str, Any], kind: str = "text", **counts: int) -> Family:
    attentions = ("sdpa", "eager") if getattr(model, "_supports_sdpa", False) else ("eager",)

    def build(attention: str) -> nn.Module:
        return model(config(**sizes, attn_implementation=attention))

    return Family(build, counts, kind, attentions)


class Attention(nn.Module):
    """As timm and many others write it: a fused projection, reshaped, permuted and taken apart."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention, self.qkv, self.proj = attention, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.attention == "sdpa":
            x = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * (c // 4) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(32, eps=1e-6), nn.LayerNorm(32, eps=1e-6), Attention(attention)
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmLike(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 32))
        self.blocks, self.norm = nn.Sequential(Block(attention), Block(attention)), nn.LayerNorm(32, eps=1e-6)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)))[:, 0]


class Plain(nn.Module):
    """A decoder as people write it by hand: masks of their own making, rotary-free, post-norm."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(50, 32), attention
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(32, 32) for name in "qkvo"} | {"norm": nn.RMSNorm(32)}) for _ in range(2)
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        length = x.shape[1]
        mask = torch.tril(torch.ones(length, length, dtype=torch.bool, device=x.device))[None, None]
        if attention_mask is not None:
            mask = mask & (attention_mask[:, None, None] != 0)
        for layer in self.layers:
            q, k, v = (layer[name](x).view(*x.shape[:2], 4, 8).transpose(1, 2) for name in "qkv")
            if self.attention == "sdpa":
                y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            else:
                scores = torch.matmul(q, k.transpose(-1, -2)) / 8**0.5
                y = torch.matmul(scores.masked_fill(mask == 0, -1e9).softmax(-1), v)
            x = layer["norm"](x + layer["o"](y.transpose(1, 2).reshape(x.shape)))
        return x


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder; `eager` asks nn.MultiheadAttention for its weights, which are not used."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.attention = attention
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pool = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = None if attention_mask is None else attention_mask == 0
        x = self.encoder(self.embed(input_ids), src_key_padding_mask=hidden)
        return self.pool(x, x, x, key_padding_mask=hidden, need_weights=self.attention == "eager")[0]


FAMILIES: dict[str, Family] = {
    "bert": family(hf.BertModel, hf.BertConfig, SIZES, attention=2, layer_norm=1, linear=5, linear_norm=4),
    "bert-classes": family(
        hf.BertForSequenceClassification, hf.BertConfig, SIZES, attention=2, layer_norm=1, linear=6, linear_norm=4
    ),
    "roberta": family(hf.RobertaModel, hf.RobertaConfig, SIZES, attention=2, layer_norm=1, linear=5, linear_norm=4),
    "xlm-roberta-tokens": family(
        hf.XLMRobertaForTokenClassification,
        hf.XLMRobertaConfig,
        SIZES,
        attention=2,
        layer_norm=1,
        linear=5,
        linear_norm=4,
    ),
    "camembert-masked": family(
        hf.CamembertForMaskedLM, hf.CamembertConfig, SIZES, attention=2, layer_norm=2, linear=6, linear_norm=4
    ),
    "distilbert": family(
        hf.DistilBertModel,
        hf.DistilBertConfig,
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        attention=2,
        layer_norm=1,
        linear=4,
        linear_norm=4,
    ),
    "electra": family(
        hf.ElectraModel,
        hf.ElectraConfig,
        {**SIZES, "embedding_size": 16},
        attention=2,
        layer_norm=1,
        linear=5,
        linear_norm=4,
    ),
    "albert": family(
        hf.AlbertModel,
        hf.AlbertConfig,
        {**SIZES, "embedding_size": 16},
        attention=2,
        layer_norm=1,
        linear=6,
        linear_norm=4,
    ),
    "mpnet": family(hf.MPNetModel, hf.MPNetConfig, SIZES, attention=2, layer_norm=1, linear=5, linear_norm=4),
    "deberta-v2": family(
        hf.DebertaV2Model,
        hf.DebertaV2Config,
        {
            **SIZES,
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": "p2c|c2p",
            "position_biased_input": False,
            "max_relative_positions": -1,
        },
        attention=2,
        layer_norm=2,
        linear=6,
        linear_norm=4,
    ),
    "modernbert": family(
        hf.ModernBertModel,
        hf.ModernBertConfig,
        {**SIZES, **MARKS, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 4},
        attention=2,
        gated_linear=2,
        layer_norm=1,
        linear=2,
        linear_norm=4,
        rotary_embedding=2,
    ),
    "t5": family(hf.T5Model, hf.T5Config, T5, "pairs", attention=6, linear=12, linear_norm=10, rms_norm=2),
    "t5-encoder": family(hf.T5EncoderModel, hf.T5Config, T5, attention=2, linear=4, linear_norm=4, rms_norm=1),
    "t5-gated": family(
        hf.T5Model,
        hf.T5Config,
        {**T5, "feed_forward_proj": "gated-gelu"},
        "pairs",
        attention=6,
        gated_linear=4,
        linear=8,
        linear_norm=10,
        rms_norm=2,
    ),
    "gpt2": family(
        hf.GPT2Model,
        hf.GPT2Config,
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **MARKS},
        "decoder",
        attention=2,
        layer_norm=1,
        linear=4,
        linear_norm=4,
    ),
    "llama": family(
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        DECODER,
        "decoder",
        attention=2,
        gated_linear=2,
        linear=3,
        linear_norm=4,
        rms_norm=1,
        rotary_embedding=2,
    ),
    "mistral": family(
        hf.MistralModel,
        hf.MistralConfig,
        {**DECODER, "sliding_window": 4},
        "decoder",
        attention=2,
        gated_linear=2,
        linear=2,
        linear_norm=4,
        rms_norm=1,
        rotary_embedding=2,
    ),
    "qwen2": family(
        hf.Qwen2Model,
        hf.Qwen2Config,
        DECODER,
        "decoder",
        attention=2,
        gated_linear=2,
        linear=2,
        linear_norm=4,
        rms_norm=1,
        rotary_embedding=2,
    ),
    "qwen3": family(
        hf.Qwen3Model,
        hf.Qwen3Config,
        {**DECODER, "head_dim": 8},
        "decoder",
        attention=2,
        gated_linear=2,
        linear=2,
        linear_norm=4,
        rms_norm=5,
        rotary_embedding=2,
    ),
    "gemma2": family(
        hf.Gemma2Model,
        hf.Gemma2Config,
        {**DECODER, **GEMMA},
        "decoder",
        attention=2,
        gated_linear=2,
        linear=2,
        linear_norm=4,
        rms_norm=5,
        rotary_embedding=2,
    ),
    "gemma3": family(
        hf.Gemma3TextModel,
        hf.Gemma3TextConfig,
        {
            **DECODER,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "decoder",
        attention=2,
        gated_linear=2,
        linear=2,
        linear_norm=4,
        rms_norm=9,
        rotary_embedding=2,
    ),
    "vit": family(hf.ViTModel, hf.ViTConfig, VISION, "image", attention=2, layer_norm=1, linear=5, linear_norm=4),
    "dinov2": family(hf.Dinov2Model, hf.Dinov2Config, VISION, "image", attention=2, layer_norm=5, linear=8),
    "clip": family(
        hf.CLIPModel,
        hf.CLIPConfig,
        {"text_config": {**SIZES, **MARKS}, "vision_config": VISION, "projection_dim": 16},
        "text and image",
        attention=4,
        layer_norm=4,
        linear=11,
        linear_norm=7,
    ),
    "whisper": family(
        hf.WhisperModel, hf.WhisperConfig, WHISPER, "sound", attention=6, layer_norm=2, linear=12, linear_norm=10
    ),
    "timm-like": Family(TimmLike, {"attention": 2, "layer_norm": 1, "linear": 4, "linear_norm": 4}, "image"),
    "plain": Family(Plain, {"attention": 2, "linear": 2, "linear_norm": 2}),
    "torch-encoder": Family(TorchEncoder, {"attention": 3, "layer_norm": 3, "linear": 9, "linear_norm": 1}),
}


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    with contextlib.suppress(AttributeError):
        hf.logging.set_verbosity_error()
    return FAMILIES[name].build(attention).eval().to(dtype)


def inputs(name: str, size: int = 3, length: int = 7, pad: str = "right", dtype: torch.dtype = torch.float32) -> Any:
    """A call of the model: `pad` is left, right or none (all ones), or absent (no attention mask)."""
    kind, generator = FAMILIES[name].kind, torch.Generator().manual_seed(10 * size + length)
    ids = torch.randint(3, 50, (size, length), generator=generator)
    call: dict[str, Any] = {}
    if kind not in ("image", "sound"):
        call["input_ids"] = ids
        if pad != "absent":
            call["attention_mask"] = padding(size, length, pad)
    if "image" in kind:
        call["pixel_values"] = torch.randn(size, 3, 16, 16, generator=generator).to(dtype)
    if kind == "sound":
        call["input_features"] = torch.randn(size, 8, 32, generator=generator).to(dtype)
    if kind in ("pairs", "sound"):
        call["decoder_input_ids"] = ids[:, :5]
    if kind in ("pairs", "sound", "decoder"):
        call["use_cache"] = False
    return call


def padding(size: int, length: int, side: str) -> torch.Tensor:
    """[size, length]: row i lacks i % 3 positions on that side."""
    lacking = torch.arange(size)[:, None] % 3 * (side != "none")
    position = torch.arange(length)
    seen = position >= lacking if side == "left" else position < length - lacking
    return seen.long()


def tensors(output: Any, call: dict[str, Any]) -> list[torch.Tensor]:
    """The floating-point outputs; of those with a row for each position, the rows that are no padding."""
    mask = call.get("attention_mask")
    leaves = torch.utils._pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return [leaf[mask.bool()] if mask is not None and leaf.shape[:2] == mask.shape else leaf for leaf in found]
