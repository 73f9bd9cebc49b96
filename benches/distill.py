"""Time to accuracy of each tier: a CIFAR teacher to a random student of the same architecture, by the clock.

Daemon and trainer are two processes that share the cores of one machine. The trainer is paced: it makes so many steps
for each chunk of dreams and then leaves the cores to the daemon, which rests while enough dreams wait (--demand
subscribers). The real pictures are only for measuring.

Writes out/bench/distill.json, {tier: [{"minutes": 5, "accuracy": 0.4}, ...]}; tiers that are not run again keep what an
earlier run wrote there. Each tier's own files lie in out/bench/distill/TIER/, a grid of its last dreams among them.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples/digits"))

import loop  # noqa: E402

MARKS = (5, 10, 20, 30, 45)
NORMALIZATION = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
# Each batch comes in four views, each with its own logits: the trainer changes no pixel.
COMMON = "--preset cifar10-live --demand subscribers --demand-max-lag 256 --views 3"
TRAINING = "--buffer-images 300000 --temperature 8 --augment none --min-images 256 --threads 2 --ema 0.99"
# What each tier is run with, and the trainer's steps for each chunk of it: what costs more is used longer.
TIERS = {
    "adi": ("--iterations 24 --learning-rate 0.3", 16),
    "warm-adi": ("--iterations 24 --learning-rate 0.3", 16),
    "fast": ("", 6),
    "hybrid": ("--learning-rate 0.1", 8),
}


def run(tier: str, args: argparse.Namespace, out: Path) -> list[dict]:
    """One tier from a fresh daemon and a fresh student; the accuracy at each mark."""
    synthesis, steps = TIERS[tier]
    out.mkdir(parents=True, exist_ok=True)
    marks = [mark for mark in MARKS if mark <= args.minutes] or [args.minutes]
    flags = ["--arch", args.arch, *NORMALIZATION, "--seed", "1", "--synthesizer", tier]
    flags += [*COMMON.split(), *(args.synthesis or synthesis).split()]
    training = ["--duration", f"{round(args.minutes * 60)}s", "--seed", "1", *TRAINING.split()]
    training += ["--eval-at", ",".join(f"{round(mark * 60)}s" for mark in marks)]
    training += ["--steps-per-batch", str(args.steps_per_chunk or steps), *args.training.split()]
    with loop.Daemon(args.teacher, out, flags) as daemon:
        summary = loop.distill(daemon, args.data, out, training)
    print(
        f"{tier}: images dreamed {summary['images_received']:,}, consumed {summary['images_consumed']:,}, "
        f"steps {summary['steps']:,}, student versions {summary['student_versions_pushed']}"
    )
    # The last measurement is made when the time is up, a moment after the last mark.
    found = []
    for mark in marks:
        late = [m for m in summary["accuracies"] if m["seconds"] >= 60 * mark - 1]
        if late:
            found.append({"minutes": mark, "accuracy": late[0]["accuracy"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--tiers", default=",".join(TIERS), help="which to run")
    parser.add_argument("--synthesis", help="other flags of dreamfeed serve than the tier's own")
    parser.add_argument("--steps-per-chunk", type=int, help="another pace than the tier's own")
    parser.add_argument("--training", default="", help="more flags of dreamfeed distill")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "out/bench")
    args = parser.parse_args()
    loop.require_binary()
    report = args.out_dir / "distill.json"
    results = json.loads(report.read_text()) if report.exists() else {}
    for tier in args.tiers.split(","):
        if tier not in TIERS:
            sys.exit(f"there is no tier {tier}; known are {', '.join(TIERS)}")
        results[tier] = run(tier, args, args.out_dir / "distill" / tier)
        report.write_text(json.dumps(results, indent=1) + "\n")
    minutes = sorted({at["minutes"] for tier in results.values() for at in tier})
    print(f"\n| accuracy on {args.data.name} after | " + " | ".join(f"{m:g} min" for m in minutes) + " |")
    print("|---" * (len(minutes) + 1) + "|")
    for tier, marks in results.items():
        at = {mark["minutes"]: f"{100 * mark['accuracy']:.1f} %" for mark in marks}
        print(f"| {tier} | " + " | ".join(at.get(m, "-") for m in minutes) + " |")


if __name__ == "__main__":
    main()
