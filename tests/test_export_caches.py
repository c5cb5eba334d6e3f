"""export_onnx of decoders: key caches go in and come out under optimum's names, and may be of any length."""

import models
import numpy as np
import onnxruntime
import pytest
import torch
from transformers import DynamicCache

import trimaran


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def ids(size, length):
    return torch.randint(3, 50, (size, length), generator=torch.Generator().manual_seed(length))


def with_past(model, past=4, new=1, size=1):
    """A step of a decoder: `new` tokens after `past` others."""
    tokens, mask = ids(size, past + new), torch.ones(size, past + new, dtype=torch.long)
    with torch.no_grad():
        before = model(tokens[:, :past], attention_mask=mask[:, :past], past_key_values=DynamicCache(), use_cache=True)
    return {"input_ids": tokens[:, past:], "attention_mask": mask, "past_key_values": before.past_key_values}


def feed(call):
    found = {name: call[name].numpy() for name in ("input_ids", "attention_mask")}
    for i, layer in enumerate(call["past_key_values"].layers):
        found |= {f"past_key_values.{i}.key": layer.keys.numpy(), f"past_key_values.{i}.value": layer.values.numpy()}
    return found


def test_a_step_of_one_token_makes_a_file_for_any_step(tmp_path):
    model, path = models.build("llama"), tmp_path / "step.onnx"
    report = trimaran.export_onnx(model, with_past(model), path, rules=trimaran.RULES)
    apart = {"linear": 7}  # k and v go into the cache: q, k and v are layers of their own
    assert report.replaced == {**models.FAMILIES["llama"].counts, **apart}
    session = session_of(path)
    assert [value.name for value in session.get_inputs()] == [
        "input_ids", "attention_mask",
        "past_key_values.0.key", "past_key_values.0.value", "past_key_values.1.key", "past_key_values.1.value",
    ]  # fmt: skip
    assert [value.shape for value in session.get_inputs()[:3]] == [
        ["batch", "sequence"],
        ["batch", "past_sequence + sequence"],
        ["batch", 2, "past_sequence", 8],
    ]
    outputs = {value.name: value.shape for value in session.get_outputs()}
    assert [*outputs][1:] == ["present.0.key", "present.0.value", "present.1.key", "present.1.value"]
    assert outputs["present.0.key"] == ["batch", 2, "past_sequence + sequence", 8]
    for size, past, new in ((1, 4, 1), (3, 9, 1), (2, 5, 3)):
        call = with_past(model, past, new, size)
        got = session.run(None, feed(call))
        with torch.no_grad():
            expected = model(**call)
        np.testing.assert_allclose(got[0], expected.logits.numpy(), atol=1e-5)
        np.testing.assert_allclose(got[2], expected.past_key_values.layers[0].values.numpy(), atol=1e-5)


def test_the_same_file_starts_from_an_empty_cache(tmp_path):
    model, path = models.build("gpt2"), tmp_path / "step.onnx"
    trimaran.export_onnx(model, with_past(model), path)
    empty = {f"past_key_values.{i}.{kind}": np.zeros((2, 4, 0, 8), "f") for i in range(2) for kind in ("key", "value")}
    prompt = ids(2, 6)
    got = session_of(path).run(None, {"input_ids": prompt.numpy(), "attention_mask": np.ones((2, 6), int), **empty})
    with torch.no_grad():
        np.testing.assert_allclose(got[0], model(prompt).last_hidden_state.numpy(), atol=1e-5)


def test_a_prompt_gives_its_cache_whole(tmp_path):
    """Also where the model's layers see a window only, and transformers' cache would drop the rest."""
    call = {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long), "use_cache": True}
    trimaran.export_onnx(models.build("mistral"), call, tmp_path / "prompt.onnx")
    session = session_of(tmp_path / "prompt.onnx")
    assert {v.name: v.shape for v in session.get_outputs()}["present.1.key"] == ["batch", 2, "sequence", 8]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_encoder_and_decoder(tmp_path, name):
    model, call = models.build(name), models.inputs(name, 2)
    past = {**call, "decoder_input_ids": ids(2, 4), "use_cache": True}
    with torch.no_grad():
        before = model(**past)
    step = {
        "encoder_outputs": (before.encoder_last_hidden_state,),
        "decoder_input_ids": ids(2, 1),
        "past_key_values": before.past_key_values,
        **{key: value for key, value in call.items() if key == "attention_mask"},
    }
    prompt_report = trimaran.export_onnx(model, past, tmp_path / "prompt.onnx")
    step_report = trimaran.export_onnx(model, step, tmp_path / "step.onnx")
    assert prompt_report.replaced["attention"] == 6
    assert step_report.replaced["attention"] == 4
    produced = {value.name for value in session_of(tmp_path / "prompt.onnx").get_outputs()}
    taken = {
        value.name.replace("past_key_values", "present") for value in session_of(tmp_path / "step.onnx").get_inputs()
    }
    caches = {
        f"present.{i}.{side}.{kind}" for i in "01" for side in ("decoder", "encoder") for kind in ("key", "value")
    }
    assert caches <= produced
    assert caches <= taken
    grown = {value.name for value in session_of(tmp_path / "step.onnx").get_outputs()}
    assert grown & caches == {name for name in caches if "decoder" in name}


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("sliding", r"past_key_values has dropped keys .* \(3 of 6 are left\)"),
        ("static", "past_key_values is a StaticCache, expected a cache that grows"),
    ],
)
def test_caches_that_a_file_cannot_take(tmp_path, cache, message):
    from transformers import StaticCache

    model = models.build("mistral")
    made = (
        DynamicCache(config=model.config) if cache == "sliding" else StaticCache(config=model.config, max_cache_len=8)
    )
    with torch.no_grad():
        model(ids(1, 6), past_key_values=made, use_cache=True)
    with pytest.raises((ValueError, TypeError), match=message):
        trimaran.export_onnx(model, {"input_ids": ids(1, 1), "past_key_values": made}, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
