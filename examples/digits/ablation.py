"""`make ablation`: the demo's loop with four kinds of images, from one seed and on one budget: the paper's table.

Compare Yin et al. 2020, arXiv:1912.08795, table 1: noise, DeepDream (cross-entropy and image prior only),
DeepInversion (with the batch-norm statistics) and Adaptive DeepInversion (with the competition).
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import loop

KINDS = {
    "noise": ("Noise", ["--synthesizer", "noise"]),
    "deepdream": ("DeepDream", ["--synthesizer", "adi", "--r-feature-weight", "0", "--compete-weight", "0"]),
    "deepinversion": ("DeepInversion", ["--synthesizer", "adi", "--compete-weight", "0"]),
    "adi": ("Adaptive DeepInversion", ["--synthesizer", "adi"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out-dir", type=Path, default=loop.ROOT / "out/ablation")
    parser.add_argument("--seed", type=int, default=loop.Budget.seed)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS), help="default: all four")
    args = parser.parse_args()
    loop.require_binary()
    budget = dataclasses.replace(loop.Budget(), seed=args.seed)
    teacher, test = loop.train_teacher(loop.ROOT / "out/demo")
    teacher_accuracy = loop.evaluate(teacher, test)

    began = time.monotonic()
    outcomes: dict[str, loop.Outcome] = {}
    for number, kind in enumerate(args.only, 1):
        name, flags = KINDS[kind]
        print(
            f"{number}/{len(args.only)}  {name}: {budget.images:,} images, {budget.steps:,} steps", flush=True
        )
        outcomes[kind] = loop.run(teacher, test, args.out_dir / kind, budget, flags)

    summary = {
        "teacher_accuracy": teacher_accuracy,
        "seed": args.seed,
        "budget": dataclasses.asdict(budget),
        "wall_seconds": time.monotonic() - began,
        "runs": {
            kind: {
                "student_accuracy": outcome.accuracy,
                "images_dreamed": outcome.images_dreamed,
                "images_consumed": outcome.images_consumed,
                "student_versions": outcome.student_versions,
                "wall_seconds": outcome.wall_seconds,
                "trainer": outcome.trainer,
            }
            for kind, outcome in outcomes.items()
        },
    }
    loop.write_json(args.out_dir / "summary.json", summary)
    rows = [
        (KINDS[kind][0], f"{100 * o.accuracy:.1f} %", f"{o.images_dreamed:,}", f"{o.wall_seconds:.0f} s")
        for kind, o in outcomes.items()
    ]
    rows.append(("(the teacher)", f"{100 * teacher_accuracy:.1f} %", "", ""))
    print(f"\n{loop.table(rows, ('images', 'student', 'dreamed', 'wall'))}\n")
    print(f"dreams:   {args.out_dir}/*/dreams.png")
    print(f"figures:  {args.out_dir / 'summary.json'}")


if __name__ == "__main__":
    try:
        main()
    except loop.RunError as error:
        sys.exit(f"ablation: {error}")
