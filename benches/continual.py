"""Five classes more, without the data of the first five: accuracy on old, new and all classes, method by method.

Each method gets the same real pictures of the new classes, the same steps and the same start, and a daemon of its own
where it takes dreams, which shares the cores with it. The test pictures are only for measuring.
Writes out/bench/continual.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples/digits"))

import loop  # noqa: E402

METHODS = {
    "finetune": "plain fine-tuning",
    "lwf-mc": "LwF.MC",
    "deepinversion": "DeepInversion",
    "abd": "ABD",
}
# The daemon rests while enough dreams wait, and follows the network that is learning.
SERVE = "--preset cifar10-live --demand subscribers --demand-max-lag 512 --seed 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the network that knows the old classes")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--mean", default="0.485,0.456,0.406")
    parser.add_argument("--std", default="0.229,0.224,0.225")
    parser.add_argument("--data", type=Path, required=True, help="real pictures of the new classes")
    parser.add_argument("--test-data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--serve", default=SERVE, help="flags of the daemon")
    parser.add_argument("--more", default="", help="further flags of dreamfeed continual")
    args = parser.parse_args()
    loop.require_binary()
    report = ROOT / "out/bench/continual.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(report.read_text()) if report.exists() else {}
    for method in args.methods.split(","):
        if method not in METHODS:
            sys.exit(f"there is no method {method}; known are {', '.join(METHODS)}")
        out = report.parent / "continual" / method
        subprocess.run(["rm", "-rf", str(out)], check=True)
        command = [str(loop.BINARY), "continual", "--model", str(args.model), "--arch", args.arch]
        command += ["--mean", args.mean, "--std", args.std, "--data", str(args.data), "--method", method]
        command += ["--test-data", str(args.test_data), "--steps", str(args.steps), "--seed", "1"]
        command += ["--out-dir", str(out), "--json", "--serve", args.serve, *args.more.split()]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=loop.environment(), check=True)
        results[method] = json.loads(done.stdout)
        report.write_text(json.dumps(results, indent=1) + "\n")
    print(
        f"\n{args.steps} steps each; the old network on its own classes: {100 * results[method]['before']:.1f} %"
    )
    print("| | old classes | new classes | all classes | dreams | wall time |\n|---|---|---|---|---|---|")
    for method, name in METHODS.items():
        for task in results.get(method, {}).get("tasks", []):
            parts = " | ".join(f"{100 * task[part]:.1f} %" for part in ("old", "new", "all"))
            print(f"| {name} | {parts} | {task['images_received']:,} | {task['wall_seconds']:.0f} s |")


if __name__ == "__main__":
    main()
