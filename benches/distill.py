"""Time to accuracy of each tier: a teacher of CIFAR images to a random student, by the clock.

Daemon and trainer are two processes that share the cores of one machine. The trainer is paced: a fixed number of
steps for each chunk of dreams and then leaves the cores to the daemon, which rests while enough dreams wait (--demand
subscribers). It has the teacher's file, too, and learns its feature maps beside its logits: block by block at first
(--blockwise), then the whole network (--hint-weight); --training="--blockwise 0 ..." tries something else. The real
pictures are only for measuring.

After the training the daemon is started again on its log, its newest student and its generator, and makes images with
nothing beside it: that is the rate given as images a second.

Writes out/bench/distill.json, {tier: [{"minutes": 5, "accuracy": 0.4}, ...]}, and out/bench/distill_rates.json,
{tier: images a second}; tiers that are not run again keep what an earlier run wrote there. Each tier's own files lie in
out/bench/distill/TIER/, a grid of its last dreams among them.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples/digits"))

import loop  # noqa: E402

MARKS = (5, 10, 12, 20, 21, 30, 45)
NORMALIZATION = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
PRESET = "--preset cifar10-live"
DEMAND = "--demand subscribers --demand-max-lag 256"
TRAINING = (
    "--blockwise 0.06 --hint-weight 10 --temperature 8 --augment shift:4,flip --buffer-images 300000 "
    "--min-images 256 --threads 2 --ema 0.99"
)
RATE_SECONDS = 60
RATE_PATIENCE = 600
# What each tier is run with, and the trainer's steps for each chunk of it: what costs more is used longer.
TIERS = {
    "adi": ("--iterations 24 --learning-rate 0.3", 40),
    "warm-adi": ("--iterations 24 --learning-rate 0.3", 40),
    "fast": ("", 24),
    "hybrid": ("--learning-rate 0.1", 32),
}


def rate(daemon: loop.Daemon) -> float:
    """Images a second of a daemon that does nothing else: whole batches, none of them the first."""

    deadline = time.monotonic() + RATE_PATIENCE

    def next_batch(made: int) -> tuple[int, float]:
        while (now := daemon.counter("dreamfeed_images_synthesized_total")) == made:
            if time.monotonic() > deadline:
                raise loop.RunError(f"no rate: the daemon made no batch for long; see {daemon.log}")
            time.sleep(0.05)
        return now, time.monotonic()

    first, began = next_batch(0)
    made, at = next_batch(first)
    while at - began < RATE_SECONDS:
        made, at = next_batch(made)
    return (made - first) / (at - began)


def serve_flags(tier: str, args: argparse.Namespace) -> list[str]:
    flags = ["--arch", args.arch, *NORMALIZATION, "--seed", "1", "--synthesizer", tier]
    return [*flags, *PRESET.split(), *(args.synthesis or TIERS[tier][0]).split()]


def accuracies(tier: str, args: argparse.Namespace, out: Path) -> list[dict]:
    """One tier from a fresh daemon and a fresh student: the accuracy at each mark."""
    out.mkdir(parents=True, exist_ok=True)
    last = int(args.minutes) if args.minutes.is_integer() else args.minutes
    marks = [mark for mark in MARKS if mark < last] + [last]
    training = ["--duration", f"{round(args.minutes * 60)}s", "--seed", "1", "--teacher", str(args.teacher)]
    training += args.training.split() if args.training else TRAINING.split()
    training += ["--arch", args.student_arch or args.arch]
    training += ["--eval-at", ",".join(f"{round(mark * 60)}s" for mark in marks)]
    training += ["--steps-per-batch", str(args.steps_per_chunk or TIERS[tier][1])]
    with loop.Daemon(args.teacher, out, [*serve_flags(tier, args), *DEMAND.split()]) as daemon:
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
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--arch", default="resnet20", help="the teacher's")
    parser.add_argument("--student-arch", help="the student's; default: the teacher's")
    parser.add_argument("--tiers", default=",".join(TIERS), help="which to run")
    parser.add_argument("--synthesis", help="other flags of dreamfeed serve than the tier's own")
    parser.add_argument("--steps-per-chunk", type=int, help="another pace than the tier's own")
    parser.add_argument("--training", default="", help=f"other flags of dreamfeed distill than {TRAINING!r}")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "out/bench")
    args = parser.parse_args()
    loop.require_binary()
    report = args.out_dir / "distill.json"
    rates_report = args.out_dir / "distill_rates.json"
    results, rates = (
        json.loads(path.read_text()) if path.exists() else {} for path in (report, rates_report)
    )
    for tier in args.tiers.split(","):
        if tier not in TIERS:
            sys.exit(f"there is no tier {tier}; known are {', '.join(TIERS)}")
        out = args.out_dir / "distill" / tier
        results[tier] = accuracies(tier, args, out)
        report.write_text(json.dumps(results, indent=1) + "\n")
        rates.pop(tier, None)
        try:
            with loop.Daemon(args.teacher, out, serve_flags(tier, args), fresh=False) as daemon:
                rates[tier] = rate(daemon)
        except (loop.RunError, OSError) as error:
            # The accuracies of this tier, and the tiers to come, are worth more than its rate.
            print(f"{tier}: {error}", file=sys.stderr)
        rates_report.write_text(json.dumps(rates, indent=1) + "\n")
    minutes = sorted({at["minutes"] for tier in results.values() for at in tier})
    print(
        f"\n| accuracy on {args.data.name} after | "
        + " | ".join(f"{m:g} min" for m in minutes)
        + " | images/s |"
    )
    print("|---" * (len(minutes) + 2) + "|")
    for tier, marks in results.items():
        at = {mark["minutes"]: f"{100 * mark['accuracy']:.1f} %" for mark in marks}
        speed = f"{rates[tier]:.1f}" if tier in rates else "-"
        print(f"| {tier} | " + " | ".join(at.get(m, "-") for m in minutes) + f" | {speed} |")


if __name__ == "__main__":
    main()
