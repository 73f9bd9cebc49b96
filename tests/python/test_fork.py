"""Threads end with the process, and a DataLoader's forked workers work or say why not."""

import ctypes
import os
import subprocess
import sys
import threading
from typing import Any

import dreamfeed
import pytest
import torch
from conftest import ROOT, random_network
from dreamfeed import Client, DreamStream, PushResult, StudentPusher, _fork, _reader
from dreamfeed._channel import Endpoint
from torch.utils.data import DataLoader

SECONDS = 60


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    environment.pop("GRPC_ENABLE_FORK_SUPPORT", None)  # as a user has it
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )


def test_the_pusher_ends_its_thread() -> None:
    class Accepts:
        def push_encoded(self, file: bytes, arch: str, step: int) -> PushResult:
            return PushResult(1, False)

    # Another test's pusher may still be there.
    before = set(threading.enumerate())
    pusher = StudentPusher(Accepts(), arch="resnet8")  # type: ignore[arg-type]
    pusher.push(random_network(2))
    assert pusher.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "dreamfeed-push"]


def test_the_end_of_the_process_waits_for_a_push() -> None:
    done = run("""
import threading, torch
from dreamfeed import PushResult, StudentPusher
begun = threading.Event()
class Slow:
    def push_encoded(self, file, arch, step):
        begun.set()
        while threading.main_thread().is_alive():  # until Python ends
            threading.main_thread().join(0.01)
        print("pushed", flush=True)
        return PushResult(1, False)
pusher = StudentPusher(Slow(), arch="resnet8")
pusher.push({f"w{i}": torch.zeros(1) for i in range(50_000)})
begun.wait()
""")
    assert (done.returncode, done.stdout) == (0, "pushed\n"), done.stderr


def test_the_end_of_the_process_cuts_off_a_push_that_hangs() -> None:
    done = run("""
import threading, dreamfeed.pusher
from dreamfeed import StudentPusher, UnavailableError
dreamfeed.pusher._LAST_SECONDS = 0.1
begun, closed = threading.Event(), threading.Event()
class Hangs:
    def push_encoded(self, file, arch, step):
        begun.set()
        closed.wait()
        raise UnavailableError("closed")
    def close(self):
        closed.set()
pusher = StudentPusher(Hangs(), arch="resnet8")
pusher.push({})
begun.wait()
""")
    assert done.returncode == 0, done.stderr


def test_grpc_is_whole_before_anybody_can_fork(address: str) -> None:
    done = run(
        """
import sys
import dreamfeed
from grpc._cython import cygrpc
assert cygrpc.is_fork_support_enabled()
before = {name for name in sys.modules if name.startswith("grpc")}
from dreamfeed import Client, DreamStream
Client(sys.argv[1]).describe()
next(iter(DreamStream(sys.argv[1], start="earliest", batch_size=4)))
try:
    Client(sys.argv[1]).push_encoded(b"", "resnet8")
except dreamfeed.DreamfeedError:
    pass
print(sorted({name for name in sys.modules if name.startswith("grpc")} - before))
""",
        address,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_fork_waits_for_a_call_under_way(address: str) -> None:
    # Pushes and forks as they come: none of the workers may find gRPC in the middle of a call.
    network, seen = random_network(2), 0
    with Client(address) as client, StudentPusher(client, arch="resnet8", on_error="raise") as pusher:
        for step in range(4):
            with torch.no_grad():
                network.linear.bias += 0.01
            pusher.push(network, step)
            dataset = DreamStream(address, start="earliest", batch_size=4)
            batches = DataLoader(dataset, batch_size=None, num_workers=2, timeout=SECONDS)
            seen += next(iter(batches)).info.count
    assert seen == 16


def stands_still(*_: Any, **__: Any) -> None:
    threading.Event().wait()


def stands_still_in_c(*_: Any, **__: Any) -> None:
    ctypes.PyDLL(None).pause()  # with Python's global lock, as a deadlock in gRPC


@pytest.mark.parametrize("channel", [stands_still, stands_still_in_c])
def test_a_forked_worker_that_cannot_work_gives_up(channel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(_fork.CHILD_SECONDS, _reader._DEAD_SECONDS) < 10
    monkeypatch.setattr(_fork, "CHILD_SECONDS", 1.0)
    monkeypatch.setattr(_reader, "_DEAD_SECONDS", 0.5)
    monkeypatch.setattr(Endpoint, "channel", channel)
    batches = DataLoader(DreamStream("127.0.0.1:1"), batch_size=None, num_workers=1, timeout=SECONDS)
    with pytest.raises(dreamfeed.DreamfeedError, match="forkserver"):
        next(iter(batches))


def test_grpc_that_was_not_told_of_forks_is_refused_in_a_fork(address: str) -> None:
    done = run(
        """
import sys
import grpc
from dreamfeed import Client, DreamStream, DreamfeedError
from torch.utils.data import DataLoader
Client(sys.argv[1]).describe()
try:
    next(iter(DataLoader(DreamStream(sys.argv[1], batch_size=4, start="earliest"), batch_size=None, num_workers=1)))
except DreamfeedError as error:
    print("forkserver" in str(error))
""",
        address,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
