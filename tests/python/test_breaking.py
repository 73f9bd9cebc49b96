"""`make lint` refuses a contract that would break the clients of today."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTO = "proto/dreamfeed/v1/dreamfeed.proto"


def breaks(folder: Path) -> str:
    """What buf has against the contract in the folder; empty = nothing."""
    buf = Path(sys.executable).with_name("buf")
    image = ROOT / "proto/dreamfeed.v1.binpb"
    done = subprocess.run(
        [buf, "breaking", "--against", image], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) == (not done.stdout), done.stderr
    return done.stdout


def test_a_field_of_another_type_or_a_lost_one_is_refused_and_a_new_one_is_not(tmp_path: Path) -> None:
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    today = (tmp_path / PROTO).read_text()
    assert breaks(tmp_path) == ""

    grown = today + "\n// More.\nmessage More {\n  // One.\n  bool one = 1;\n}\n"
    (tmp_path / PROTO).write_text(grown)
    assert breaks(tmp_path) == ""

    (tmp_path / PROTO).write_text(today.replace("uint64 sequence = 3", "uint32 sequence = 3", 1))
    assert '"sequence"' in breaks(tmp_path)

    (tmp_path / PROTO).write_text(today.replace("rpc Describe(", "rpc Portray(", 1))
    assert '"Describe"' in breaks(tmp_path)
