"""What a DataLoader's workers have to do with the process that trains: who took what, and when it is over."""

import inspect
import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils.data import dataloader

from dreamfeed._batch import BatchInfo
from dreamfeed._fork import FORKSERVER, Alarm
from dreamfeed.errors import DreamfeedError

# A DataLoader's bound is the operating system's; this many fit one page of memory.
_MOST_WORKERS = 510


class Board:
    """Memory that a stream shares with its copies in a DataLoader's workers, which may outlive an epoch.

    Only the trainer writes it, and before the workers hear of the next epoch.
    """

    def __init__(self) -> None:
        # How often the position was moved by hand; whether batches reach the trainer without their info; and for each
        # worker the number of its last batch that was taken.
        self._values = torch.zeros(2 + _MOST_WORKERS, dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._values.share_memory_()  # it is already, unless this is a copy for something else than a worker

    @property
    def moves(self) -> int:
        return int(self._values[0])

    def move(self) -> None:
        self._values[0] += 1
        self._values[1] = 0

    @property
    def is_blind(self) -> bool:
        return bool(self._values[1])

    def set_blind(self, blind: bool) -> None:
        self._values[1] = int(blind)

    def taken(self, worker: int) -> int:
        return int(self._values[2 + worker])

    def take(self, worker: int, number: int) -> None:
        self._values[2 + worker] = number


class Worker:
    """The DataLoader's worker that this process is, of which the DataLoader takes leave while it waits for images.

    It says so in an event that only the worker's loop looks at, between two batches; and waits five seconds for it.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._done: Any = None
        frame = inspect.currentframe()
        while frame is not None and self._done is None:
            if frame.f_code.co_name == "_worker_loop":
                self._done = frame.f_locals.get("done_event")
            frame = frame.f_back

    def is_over(self) -> bool:
        return os.getppid() != self._parent or (self._done is not None and self._done.is_set())


#: The streams of this process by name. What workers read comes back with the name of the stream.
streams: WeakValueDictionary[str, Any] = WeakValueDictionary()


def info_of(data: object, depth: int = 2) -> BatchInfo | None:
    """The BatchInfo in what a DataLoader yields: a Batch, or what a collate_fn made of it."""
    if isinstance(data, BatchInfo):
        return data
    if depth and isinstance(data, list | tuple | Mapping):
        for value in data.values() if isinstance(data, Mapping) else data:
            found = info_of(value, depth - 1)
            if found is not None:
                return found
    return None


def _watched(following: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(following)
    def __next__(self: Any) -> Any:
        try:
            data = following(self)
        except RuntimeError as error:
            # How torch says that a worker died; why, it does not say in the same words everywhere.
            if any(worker.exitcode == -Alarm.SIGNAL for worker in getattr(self, "_workers", ())):
                self._shutdown_workers()  # else torch raises for this one again, wherever the trainer is then
                raise DreamfeedError(FORKSERVER) from error
            raise
        if self._num_workers:
            info = info_of(data)
            origin = None if info is None else info.origin
            stream = streams.get(origin.stream) if origin is not None else self._dataset
            taken = getattr(stream, "_taken_from_worker", None)
            if taken is not None:
                taken(info)
        return data

    return __next__


# The only place where a batch is known to have reached the trainer, and not to lie ready in a queue, in another
# thread or in another worker's turn. The stream itself lives in the workers, which end with the epoch, and torch has
# no hook there.
_iterator = dataloader._BaseDataLoaderIter
_iterator.__next__ = _watched(_iterator.__next__)  # type: ignore[method-assign, assignment]
