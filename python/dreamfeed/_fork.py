"""Prepares gRPC for a DataLoader that forks its workers while the trainer may have connections open.

Imported before everything else of this package, because grpc reads the variable as it is first imported.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

# Imported by somebody else before this, and without it, gRPC crashes in a fork of a process that was using it.
_UNPREPARED = "grpc" in sys.modules and "GRPC_ENABLE_FORK_SUPPORT" not in os.environ
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

# What grpc itself would import in the middle of calls, on the threads that make them: a fork at such a moment leaves
# the child with half a module.
for _module in ("_auth", "_channel", "_interceptor", "_plugin_wrapping", "_utilities", "experimental"):
    importlib.import_module(f"grpc.{_module}")

FORKSERVER = (
    "gRPC does not work in this DataLoader worker, which was forked from a process that was using it: write "
    'DataLoader(..., multiprocessing_context="forkserver")'
)
_importer = os.getpid()
_used = False
# Many times what gRPC takes to take leave of a call or a connection, on threads of its own for which nobody can wait. A
# fork at that moment, or in the middle of a call, leaves locks in the child that nobody opens.
_SETTLE_SECONDS = 0.1
# What a fork waits for calls under way, and what gRPC may take in the child to get over the fork.
_CALL_SECONDS, CHILD_SECONDS = 5.0, 8.0

_turn = threading.Condition(threading.Lock())
# Guarded by `_turn`: calls under way, whether somebody is about to fork, and when gRPC was last used.
_calls = 0
_forking = False
_last: float | None = None


@contextlib.contextmanager
def calling() -> Iterator[None]:
    """A call that ends: a fork waits for it, and it for the fork."""
    global _calls, _last
    with _turn:
        _turn.wait_for(lambda: not _forking)
        _calls += 1
    try:
        yield
    finally:
        with _turn:
            _calls -= 1
            _last = time.monotonic()
            _turn.notify_all()


def closed() -> None:
    """This process has just closed a channel."""
    global _last
    _last = time.monotonic()


def opened() -> None:
    """This process has opened a channel."""
    global _used
    if not _used and not is_forked():
        # After gRPC's own, so that it is before them in the parent.
        os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
    _used = True


def _before() -> None:
    global _forking
    _turn.acquire()
    _forking = True
    _turn.wait_for(lambda: _calls == 0, _CALL_SECONDS)
    if _last is not None:
        time.sleep(max(0.0, _last + _SETTLE_SECONDS - time.monotonic()))


def _after() -> None:
    global _forking
    _forking = False
    _turn.notify_all()
    _turn.release()


def _after_in_child() -> None:
    global _turn, _calls, _forking, _alarm
    _turn, _calls, _forking = threading.Condition(threading.Lock()), 0, False
    if _alarm is not None:
        _alarm.stop()
        _alarm = None


class Alarm:
    """Ends a forked child in which gRPC stands still in C, with Python's global lock held, so that no Python runs.

    The trainer knows it by the signal. Made in the main thread; `stop` may be called in any.
    """

    SIGNAL = signal.SIGALRM

    def __init__(self, seconds: float) -> None:
        free = signal.getsignal(self.SIGNAL) is signal.SIG_DFL
        self._set = free and not any(signal.getitimer(signal.ITIMER_REAL))
        if self._set:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def stop(self) -> None:
        if self._set:
            self._set = False
            signal.setitimer(signal.ITIMER_REAL, 0)


_alarm: Alarm | None = None


def _begin_child() -> None:
    global _alarm
    # gRPC's own handlers come between this and `_after_in_child`.
    _alarm = Alarm(CHILD_SECONDS) if _used else None


os.register_at_fork(after_in_child=_begin_child)


def is_forked() -> bool:
    """Whether this process was forked from one that had imported this."""
    return os.getpid() != _importer


def cannot_work() -> bool:
    """Whether gRPC is known not to work here."""
    return is_forked() and _UNPREPARED and _used
