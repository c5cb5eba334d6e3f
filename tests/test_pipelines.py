"""Models as people call them: heads, pipelines, sentence-transformers."""

import pytest
import torch
import transformers as hf
from models import DECODER, SIZES, T5, VISION, inputs, tensors
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import trimaran

pytestmark = pytest.mark.usefixtures("fresh_compiler")
ENCODER = {"attention": 2, "layer_norm": 1, "linear": 5, "linear_norm": 4}  # with a pooler
BARE = {**ENCODER, "linear": 4}
GATED = {"attention": 2, "gated_linear": 2, "linear": 2, "linear_norm": 4, "rms_norm": 1, "rotary_embedding": 2}
HEADS = {  # what its layers become: those of the head, besides those of the model
    "BertForSequenceClassification": (hf.BertConfig, SIZES, "text", {**ENCODER, "linear": 6}),
    "BertForTokenClassification": (hf.BertConfig, SIZES, "text", {**BARE, "linear": 5}),
    "BertForQuestionAnswering": (hf.BertConfig, SIZES, "text", {**BARE, "linear": 5}),
    "BertForMaskedLM": (hf.BertConfig, SIZES, "text", {**BARE, "linear": 6, "layer_norm": 2}),
    "LlamaForSequenceClassification": (hf.LlamaConfig, DECODER, "decoder", {**GATED, "linear": 3}),
    "T5ForConditionalGeneration": (hf.T5Config, T5, "pairs",
                                   {"attention": 6, "linear": 13, "linear_norm": 10, "rms_norm": 2}),
    "ViTForImageClassification": (hf.ViTConfig, VISION, "image", BARE | {"linear": 5}),
}  # fmt: skip
KINDS = {"text": "bert", "decoder": "llama", "pairs": "t5", "image": "vit"}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    config, sizes, kind, counts = HEADS[name]
    torch.manual_seed(0)
    model, call = getattr(hf, name)(config(**sizes)).eval(), inputs(KINDS[kind])
    with torch.no_grad():
        before = tensors(model(**call), call)
    report = trimaran.optimize_model(model)
    for ours, expected in zip(tensors(model(**call), call), before, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert report.replaced == counts, report
    assert not report.near_misses, report


def tokenizer():
    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"w{i}" for i in range(45))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **marks)


TASKS = {
    "text-classification": ("BertForSequenceClassification", "w1 w2 w3"),
    "token-classification": ("BertForTokenClassification", "w1 w2 w3"),
    "fill-mask": ("BertForMaskedLM", "w1 [MASK] w3"),
    "feature-extraction": ("BertModel", "w1 w2 w3"),
    "text-generation": ("LlamaForCausalLM", "w1 w2 w3"),
}


@pytest.mark.parametrize("task", TASKS)
def test_pipelines(task):
    name, text = TASKS[task]
    torch.manual_seed(0)
    config = hf.LlamaConfig(**DECODER) if "Llama" in name else hf.BertConfig(**SIZES)
    model = getattr(hf, name)(config).eval()
    options = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}
    run = hf.pipeline(task, model=model, tokenizer=tokenizer(), device="cpu")
    expected = run([text, "w4 w5 [MASK] w6"], **options)
    report = trimaran.optimize_model(model)
    assert rounded(run([text, "w4 w5 [MASK] w6"], **options)) == rounded(expected)
    assert all(graph.replaced["attention"] == 2 for graph in report.graphs), report
    assert report.graphs
    assert not report.fallbacks, report


def rounded(answer):
    if isinstance(answer, float):
        return pytest.approx(answer, abs=1e-4)
    if isinstance(answer, dict):
        return {key: rounded(value) for key, value in answer.items()}
    return [rounded(value) for value in answer] if isinstance(answer, list) else answer


class Transformer(nn.Module):
    """The first part of such an object: today it calls the model's forward, it used to call the model."""

    def __init__(self, directly):
        super().__init__()
        torch.manual_seed(0)
        self.auto_model, self.directly = hf.BertModel(hf.BertConfig(**SIZES)), directly

    def forward(self, features):
        run = self.auto_model.forward if self.directly else self.auto_model
        return {"token_embeddings": run(**features).last_hidden_state}


class Encoder(nn.Sequential):
    def encode(self, features):
        return self(features)["token_embeddings"].mean(1)


@pytest.mark.parametrize("directly", [False, True])
def test_an_object_like_those_of_sentence_transformers(directly):
    model, call = Encoder(Transformer(directly)).eval(), inputs("bert", pad="none")
    with torch.no_grad():
        expected = model.encode(call)
    report = trimaran.optimize_model(model)
    torch.testing.assert_close(model.encode(call), expected, rtol=1e-5, atol=1e-5)
    assert report.replaced == BARE
    assert trimaran.report(model) is report
    trimaran.restore(model)
    with torch.no_grad():
        assert torch.equal(model.encode(call), expected)


@pytest.mark.zoo
@pytest.mark.zoo("sentence_transformers")
def test_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    from trimaran.demo import model_folder

    model = SentenceTransformer(str(model_folder()), device="cpu")
    texts = ["A man plays a guitar.", "Someone makes music.", "The stock market fell sharply today."]
    expected = model.encode(texts)
    report = trimaran.optimize_model(model)
    ours = model.encode(texts)
    assert abs(ours - expected).max() < 1e-5
    assert report.replaced["attention"] == 6
    assert trimaran.report(model) is report
    trimaran.restore(model)
    assert (model.encode(texts) == expected).all()
