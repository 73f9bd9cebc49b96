"""One run of the main job on the digits: a daemon that dreams, a trainer that learns from it, and their figures.

Shared by demo.py and ablation.py. Both processes are the released binary; they meet only on a socket.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BINARY = ROOT / "target/release/dreamfeed"
READY_SECONDS, DRAIN_SECONDS = 60, 15


class RunError(Exception):
    """A process did not do what it should; the message says which, and where its log is."""


@dataclass(frozen=True)
class Budget:
    """What every run gets, the same for each kind of images."""

    batch_size: int = 128
    batches: int = 8
    iterations: int = 150
    steps_per_batch: int = 120
    train_batch_size: int = 64
    learning_rate: float = 0.1
    temperature: float = 4.0
    augment: str = "shift:1"
    arch: str = "resnet8"
    seed: int = 1

    @property
    def images(self) -> int:
        return self.batch_size * self.batches

    @property
    def steps(self) -> int:
        return self.steps_per_batch * self.batches


@dataclass
class Outcome:
    """What came of one run."""

    accuracy: float
    images_dreamed: int
    images_consumed: int
    student_versions: int
    wall_seconds: float
    grid: Path
    trainer: dict = field(default_factory=dict)


def environment() -> dict[str, str]:
    """Idle OpenMP threads sleep instead of spinning: two processes share two cores."""
    return os.environ | {"OMP_WAIT_POLICY": "passive"}


def require_binary() -> None:
    if not BINARY.exists():
        sys.exit(f"{BINARY} is not there: run `make build` first (`make demo` does it for you)")


def train_teacher(out: Path) -> tuple[Path, Path]:
    """The teacher and the held-out digits in `out`, made where they are not there yet."""
    script = ROOT / "examples/digits/train_teacher.py"
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}
    subprocess.run([sys.executable, str(script), "--out-dir", str(out)], check=True, env=env)
    return out / "teacher.safetensors", out / "test.bin"


def evaluate(model: Path, test: Path) -> float:
    """The accuracy of a network's file on labelled pictures, 0..1."""
    command = [
        *(str(BINARY), "evaluate", "--model", str(model), "--data", str(test), "--threads", "1", "--json")
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode != 0:
        raise RunError(f"{' '.join(command)} exited with {done.returncode}: {done.stderr.strip()}")
    return float(json.loads(done.stdout)["accuracy"])


def _tail(log: Path, lines: int = 15) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return ""


class Daemon:
    """`dreamfeed serve` as a context: ready on entry, drained with SIGTERM and gone with exit code 0 on leaving."""

    def __init__(self, teacher: Path, out: Path, flags: list[str], *, fresh: bool = True) -> None:
        self.log, self.ready_file = out / "serve.log", out / "serve.ready.json"
        store = out / "store"
        if fresh:  # a run from the beginning: its log must not hold the images of the run before
            shutil.rmtree(store, ignore_errors=True)
        self.command = [
            str(BINARY),
            "serve",
            *("--teacher", str(teacher), "--store", str(store)),
            *("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"),
            *("--ready-file", str(self.ready_file)),
            *flags,
        ]
        self.grpc = ""
        self.admin = ""

    def __enter__(self) -> "Daemon":
        self.ready_file.unlink(missing_ok=True)  # one of an earlier run would name a port of nobody
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment())
        deadline = time.monotonic() + READY_SECONDS
        while True:
            if self.process.poll() is not None:
                raise RunError(
                    f"the daemon exited with {self.process.returncode} before it was ready; {self.log} ends:\n"
                    + _tail(self.log)
                )
            # It may be half written for a moment: then it is read again.
            with contextlib.suppress(OSError, ValueError, KeyError):
                ready = json.loads(self.ready_file.read_text())
                self.grpc, self.admin = ready["grpc"], ready["admin"]
                return self
            if time.monotonic() > deadline:
                self.process.kill()
                self.process.wait()
                raise RunError(
                    f"the daemon was not ready within {READY_SECONDS} s; {self.log} ends:\n{_tail(self.log)}"
                )
            time.sleep(0.05)

    def counter(self, name: str) -> int:
        """The sum of a counter's series on the daemon's /metrics."""
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return int(
            sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))
        )

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        if kind is not None or code == 0:
            return  # an error inside the block is the one to report
        after = f"did not stop within {DRAIN_SECONDS} s of" if code is None else f"exited with {code} after"
        raise RunError(f"the daemon {after} SIGTERM; {self.log} ends:\n{_tail(self.log)}")


def distill(daemon: Daemon, test: Path, out: Path, flags: list[str]) -> dict:
    """Runs the trainer to its end, its progress lines passed through; returns its own summary."""
    summary, student, grid = out / "distill.json", out / "student.safetensors", out / "dreams.png"
    for stale in (summary, student, grid):
        stale.unlink(missing_ok=True)
    command = [
        str(BINARY),
        "distill",
        *("--connect", f"http://{daemon.grpc}"),
        *("--test-data", str(test)),
        *("--out", str(student), "--summary", str(summary), "--grid", str(grid)),
        *flags,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    last: list[str] = []

    def pass_through() -> None:
        for line in process.stdout or ():
            last[:] = [*last, line][-15:]
            print(f"  {line.rstrip()}", flush=True)

    reader = threading.Thread(target=pass_through, daemon=True)
    reader.start()
    try:
        # A daemon that dies would leave the trainer reconnecting for ever.
        while process.poll() is None:
            if daemon.process.poll() is not None:
                raise RunError(
                    f"the daemon exited with {daemon.process.returncode} during the run; {daemon.log} ends:\n"
                    + _tail(daemon.log)
                )
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(5)
    if process.returncode != 0:
        raise RunError(f"the trainer exited with {process.returncode}:\n{''.join(last)}")
    return json.loads(summary.read_text())


def run(teacher: Path, test: Path, out: Path, budget: Budget, synthesis: list[str]) -> Outcome:
    """Dreams and distils once. `synthesis` are the daemon's flags that say how images are made."""
    out.mkdir(parents=True, exist_ok=True)
    flags = [
        *("--preset", "digits"),
        *("--batch-size", str(budget.batch_size), "--iterations", str(budget.iterations)),
        *("--max-images", str(budget.images)),
        *("--seed", str(budget.seed), "--threads", "1"),
        *synthesis,
    ]
    began = time.monotonic()
    with Daemon(teacher, out, flags) as daemon:
        print(f"daemon: serving on {daemon.grpc} (its log: {daemon.log})", flush=True)
        trainer = distill(
            daemon,
            test,
            out,
            [
                *("--arch", budget.arch),
                *("--steps", str(budget.steps), "--steps-per-batch", str(budget.steps_per_batch)),
                *("--batch-size", str(budget.train_batch_size)),
                *("--learning-rate", str(budget.learning_rate), "--temperature", str(budget.temperature)),
                *("--push-every", str(budget.steps_per_batch)),
                *("--augment", budget.augment),
                *("--seed", str(budget.seed), "--threads", "1"),
            ],
        )
        dreamed = daemon.counter("dreamfeed_images_synthesized_total")
    return Outcome(
        accuracy=float(trainer["accuracy"]),
        images_dreamed=dreamed,
        images_consumed=int(trainer["images_consumed"]),
        student_versions=int(trainer["student_versions_pushed"]),
        wall_seconds=time.monotonic() - began,
        grid=out / "dreams.png",
        trainer=trainer,
    )


def table(rows: list[tuple[str, ...]], header: tuple[str, ...] | None = None) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    every = [header, *rows] if header else rows
    widths = [max(len(row[column]) for row in every) for column in range(len(every[0]))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells)

    lines = [line(row) for row in rows]
    if header:
        lines[:0] = [line(header), "  ".join("-" * width for width in widths)]
    return "\n".join(lines)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
