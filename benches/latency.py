"""How fast a daemon answers a unary RPC while its engine saturates the machine.

The teacher is a randomly initialised ResNet-20 for 3x32x32 (the weights do not change the work), batch 128, all cores.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "examples/digits")]

import loop  # noqa: E402
import step  # noqa: E402


def main() -> None:
    loop.require_binary()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        teacher = step.random_network(out / "teacher.safetensors", "resnet20")
        flags = ["--preset", "cifar10", "--batch-size", "128"]
        with loop.Daemon(teacher, out, flags) as daemon:
            command = [str(loop.BINARY), "bench", "rpc", "--connect", f"http://{daemon.grpc}", "--json"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    print("\n| Describe beside a busy engine | ms |\n|---|---|")
    for key in ("p50", "p99", "max"):
        print(f"| {key} of {report['calls']} calls | {report[f'{key}_milliseconds']:.2f} |")


if __name__ == "__main__":
    main()
