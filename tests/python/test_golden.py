"""The committed golden values are those that their script computes."""

import subprocess
import sys
from pathlib import Path


def test_golden_files_reproduce() -> None:
    script = Path(__file__).resolve().parents[1] / "golden/make_golden.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
