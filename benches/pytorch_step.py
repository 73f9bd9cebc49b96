"""The time of one Adaptive DeepInversion step in plain PyTorch, as an engineer would write it from the paper.

The yardstick for `dreamfeed bench synth`: the same teacher, batch, threads and loss terms (cross-entropy, total
variation l2, R_feature on every batch norm's input, true Jensen-Shannon competition), jitter, flip, Adam on the
pixels and clipping. Parameters keep requires_grad=True, as in the published scripts, so that backward also computes
gradients of the weights, which nobody uses.

    .venv/bin/python benches/pytorch_step.py --teacher FILE.safetensors [--no-compete] [--json]

Formulas: Yin et al. 2020, arXiv:1912.08795; the network: He et al. 2015, arXiv:1512.03385, section 4.2.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import cifar_resnet
from cifar_resnet import per_channel

# The preset cifar10 of the daemon, src/synthesis/settings.rs.
LEARNING_RATE, TV_L2, R_FEATURE, COMPETE, TEMPERATURE, JITTER = 0.1, 3e-3, 1.0, 1.0, 3.0, 2


class StatisticsHook:
    """Keeps the distance between the statistics of a batch norm's input and its running statistics."""

    def __init__(self, module: nn.BatchNorm2d) -> None:
        self.distance = torch.zeros(())
        module.register_forward_hook(self.hook)

    def hook(self, module: nn.BatchNorm2d, args: tuple[Tensor], _output: Tensor) -> None:
        mean = args[0].mean([0, 2, 3])
        var = args[0].permute(1, 0, 2, 3).reshape(args[0].shape[1], -1).var(1, unbiased=False)
        self.distance = torch.norm(module.running_var - var) + torch.norm(module.running_mean - mean)


def one_pixel_differences(x: Tensor) -> list[Tensor]:
    return [
        x[:, :, :, :-1] - x[:, :, :, 1:],
        x[:, :, :-1, :] - x[:, :, 1:, :],
        x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
        x[:, :, :-1, 1:] - x[:, :, 1:, :-1],
    ]


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the softmax at temperature 3 of logits [N,K], the mean over the batch."""
    log_p, log_q = F.log_softmax(student / TEMPERATURE, 1), F.log_softmax(teacher / TEMPERATURE, 1)
    log_m = (0.5 * (log_p.exp() + log_q.exp())).log()
    kl = {"reduction": "batchmean", "log_target": True}
    return 0.5 * F.kl_div(log_m, log_p, **kl) + 0.5 * F.kl_div(log_m, log_q, **kl)


# Kinds of ops by what their names contain, first match wins.
KINDS = (
    ("convolution, backward (image and weights)", ("convolution_backward",)),
    ("convolution, forward", ("conv",)),
    ("batch norm, forward and backward", ("batch_norm",)),
    ("mean and variance hooks", ("aten::var", "aten::mean", "aten::std", "aten::sum")),
    ("ReLU, forward and backward", ("threshold", "relu", "clamp")),
    ("everything else: elementwise, copies, losses, Adam", ("",)),
)


def profile(step, count: int) -> None:
    """Prints the time of each kind of op in a step, by PyTorch's own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            step()
    sums = dict.fromkeys((name for name, _ in KINDS), 0.0)
    for event in profiler.key_averages():
        kind = next(name for name, parts in KINDS if any(part in event.key for part in parts))
        sums[kind] += event.self_cpu_time_total / 1e6 / count
    whole = sum(sums.values())
    for name, seconds in sums.items():
        print(f"{name:<52} {seconds:.4f} s ({100 * seconds / whole:.0f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="a safetensors file")
    parser.add_argument("--student", type=Path, help="a safetensors file; default: random weights")
    parser.add_argument("--arch", help="default: the file's metadata")
    parser.add_argument("--mean", help="default: the teacher's metadata")
    parser.add_argument("--std", help="default: the teacher's metadata")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compete", action="store_true", help="plain DeepInversion")
    parser.add_argument(
        "--profile", action="store_true", help="also print where the time goes, by kind of op"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    teacher, metadata = cifar_resnet.load(args.teacher, args.arch)
    channels, classes = teacher.conv1.in_channels, teacher.linear.out_features
    if args.student is None:
        student = cifar_resnet.ResNet(teacher.arch, channels, classes).eval()
    else:
        student, _ = cifar_resnet.load(args.student, args.arch)
    height, width = (int(v) for v in metadata.get("image_size", "32,32").split(","))
    mean, std = (per_channel(args.mean or metadata["mean"]), per_channel(args.std or metadata["std"]))
    low = (0.0 - mean) / std
    high = (1.0 - mean) / std

    hooks = [StatisticsHook(module) for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    targets = torch.arange(args.batch) % classes
    inputs = torch.randn(args.batch, channels, height, width, requires_grad=True)
    optimizer = torch.optim.Adam([inputs], lr=LEARNING_RATE)

    def step() -> Tensor:
        offsets = torch.randint(-JITTER, JITTER + 1, (2,)).tolist()
        x = torch.roll(inputs, shifts=offsets, dims=(2, 3))
        if torch.rand(()) < 0.5:
            x = x.flip(3)
        optimizer.zero_grad()
        teacher.zero_grad()
        student.zero_grad()
        logits = teacher(x)
        loss = F.cross_entropy(logits, targets)
        loss = loss + TV_L2 * sum(torch.norm(d) for d in one_pixel_differences(x))
        loss = loss + R_FEATURE * sum(hook.distance for hook in hooks)
        if not args.no_compete:
            loss = loss + COMPETE * (1.0 - jensen_shannon(student(x)[:, :classes], logits))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            inputs.copy_(torch.minimum(torch.maximum(inputs, low), high))
        return loss.detach()

    seconds = []
    for index in range(args.warmup + args.steps):
        begin = time.perf_counter()
        loss = step()
        if index >= args.warmup:
            seconds.append(time.perf_counter() - begin)
    if args.profile:
        profile(step, 4)
    result = {
        "step_seconds": statistics.median(seconds),
        "steps": args.steps,
        "arch": teacher.arch,
        "batch_size": args.batch,
        "threads": args.threads,
        "compete": not args.no_compete,
        "final_loss": loss.item(),
        "torch": torch.__version__,
    }
    print(
        json.dumps(result) if args.json else f"{result['step_seconds']:.4f} s a step (median of {args.steps})"
    )


if __name__ == "__main__":
    main()
