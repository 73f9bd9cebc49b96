"""The CIFAR ResNets in plain PyTorch, and the safetensors files in which Dreamfeed reads and writes them.

He et al. 2015, arXiv:1512.03385, section 4.2: depth 6n+2, three stages of n blocks with 16, 32 and 64 channels,
option-A shortcuts. Tensor names are those of the common public CIFAR checkpoints.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions; option A: every second pixel, new channels zero-padded on both sides."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.stride, self.extra = stride, width_out - width_in

    def forward(self, x: Tensor) -> Tensor:
        """[N,in,H,W] -> [N,out,H/stride,W/stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            low, high = self.extra // 2, self.extra - self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, low, high))
        return F.relu(out + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of an architecture name such as "resnet20"."""

    def __init__(self, arch: str, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        depth = int(arch.removeprefix("resnet"))
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"{arch}: give a CIFAR ResNet of depth 6n+2")
        self.arch = arch
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage in range(3):
            blocks = []
            for index in range((depth - 2) // 6):
                blocks.append(Block(width, 16 << stage, 2 if stage > 0 and index == 0 else 1))
                width = 16 << stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] normalised -> [N,classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def weights_of(network: ResNet) -> dict[str, Tensor]:
    """The tensors that Dreamfeed keeps: everything but the step counters of the batch norms."""
    state = network.state_dict()
    return {
        name: t.detach().contiguous() for name, t in state.items() if not name.endswith("num_batches_tracked")
    }


def save(
    network: ResNet,
    path: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: tuple[int, int],
    class_names: Sequence[str] = (),
    more: Mapping[str, str] | None = None,
) -> None:
    """Writes weights and everything that Dreamfeed has to know beside them; mean and std in units of pixel / 255."""
    metadata = {
        "arch": network.arch,
        "mean": ",".join(f"{v:.6g}" for v in mean),
        "std": ",".join(f"{v:.6g}" for v in std),
        "image_size": ",".join(str(v) for v in image_size),
        "class_names": json.dumps(list(class_names)),
    }
    metadata.update(more or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(weights_of(network), partial, metadata=metadata)
    partial.replace(path)  # never a torn file under the final name


def load(path: Path, arch: str | None = None) -> tuple[ResNet, dict[str, str]]:
    """A network in eval mode and its file's metadata."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    weights = {name.replace("fc.", "linear."): value for name, value in weights.items()}
    arch = arch or metadata.get("arch")
    if arch is None:
        raise ValueError(f"{path} does not name its architecture; pass one")
    network = ResNet(arch, weights["conv1.weight"].shape[1], weights["linear.bias"].numel())
    missing, extra = network.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or extra:
        raise ValueError(f"{path} is not a {arch} with option-A shortcuts: missing {missing}, extra {extra}")
    return network.eval(), metadata


def per_channel(text: str) -> Tensor:
    """ "0.485,0.456,0.406" -> [1,C,1,1]."""
    return torch.tensor([float(v) for v in text.split(",")]).view(1, -1, 1, 1)


def normalize(pixels: Tensor, metadata: Mapping[str, str]) -> Tensor:
    """[N,C,H,W] of 0..255 -> what the network takes: (pixel / 255 - mean) / std."""
    return (pixels.float() / 255.0 - per_channel(metadata["mean"])) / per_channel(metadata["std"])
