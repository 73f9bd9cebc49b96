"""Prunes a daemon's teacher without data: the filters that matter least on its dreams are removed for good.

    dreamfeed serve --teacher teacher.safetensors --preset cifar10-live
    python examples/python/prune.py --connect 127.0.0.1:7461 --model teacher.safetensors --remove 0.5
    dreamfeed evaluate --model pruned.safetensors --data test_batch.bin

Filters go round by round, by first-order Taylor importance (Molchanov et al., CVPR 2019), while what is left learns
from the whole network's logits. Needs torch-pruning, which cannot trace zero-padded shortcuts, so that only filters
inside of blocks go here; `dreamfeed prune` removes the others as well.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning as tp
from dreamfeed import Client, DreamStream, StudentPusher, save_student
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar_resnet

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--connect", default="127.0.0.1:7461")
parser.add_argument("--model", type=Path, required=True, help="the daemon's teacher, a safetensors file")
parser.add_argument("--arch", help="the architecture; default: what the file says")
parser.add_argument("--remove", type=float, default=0.5, help="the part of the filters inside of blocks")
parser.add_argument("--rounds", type=int, default=10)
parser.add_argument("--steps-per-round", type=int, default=30)
parser.add_argument("--fine-tune-steps", type=int, default=600)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--push-every", type=int, default=30)
parser.add_argument("--temperature", type=float, default=4.0)
parser.add_argument("--out", type=Path, default=Path("pruned.safetensors"))
args = parser.parse_args()

client = Client(args.connect)
teacher = client.describe().teacher
stream = DreamStream(args.connect, start="earliest", batch_size=args.batch_size, replay=0.5)
batches = enumerate(DataLoader(stream, batch_size=None))
network, _ = cifar_resnet.load(args.model, args.arch)
_, (images, _, teacher_logits, _) = next(batches)
if (network(images).argmax(1) == teacher_logits.argmax(1)).float().mean() < 0.9:
    sys.exit(f"{args.model} is not what {args.connect} dreams from: give --model the daemon's teacher")

blocks = [module for module in network.modules() if isinstance(module, cifar_resnet.Block)]
# Of each channel between a block's convolutions, by the batch norm between them.
importance: dict[nn.Module, Tensor | float] = {}
pruner = tp.BasePruner(
    network,
    images[:1],
    importance=lambda group: next(importance[dep.layer] for dep, _ in group if dep.layer in importance),
    global_pruning=True,
    pruning_ratio=args.remove,
    max_pruning_ratio=0.9,
    iterative_steps=args.rounds,
    ignored_layers=[network.conv1, network.linear, *(block.conv2 for block in blocks)],
)
network.train()  # where batch norms tell it from the teacher, or the first gradients would all be zero


def learn(steps: int) -> None:
    # The parameters are new ones after each removal.
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    importance.clear()
    for step, (images, _, teacher_logits, _) in islice(batches, steps):
        found = F.log_softmax(network(images) / args.temperature, 1)
        wanted = F.softmax(teacher_logits / args.temperature, 1)
        loss = F.kl_div(found, wanted, reduction="batchmean") * args.temperature**2
        optimizer.zero_grad()
        loss.backward()
        for norm in (block.bn1 for block in blocks):
            # To first order the loss would change by this without the channel: the gradient of a gate behind it.
            change = (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach()
            importance[norm] = importance.get(norm, 0.0) + change**2
        optimizer.step()
        schedule.step()
        if step % args.push_every == 0:
            pusher.push(network, step)
            print(f"step {step}  loss {loss:.3f}")


with StudentPusher(client) as pusher:
    for number in range(1, args.rounds + 1):
        learn(args.steps_per_round)
        pruner.step()
        operations, parameters = tp.utils.count_ops_and_params(network, images[:1])
        print(f"round {number}: {operations / 1e6:.2f} M multiply-adds, {parameters:,.0f} parameters left")
    learn(args.fine_tune_steps)
    pusher.push(network, args.rounds * args.steps_per_round + args.fine_tune_steps)
save_student(network, args.out, teacher)
