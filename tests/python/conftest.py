"""The real daemon, and a client made from the proto alone: nothing here uses code of the daemon."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# As the package does, which these files import after grpc.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "1"

import grpc
import grpc_tools
import pytest
import torch
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "python")]
import cifar_resnet  # noqa: E402
import dreamfeed  # noqa: E402

BINARY = ROOT / "target/release/dreamfeed"
CHANNELS, CLASSES, SIZE, BATCH = 3, 5, (16, 16), 24
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASS_NAMES = ["aloe", "birch", "cedar", "dahlia", "elm"]


@dataclass(frozen=True)
class Contract:
    """The modules that grpcio-tools generates."""

    messages: ModuleType
    services: ModuleType


@dataclass(frozen=True)
class Client:
    """A stub on a running daemon, and what the test knows of it."""

    stub: object
    messages: ModuleType
    process: subprocess.Popen
    log: Path


def random_network(seed: int, classes: int = CLASSES) -> cifar_resnet.ResNet:
    """A ResNet-8 in eval mode, with batch norms that differ from a fresh one's."""
    torch.manual_seed(seed)
    network = cifar_resnet.ResNet("resnet8", CHANNELS, classes)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.normal_(module.running_mean, 0.0, 0.3)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    return network.eval()


@pytest.fixture(scope="session")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Contract:
    """Stubs generated from proto/ with nothing but grpcio-tools."""
    out = tmp_path_factory.mktemp("stubs")
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"-I{ROOT / 'proto'}",
            f"-I{well_known}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            "dreamfeed/v1/dreamfeed.proto",
        ]
    )
    assert code == 0, "grpcio-tools does not accept the proto"
    # The Python package of the same name has no package v1, and lends its name to these.
    dreamfeed.__path__.append(str(out / "dreamfeed"))
    return Contract(
        messages=importlib.import_module("dreamfeed.v1.dreamfeed_pb2"),
        services=importlib.import_module("dreamfeed.v1.dreamfeed_pb2_grpc"),
    )


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    cifar_resnet.save(random_network(1), path, mean=MEAN, std=STD, image_size=SIZE, class_names=CLASS_NAMES)
    return path


@contextlib.contextmanager
def daemon(
    teacher_file: Path, folder: Path, listen: str = "127.0.0.1:0"
) -> Iterator[tuple[str, subprocess.Popen, Path]]:
    """A daemon with the cheap synthesizer, on free ports unless told, its store in `folder`/store: its address, its
    process and its log. It must drain and exit with 0 on SIGTERM."""
    if not BINARY.exists():
        pytest.fail(f"{BINARY} is not built; `make test` builds it")
    ready_file, log = folder / "ready.json", folder / "serve.log"
    command = [
        str(BINARY),
        "serve",
        *("--teacher", str(teacher_file), "--synthesizer", "noise", "--batch-size", str(BATCH)),
        *("--store", str(folder / "store")),
        *("--max-images", str(4 * BATCH), "--seed", "7", "--threads", "1"),
        *("--listen", listen, "--admin-listen", "127.0.0.1:0", "--ready-file", str(ready_file)),
    ]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder)
    try:
        yield wait_until_ready(process, ready_file, log), process, log
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def address(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A daemon that makes four batches and no more, one for all tests of a file."""
    torch.set_num_threads(1)
    with daemon(teacher_file, tmp_path_factory.mktemp("daemon")) as (address, _, _):
        yield address


@pytest.fixture
def client(contract: Contract, teacher_file: Path, tmp_path: Path) -> Iterator[Client]:
    with daemon(teacher_file, tmp_path) as (address, process, log):
        options = [("grpc.max_receive_message_length", 64 << 20)]
        with grpc.insecure_channel(address, options=options) as channel:
            yield Client(contract.services.DreamfeedServiceStub(channel), contract.messages, process, log)


def wait_until_ready(process: subprocess.Popen, ready_file: Path, log: Path) -> str:
    """The address of the daemon's gRPC port, once the teacher is on the device: the file only tells of the ports."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the daemon exited with {process.returncode}:\n{log.read_text()}"
        # An HTTP error is an OSError too.
        with contextlib.suppress(OSError, ValueError, KeyError):
            ports = json.loads(ready_file.read_text())
            urllib.request.urlopen(f"http://{ports['admin']}/readyz", timeout=10).close()
            return ports["grpc"]
        time.sleep(0.05)
    pytest.fail(f"the daemon was not ready within 60 s:\n{log.read_text()}")
