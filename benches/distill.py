"""An honest run of the main job by the clock: a CIFAR teacher to a random student of the same architecture.

Daemon and trainer are two processes that share the cores of one machine. The trainer is paced: it makes so many
steps for each batch of dreams and then leaves the cores to the daemon; unpaced it only learns a few hundred images by
heart while they come half as fast. The real pictures are only for measuring.

Writes out/bench/distill/distill.json and a grid of dreams beside it.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples/digits"))

import loop  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument(
        "--synthesis",
        default="--preset cifar10-live --iterations 24 --learning-rate 0.3",
        help="flags of dreamfeed serve",
    )
    parser.add_argument(
        "--training",
        default="--temperature 8 --augment shift:2,flip --min-images 256 --threads 2 --steps-per-batch 64 --eval-every 500",
        help="more flags of dreamfeed distill",
    )
    parser.add_argument("--out-dir", type=Path, default=ROOT / "out/bench/distill")
    args = parser.parse_args()
    loop.require_binary()
    out = args.out_dir
    out.mkdir(parents=True, exist_ok=True)
    normalization = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    flags = ["--arch", args.arch, *normalization, "--seed", "1", *args.synthesis.split()]
    training = [
        *("--duration", f"{round(args.minutes * 60)}s", "--seed", "1"),
        *args.training.split(),
    ]
    with loop.Daemon(args.teacher, out, flags) as daemon:
        summary = loop.distill(daemon, args.data, out, training)
    print(f"\n| minutes | steps | accuracy on {args.data.name} |\n|---|---|---|")
    for at in summary["accuracies"]:
        print(f"| {at['seconds'] / 60:.1f} | {at['step']} | {100 * at['accuracy']:.1f} % |")
    print(
        f"\nimages dreamed {summary['images_received']:,}, consumed {summary['images_consumed']:,}, "
        f"student versions {summary['student_versions_pushed']}"
    )


if __name__ == "__main__":
    main()
