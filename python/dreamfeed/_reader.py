"""The background thread that reads a stream, across reconnections."""

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import grpc

from dreamfeed import _fork
from dreamfeed._backoff import Backoff
from dreamfeed._batch import Batch, Normalization, decode
from dreamfeed._channel import Endpoint
from dreamfeed._loader import Worker
from dreamfeed._position import Origin, Place, Start
from dreamfeed._proto import dreamfeed_pb2 as pb
from dreamfeed._proto import dreamfeed_pb2_grpc as pb_grpc
from dreamfeed.errors import (
    CallTimeoutError,
    DreamfeedError,
    GapError,
    InvalidRequestError,
    UnavailableError,
    translate,
)

_log = logging.getLogger("dreamfeed")

PIXELS = {
    "u8": pb.PIXEL_FORMAT_U8,
    # Normalized here: the same floats in a quarter of the bytes.
    "f32": pb.PIXEL_FORMAT_U8,
    "f16": pb.PIXEL_FORMAT_F16_NORMALIZED,
}
SAMPLING = {
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
# In a forked worker gRPC may be dead, so that no call ends, not even at its deadline: the first ones have a short
# one, and where they do not end by far, the worker gives up, or is ended where it cannot even do that.
_PROBE_SECONDS, _DEAD_SECONDS = 2.0, 7.0
# How often a worker that waits for images looks whether it is still wanted.
_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Request:
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
            pixel_format=PIXELS[self.pixels],
            classes=[_class_index(name, class_names) for name in self.classes],
        )
        if shard[1] > 1:
            request.shard.index, request.shard.count = shard
        if self.replay > 0:
            request.replay.share = self.replay
            request.replay.sampling = SAMPLING[self.sampling]
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


@dataclass(frozen=True)
class Source:
    """What a reader reads, and how."""

    endpoint: Endpoint
    request: Request
    prefetch: int
    on_gap: str
    give_up_after: float | None


class Reader:
    """A background thread that keeps a few batches ready, across reconnections.

    `origin` is that of a batch before the first: its place is where to begin, and its number that of the last batch.
    """

    def __init__(self, source: Source, shard: tuple[int, int], origin: Origin, worker: Worker | None) -> None:
        self._source, self._shard, self._origin, self._worker = source, shard, origin, worker
        # Where a request goes on from: behind a gap, or where the last batch ended.
        self._position: Start = origin.after.start
        self._address = source.endpoint.target
        self._changed = threading.Condition()
        # All below are guarded by `_changed`.
        self._ready: deque[Batch] = deque()
        self._error: BaseException | None = None
        self._closed = False
        # Whether gRPC is known to work in this process: a call came to an end.
        self._works = not _fork.is_forked()
        self._alarm = None if self._works or worker is None else _fork.Alarm(_fork.CHILD_SECONDS)
        self._began = time.monotonic()
        # When the newest stream was opened; None where an attempt did not get there.
        self._opened: float | None = None
        self._pid = os.getpid()
        self._channel: grpc.Channel | None = None
        self._thread = threading.Thread(target=self._run, name="dreamfeed-stream", daemon=True)
        self._thread.start()
        # An iterator in a global variable outlives grpc's own globals, without which a connection cannot be closed.
        atexit.register(self.close)

    def next(self) -> Batch | None:
        """The next batch; waits for it. None where nobody wants the worker's any more."""
        with self._changed:
            worker = self._worker
            while not self._changed.wait_for(
                lambda: self._ready or self._error is not None,
                None if worker is None and self._works else _LOOK_SECONDS,
            ):
                if worker is not None and worker.is_over():
                    return None
                if not self._works and time.monotonic() - self._began > _DEAD_SECONDS:
                    self._closed = True  # without closing the channel, which would not end either
                    if self._alarm is not None:
                        self._alarm.stop()  # which is for a worker that cannot say so
                    raise DreamfeedError(_fork.FORKSERVER)
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
        _fork.closed()

    def _run(self) -> None:
        try:
            self._read_forever()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read_forever(self) -> None:
        backoff = Backoff(give_up_after=self._source.give_up_after)
        while True:
            error: DreamfeedError
            self._opened = None
            patience = backoff.begin(_DESCRIBE_SECONDS)
            try:
                for batch in self._connect(patience):
                    backoff.reset()
                    if not self._put(batch):
                        return
                    self._position = batch.info.cursor
                error = UnavailableError(f"the stream of {self._address} ended")
            except grpc.RpcError as rpc_error:
                self._prove()
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
                if isinstance(error, CallTimeoutError):
                    problem = f"the daemon at {self._address} takes connections and does not answer"
                    raise UnavailableError(f"{problem}; see whether it is stopped or very busy") from error
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
        if self._source.on_gap == "raise" or following is None or following == self._position:
            raise error
        _log.warning("%s; skipping to sequence %d", error, following)
        self._position = following

    def _connect(self, patience: float) -> Iterator[Batch]:
        """The batches of one connection, which may take `patience` seconds to come about."""
        if _fork.cannot_work():
            raise DreamfeedError(_fork.FORKSERVER)
        endpoint, request = self._source.endpoint, self._source.request
        # How large a message may be is what the daemon would say itself: that is worth no second channel.
        with endpoint.channel(small_window=request.bounds_staleness) as channel:
            self._use(channel)
            described = self._describe(channel, patience)
            self._prove()
            if self._position == "latest":
                # Else what is made between a broken connection and the next would be skipped.
                self._position = described.log.next_sequence
                self._begin(Place(self._position, self._position))
            elif self._position == "earliest" and self._origin.after.sequence is None:
                self._begin(Place(self._position, described.log.first_sequence))
            # As the generated stub does, but the bytes are decoded here.
            call: Any = channel.unary_stream(
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
                shared = self._origin.worker is not None
                yield self._named(
                    decode(response, shard=self._shard, shared=shared, normalization=normalization)
                )

    def _describe(self, channel: grpc.Channel, patience: float) -> pb.DescribeResponse:
        timeout = patience if self._works else min(patience, _PROBE_SECONDS)
        stub = pb_grpc.DreamfeedServiceStub(channel)
        metadata = self._source.endpoint.metadata()
        described: pb.DescribeResponse = stub.Describe(
            pb.DescribeRequest(), timeout=timeout, metadata=metadata
        )
        return described

    def _prove(self) -> None:
        """gRPC has answered."""
        self._works = True
        if self._alarm is not None:
            self._alarm.stop()

    def _begin(self, place: Place) -> None:
        """Now it is known where that is."""
        self._origin = replace(self._origin, begun=place, before=place, after=place)

    def _named(self, batch: Batch) -> Batch:
        """The batch with its origin."""
        info, last = batch.info, self._origin
        before, fresh = last.after, info.fresh_count
        sequence = int(info.sequence[fresh - 1]) + 1 if fresh else before.sequence
        after = Place(info.cursor, sequence)
        self._origin = replace(last, number=last.number + 1, before=before, after=after)
        return batch._replace(info=replace(info, origin=self._origin))

    def _use(self, channel: grpc.Channel) -> None:
        with self._changed:
            if not self._closed:
                self._channel = channel
                return
        channel.close()

    def _put(self, batch: Batch) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._source.prefetch or self._closed)
            if self._closed:
                return False
            self._ready.append(batch)
            self._changed.notify_all()
            return True

    def begun(self) -> Place:
        """Where it begins, as far as that is known yet."""
        return self._origin.begun

    def _is_closed(self) -> bool:
        with self._changed:
            return self._closed
