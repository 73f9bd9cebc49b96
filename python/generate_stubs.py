"""Generates dreamfeed/_proto from proto/dreamfeed/v1/dreamfeed.proto: `python python/generate_stubs.py`.

Needs the grpcio-tools of requirements.txt: what a newer one generates does not run with what pyproject.toml allows. The
modules register the file under the name that any other client of the contract gives it, so that both can be loaded into
one process.
"""

import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python/dreamfeed/_proto"
PROTO = "dreamfeed/v1/dreamfeed.proto"
INIT = '"""Generated from proto/dreamfeed/v1/dreamfeed.proto by generate_stubs.py. Do not edit."""\n'


def generate() -> dict[str, str]:
    """The text of every file of the package `dreamfeed._proto`."""
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        outs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{well_known}", *outs, PROTO]) != 0:
            raise SystemExit(f"protoc does not accept {PROTO}")
        files = {path.name: path.read_text() for path in (Path(folder) / "dreamfeed/v1").iterdir()}
    for name, text in files.items():
        files[name] = text.replace("from dreamfeed.v1 import", "from dreamfeed._proto import")
    return {"__init__.py": INIT} | files


def main() -> None:
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for name, text in generate().items():
        (PACKAGE / name).write_text(text)
        sys.stdout.write(f"{PACKAGE / name}\n")


if __name__ == "__main__":
    main()
