"""Exported files of full size on a GPU: every trimaran node runs there, and the results are as right as PyTorch's."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers as hf

import trimaran
from trimaran.export.call import Call, named_outputs
from trimaran.export.export_onnx import in_dtype
from trimaran.export.functions import our_nodes
from trimaran.export.verify import array

pytestmark = pytest.mark.gpu


def tokens(size, length, vocabulary=30000):
    ids = torch.randint(3, vocabulary, (size, length), generator=torch.Generator().manual_seed(length))
    mask = torch.arange(length) < length - torch.arange(size)[:, None] * (length // (2 * size))
    return {"input_ids": ids, "attention_mask": mask.long()}


def bert():
    return hf.BertModel(hf.BertConfig()), tokens(2, 9), tokens(8, 384), {"attention": 12, "linear_norm": 24}


def t5():
    config = hf.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32000)
    return hf.T5EncoderModel(config), tokens(2, 9), tokens(4, 256), {"attention": 12}


def llama():
    """A step of one token after others, in a file made of another step."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 32}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=32000)).eval()
    counts = {"attention": 6, "gated_linear": 6, "rotary_embedding": 6}
    return model, step(model, 2, 5), step(model, 4, 300), counts


def step(model, size, past):
    call = tokens(size, past + 1)
    before = {"input_ids": call["input_ids"][:, :-1], "attention_mask": call["attention_mask"][:, :-1]}
    with torch.no_grad():
        cache = model(**before, past_key_values=hf.DynamicCache(), use_cache=True).past_key_values
    return {"input_ids": call["input_ids"][:, -1:], "attention_mask": call["attention_mask"], "past_key_values": cache}


def cast(call, dtype, device="cpu"):
    wide = Call(call).with_tensors(lambda _, t: t.to(device, dtype if t.is_floating_point() else None))
    return wide.rebuild(list(wide.tensors.values()))


@pytest.mark.parametrize("make", [bert, t5, llama], ids=lambda make: make.__name__)
def test_a_file_on_a_gpu(make, tmp_path):
    torch.manual_seed(0)
    model, example, call, counts = make()
    model = model.eval()
    report = trimaran.export_onnx(model, example, tmp_path / "m.onnx", dtype=torch.float16, verify=False)
    assert report.replaced.items() >= counts.items()
    got, where = run_profiled(tmp_path, Call(cast(call, torch.float16)).tensors)
    with torch.no_grad():
        exact = named_outputs(model.cuda()(**cast(call, torch.float32, "cuda")))
        peer = named_outputs(in_dtype(model, Call({}), torch.float16)[0](**cast(call, torch.float16, "cuda")))
    assert where == {"CUDAExecutionProvider": sum(report.replaced.values())}
    seen = call["attention_mask"].bool().numpy()
    for name, ours in got.items():
        wanted, half = (array(x[name].float()) for x in (exact, peer))
        if ours.shape[:2] == seen.shape:
            ours, wanted, half = ours[seen], wanted[seen], half[seen]
        assert rms(ours - wanted) <= 1.2 * rms(half - wanted) + 1e-4 * rms(wanted), name


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def run_profiled(folder, tensors):
    """(outputs by name, how many trimaran nodes ran on which provider)"""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.log_severity_level = 3
    session = trimaran.ort_session(folder / "m.onnx", session_options=options)
    feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
    names = [output.name for output in session.get_outputs()]
    results = dict(zip(names, session.run(names, feeds), strict=True))
    events = json.loads(Path(session.end_profiling()).read_text())
    ours = {node.op_type for node in our_nodes(ir.load(folder / "m.onnx"))}
    runs = [
        e["args"]["provider"] for e in events if e.get("args", {}).get("op_name") in ours and "kernel_time" in e["name"]
    ]
    return results, Counter(runs)
