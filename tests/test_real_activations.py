"""The kernels on what a trained model really feeds them: MiniLM's attention and norms on English text, whose scores
and channels are far from normally distributed."""

import pytest
import torch
from oracle import assert_close, run_kernel, widened

from trimaran.demo import SENTENCES, load, model_folder
from trimaran.kernels.attention import attention, attention_reference

pytestmark = pytest.mark.zoo
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def activations():
    """q, k, v and the mask [B, 1, Sq, Sk] of each attention, and input, weight, bias and eps of each norm."""
    model, tokenizer = load(model_folder())
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    attentions, norms = [], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def seen(q, k, v, attn_mask=None, **options):
        attentions.append((q, k, v, attn_mask))
        return attend(q, k, v, attn_mask=attn_mask, **options)

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda m, x, y: norms.append((x[0], m.weight, m.bias, m.eps)))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
        model(**inputs)
    assert len(attentions) == 6
    assert len(norms) == 13
    return attentions, norms


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [0, 5])
def test_attention(activations, layer, dtype, device):
    q, k, v, mask = (t.to(device) for t in activations[0][layer])
    key_mask = mask[:, 0, 0].bool() if mask.dtype == torch.bool else mask[:, 0, 0] == 0
    inputs = (*(t.to(dtype) for t in (q, k, v)), None, None, key_mask)
    given = {"scale": q.shape[-1] ** -0.5}
    attrs = vars(attention.attributes(given))
    (exact,) = attention_reference(*map(widened, inputs), **attrs)
    (peer,) = attention_reference(*inputs, **attrs)
    assert_close(run_kernel("attention", *inputs, **given), exact, peer)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [0, 6, 12])
def test_layer_norm(activations, norm, dtype, device):
    x, weight, bias, eps = activations[1][norm]
    inputs = [t.detach().to(device, dtype) for t in (x, weight, bias)]
    exact = torch.nn.functional.layer_norm(inputs[0].double(), weight.shape, *map(widened, inputs[1:]), eps)
    peer = torch.nn.functional.layer_norm(inputs[0], weight.shape, *inputs[1:], eps)
    got, _ = run_kernel("layer_norm", *inputs, eps=eps)
    assert_close(got, exact, peer)
