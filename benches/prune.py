"""A network with a part of its floating-point operations removed: accuracy after fine-tuning on dreams, on real
pictures, on noise, and without any.

Removal and fine-tuning are the same in each run but for the images. Dreams and noise are made before, by a daemon that
then only streams them, so that every run has the cores to itself; without fine-tuning nothing is learned, neither
between the rounds of removal nor after them. The test pictures are only for measuring. Writes out/bench/prune.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples/digits"))

import loop  # noqa: E402

IMAGES = {"dreams": "dreams", "real": "real pictures", "noise": "noise", "none": "no fine-tuning"}


def prune(args: argparse.Namespace, part: float, images: str, source: list[str], out: Path) -> dict:
    command = [
        str(loop.BINARY),
        "prune",
        "--model",
        str(args.model),
        "--arch",
        args.arch,
        "--mean",
        args.mean,
    ]
    command += [
        "--std",
        args.std,
        "--flops",
        str(part),
        "--test-data",
        str(args.test_data),
        "--seed",
        "1",
        "--json",
    ]
    command += ["--rounds", str(args.rounds), "--steps-per-round", str(args.steps_per_round)]
    learning = ["--learning-rate", "0", "--fine-tune-steps", "0"]
    if images != "none":
        learning = [
            "--learning-rate",
            str(args.learning_rate),
            "--fine-tune-steps",
            str(args.fine_tune_steps),
        ]
    command += [*learning, *source, "--out", str(out / f"{images}-{part}.safetensors")]
    print(f"{images}, {part:.0%}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=loop.environment(), check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--arch", default="resnet56")
    parser.add_argument("--mean", default="0.485,0.456,0.406")
    parser.add_argument("--std", default="0.229,0.224,0.225")
    parser.add_argument("--data", type=Path, required=True, help="real pictures, for the upper bound")
    parser.add_argument("--test-data", type=Path, required=True)
    parser.add_argument(
        "--parts", default="0.2,0.4,0.6", help="parts of the floating-point operations to remove"
    )
    parser.add_argument("--images", default=",".join(IMAGES), help="'': only print what earlier runs found")
    parser.add_argument(
        "--made", type=int, default=5_120, help="dreams, and noise images, that are made before"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps-per-round", type=int, default=8)
    parser.add_argument("--fine-tune-steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    args = parser.parse_args()
    loop.require_binary()
    report = ROOT / "out/bench/prune.json"
    results = json.loads(report.read_text()) if report.exists() else {}
    parts = [float(part) for part in args.parts.split(",")]
    network = ["--arch", args.arch, "--mean", args.mean, "--std", args.std]

    def measure(images: str, source: list[str]) -> None:
        out = report.parent / "prune"
        for part in parts:
            results.setdefault(images, {})[str(part)] = prune(args, part, images, source, out)
            report.write_text(json.dumps(results, indent=1) + "\n")

    wanted = args.images.split(",")
    for images, synthesizer in (("dreams", "fast"), ("noise", "noise")):
        if images not in wanted and not (images == "dreams" and "none" in wanted):
            continue
        out = report.parent / "prune" / images
        out.mkdir(parents=True, exist_ok=True)
        flags = ["--preset", "cifar10-live", "--synthesizer", synthesizer, "--max-images", str(args.made)]
        with loop.Daemon(args.model, out, [*network, *flags, "--seed", "1"]) as daemon:
            began = time.monotonic()
            while daemon.counter("dreamfeed_log_next_sequence") < args.made:
                time.sleep(1)
            print(f"{args.made:,} images of {images} in {time.monotonic() - began:.0f} s", flush=True)
            if images in wanted:
                measure(images, ["--connect", f"http://{daemon.grpc}"])
            if images == "dreams" and "none" in wanted:
                measure("none", ["--connect", f"http://{daemon.grpc}"])
    if "real" in wanted:
        measure("real", ["--pictures", str(args.data)])

    first = next(iter(next(iter(results.values())).values()))
    before = first["before"]
    print(f"\nBefore: {100 * before['accuracy']:.1f} %, {before['flops'] / 1e6:.1f} MFLOP an image, ", end="")
    print(f"{before['parameters']:,} parameters, {1000 * before['batch_seconds']:.0f} ms a batch.")
    print("| removed | parameters left | a batch | " + " | ".join(IMAGES.values()) + " |")
    print("|---" * (3 + len(IMAGES)) + "|")
    for part in parts:
        runs = {images: results.get(images, {}).get(str(part)) for images in IMAGES}
        done = [run["tuned"] for run in runs.values() if run]
        # All runs remove as much, though not the same filters; the least time is the least disturbed.
        fastest = min(run["batch_seconds"] for run in done)
        cells = [f"{100 * run['tuned']['accuracy']:.1f} %" if run else "-" for run in runs.values()]
        left = f"{100 * done[0]['parameters'] / before['parameters']:.0f} %"
        print(f"| {part:.0%} | {left} | {1000 * fastest:.0f} ms | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
