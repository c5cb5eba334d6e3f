"""`trimaran check-kernels`: the variants run, a difference is seen, a sanitizer's report is read right."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from trimaran.benchmarks import soundness
from trimaran.cli import app
from trimaran.kernels import attention, gated_linear, linear_configs
from trimaran.kernels.catalog import OPS
from trimaran.kernels.configs import lookup
from trimaran.kernels.contract import Device
from trimaran.kernels.matmul import CONFIGS
from trimaran.kernels.plans import make_plan
from trimaran.torch_path import ops
from trimaran.torch_path.ops import TORCH_OPS

REPORT = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at attention_kernel+0x4290 in attention.py:{line}
=========     by thread (1,0,0) in block (3,0,0)
=========
========= Invalid __global__ read of size 2 bytes
=========     at rms_norm_kernel+0x10 in rms_norm.py:7
"""


def line_of(module, text):
    source = Path(module.__file__).read_text().splitlines()
    return next(number for number, line in enumerate(source, 1) if text in line)


def test_every_op_has_variants_and_they_run():
    names = [name for name, _ in soundness.variants(torch.device("cpu"))]
    assert len(set(names)) == len(names)
    assert {name.split()[0] for name in names} == set(TORCH_OPS)
    for _, call in itertools.islice(soundness.variants(torch.device("cpu")), 0, None, 20):
        assert all(torch.isfinite(tensor).all() for tensor in soundness._tensors(call()))


def test_ops_can_be_chosen():
    names = [name for name, _ in soundness.variants(torch.device("cpu"), ["rms_norm", "linear"])]
    assert {name.split()[0] for name in names} == {"rms_norm", "linear"}
    with pytest.raises(ValueError, match="no variants of linaer, expected some of attention, layer_norm"):
        list(soundness.variants(torch.device("cpu"), ["linaer"]))


def test_every_row_of_linears_tables_has_a_variant(monkeypatch):
    chosen, soonest = [], linear_configs.soonest

    def recorded(choose, *given, **facts):
        chosen.append(choose(*given, **facts))
        return chosen[-1]

    for module in (linear_configs, gated_linear):
        monkeypatch.setattr(module, "lookup", partial(recorded, lookup))
    monkeypatch.setattr(linear_configs, "soonest", partial(recorded, soonest))
    for _, call in soundness._linears(torch.device("cpu"), torch.float16):
        plan_of(OPS[call.func.__name__], call.keywords)
    rows = [config for _, config in (*linear_configs.HOPPER, *gated_linear.HOPPER, *CONFIGS)]
    for row in (*rows, *(tile.config for tile in linear_configs.TILES)):
        assert any(config is row for config in chosen), row


def plan_of(op, given):
    inputs = [ops.describe(given.get(port.name)) for port in op.inputs]
    attrs = op.attributes({attr.name: given[attr.name] for attr in op.attrs if attr.name in given})
    wanted = tuple(not port.optional for port in op.outputs)
    return make_plan(op, inputs, attrs, Device("cuda", 0, 90, 132, 227 * 1024), wanted)


def test_a_difference_of_one_bit_is_seen():
    one = torch.ones(5, dtype=torch.float16)
    nan = torch.full((5,), float("nan"))
    other = one.clone()
    other[3] = torch.nextafter(one[3].float(), torch.tensor(2.0)).half() + 2**-10
    assert not soundness._differs([one, nan], [one.clone(), nan.clone()])
    assert soundness._differs([other], [one])
    assert soundness._differs([nan], [torch.zeros(5)])


def test_findings_and_their_places():
    found = soundness.FINDING.findall(REPORT.format(line=3))
    assert [place for _, place in found] == ["attention.py:3", "rms_norm.py:7"]
    assert found[1][0] == "Invalid __global__ read of size 2 bytes"


def test_only_the_making_of_descriptors_is_explained(tmp_path, monkeypatch):
    plain = line_of(attention, "tl.make_tensor_descriptor")
    assert soundness.makes_descriptor(f"attention.py:{plain}")
    assert not soundness.makes_descriptor(f"attention.py:{plain + 5}")
    (tmp_path / "wide.py").write_text("x = 1\ny = tl.make_tensor_descriptor(\n    x,\n    [1],\n)\n")
    monkeypatch.setattr(soundness.kernels, "__file__", str(tmp_path / "catalog.py"))
    assert soundness.makes_descriptor("wide.py:4"), "its arguments stand on lines of their own"
    assert not soundness.makes_descriptor("wide.py:1")


def test_sanitizers_have_names():
    with pytest.raises(ValueError, match="sanitizer is 'memchek', expected one of memcheck, initcheck"):
        soundness.sanitize("memchek")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine with no GPU gets")
def test_without_a_gpu():
    result = CliRunner().invoke(app, ["check-kernels"])
    assert result.exit_code == 2
    assert "needs a CUDA GPU" in result.stderr
