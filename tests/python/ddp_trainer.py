"""One rank of a training under DistributedDataParallel, for test_ddp.py: a process of its own imports it."""

import os
import signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dreamfeed import DreamStream
from torch import nn
from torch.nn.parallel import DistributedDataParallel

RANKS = 2


def train(
    rank: int, address: str, folder: Path, run: str, steps: int, batch_size: int, die: tuple[int, int]
) -> None:
    """Trains until step `steps`, from this rank's checkpoint if there is one, and keeps one after every step.

    In the step `die` = (rank, step) that rank is killed as it has received its batch.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = f"file://{folder}/{run}.rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), RANKS, rank)
    stream = DreamStream(address, start="earliest", batch_size=batch_size, prefetch=3)
    model = DistributedDataParallel(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    path = folder / f"rank{rank}.pt"
    step, seen = 0, []
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        stream.load_state_dict(checkpoint["stream"])
        step, seen = checkpoint["step"], checkpoint["seen"]
    batches = iter(stream)
    while step < steps:
        images, _, teacher_logits, info = next(batches)
        step += 1
        if (rank, step) == die:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = F.mse_loss(model(images), teacher_logits)
        optimizer.zero_grad()
        loss.backward()  # where the ranks meet
        optimizer.step()
        seen += info.sequence.tolist()
        state = {"model": model.state_dict(), "stream": stream.state_dict(), "step": step, "seen": seen}
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    batches.close()
    dist.destroy_process_group()
