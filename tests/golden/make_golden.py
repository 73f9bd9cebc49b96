"""Golden values of every loss term and its gradient, computed independently of the daemon in PyTorch float64.

Usage:
    .venv/bin/python tests/golden/make_golden.py          # writes the three .safetensors files beside it
    .venv/bin/python tests/golden/make_golden.py --check  # exits 1 unless the committed files reproduce

The networks are CIFAR-type ResNets with one block a stage and one shortcut of each kind: identity,
zero-padded ("option A") and projected. Everything follows from fixed seeds of NumPy's PCG64, whose streams do
not change between PyTorch versions. Values are drawn in float64, rounded to the float32 that the files hold,
and all losses are computed in float64 from these rounded values.

Formulas: Yin et al. 2020, "Dreaming to Distill", arXiv:1912.08795, as coded by the published scripts where
the paper leaves something open (biased batch variance, norms over the whole batch, the clamped competition term).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
BATCH, CHANNELS, SIZE = 6, 3, 16
TEACHER_CLASSES, STUDENT_CLASSES = 5, 7
WIDTHS = (6, 10, 14)
TEMPERATURE = 3.0
METADATA = {
    "arch": "resnet8",
    "mean": "0.485,0.456,0.406",
    "std": "0.229,0.224,0.225",
    "image_size": f"{SIZE},{SIZE}",
}
TERMS = (
    "cross_entropy",
    "tv_l2",
    "tv_l1",
    "l2",
    "r_feature",
    "r_feature_first10",
    "compete_js",
    "compete_reference",
    "compete_agreement",
)


class PadShortcut(nn.Module):
    """Option A of He et al. 2015: every second pixel, then zero channels on both sides."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.low, self.high = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,C+extra,H/2,W/2]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.low, self.high))


class Block(nn.Module):
    """conv3x3, BN, ReLU, conv3x3, BN, plus the shortcut, ReLU."""

    def __init__(self, width_in: int, width_out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if shortcut == "pad":
            self.shortcut = PadShortcut(width_out - width_in)
        elif shortcut == "projection":
            conv = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Network(nn.Module):
    """A ResNet of three stages with one block each: identity, padded and projected shortcut."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = nn.Sequential(Block(WIDTHS[0], WIDTHS[0], 1, "identity"))
        self.layer2 = nn.Sequential(Block(WIDTHS[0], WIDTHS[1], 2, "pad"))
        self.layer3 = nn.Sequential(Block(WIDTHS[1], WIDTHS[2], 2, "projection"))
        self.linear = nn.Linear(WIDTHS[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N,3,H,W] normalised -> [N,classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """In the order of registration: bn1, layer1.0.bn1, ...; a shortcut's comes after its block's bn2."""
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]


def draw_weights(classes: int, seed: int, head_scale: float) -> dict[str, Tensor]:
    """float32 weights at a sensible scale; no batch norm looks like a default initialisation."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, like in Network(classes).state_dict().items():
        shape = tuple(like.shape)
        if name.endswith("num_batches_tracked"):
            continue  # not part of the network's function; the daemon does not keep it
        elif name.endswith("running_mean"):
            value = rng.normal(0.0, 0.5, shape)
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 2.0, shape)
        elif name == "linear.weight":
            value = rng.normal(0.0, head_scale, shape)
        elif name == "linear.bias":
            value = rng.normal(0.0, 0.5, shape)
        elif name.endswith("bias"):
            value = rng.normal(0.0, 0.3, shape)
        elif len(shape) == 1:  # gamma
            value = rng.uniform(0.5, 1.5, shape)
        else:  # He initialisation over the fan-in
            value = rng.normal(0.0, (2.0 / np.prod(shape[1:])) ** 0.5, shape)
        weights[name] = torch.from_numpy(value.astype(np.float32))
    return weights


def build(weights: dict[str, Tensor]) -> Network:
    """The network in float64 and eval mode, without gradients of parameters."""
    network = Network(weights["linear.bias"].numel()).double()
    missing, extra = network.load_state_dict(weights, strict=False)
    assert not extra and all(name.endswith("num_batches_tracked") for name in missing), (missing, extra)
    return network.eval().requires_grad_(False)


def norm(x: Tensor) -> Tensor:
    """The Frobenius norm over everything, not squared."""
    return x.square().sum().sqrt()


def one_pixel_differences(x: Tensor) -> list[Tensor]:
    """Of [N,C,H,W]: horizontal, vertical, and along both diagonals."""
    return [
        x[:, :, :, 1:] - x[:, :, :, :-1],
        x[:, :, 1:, :] - x[:, :, :-1, :],
        x[:, :, 1:, 1:] - x[:, :, :-1, :-1],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
    ]


def bn_distances(network: Network, x: Tensor) -> Tensor:
    """||running_var - var|| + ||running_mean - mean|| of every batch norm's input, in order: [B]."""
    seen: dict[nn.Module, Tensor] = {}
    handles = [
        bn.register_forward_pre_hook(lambda module, args: seen.__setitem__(module, args[0]))
        for bn in network.batch_norms()
    ]
    network(x)
    for handle in handles:
        handle.remove()
    distances = []
    for bn in network.batch_norms():
        value = seen[bn]
        mean = value.mean(dim=(0, 2, 3))
        var = (value - mean[None, :, None, None]).square().mean(dim=(0, 2, 3))  # biased, as published
        distances.append(norm(bn.running_var - var) + norm(bn.running_mean - mean))
    return torch.stack(distances)


def compete_js(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - JS(P, Q), the mean over the batch of logits [N,K], natural logarithms; nothing clamped."""
    log_p, log_q = F.log_softmax(student / TEMPERATURE, 1), F.log_softmax(teacher / TEMPERATURE, 1)
    p, q = log_p.exp(), log_q.exp()
    log_m = (0.5 * (p + q)).log()
    js = 0.5 * (p * (log_p - log_m)).sum(1) + 0.5 * (q * (log_q - log_m)).sum(1)
    return 1.0 - js.mean()


def compete_reference(student: Tensor, teacher: Tensor) -> Tensor:
    """As published: M before the clamps, no distribution renormalised after them, KL(M||P) for KL(P||M)."""
    p, q = F.softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    m = 0.5 * (p + q)
    p, q, m = p.clamp(0.01, 0.99), q.clamp(0.01, 0.99), m.clamp(0.01, 0.99)
    batch = student.shape[0]
    js = 0.5 * (m * (m.log() - p.log())).sum() / batch + 0.5 * (m * (m.log() - q.log())).sum() / batch
    return 1.0 - js.clamp(0.0, 1.0)


def compete_agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Fang et al. 2022: -KL(Q, P) at the same temperature of the images in which both see the same class."""
    log_p, log_q = F.log_softmax(student / TEMPERATURE, 1), F.log_softmax(teacher / TEMPERATURE, 1)
    agree = (student.argmax(1) == teacher.argmax(1)).to(student.dtype)
    return -((log_q.exp() * (log_q - log_p)).sum(1) * agree).mean()


def term(name: str, teacher: Network, student: Network, x: Tensor, targets: Tensor) -> Tensor:
    """One unweighted loss term of the images x [N,C,H,W] (normalised)."""
    if name == "cross_entropy":
        return -F.log_softmax(teacher(x), 1).gather(1, targets[:, None]).mean()
    if name == "tv_l2":
        return torch.stack([norm(d) for d in one_pixel_differences(x)]).sum()
    if name == "tv_l1":
        return torch.stack([d.abs().mean() for d in one_pixel_differences(x)]).sum()
    if name == "l2":
        return norm(x)
    if name == "r_feature":
        return bn_distances(teacher, x).sum()
    if name == "r_feature_first10":
        distances = bn_distances(teacher, x)
        return 10.0 * distances[0] + distances[1:].sum()
    teacher_logits = teacher(x)
    student_logits = student(x)[
        :, : teacher_logits.shape[1]
    ]  # a wider student competes on the teacher's classes
    forms = {
        "compete_js": compete_js,
        "compete_reference": compete_reference,
        "compete_agreement": compete_agreement,
    }
    return forms[name](student_logits, teacher_logits)


def objective(
    teacher_weights: dict[str, Tensor], student_weights: dict[str, Tensor], x32: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Everything that objective.safetensors holds, computed from its inputs."""
    teacher, student = build(teacher_weights), build(student_weights)
    x = x32.double()
    tensors = {
        "x": x32,
        "targets": targets,
        "teacher_logits": teacher(x).float(),
        "student_logits": student(x).float(),
        "r_feature.distances": bn_distances(teacher, x),
    }
    for name in TERMS:
        leaf = x.clone().requires_grad_(True)
        value = term(name, teacher, student, leaf, targets)
        (grad,) = torch.autograd.grad(value, leaf)
        tensors[f"{name}.value"] = value.detach().reshape(1)
        tensors[f"{name}.grad"] = grad
    return tensors


def centre_head(weights: dict[str, Tensor], x: Tensor) -> None:
    """Moves the head's bias so that the logits of [N,C,H,W] average to the bias that was drawn.

    A random network answers every image with nearly the same class; this lets the images differ.
    """
    mean = build(weights)(x.double()).mean(dim=0)
    weights["linear.bias"] = (2.0 * weights["linear.bias"].double() - mean).float()


def make() -> dict[str, dict[str, Tensor]]:
    """The three files' tensors."""
    rng = np.random.default_rng(22)
    # Noise of another strength and tint for each image, so that the logits differ between images.
    tint = rng.normal(0.0, 1.0, (BATCH, CHANNELS, 1, 1))
    strength = rng.uniform(0.4, 1.4, (BATCH, 1, 1, 1))
    noise = rng.normal(0.0, 1.0, (BATCH, CHANNELS, SIZE, SIZE))
    x = torch.from_numpy((tint + strength * noise).astype(np.float32))
    targets = torch.from_numpy(rng.permutation(BATCH) % TEACHER_CLASSES)
    # The heads are scaled so that some probabilities at temperature 3 lie below the published clamp of 0.01
    # and the clamped term still does not saturate.
    teacher = draw_weights(TEACHER_CLASSES, seed=20, head_scale=2.5)
    student = draw_weights(STUDENT_CLASSES, seed=23, head_scale=1.5)
    for weights in (teacher, student):
        centre_head(weights, x)
    return {"teacher": teacher, "student": student, "objective": objective(teacher, student, x, targets)}


def sanity(tensors: dict[str, Tensor]) -> None:
    """What makes these inputs good ones."""
    probabilities = torch.cat(
        [
            F.softmax(tensors["teacher_logits"] / TEMPERATURE, 1),
            F.softmax(tensors["student_logits"][:, :TEACHER_CLASSES] / TEMPERATURE, 1),
        ]
    )
    clamped = int(((probabilities < 0.01) | (probabilities > 0.99)).sum())
    value = tensors["compete_reference.value"].item()
    assert 0.05 < value < 0.95, f"compete_reference is saturated: {value}"
    value = tensors["compete_agreement.value"].item()
    assert value < -0.01, f"compete_agreement: teacher and student never agree: {value}"
    assert 0 < clamped < probabilities.numel() // 2, f"{clamped} probabilities are clamped"
    for name in TERMS:
        assert torch.isfinite(tensors[f"{name}.grad"]).all() and tensors[f"{name}.grad"].abs().max() > 0, name


def check(files: dict[str, dict[str, Tensor]]) -> bool:
    """Whether the committed files hold these tensors: inputs exactly, results to 1e-9, logits to 1e-6."""
    good = True
    for stem, tensors in files.items():
        committed = load_file(HERE / f"{stem}.safetensors")
        if committed.keys() != tensors.keys():
            print(f"{stem}.safetensors: tensors differ: {sorted(committed.keys() ^ tensors.keys())}")
            good = False
        for name in committed.keys() & tensors.keys():
            ours, theirs = tensors[name], committed[name]
            if ours.dtype == torch.float64:
                same = (ours - theirs).norm() <= 1e-9 * ours.norm()
            elif name.endswith("_logits"):
                same = torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
            else:
                same = torch.equal(ours, theirs)
            if not same:
                print(f"{stem}.safetensors: {name} does not reproduce")
                good = False
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed files, write nothing"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = make()
    sanity(files["objective"])
    if args.check:
        good = check(files)
        print("golden files reproduce" if good else "golden files DO NOT reproduce")
        return 0 if good else 1
    for stem, tensors in files.items():
        metadata = {} if stem == "objective" else METADATA
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, HERE / f"{stem}.safetensors", metadata=metadata)
        print(f"wrote {HERE / stem}.safetensors ({(HERE / f'{stem}.safetensors').stat().st_size} bytes)")
    for name in TERMS:
        value, grad = files["objective"][f"{name}.value"].item(), files["objective"][f"{name}.grad"]
        print(f"{name:18} {value:.9f}  |grad| {grad.norm():.6e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
