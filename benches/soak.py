"""Ten minutes of everything that clients and operators do to a daemon at once, and whether it stays the size it was.

200 readers of odd policies, slow ones and vanishing ones among them; pushes that are good, that explode, that are too
large, nonsense; connections that say nothing; a store that is deleted and comes back; a drain and a kill -9,
each followed by a start on that store. Memory, descriptors and threads are sampled every second. Exits with 1 where the
daemon panicked, lost an image, or grew.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "examples/digits")]

import loop  # noqa: E402

READERS, PROCESSES = 200, 2
# Daemon and readers share two cores.
FLAGS = [
    "--preset",
    "digits",
    "--synthesizer",
    "fast",
    "--fast-width",
    "8",
    "--batch-size",
    "64",
    "--log-max-images",
    "20000",
]
# Small, so that all of it is used after a minute.
LIMITS = ["--log-cache-bytes", "32MiB", "--max-message-bytes", "64MiB", "--max-connections", "260"]
ALLOWED_GROWTH = 1.15
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"


class Served:
    """A daemon on fixed ports, started again and again on one store."""

    def __init__(self, teacher: Path, out: Path) -> None:
        self.teacher, self.out, self.store = teacher, out, out / "store"
        self.grpc, self.admin = free_port(), free_port()
        self.process: subprocess.Popen | None = None
        self.log = (out / "serve.log").open("w")

    def start(self) -> None:
        command = [
            *(str(loop.BINARY), "serve", "--teacher", str(self.teacher), "--store", str(self.store)),
            *("--listen", f"127.0.0.1:{self.grpc}", "--admin-listen", f"127.0.0.1:{self.admin}"),
            *(*FLAGS, *LIMITS),
        ]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=loop.environment())
        self.wait("readiness", lambda: self.get("/readyz")[0] == 200)

    def end(self, signal: str) -> int:
        getattr(self.process, signal)()
        return self.process.wait(timeout=20)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def wait(self, what: str, condition, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise SystemExit(
                    f"the daemon exited with {self.process.returncode} while {what} was waited for"
                )
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"waited {seconds:.0f} s in vain for {what}: /readyz says {self.get('/readyz')}"
                )
            time.sleep(0.2)

    def sample(self) -> dict[str, float]:
        folder = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        return {
            "MiB": int(status["VmRSS"].split()[0]) / 1024,
            "descriptors": len(list((folder / "fd").iterdir())),
            "threads": int(status["Threads"]),
        }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_forever(port: int, end: float, seed: int, counts: collections.Counter) -> None:
    """One reader after the other, each with a policy of its own, until the end."""
    import grpc
    from dreamfeed._proto import dreamfeed_pb2 as pb
    from dreamfeed._proto import dreamfeed_pb2_grpc as pb_grpc

    draw = random.Random(seed)
    while time.time() < end:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
        request = pb.StreamRequest(
            batch_size=draw.choice([0, 7, 64, 300, 5000]),
            pixel_format=draw.choice([0, 2, 3]),
            classes=draw.choice([[], [], [0, 1, 2, 3, 4], [draw.randrange(10)]]),
            replay=pb.Replay(share=draw.choice([0, 0.3, 1]), sampling=draw.choice([1, 2, 3])),
        )
        if draw.random() < 0.5:
            request.start.earliest.SetInParent()
        if draw.random() < 0.3:
            request.staleness_bound.max_student_versions = draw.randrange(5)
        pause = draw.choice([0.05, 0.2, 1.0, 5.0])
        call = pb_grpc.DreamfeedServiceStub(channel).Stream(request, timeout=draw.uniform(1, 25))
        try:
            position = None
            for message in call:
                # Messages without replay that are not filtered are consecutive.
                plain = (
                    request.replay.share == 0
                    and not request.classes
                    and not request.HasField("staleness_bound")
                )
                if plain and position is not None and message.first_sequence != position:
                    counts["OUT OF ORDER"] += 1
                position = message.first_sequence + message.count
                counts["messages"] += 1
                counts["images"] += message.count
                if draw.random() < 0.02:
                    counts["vanished"] += 1
                    break
                time.sleep(pause)
        except grpc.RpcError as error:
            counts[error.code().name] += 1
            time.sleep(draw.uniform(0, 0.5))
        channel.close()


def readers(port: int, end: float, first: int, count: int) -> None:
    counts: collections.Counter = collections.Counter()
    threads = [
        threading.Thread(target=read_forever, args=(port, end, first + index, counts), daemon=True)
        for index in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(counts), flush=True)


def push_forever(served: Served, end: float, counts: collections.Counter) -> None:
    import torch
    from dreamfeed import Client, DreamfeedError
    from safetensors.torch import load_file, save

    draw = random.Random(7)
    teacher = load_file(served.teacher)
    client = Client(f"127.0.0.1:{served.grpc}", timeout=20)
    while time.time() < end:
        kind = draw.choice(["good", "good", "good", "exploding", "not finite", "too large", "nonsense"])
        noisy = {
            name: value + 0.01 * torch.randn_like(value) if value.is_floating_point() else value
            for name, value in teacher.items()
        }
        for name, value in noisy.items():
            if name.endswith("running_var"):
                noisy[name] = value.abs() + 1e-3
        head = noisy["linear.weight"]
        file = b""
        if kind == "exploding":
            noisy["linear.weight"] = head * 1e18
        if kind == "not finite":
            noisy["linear.weight"] = head * float("nan")
        if kind == "too large":
            file = bytes(300 << 20)
        if kind == "nonsense":
            file = bytes(draw.randrange(256) for _ in range(5000))
        try:
            client.push_encoded(file or save(noisy), "resnet8")
            counts[f"{kind}: accepted"] += 1
        except DreamfeedError as error:
            counts[f"{kind}: {type(error).__name__}"] += 1
        time.sleep(draw.uniform(0.2, 2))


def idle_forever(port: int, end: float, counts: collections.Counter) -> None:
    """Connections that say nothing, or half of something, and stay."""
    held: collections.deque = collections.deque()
    draw = random.Random(11)
    while time.time() < end:
        with contextlib.suppress(OSError):
            idle = socket.create_connection(("127.0.0.1", port), timeout=5)
            idle.sendall(draw.choice([b"", PREFACE[:10], PREFACE, b"GET / HTTP/1.1\r\n"]))
            held.append(idle)
            counts["silent connections"] += 1
        if len(held) > 100:
            held.popleft().close()
        time.sleep(0.05)


def flat(samples: list[tuple[float, dict[str, float]]], key: str) -> tuple[float, float]:
    """The median of the second fifth of a life and of its last: before that it warms up."""
    values = [sample[key] for _, sample in samples]
    fifth = max(1, len(values) // 5)
    return statistics.median(values[fifth : 2 * fifth]), statistics.median(values[-fifth:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--role", choices=["readers"], help=argparse.SUPPRESS)
    parser.add_argument("--arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "readers":
        port, end, first, count = args.arguments
        return readers(int(port), float(end), int(first), int(count))

    loop.require_binary()
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), args.minutes * 60)
    return None


def soak(out: Path, seconds: float) -> None:
    teacher, _ = loop.train_teacher(ROOT / "out/demo")
    served = Served(teacher, out)
    served.start()
    begin, end = time.time(), time.time() + seconds
    counts: collections.Counter = collections.Counter()
    command = [sys.executable, __file__, "--role", "readers", "--arguments", str(served.grpc), str(end)]
    share = READERS // PROCESSES
    env = os.environ | {"OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "NONE"}
    children = [
        subprocess.Popen(
            [*command, str(1000 * index), str(share)], stdout=subprocess.PIPE, text=True, env=env
        )
        for index in range(PROCESSES)
    ]
    for target, first in [(push_forever, served), (idle_forever, served.grpc), (idle_forever, served.admin)]:
        threading.Thread(target=target, args=(first, end, counts), daemon=True).start()

    problems: list[str] = []
    lives: list[list[tuple[float, dict[str, float]]]] = []

    def live(until: float) -> None:
        lives.append([])
        while time.time() < begin + until * seconds:
            if served.process.poll() is not None:
                raise SystemExit(f"the daemon exited with {served.process.returncode}")
            lives[-1].append((time.time() - begin, served.sample()))
            time.sleep(1)

    live(0.15)
    # The store goes away for some seconds, and comes back.
    away = out / "away"
    served.store.rename(away)
    served.wait("the fault", lambda: served.get("/readyz")[0] == 503)
    time.sleep(5)
    if served.store.exists():
        problems.append(
            f"the daemon wrote into a store that was deleted: {sorted(served.store.rglob('*'))[:3]}"
        )
        shutil.rmtree(served.store)
    away.rename(served.store)
    served.wait("readiness", lambda: served.get("/readyz")[0] == 200)
    live(0.35)
    code = served.end("terminate")
    if code != 0:
        problems.append(f"a drain ended with {code}")
    served.start()
    live(0.45)
    served.end("kill")
    served.start()
    live(1.0)
    for child in children:
        output, _ = child.communicate(timeout=60)
        counts.update(json.loads(output.strip().splitlines()[-1]))
    last = served.get("/metrics")[1]
    code = served.end("terminate")
    if code != 0:
        problems.append(f"a drain ended with {code}")
    log = (out / "serve.log").read_text(errors="replace")
    if "panicked" in log:
        problems.append(
            "the daemon panicked: " + next(line for line in log.splitlines() if "panicked" in line)
        )
    if counts["OUT OF ORDER"]:
        problems.append(f"{counts['OUT OF ORDER']} messages did not follow the one before")
    verify = subprocess.run(
        [str(loop.BINARY), "log", "verify", "--store", str(served.store)],
        capture_output=True,
        text=True,
        check=False,
    )
    if verify.returncode != 0:
        problems.append(f"the store is not sound: {verify.stderr.strip()}")

    lived = lives[-1][-1][0] - lives[-1][0][0]
    print(f"\n| {seconds / 60:.0f} minutes, last life {lived:.0f} s | early | at the end | most |")
    print("|---|---|---|---|")
    for key in ("MiB", "descriptors", "threads"):
        early, late = flat(lives[-1], key)
        most = max(sample[key] for life in lives for _, sample in life)
        print(f"| {key} | {early:.0f} | {late:.0f} | {most:.0f} |")
        if late > early * ALLOWED_GROWTH + 5:
            problems.append(f"{key} grew from {early:.0f} to {late:.0f}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in sorted(counts.items())))
    refused = [
        line
        for line in last.splitlines()
        if "refused_total" in line and not line.startswith("#") and not line.endswith(" 0")
    ]
    print("refused in the last life: " + "; ".join(refused))
    for problem in problems:
        print("PROBLEM: " + problem)
    if problems:
        shutil.copy(out / "serve.log", ROOT / "out/soak.log")
        raise SystemExit(f"{len(problems)} problems; the daemon's log is out/soak.log")


if __name__ == "__main__":
    main()
