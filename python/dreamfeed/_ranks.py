"""Which part of the images a process gets, and loaders that would deal them out a second time."""

import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

_COLLATING = ("torch.utils.data", "torchdata.")
# Where one process reads for all ranks, and the classes that do.
_DEALING = ("accelerate.", "transformers.")
_DEALERS = ("DataLoaderDispatcher", "IterableDatasetShard")


def check_shard(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(f"shard is ({index}, {count}); give (rank, ranks) with 0 <= rank < ranks")


def rank_and_ranks(parent: tuple[int, int] | None) -> tuple[int, int]:
    """This process's rank of how many: of torch.distributed, of the process that spawned this worker, of Ray Train, or
    of a launcher's environment."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    found = parent or _ray()
    if found is not None:
        return found
    rank, ranks = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or ranks is None:
        return 0, 1
    check_shard(int(rank), int(ranks))
    return int(rank), int(ranks)


def _ray() -> tuple[int, int] | None:
    """The rank of a worker of Ray Train, which need not have a process group."""
    train = sys.modules.get("ray.train")
    if train is None:
        return None
    try:
        context = train.get_context()
        rank, ranks = context.get_world_rank(), context.get_world_size()
    except (
        Exception
    ):  # this process is no worker of a training; how Ray says that differs between its versions
        return None
    return None if rank is None or ranks is None else (rank, ranks)


def refuse_unfit_loaders(*, has_shard: bool) -> None:
    """Looks who is about to iterate over a stream.

    Raises:
        ValueError: a DataLoader that would put batches together, or one that deals images out to all ranks, which would
            each get a part of one rank's part.
    """
    for module, variables in _loaders():
        if variables.get("auto_collation") is True and not module.startswith(_DEALING):
            raise ValueError(
                "this DataLoader would put batches of the stream together: write DataLoader(stream, batch_size=None), "
                "and give the number of images as DreamStream(..., batch_size=64)"
            )
        loader = variables.get("self")
        if has_shard or not any(kind.__name__ in _DEALERS for kind in type(loader).__mro__):
            continue
        ranks = getattr(getattr(loader, "state", loader), "num_processes", 1)
        if ranks > 1:
            raise ValueError(
                f"this loader deals out to {ranks} processes what one reads, and each process of a DreamStream reads a "
                "part of its own: leave the loader out of accelerator.prepare(...), and write DataLoader(stream, "
                "batch_size=None)"
            )


def _loaders() -> Iterator[tuple[str, dict[str, Any]]]:
    """The modules and variables of the loaders that are calling, in this process or, forked, in the one before."""
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        # Not of everybody: a frame that was asked for its variables keeps them.
        if module.startswith((*_COLLATING, *_DEALING)):
            yield module, frame.f_locals
        frame = frame.f_back
