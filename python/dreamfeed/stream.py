"""The stream of dreams as a PyTorch dataset."""

import atexit
import inspect
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import grpc
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from dreamfeed._backoff import Backoff
from dreamfeed._batch import Batch, BatchInfo, Normalization, decode
from dreamfeed._channel import Endpoint, Tls
from dreamfeed._proto import dreamfeed_pb2 as pb
from dreamfeed._proto import dreamfeed_pb2_grpc as pb_grpc
from dreamfeed.errors import DreamfeedError, GapError, InvalidRequestError, UnavailableError, translate

_log = logging.getLogger("dreamfeed")

#: Where a stream starts: the next image to be made, the oldest, a sequence, or a cursor.
Start = Literal["latest", "earliest"] | int | bytes

_PIXELS = {
    "u8": pb.PIXEL_FORMAT_U8,
    # Normalized here: the same floats in a quarter of the bytes.
    "f32": pb.PIXEL_FORMAT_U8,
    "f16": pb.PIXEL_FORMAT_F16_NORMALIZED,
}
_SAMPLING = {
    "uniform": pb.REPLAY_SAMPLING_UNIFORM,
    "recency": pb.REPLAY_SAMPLING_RECENCY,
    "competition": pb.REPLAY_SAMPLING_COMPETITION,
}
_STREAM_PATH = f"/{pb.DESCRIPTOR.services_by_name['DreamfeedService'].full_name}/Stream"
_RETRIED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
_DESCRIBE_SECONDS = 30.0
# How often a worker that waits for images looks whether it is still wanted.
_LOOK_SECONDS = 0.25
_FORMAT = 1


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

    **Checkpoints.** :meth:`state_dict` is the position after the last batch that was *yielded*; what was prefetched
    beyond is received again. torchdata's ``StatefulDataLoader`` does all by itself, with any number of workers. In a
    plain DataLoader with workers the stream lives in the workers: call :meth:`record` with each batch that you have
    trained on. Every rank keeps its own state. Iterating again goes on where the last iteration of this object
    stopped; one iteration at a time.

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
        if sampling not in _SAMPLING:
            raise ValueError(f"sampling is {sampling!r}; give one of {', '.join(_SAMPLING)}")
        if pixels not in _PIXELS:
            raise ValueError(f"pixels is {pixels!r}; give one of {', '.join(_PIXELS)}")
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
            _check_shard(*shard)
        _check_start(start)
        self._endpoint = Endpoint.of(address, token, tls)
        self._request = _Request(
            batch_size=batch_size or 0,
            replay=float(replay),
            sampling=sampling,
            max_age=max_age,
            max_student_versions=max_student_versions,
            classes=tuple(classes or ()),
            pixels=pixels,
        )
        self._start: Start = start
        self._shard = shard
        self._prefetch, self._on_gap, self._give_up_after = prefetch, on_gap, give_up_after
        # Rank and ranks of the process that pickled this, for a spawned worker, which knows of no process group.
        self._parent_rank: tuple[int, int] | None = None
        # After the last yielded batch of each reader: cursors, or the sequence at which "latest" was found.
        self._positions: dict[int, int | bytes] = {}
        # How many readers `_positions` speaks of.
        self._readers: int | None = None

    def __repr__(self) -> str:
        return f"DreamStream({self._endpoint.target!r}, {self._request})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parent_rank": self._rank()}

    # What a DataLoader gets -------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rank, ranks = self._rank()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shard = (rank * workers + number, ranks * workers)
        position = self._position(shard)
        return self._iterate(shard, position, worker=_Worker() if worker else None)

    def _iterate(self, shard: tuple[int, int], position: Start, worker: "_Worker | None") -> Iterator[Batch]:
        reader = _Reader(self, shard, position, shared=worker is not None)
        try:
            while True:
                batch = reader.next(worker)
                if batch is None:
                    return
                self.record(batch)
                yield batch
        finally:
            reader.close()

    # Positions --------------------------------------------------------------------------------------------------------

    def record(self, batch: Batch | BatchInfo) -> None:
        """Makes `batch` the last one of its reader for :meth:`state_dict`.

        Needed only in the main process of a plain DataLoader with workers; call it with each batch that was trained on.
        """
        info = batch if isinstance(batch, BatchInfo) else batch[3]
        self._keep(info.shard, info.cursor)

    def _keep(self, shard: tuple[int, int], position: int | bytes) -> None:
        if self._readers != shard[1]:
            self._positions, self._readers = {}, shard[1]
        self._positions[shard[0]] = position

    def seek(self, start: Start) -> None:
        """Lets the next iteration begin at `start`, whatever was read or loaded before."""
        _check_start(start)
        self._start, self._positions, self._readers = start, {}, None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last yielded batch, of plain strings and numbers: for torch.save, or JSON."""
        positions = {
            str(reader): {"cursor": position.hex()} if isinstance(position, bytes) else {"sequence": position}
            for reader, position in sorted(self._positions.items())
        }
        return {"dreamfeed_stream": _FORMAT, "readers": self._readers, "positions": positions}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Lets the next iteration go on from a :meth:`state_dict`, with as many ranks and workers as there were.

        Raises:
            ValueError: this is no state of a DreamStream.
        """
        if state_dict.get("dreamfeed_stream") != _FORMAT:
            raise ValueError(
                f"no state that this version of DreamStream wrote; its keys are {sorted(map(str, state_dict))}"
            )
        positions: dict[int, int | bytes] = {}
        for reader, position in state_dict["positions"].items():
            cursor = position.get("cursor")
            positions[int(reader)] = int(position["sequence"]) if cursor is None else bytes.fromhex(cursor)
        self._positions, self._readers = positions, state_dict["readers"]

    def _position(self, shard: tuple[int, int]) -> Start:
        if self._readers is None:
            return self._start
        index, count = shard
        if self._readers != count:
            raise ValueError(
                f"the position is that of {self._readers} readers (ranks times DataLoader workers), and now "
                f"there are {count}: use as many again, or stream.seek() to a sequence"
            )
        if index not in self._positions:
            # A worker that had yielded nothing yet has not moved. That of another rank never is in here.
            workers = get_worker_info()
            mine = workers.num_workers if workers else 1
            if any(reader // mine == index // mine for reader in self._positions):
                return self._start
            raise ValueError(
                f"the loaded position is that of readers {sorted(self._positions)} of {count}, and this is reader "
                f"{index}: let every rank load its own state, or dreamfeed.merge_states(...) of the states of all"
            )
        return self._positions[index]

    def _rank(self) -> tuple[int, int]:
        if self._shard is not None:
            return self._shard
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        if self._parent_rank is not None:
            return self._parent_rank
        rank, ranks = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank is None or ranks is None:
            return 0, 1
        _check_shard(int(rank), int(ranks))
        return int(rank), int(ranks)


def merge_states(*states: Mapping[str, Any]) -> dict[str, Any]:
    """One state of the states of several ranks, which every rank can load.

    Raises:
        ValueError: the states are of different runs: they speak of different numbers of readers.
    """
    readers = {state["readers"] for state in states if state["readers"] is not None}
    if len(readers) > 1:
        raise ValueError(f"states of {sorted(readers)} readers cannot be merged: they are of different runs")
    positions = {reader: place for state in states for reader, place in state["positions"].items()}
    return {"dreamfeed_stream": _FORMAT, "readers": next(iter(readers), None), "positions": positions}


def _check_shard(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(f"shard is ({index}, {count}); give (rank, ranks) with 0 <= rank < ranks")


def _check_start(start: Start) -> None:
    if isinstance(start, bytes):
        fine = bool(start)
    elif isinstance(start, int):
        fine = not isinstance(start, bool) and start >= 0
    else:
        fine = start in ("latest", "earliest")
    if not fine:
        raise ValueError(f"start is {start!r}; give 'latest', 'earliest', a sequence from 0 on, or a cursor")


@dataclass(frozen=True)
class _Request:
    """The part of a StreamRequest that is the same for every reader."""

    batch_size: int
    replay: float
    sampling: str
    max_age: float | None
    max_student_versions: int | None
    classes: tuple[int | str, ...]
    pixels: str

    @property
    def bounds_staleness(self) -> bool:
        return self.max_age is not None or self.max_student_versions is not None

    def build(self, shard: tuple[int, int], position: Start, class_names: Sequence[str]) -> pb.StreamRequest:
        request = pb.StreamRequest(
            start=_start(position),
            batch_size=self.batch_size,
            pixel_format=_PIXELS[self.pixels],
            classes=[_class_index(name, class_names) for name in self.classes],
        )
        if shard[1] > 1:
            request.shard.index, request.shard.count = shard
        if self.replay > 0:
            request.replay.share = self.replay
            request.replay.sampling = _SAMPLING[self.sampling]
        if self.max_student_versions is not None:
            request.staleness_bound.max_student_versions = self.max_student_versions
        if self.max_age is not None:
            request.staleness_bound.max_age.FromTimedelta(timedelta(seconds=self.max_age))
        return request


def _start(position: Start) -> pb.StreamStart:
    if isinstance(position, bytes):
        return pb.StreamStart(cursor=position)
    if isinstance(position, int):
        return pb.StreamStart(sequence=position)
    return (
        pb.StreamStart(earliest=pb.Earliest())
        if position == "earliest"
        else pb.StreamStart(latest=pb.Latest())
    )


def _class_index(name: int | str, class_names: Sequence[str]) -> int:
    if isinstance(name, int):
        return name
    if name not in class_names:
        known = ", ".join(class_names) or "none, its file does not name them: give indices"
        raise InvalidRequestError(f"the teacher has no class {name!r}; its classes are: {known}")
    return list(class_names).index(name)


class _Worker:
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


class _Reader:
    """A background thread that keeps a few batches ready, across reconnections."""

    def __init__(self, stream: DreamStream, shard: tuple[int, int], position: Start, *, shared: bool) -> None:
        self._stream, self._shard, self._position, self._shared = stream, shard, position, shared
        self._address = stream._endpoint.target
        self._changed = threading.Condition()
        # All below are guarded by `_changed`.
        self._ready: deque[Batch] = deque()
        self._error: BaseException | None = None
        self._closed = False
        # When the newest stream was opened; None where an attempt did not get there.
        self._opened: float | None = None
        self._pid = os.getpid()
        self._channel: grpc.Channel | None = None
        self._thread = threading.Thread(target=self._run, name="dreamfeed-stream", daemon=True)
        self._thread.start()
        # An iterator in a global variable outlives grpc's own globals, without which a connection cannot be closed.
        atexit.register(self.close)

    def next(self, worker: _Worker | None) -> Batch | None:
        """The next batch; waits for it. None where nobody wants the worker's any more."""
        with self._changed:
            while not self._changed.wait_for(
                lambda: self._ready or self._error is not None, None if worker is None else _LOOK_SECONDS
            ):
                if worker is not None and worker.is_over():
                    return None
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            assert self._error is not None
            raise self._error

    def close(self) -> None:
        # First of all, because the globals of this module may be gone as well when the iterator is.
        if self._closed:
            return
        if self._pid != os.getpid():
            return  # a forked child has neither the thread nor the connection
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            channel, self._channel = self._channel, None
            self._changed.notify_all()
        if channel is not None:
            channel.close()
        if threading.current_thread() is not self._thread:  # which may be the one that collects garbage
            self._thread.join(10.0)

    def _run(self) -> None:
        try:
            self._read_forever()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read_forever(self) -> None:
        backoff = Backoff(give_up_after=self._stream._give_up_after)
        while True:
            error: DreamfeedError
            self._opened = None
            try:
                for batch in self._connect():
                    backoff.reset()
                    if not self._put(batch):
                        return
                    self._position = batch.info.cursor
                error = UnavailableError(f"the stream of {self._address} ended")
            except grpc.RpcError as rpc_error:
                error = translate(rpc_error, "Stream", self._address)
                error.__cause__ = rpc_error
                if not self._is_closed() and rpc_error.code() not in _RETRIED:
                    self._handle(error)
                    continue
            except ValueError:
                # What grpc raises where the channel is closed under it.
                if self._is_closed():
                    return
                raise
            if self._opened is not None and time.monotonic() - self._opened > _DESCRIBE_SECONDS:
                backoff.reset()  # it waited for images, in vain but well
            wait = backoff.wait()
            if wait is None:
                raise error
            with self._changed:
                if not self._closed:
                    _log.warning("%s; again in %.1f s, from the last cursor", error, wait)
                if self._changed.wait_for(lambda: self._closed, wait):
                    return

    def _handle(self, error: DreamfeedError) -> None:
        """Goes over a gap, or raises."""
        following = error.next_sequence if isinstance(error, GapError) else None
        # A position that the daemon sends us to for the second time would send us there for ever.
        if self._stream._on_gap == "raise" or following is None or following == self._position:
            raise error
        _log.warning("%s; skipping to sequence %d", error, following)
        self._position = following

    def _connect(self) -> Iterator[Batch]:
        """The batches of one connection."""
        endpoint, request = self._stream._endpoint, self._stream._request
        with endpoint.channel() as channel:
            self._use(channel)
            stub = pb_grpc.DreamfeedServiceStub(channel)
            described = stub.Describe(
                pb.DescribeRequest(), timeout=_DESCRIBE_SECONDS, metadata=endpoint.metadata()
            )
        if self._position == "latest":
            # Else what is made between a broken connection and the next would be skipped.
            self._position = following = described.log.next_sequence
            self._stream._keep(self._shard, following)
        with endpoint.channel(
            max_receive_bytes=described.max_message_bytes + 1024, small_window=request.bounds_staleness
        ) as channel:
            self._use(channel)
            # As the generated stub does, but the bytes are decoded here.
            call = channel.unary_stream(
                _STREAM_PATH,
                request_serializer=pb.StreamRequest.SerializeToString,
                response_deserializer=None,
            )
            normalization = None
            if request.pixels == "f32":
                normalization = Normalization.of(described.teacher.normalization)
            message = request.build(self._shard, self._position, described.teacher.class_names)
            self._opened = time.monotonic()
            for response in call(message, metadata=endpoint.metadata()):
                yield decode(response, shard=self._shard, shared=self._shared, normalization=normalization)

    def _use(self, channel: grpc.Channel) -> None:
        with self._changed:
            if not self._closed:
                self._channel = channel
                return
        channel.close()

    def _put(self, batch: Batch) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._stream._prefetch or self._closed)
            if self._closed:
                return False
            self._ready.append(batch)
            self._changed.notify_all()
            return True

    def _is_closed(self) -> bool:
        with self._changed:
            return self._closed
