"""The time of one synthesis step of the daemon beside plain PyTorch: `make bench`.

Runs `dreamfeed bench synth` and benches/pytorch_step.py one process after the other, on the same weights, batch and
threads, for Adaptive DeepInversion and for plain DeepInversion, and prints a table of medians.

    .venv/bin/python benches/step.py [--teacher FILE --arch resnet20 --mean LIST --std LIST] [--out FILE.json]

Without --teacher it takes ../shared/models/cifar_resnet20_jpeg.safetensors where that exists, and otherwise a
ResNet-20 with random weights that it writes itself: the weights do not change the time of a step.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import cifar_resnet  # noqa: E402

SHARED = ROOT.parent / "shared" / "models" / "cifar_resnet20_jpeg.safetensors"
MEAN, STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


def random_network(path: Path, arch: str, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Path:
    """Writes a network with random weights, once."""
    import torch

    if not path.exists():
        torch.manual_seed(1)
        network = cifar_resnet.ResNet(arch, channels)
        mean, std = ([float(v) for v in text.split(",")][:channels] for text in (MEAN, STD))
        cifar_resnet.save(network, path, mean=mean, std=std, image_size=size)
    return path


def run_json(command: list[str], threads: int) -> dict:
    """Runs a process to its end and reads the JSON object on the last line of its output."""
    # Idle OpenMP threads of one process must not spin while another thread pool works.
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stderr}{done.stdout}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--arch", help="default: the teacher's metadata, or resnet20")
    parser.add_argument("--mean", help="default: the teacher's metadata")
    parser.add_argument("--std", help="default: the teacher's metadata")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="timed steps a run")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps a run")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of each process")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/dreamfeed")
    parser.add_argument("--out", type=Path, default=ROOT / "out/bench/step.json")
    args = parser.parse_args()

    teacher, known = args.teacher, {}
    if teacher is None and SHARED.exists():
        # That file carries no metadata.
        teacher, known = SHARED, {"arch": "resnet20", "mean": MEAN, "std": STD}
    elif teacher is None:
        teacher = random_network(ROOT / "out/bench/random-resnet20.safetensors", "resnet20")
    # What the command line gives wins over what is known of the file; what neither gives is in its metadata.
    given = {"arch": args.arch, "mean": args.mean, "std": args.std}
    told = known | {key: value for key, value in given.items() if value is not None}
    network, metadata = cifar_resnet.load(teacher, told.get("arch"))
    arch, channels = network.arch, network.conv1.in_channels
    size = tuple(int(v) for v in metadata.get("image_size", "32,32").split(","))
    student = ROOT / f"out/bench/random-{arch}-{channels}x{size[0]}x{size[1]}.safetensors"
    random_network(student, arch, channels, size)
    print(
        f"teacher {teacher}, {arch}; batch {args.batch}, {args.threads} threads, medians of {args.steps} steps"
    )

    source = [word for key, value in told.items() for word in (f"--{key}", value)]
    common = ["--teacher", str(teacher), "--student", str(student), *source, "--batch", str(args.batch)]
    common += [
        "--steps",
        str(args.steps),
        "--warmup",
        str(args.warmup),
        "--threads",
        str(args.threads),
        "--json",
    ]
    ours = [str(args.binary), "bench", "synth", *common, "--preset", "cifar10"]
    theirs = [sys.executable, str(ROOT / "benches/pytorch_step.py"), *common]
    results = {}
    for name, our_flags, their_flags in (
        ("ADI", [], []),
        ("DeepInversion", ["--compete-weight", "0"], ["--no-compete"]),
    ):
        seconds: dict[str, list[float]] = {"dreamfeed": [], "pytorch": []}
        for repeat in range(args.repeats):
            print(f"  {name}: run {repeat + 1}/{args.repeats}", file=sys.stderr, flush=True)
            # Alternating, so that a slow minute of the machine meets both.
            seconds["dreamfeed"].append(run_json(ours + our_flags, args.threads)["step_seconds"])
            seconds["pytorch"].append(run_json(theirs + their_flags, args.threads)["step_seconds"])
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        ratio = medians["dreamfeed"] / medians["pytorch"]
        results[name] = {"runs": seconds, **medians, "ratio": ratio}

    print()
    print("| step | Dreamfeed | plain PyTorch | ratio |")
    print("|---|---|---|---|")
    for name, result in results.items():
        print(f"| {name} | {result['dreamfeed']:.3f} s | {result['pytorch']:.3f} s | {result['ratio']:.2f} |")
    report = {
        "teacher": str(teacher),
        "arch": arch,
        "batch_size": args.batch,
        "threads": args.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
