"""Files beyond 2 GB, where protobuf ends: their weights lie in a file beside them."""

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import trimaran

ROWS = 530_000  # of 1024 floats: 2.17 GB


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(ROWS, 1024, _weight=torch.zeros(ROWS, 1024))
        self.norm = nn.LayerNorm(1024)
        nn.init.normal_(self.table.weight[-1])

    def forward(self, input_ids):
        return self.norm(self.table(input_ids))


@pytest.mark.slow
def test_a_file_beyond_2_gb_is_exported_and_rewritten(tmp_path):
    """Verified both times, which runs them; rewriting what is rewritten changes nothing but where it is."""
    with torch.no_grad():
        model = Large().eval()
    call = {"input_ids": torch.tensor([[ROWS - 1, 0, 7], [1, ROWS - 1, 2]])}
    report = trimaran.export_onnx(model, call, tmp_path / "large.onnx")
    assert report.replaced == {"layer_norm": 1}
    assert report.verified.startswith("verified")
    data = tmp_path / "large.onnx.data"
    assert data.stat().st_size > 2 << 30
    del model
    again = trimaran.rewrite_onnx(tmp_path / "large.onnx", tmp_path / "again.onnx")
    assert again.replaced == report.replaced
    assert again.verified.startswith("verified")
    first, second = (ir.load(tmp_path / name).graph for name in ("large.onnx", "again.onnx"))
    assert [node.op_type for node in first] == [node.op_type for node in second]
    onnx.checker.check_model(tmp_path / "again.onnx")
