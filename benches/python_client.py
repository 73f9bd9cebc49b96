"""How fast batches come out of DreamStream, beside an in-memory TensorDataset in the same DataLoader.

Batches of 256 images of 3x32x32 in replay, f32 normalized, with labels and the teacher's logits. The daemon (one
process, on the same cores) holds noise images labelled by a random ResNet-20 and makes no more: what is in them does
not matter here. Both loaders take turns, for several rounds, and the best of each counts. Writes
out/bench/python_client.json.

    .venv/bin/python benches/python_client.py
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "python")]

import cifar_resnet  # noqa: E402
from dreamfeed import Client, DreamStream  # noqa: E402

BINARY = ROOT / "target/release/dreamfeed"
BATCH, CLASSES = 256, 10
MEAN, STD, SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (32, 32)


@contextlib.contextmanager
def daemon(folder: Path, images: int):
    """A daemon whose log holds this many `images`: its address."""
    torch.manual_seed(0)
    teacher = cifar_resnet.ResNet("resnet20", 3, CLASSES)
    cifar_resnet.save(teacher, folder / "teacher.safetensors", mean=MEAN, std=STD, image_size=SIZE)
    ready = folder / "ready.json"
    command = [
        str(BINARY),
        "serve",
        "--teacher",
        "teacher.safetensors",
        "--store",
        "store",
        "--synthesizer",
        "noise",
    ]
    command += [
        "--batch-size",
        str(BATCH),
        "--max-images",
        str(images),
        "--threads",
        "1",
        "--log-level",
        "error",
    ]
    command += ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--ready-file", str(ready)]
    process = subprocess.Popen(command, cwd=folder)
    try:
        while True:
            if process.poll() is not None:
                sys.exit("the daemon did not start")
            with contextlib.suppress(OSError, ValueError):
                ports = json.loads(ready.read_text())
                urllib.request.urlopen(f"http://{ports['admin']}/readyz").close()
                break
            time.sleep(0.1)
        with Client(ports["grpc"]) as client:
            while client.describe().log.next_sequence < images:
                time.sleep(0.2)
        yield ports["grpc"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def images_a_second(loader: DataLoader, seconds: float) -> float:
    """How many images the loader hands over a second, once it runs; it is started anew where it ends."""

    def forever():
        while True:
            yield from loader

    batches = forever()
    for _ in range(8):
        next(batches)
    images, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        # Looked at, so that no page is left untouched.
        batch = next(batches)
        images += len(batch[0])
        batch[0].view(-1)[::1024].sum()
    batches.close()
    return images / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (5)")
    parser.add_argument("--images", type=int, default=8_192, help="that each of them has (8192)")
    parser.add_argument("--rounds", type=int, default=3, help="in each of which both are measured (3)")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 1], help="the DataLoader's workers (0 1)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {}
    with tempfile.TemporaryDirectory() as folder, daemon(Path(folder), args.images) as address:
        stream = DreamStream(address, batch_size=BATCH, replay=1.0)
        images = torch.randn(args.images, 3, *SIZE)
        memory = TensorDataset(
            images, torch.randint(CLASSES, (args.images,)), torch.randn(args.images, CLASSES)
        )
        for workers in args.workers:
            rates = {"dreamstream": [], "in memory": []}
            for _ in range(args.rounds):
                loader = DataLoader(
                    stream, batch_size=None, num_workers=workers, persistent_workers=workers > 0
                )
                rates["dreamstream"].append(images_a_second(loader, args.seconds))
                del loader
                loader = DataLoader(
                    memory, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
                )
                rates["in memory"].append(images_a_second(loader, args.seconds))
                del loader
            ours, theirs = max(rates["dreamstream"]), max(rates["in memory"])
            report[f"{workers} workers"] = {"images_a_second": rates, "ratio": ours / theirs}
            print(
                f"{workers} workers: DreamStream {ours:,.0f} images/s, in-memory TensorDataset {theirs:,.0f} images/s, "
                f"ratio {ours / theirs:.2f}",
                flush=True,
            )
    out = ROOT / "out/bench/python_client.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
