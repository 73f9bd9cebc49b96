"""How fast the log reaches its subscribers, beside tonic's own encoder and plain memory copy.

For 1, 10, 100 and 1000 loopback streams: bytes a second out of the log and in replay, and of the same messages from a
bare tonic server, all three in turn and several times; CPU time of the server per delivered byte, its resident memory,
and the time from a chunk's being durable to its being received while the daemon goes on dreaming. Server and
subscribers are two processes on the same cores. Printed are medians, and the median of the ratios within a turn.

The chunks are 256 noise images of 3x32x32 labelled by a random ResNet-20: what is in them does not matter here.
Writes out/bench/delivery.json.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "examples/digits")]

import loop  # noqa: E402
import step  # noqa: E402

IMAGES = 16_384
CACHE = 128 << 20


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) << 10


def load(pid: int, address: str, streams: int, mode: str, seconds: float, store: Path | None = None) -> dict:
    command = [
        str(loop.BINARY),
        "bench",
        "load",
        "--connect",
        f"http://{address}",
        "--json",
        "--server-pid",
        str(pid),
    ]
    command += ["--streams", str(streams), "--mode", mode, "--duration", f"{seconds}s"]
    # A thousand messages of a megabyte are a gigabyte of memory that a fresh server never touched.
    command += ["--warmup", f"{2 + streams / 50}s"]
    if store:
        command += ["--store", str(store)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    report = json.loads(output)
    report["server_cpu_seconds_per_gb"] = report["server_cpu_seconds"] / max(report["bytes"] / 1e9, 1e-9)
    report["resident_bytes"] = resident_bytes(pid)
    return report


def median(turns: list[dict], bare: list[dict]) -> dict:
    """The median of every figure, and of the ratio to bare tonic in the same turn."""
    middle = {
        key: statistics.median(turn[key] for turn in turns) for key in turns[0] if _is_number(turns[0][key])
    }
    ratios = [
        own["bytes_per_second"] / tonic["bytes_per_second"] for own, tonic in zip(turns, bare, strict=True)
    ]
    return turns[0] | middle | {"ratios_to_bare": ratios, "ratio_to_bare": statistics.median(ratios)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="1,10,100,1000")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="turns of replay, bare tonic and whole chunks")
    args = parser.parse_args()
    counts = [int(n) for n in args.streams.split(",")]
    loop.require_binary()
    reports: dict[str, list[dict]] = {"log": [], "replay": [], "bare": [], "live": []}
    # Memory-backed, so that the disk is not what is measured.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        out = Path(folder)
        teacher = step.random_network(out / "teacher.safetensors", "resnet20")
        made = [
            "--synthesizer",
            "noise",
            "--batch-size",
            "256",
            "--max-images",
            str(IMAGES),
            "--threads",
            "1",
        ]
        made += ["--max-streams", "2000", "--log-cache-bytes", str(CACHE)]
        with loop.Daemon(teacher, out, made) as daemon:
            server = daemon.process.pid
            while daemon.counter("dreamfeed_log_next_sequence") < IMAGES:
                pass
            base = resident_bytes(server)
            command = [str(loop.BINARY), "bench", "bare", "--store", str(out / "store")]
            bare = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                address = bare.stdout.readline().strip()
                for streams in counts:
                    turns: dict[str, list[dict]] = {"log": [], "replay": [], "bare": []}
                    # In turn, because the speed of a shared machine drifts.
                    for _ in range(args.repeats):
                        turns["replay"].append(load(server, daemon.grpc, streams, "replay", args.seconds))
                        turns["bare"].append(load(bare.pid, address, streams, "log", args.seconds))
                        turns["log"].append(load(server, daemon.grpc, streams, "log", args.seconds))
                    for mode, turn in turns.items():
                        reports[mode].append(median(turn, turns["bare"]))
            finally:
                bare.kill()
                bare.wait()
        # Dreaming goes on beside it, on one thread, as it does in earnest.
        dreams = [
            "--synthesizer",
            "adi",
            "--preset",
            "cifar10-live",
            "--iterations",
            "2",
            "--batch-size",
            "64",
            "--threads",
            "1",
        ]
        dreams += ["--max-streams", "2000", "--log-cache-bytes", str(CACHE)]
        with loop.Daemon(teacher, out, dreams) as daemon:
            server = daemon.process.pid
            for streams in counts:
                report = load(server, daemon.grpc, streams, "live", 2 * args.seconds, out / "store")
                reports["live"].append(report)

    print(
        f"\nChunks of 256 images, {reports['bare'][0]['bytes'] / reports['bare'][0]['messages']:,.0f} bytes. ",
        end="",
    )
    print(f"The daemon at rest: {base / 1e6:.0f} MB resident; its cache may hold {CACHE >> 20} MiB. ", end="")
    print(f"Plain memory copy, one thread: {reports['bare'][0]['copy_bytes_per_second'] / 1e9:.2f} GB/s.\n")
    print("| streams | log | bare tonic | replay | log / bare | replay / bare |", end="")
    print(" CPU s/GB: log | bare | replay | resident: log | replay |")
    print("|---" * 11 + "|")
    for log, replay, tonic in zip(reports["log"], reports["replay"], reports["bare"], strict=True):
        speeds = [f"{r['bytes_per_second'] / 1e9:.2f} GB/s" for r in (log, tonic, replay)]
        ratios = [f"{r['ratio_to_bare']:.2f}" for r in (log, replay)]
        cpu = [f"{r['server_cpu_seconds_per_gb']:.2f}" for r in (log, tonic, replay)]
        memory = [f"{r['resident_bytes'] / 1e6:.0f} MB" for r in (log, replay)]
        print("|", " | ".join([f"{log['streams']:.0f}", *speeds, *ratios, *cpu, *memory]), "|")
    print("\n| streams, live | p50 from durable to received | p99 | resident |\n|---|---|---|---|")
    for r in reports["live"]:
        latency = [f"{r[f'{key}_milliseconds']:.1f} ms" for key in ("p50", "p99")]
        print("|", " | ".join([str(r["streams"]), *latency, f"{r['resident_bytes'] / 1e6:.0f} MB"]), "|")
    target = ROOT / "out/bench/delivery.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
