"""`make demo`: trains a teacher on real digits, dreams its training set back, and teaches a student with the dreams.

The student never sees a real digit. Everything lands in out/demo: teacher and student, the daemon's log, a picture of
dreams, and summary.json with all figures (fractions, not per cent).
"""

import argparse
import sys
import time
from pathlib import Path

import loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out-dir", type=Path, default=loop.ROOT / "out/demo")
    args = parser.parse_args()
    loop.require_binary()
    began = time.monotonic()
    budget = loop.Budget()
    print("1/3  the teacher, trained on the training split of scikit-learn's digits", flush=True)
    teacher, test = loop.train_teacher(args.out_dir)
    print(
        "2/3  a daemon that dreams, and a trainer that learns from its dreams and pushes its weights back",
        flush=True,
    )
    outcome = loop.run(teacher, test, args.out_dir, budget, ["--synthesizer", "adi"])
    print("3/3  the teacher on the held-out digits", flush=True)
    teacher_accuracy = loop.evaluate(teacher, test)

    wall = time.monotonic() - began
    summary = {
        "teacher_accuracy": teacher_accuracy,
        "student_accuracy": outcome.accuracy,
        "images_dreamed": outcome.images_dreamed,
        "images_consumed": outcome.images_consumed,
        "student_versions": outcome.student_versions,
        "wall_seconds": wall,
        "run_seconds": outcome.wall_seconds,
        "trainer": outcome.trainer,
    }
    loop.write_json(args.out_dir / "summary.json", summary)
    rows = [
        ("teacher, held-out digits", f"{100 * teacher_accuracy:.1f} %"),
        ("student, held-out digits", f"{100 * outcome.accuracy:.1f} %"),
        ("images dreamed", f"{outcome.images_dreamed:,}"),
        ("images consumed", f"{outcome.images_consumed:,}"),
        ("student versions pushed", f"{outcome.student_versions}"),
        ("wall time", f"{wall:.0f} s"),
    ]
    print(f"\n{loop.table(rows)}\n")
    print(f"dreams:   {outcome.grid}")
    print(f"figures:  {args.out_dir / 'summary.json'}")


if __name__ == "__main__":
    try:
        main()
    except loop.RunError as error:
        sys.exit(f"demo: {error}")
