"""Pushes of the student that never hold up the training step."""

import atexit
import logging
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor, nn

from dreamfeed._backoff import Backoff
from dreamfeed.client import Client, PushResult, Snapshot, arch_of
from dreamfeed.errors import StudentPushWarning, UnavailableError

_log = logging.getLogger("dreamfeed")

# What a push that is under way as the process ends may still take.
_LAST_SECONDS = 5.0


@dataclass(frozen=True)
class _Job:
    snapshot: Snapshot
    arch: str
    step: int


class StudentPusher:
    """Pushes a student in the background; the newest wins.

    :meth:`push` copies the weights to CPU memory on the calling thread, so that the next optimizer step cannot change
    them, and returns. Encoding, sending and the daemon's checks happen on a thread of its own. While a push is under
    way at most one more waits; a newer one replaces it (:attr:`superseded` counts). Where the daemon does not answer,
    the push is tried again with back-off until it succeeds or a newer one takes its place.

        with StudentPusher(Client("127.0.0.1:7461"), arch="resnet20") as pusher:
            for step, batch in enumerate(loader):
                ...
                if step % 100 == 0:
                    pusher.push(model, step)

    Args:
        client: the daemon; used only from the background thread, and not closed.
        arch: the student's architecture; default: the module's attribute ``arch``.
        on_error: what the next :meth:`push` or :meth:`flush` does with an error of the background: ``"warn"`` with a
            :class:`StudentPushWarning`, or ``"raise"`` it. With "warn", :meth:`push` itself never raises for anything
            that the daemon, the network or the weights do.
    """

    def __init__(
        self, client: Client, arch: str | None = None, *, on_error: Literal["warn", "raise"] = "warn"
    ) -> None:
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error is {on_error!r}; give 'warn' or 'raise'")
        self._client, self._arch, self._on_error = client, arch, on_error
        self._changed = threading.Condition()
        # All below are guarded by `_changed`.
        self._waiting: _Job | None = None
        self._busy = False
        self._closed = False
        self._error: Exception | None = None
        self._last: PushResult | None = None
        self._superseded = 0
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    @property
    def last(self) -> PushResult | None:
        """The newest push that the daemon accepted."""
        return self._last

    @property
    def superseded(self) -> int:
        """Pushes that were never sent, because a newer one came first."""
        return self._superseded

    def push(self, model: nn.Module | Mapping[str, Tensor], step: int = 0) -> None:
        """Takes a copy of the weights and returns; see the class.

        Raises:
            DreamfeedError: with ``on_error="raise"``, what an earlier push met.
            ValueError: nothing names the architecture.
            RuntimeError: the pusher is closed.
        """
        self._surface()
        arch = arch_of(model, self._arch)
        try:
            job = _Job(Snapshot.take(model), arch, step)
        except Exception as error:
            if self._on_error == "raise":
                raise
            self._keep(error)
            return
        with self._changed:
            if self._closed:
                raise RuntimeError("this StudentPusher is closed; make a new one")
            if self._pid != os.getpid():
                raise RuntimeError("this StudentPusher belongs to another process; make one in each process")
            self._superseded += self._waiting is not None
            self._waiting = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dreamfeed-push", daemon=True)
                self._thread.start()
                atexit.register(self._end)
            self._changed.notify_all()

    def flush(self, timeout: float | None = 60.0) -> bool:
        """Waits until what was pushed is with the daemon, or was refused; False after `timeout` seconds (None: never).

        Raises:
            DreamfeedError: with ``on_error="raise"``, what a push met.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: not self._busy and self._waiting is None, timeout)
        self._surface()
        return done

    def close(self, timeout: float | None = 60.0) -> bool:
        """:meth:`flush`, then ends the thread. The answer is flush's.

        What is still under way after `timeout` goes on until it succeeds or fails, or until the process ends.
        """
        try:
            return self.flush(timeout)
        finally:
            if not self._stop() and self._thread is not None and self._pid == os.getpid():
                self._thread.join()
                atexit.unregister(self._end)

    def _stop(self) -> bool:
        """Lets the thread end after what is under way; whether there is something."""
        with self._changed:
            self._closed = True
            self._waiting = None
            self._changed.notify_all()
            return self._busy

    def _end(self) -> None:
        """At the end of the process: a thread that Python ends in the middle of freeing tensors aborts all."""
        if self._thread is None or self._pid != os.getpid():
            return
        self._stop()
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive():
            self._client.close()  # which ends the call under way
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error or Ctrl-C nobody wants to wait for a daemon that may be away.
        self.close(60.0 if kind is None else 0.0)

    def _keep(self, error: Exception) -> None:
        with self._changed:
            self._error = error

    def _surface(self) -> None:
        with self._changed:
            error, self._error = self._error, None
        if error is None:
            return
        if self._on_error == "raise":
            raise error
        text = f"the student was not pushed, training goes on: {error}"
        try:
            warnings.warn(text, StudentPushWarning, stacklevel=3)
        except StudentPushWarning:  # somebody turned warnings into errors; the step must go on
            _log.warning("%s", text)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                job, self._waiting = self._waiting, None
                if job is None:
                    return
                self._busy = True
            try:
                self._send(job)
            except Exception as error:
                self._keep(error)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _send(self, job: _Job) -> None:
        file = job.snapshot.encode()
        backoff = Backoff()
        while True:
            try:
                result = self._client.push_encoded(file, job.arch, job.step)
            except UnavailableError as error:
                self._keep(error)
                wait = backoff.wait() or 0.0
                _log.info("push of step %d: %s; again in %.1f s", job.step, error, wait)
                with self._changed:
                    newer = self._changed.wait_for(lambda: self._waiting is not None or self._closed, wait)
                    if newer:
                        self._superseded += self._waiting is not None
                        return
                continue
            with self._changed:
                self._last = result
                # What an earlier attempt of this very student met is settled.
                if isinstance(self._error, UnavailableError):
                    self._error = None
            return
