"""docs/own_rule.md runs as it stands, and what it promises holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trimaran.kernels.catalog import OPS, add_op

PAGE = (Path(__file__).parent.parent / "docs" / "own_rule.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page(tmp_path):
    (tmp_path / "page.py").write_text("\n".join(BLOCKS))  # Triton reads the source of kernels from their file
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = re.search(r"# (GatedAttention: .*)", PAGE)
    assert printed is not None
    assert printed.group(1) in done.stdout
    assert "1 verified against the model" in done.stdout


def test_the_op_and_the_rule_are_under_forty_lines():
    lines = [line for line in BLOCKS[1].splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) < 40


@pytest.mark.parametrize(
    ("op", "error", "message"),
    [(None, TypeError, "op is a NoneType, expected an Op"), ("linear", ValueError, "op is named linear, as one in")],
)
def test_add_op_refuses(op, error, message):
    with pytest.raises(error, match=message):
        add_op(OPS.get(op))
