"""The stream of dreams as a PyTorch dataset."""

import logging
import uuid
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

from torch.utils.data import IterableDataset, get_worker_info

from dreamfeed._batch import Batch, BatchInfo
from dreamfeed._channel import Endpoint, Tls
from dreamfeed._loader import Board, Worker, streams
from dreamfeed._position import Origin, Place, Positions, Start, merged
from dreamfeed._ranks import check_shard, rank_and_ranks, refuse_unfit_loaders
from dreamfeed._reader import PIXELS, SAMPLING, Reader, Request, Source

_log = logging.getLogger("dreamfeed")

_BLIND = (
    "what the DataLoader's collate_fn returns has no info, so that nobody knows which batches were taken from its "
    "workers: let it return the Batch, or its info beside the rest, or give num_workers=0"
)


class DreamStream(IterableDataset[Batch]):
    """Batches of dreams from a daemon, without end, as ``images, labels, teacher_logits, info`` (:class:`Batch`).

        loader = DataLoader(DreamStream("127.0.0.1:7461", batch_size=128, replay=0.5), batch_size=None, num_workers=1)
        for images, labels, teacher_logits, info in loader:
            ...

    The daemon makes the batches, so the DataLoader gets ``batch_size=None``. Every worker opens a stream of its own,
    prefetches on a background thread, and goes on from its last cursor when the daemon was away.

    **Ranks and workers.** Each reader gets its own part of the fresh images, disjoint and together complete: reader
    ``rank * workers + worker`` of ``ranks * workers``. Rank and ranks come from `shard`, else from
    ``torch.distributed``, else from ``RANK`` and ``WORLD_SIZE``. Replayed images come from the whole log for everybody.

    **Positions.** Iterating again goes on where the trainer stopped: after the last batch that its DataLoader handed
    out, with any number of workers, and what was prefetched beyond is received again. One iteration at a time.
    :meth:`state_dict` is that position. Where a loader fetches ahead of the training (Lightning, Accelerate), call
    :meth:`record` with each batch that was trained on, in order; from the first call on that is the position. Every
    rank keeps its own state. torchdata's ``StatefulDataLoader`` keeps the position in its own.

    Args:
        address: ``"HOST:PORT"``, with ``http://`` or ``https://`` in front or not (https turns TLS on).
        start: ``"latest"`` (the next image to be made), ``"earliest"`` (the oldest still held), a sequence, or a cursor
            (:attr:`BatchInfo.cursor`). A loaded state wins.
        batch_size: images a batch; default: what each chunk has of this reader's, with replay one synthesis batch.
            Without replay a batch waits until it is full.
        replay: the share of each batch that is replayed even where enough fresh images wait, 0 to 1. With any replay a
            batch never waits for fresh images while the log holds some.
        sampling: how replayed images are chosen: ``"uniform"``, ``"recency"`` or ``"competition"``.
        max_age: images older than this, in seconds or as a timedelta, are passed over.
        max_student_versions: images made against a student more versions back than this are passed over.
        classes: only images made for these classes, by index or by the teacher's name for them.
        pixels: ``"f32"`` or ``"f16"`` (normalized as the teacher wants them) or ``"u8"`` (0..255).
        shard: (rank, ranks) where they are not to be derived; a DataLoader's workers still divide it among them.
        token: sent as ``authorization: Bearer TOKEN``. Refused without TLS, except to loopback.
        tls: ``True`` for the system's authorities, or a :class:`Tls`.
        prefetch: batches that each reader holds ready, at least 1.
        on_gap: what to do where the next image is not there any more: ``"raise"``, or ``"skip"`` to the next that is,
            with a warning in the log.
        give_up_after: seconds of failing attempts to reach the daemon after which iterating raises
            :class:`UnavailableError`; ``None``: never.

    Raises:
        ValueError: an argument is malformed, or the token would travel in the clear to another machine.

    Iterating raises
        :class:`PositionLostError`, :class:`DataLossError` where the next image is not there: ``next_sequence`` tells
            where a stream can go on (``stream.seek(error.next_sequence)``), with `on_gap` "raise";
        :class:`UnavailableError` after `give_up_after`;
        :class:`InvalidRequestError` where the daemon refuses the request; the message names the field.
    """

    def __init__(
        self,
        address: str,
        *,
        start: Start = "latest",
        batch_size: int | None = None,
        replay: float = 0.0,
        sampling: Literal["uniform", "recency", "competition"] = "uniform",
        max_age: float | timedelta | None = None,
        max_student_versions: int | None = None,
        classes: Sequence[int | str] | None = None,
        pixels: Literal["f32", "f16", "u8"] = "f32",
        shard: tuple[int, int] | None = None,
        token: str | None = None,
        tls: Tls | bool | None = None,
        prefetch: int = 2,
        on_gap: Literal["raise", "skip"] = "raise",
        give_up_after: float | None = 300.0,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1, or None for the daemon's")
        if not 0.0 <= replay <= 1.0:
            raise ValueError(f"replay is {replay}; give a share from 0 to 1")
        if sampling not in SAMPLING:
            raise ValueError(f"sampling is {sampling!r}; give one of {', '.join(SAMPLING)}")
        if pixels not in PIXELS:
            raise ValueError(f"pixels is {pixels!r}; give one of {', '.join(PIXELS)}")
        if prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}; give at least 1")
        if on_gap not in ("raise", "skip"):
            raise ValueError(f"on_gap is {on_gap!r}; give 'raise' or 'skip'")
        if classes is not None and (isinstance(classes, str) or not classes):
            raise ValueError(
                f"classes is {classes!r}; give a list of indices or names, or None for every class"
            )
        if max_student_versions is not None and max_student_versions < 0:
            raise ValueError(f"max_student_versions is {max_student_versions}; give 0 or more")
        if isinstance(max_age, timedelta):
            max_age = max_age.total_seconds()
        if max_age is not None and max_age < 0:
            raise ValueError(f"max_age is {max_age} s; give 0 or more")
        if shard is not None:
            check_shard(*shard)
        _check_start(start)
        self._source = Source(
            endpoint=Endpoint.of(address, token, tls),
            request=Request(
                batch_size=batch_size or 0,
                replay=float(replay),
                sampling=sampling,
                max_age=max_age,
                max_student_versions=max_student_versions,
                classes=tuple(classes or ()),
                pixels=pixels,
            ),
            prefetch=prefetch,
            on_gap=on_gap,
            give_up_after=give_up_after,
        )
        self._start: Start = start
        self._shard = shard
        # Rank and ranks of the process that pickled this, for a spawned worker, which knows of no process group.
        self._parent_rank: tuple[int, int] | None = None
        self._positions = Positions()
        # How often they were moved by hand; None where a worker loaded its own state.
        self._moves: int | None = 0
        # What a worker yielded and the trainer had not taken when it last looked: numbers, and the places after them.
        self._untaken: deque[tuple[int, Place]] = deque()
        self._board = Board()
        self._iteration: weakref.ref[_Iteration] | None = None
        self._name = uuid.uuid4().hex
        streams[self._name] = self

    def __repr__(self) -> str:
        return f"DreamStream({self._source.endpoint.target!r}, {self._source.request})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parent_rank": self._rank(), "_iteration": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._name in streams:  # a copy beside the original
            self._name = uuid.uuid4().hex
        streams[self._name] = self

    # What a DataLoader gets -------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        refuse_unfit_loaders(has_shard=self._shard is not None)
        info = get_worker_info()
        workers, number = (info.num_workers, info.id) if info else (1, 0)
        rank, ranks = self._rank()
        shard = (rank * workers + number, ranks * workers)
        refusal = self._follow_trainer(number, shard) if info is not None else None
        place, notice = self._positions.begin(shard, workers, self._start)
        if notice is not None and shard[0] == 0:
            _log.warning("%s", notice)
        last = self._board.taken(number) if info is not None else 0
        if info is not None:
            self._untaken = deque([(last, place)])
        origin = Origin(
            stream=self._name,
            moves=self._moves,
            worker=None if info is None else (number, workers),
            number=last,
            begun=place,
            before=place,
            after=place,
        )
        iteration = _Iteration(self, shard, origin, Worker() if info else None, refusal)
        self._iteration = weakref.ref(iteration)
        return iteration

    def _follow_trainer(self, number: int, shard: tuple[int, int]) -> str | None:
        """In a worker that lived on: back to the last batch that was taken from it. Why that cannot be, if so."""
        if self._board.is_blind:
            return _BLIND
        if self._untaken:
            if self._moves is not None and self._moves != self._board.moves:
                return (
                    "the position was moved by seek or load_state_dict, of which the DataLoader's persistent workers "
                    "cannot hear: make a new DataLoader"
                )
            taken = self._board.taken(number)
            self._positions.put(shard, next(place for last, place in self._untaken if last >= taken))
        return None

    def _yielded(self, batch: Batch, *, by_worker: bool) -> None:
        info = batch.info
        assert info.origin is not None
        self._check_moves(info.origin)
        if by_worker:
            self._positions.put(info.shard, info.origin.after)
            taken = self._board.taken(info.origin.worker[0]) if info.origin.worker else 0
            while self._untaken and self._untaken[0][0] < taken:
                self._untaken.popleft()
            self._untaken.append((info.origin.number, info.origin.after))
        else:
            self._check_rank(info)
            self._positions.hand(info.shard, info.origin)

    def _taken_from_worker(self, info: BatchInfo | None) -> None:
        """In the trainer: its DataLoader hands it this batch of a worker's, or one that does not say which it is."""
        if info is None or info.origin is None or info.origin.worker is None:
            self._board.set_blind(not self._positions.is_recorded)
            return
        self._check_moves(info.origin)
        self._check_rank(info)
        self._positions.hand(info.shard, info.origin)
        if not self._positions.is_recorded:
            self._board.take(info.origin.worker[0], info.origin.number)

    def _check_moves(self, origin: Origin) -> None:
        if origin.moves is not None and origin.moves != self._moves:
            raise RuntimeError(
                "the position was moved by seek or load_state_dict after iter(loader), which goes on where it was: do "
                "that before iter(loader), or iterate anew"
            )

    def _check_rank(self, info: BatchInfo) -> None:
        assert info.origin is not None
        number, workers = info.origin.worker or (0, 1)
        rank, ranks = self._rank()
        if info.shard != (rank * workers + number, ranks * workers):
            raise RuntimeError(
                f"this is rank {rank} of {ranks}, and the iteration began as {info.shard[0]} of {info.shard[1]}, "
                "so that ranks would get the same images: call init_process_group before iter(loader), or pass "
                "DreamStream(..., shard=(rank, ranks))"
            )

    def set_epoch(self, epoch: int) -> None:
        """What some loaders call before an epoch. A stream has none: each goes on where the last one stopped."""
        refuse_unfit_loaders(has_shard=self._shard is not None)

    # Positions --------------------------------------------------------------------------------------------------------

    def record(self, batch: Batch | BatchInfo) -> None:
        """Makes `batch` the last one of its reader for :meth:`state_dict` and for the next iteration.

        Not needed where each batch is trained on as the DataLoader hands it out. Loaders that fetch ahead (Lightning,
        Accelerate) need it: call it with each batch that was trained on, in order.

        Raises:
            ValueError: the batch does not follow the last one that was recorded, or the position that was loaded.
        """
        info = batch if isinstance(batch, BatchInfo) else batch[3]
        if info.origin is None:
            raise ValueError("this info is of no stream; give record the batch that the DataLoader yielded")
        self._positions.record(info.shard, info.origin)
        self._board.set_blind(False)
        if info.origin.worker is not None:
            self._board.take(info.origin.worker[0], info.origin.number)

    def seek(self, start: Start) -> None:
        """Lets the next iteration begin at `start`, whatever was read or loaded before."""
        _check_start(start)
        self._start = start
        self._move(Positions())

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was yielded, or that was recorded, where :meth:`record` was called.

        Of plain strings and numbers: for torch.save, or JSON.
        """
        iteration = self._iteration() if self._iteration is not None else None
        if iteration is not None:
            iteration.settle()
        if self._board.is_blind:
            raise RuntimeError(_BLIND)
        return self._positions.state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Lets the next iteration go on from a :meth:`state_dict`.

        With another number of ranks or workers all of them start from the lowest position (which needs the states of
        all ranks, :func:`merge_states`), and a warning in the log says how many images come twice.

        Raises:
            ValueError: this is no state of a DreamStream, or the stream is being read.
        """
        iteration = self._iteration() if self._iteration is not None else None
        if iteration is not None and iteration.is_open:
            raise ValueError(
                "this stream is already being read, and goes on where it is: load its position before iter(loader), or "
                "close the iterator"
            )
        self._move(Positions.of(state_dict))

    def _move(self, positions: Positions) -> None:
        self._positions = positions
        self._untaken.clear()
        if get_worker_info() is not None:
            self._moves = None
            return
        self._board.move()
        self._moves = self._board.moves

    def _rank(self) -> tuple[int, int]:
        return self._shard if self._shard is not None else rank_and_ranks(self._parent_rank)


class _Iteration(Iterator[Batch]):
    """Open from iter() on, also before the first batch was asked for."""

    def __init__(
        self,
        stream: DreamStream,
        shard: tuple[int, int],
        origin: Origin,
        worker: Worker | None,
        refusal: str | None,
    ) -> None:
        self._stream, self._shard, self._origin, self._worker = stream, shard, origin, worker
        # Raised by next(): a worker that lives on cannot tell its DataLoader earlier.
        self._refusal = refusal
        self._reader: Reader | None = None
        self.is_open = True

    def __next__(self) -> Batch:
        if not self.is_open:
            raise StopIteration
        try:
            if self._refusal is not None:
                raise RuntimeError(self._refusal)
            if self._reader is None:
                self._reader = Reader(self._stream._source, self._shard, self._origin, self._worker)
            batch = self._reader.next()
            if batch is None:
                raise StopIteration
            self._stream._yielded(batch, by_worker=self._worker is not None)
            self._origin = batch.info.origin or self._origin
            return batch
        except BaseException:
            self.close()
            raise

    def settle(self) -> None:
        """Where "latest" was found to be is the position, also if no batch came yet."""
        begun = self._reader.begun() if self._reader is not None else None
        untouched = self._origin.after == self._origin.begun and not self._stream._positions.places
        if untouched and begun is not None and isinstance(begun.start, int):
            self._stream._positions.put(self._shard, begun)

    def close(self) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self.settle()
        if self._reader is not None:
            self._reader.close()

    def __del__(self) -> None:
        self.close()


def merge_states(*states: Mapping[str, Any]) -> dict[str, Any]:
    """One state of the states of several ranks, which every rank can load.

    Raises:
        ValueError: the states are of different runs: they speak of different numbers of readers.
    """
    return merged(states)


def _check_start(start: Start) -> None:
    if isinstance(start, bytes):
        fine = bool(start)
    elif isinstance(start, int):
        fine = not isinstance(start, bool) and start >= 0
    else:
        fine = start in ("latest", "earliest")
    if not fine:
        raise ValueError(f"start is {start!r}; give 'latest', 'earliest', a sequence from 0 on, or a cursor")
