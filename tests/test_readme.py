"""The README's examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_two_examples_of_six_lines_and_one_of_less_than_thirty():
    assert [len(re.findall(r"^\S", example, re.MULTILINE)) for example in EXAMPLES[:2]] == [6, 6]
    assert [len(example.splitlines()) < 30 for example in EXAMPLES[2:]] == [True]


@pytest.mark.parametrize("example", EXAMPLES, ids=["pytorch", "onnxruntime", "triton_op"])
def test_example(example, tmp_path):
    script = tmp_path / "example.py"  # a file, since Triton reads a kernel's source
    script.write_text(example)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"print\(.*\)  # (.*)", example)
    assert promised
    for line in promised:
        assert line in done.stdout
