"""Rewritten files on a GPU: every trimaran node runs there, and gives what the file gave before."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnxruntime
import pytest
import torch
import transformers as hf

import trimaran

CUDA = "CUDAExecutionProvider"
SMALL = {"vocab_size": 512, "max_position_embeddings": 512}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, **SMALL}
LLAMA = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
         "intermediate_size": 2816, **SMALL}  # fmt: skip
T5 = {"vocab_size": 512, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 6, "num_heads": 8}
MODELS = {
    "minilm": lambda: hf.BertModel(hf.BertConfig(**MINILM)),
    "bert-base": lambda: hf.BertModel(hf.BertConfig(**SMALL)),
    "t5": lambda: hf.T5Model(hf.T5Config(**T5)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
}
pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def feeds(name: str, size: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 512, (size, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(size)[:, None] % length).long()
    return {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": ids} if name == "t5" else {})


def session_of(path: Path, ours: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    if ours:
        return trimaran.ort_session(path, [CUDA], session_options=options)
    return onnxruntime.InferenceSession(path, options, providers=[CUDA])


def timed(session: Any, call: dict[str, Any]) -> tuple[Any, float]:
    """(outputs, milliseconds of the fastest of ten runs), copies from and to the host included."""
    out, best = session.run(None, call), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        session.run(None, call)
        best = min(best, time.perf_counter() - start)
    return out, 1000 * best


def providers(session: Any) -> Counter[tuple[str, str]]:
    """(op, provider) of each run of a node, from the session's profile."""
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    return Counter((args["op_name"], args["provider"]) for args in ran)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_node_runs_there(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flags = {} if name in ("minilm", "bert-base") else {"use_cache": False}
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    exports.export(MODELS[name]().eval().to(dtype), feeds(name, 2, 9), flags, source, "dynamo", 18)
    started = time.perf_counter()
    report = trimaran.rewrite_onnx(source, target, verify=False)
    seconds = time.perf_counter() - started
    assert report.replaced["attention"] >= 4
    theirs, ours = session_of(source, False), session_of(target, True)
    for size, length in ((1, 16), (8, 128), (8, 384)):
        call = {key: value.numpy() for key, value in feeds(name, size, length).items()}
        (expected, before), (got, after) = timed(theirs, call), timed(ours, call)
        errors = []
        for a, b in zip(got, expected, strict=True):
            seen = call["attention_mask"].astype(bool) if b.shape[:2] == (size, length) else np.ones(len(b), bool)
            a, b = a[seen].astype(np.float64), b[seen].astype(np.float64)
            errors.append(float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))))
        print(f"{name} {dtype} {size} x {length}: {before:.2f} -> {after:.2f} ms, error {max(errors):.1e}")
        assert max(errors) < (1e-2 if dtype == torch.float16 else 1e-3)
    ran = providers(ours)
    mine = {op: provider for op, provider in ran if op in report.replaced}
    print(f"{name} {dtype}: {dict(report.replaced)}, rewritten in {seconds:.1f} s; {mine}")
    assert mine.keys() == report.replaced.keys()
    assert {*mine.values()} == {CUDA}
    providers(theirs)
