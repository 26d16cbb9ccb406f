"""`make demo` runs from the first second to the last."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    not os.environ.get("ATTNREWRITE_SLOW"), reason="compiles with four kernels: ATTNREWRITE_SLOW=1 runs it"
)
def test_the_demo(tmp_path):
    command = [sys.executable, ROOT / "examples/digits/demo.py", "--steps", "1", "--out", tmp_path / "digits.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "demo: eager"
    assert "native  " in done.stdout
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
