"""Makes the graph_*.safetensors beside it: small networks as `save_network` writes them, and what PyTorch says of them.

Run once (`python tests/golden/make_graphs.py`). In `graph_NAME.reference.safetensors`, for the two images of the golden
sample and the loss Σ logits²: `gradient`, its gradient at the images in evaluation mode, in f64; and in training mode
`trained.logits`, `trained.gradient` and, by name, every running statistic after it, where no dropout is in the way.
`graph_resnet.safetensors` is `teacher.safetensors`, a network that has a name, as `save_network` writes it.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parents[1] / "python"), str(HERE.parent / "python")]

from conftest import MEAN, STD  # noqa: E402
from dreamfeed import load_network, save_network  # noqa: E402
from dreamfeed.graph import golden_images  # noqa: E402
from make_golden import SIZE as RESNET_SIZE  # noqa: E402
from make_golden import build  # noqa: E402
from test_network import BODIES, SIZE, Classified, randomized, save  # noqa: E402


def differentiated(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    images = images.detach().requires_grad_()
    logits = network(images)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), images)[0]


def main() -> None:
    for name, (body, channels) in BODIES.items():
        torch.manual_seed(len(name))
        path = HERE / f"graph_{name}.safetensors"
        save(randomized(Classified(body(), channels)), path)
        network = load_network(path).double()
        images = golden_images(3, *SIZE).double()
        reference = {"gradient": differentiated(network, images)[1]}
        if not any(isinstance(layer, nn.Dropout) for layer in network.modules()):
            reference["trained.logits"], reference["trained.gradient"] = differentiated(
                network.train(), images
            )
            state = network.state_dict()
            reference |= {key: state[key] for key in state if "running_" in key}
        save_file(
            {key: value.contiguous() for key, value in reference.items()},
            HERE / f"graph_{name}.reference.safetensors",
        )
    resnet = build(load_file(HERE / "teacher.safetensors"))
    save_network(
        resnet, HERE / "graph_resnet.safetensors", image_size=(RESNET_SIZE, RESNET_SIZE), mean=MEAN, std=STD
    )


if __name__ == "__main__":
    main()
