"""The examples of the Python package, and Lightning's callback, on a real daemon."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cifar_resnet
import pytest
import torch
from conftest import BATCH, CLASS_NAMES, ROOT, SIZE, daemon
from dreamfeed import Client, DreamStream

EXAMPLES = ROOT / "examples/python"
SECONDS = 120


@pytest.fixture
def client(teacher_file: Path, tmp_path: Path) -> Iterator[Client]:
    with daemon(teacher_file, tmp_path) as (address, _, _), Client(address, timeout=SECONDS) as client:
        yield client


def run(example: str, client: Client, folder: Path, *more: str) -> str:
    command = [sys.executable, str(EXAMPLES / example), "--connect", client.address, "--arch", "resnet8"]
    command += ["--batch-size", str(BATCH), "--push-every", "2", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_distill_in_plain_pytorch_pushes_and_resumes(client: Client, tmp_path: Path) -> None:
    assert "step 4 " in run("distill.py", client, tmp_path, "--steps", "4")
    _, info = client.fetch_student()
    assert (info.arch, info.step) == ("resnet8", 4)
    network, metadata = cifar_resnet.load(tmp_path / "student.safetensors")
    assert network.arch == "resnet8" and CLASS_NAMES[0] in metadata["class_names"]
    assert metadata["image_size"] == ",".join(map(str, SIZE))
    output = run("distill.py", client, tmp_path, "--steps", "6")
    assert "step 6 " in output and "step 4 " not in output
    assert client.fetch_student()[1].step == 6


def test_distill_with_lightning_pushes_and_resumes(client: Client, tmp_path: Path) -> None:
    run("distill_lightning.py", client, tmp_path, "--steps", "4")
    assert client.fetch_student()[1].step == 4
    (checkpoint,) = tmp_path.glob("lightning_logs/*/checkpoints/*.ckpt")
    # Half of each batch is replayed; what Lightning had fetched ahead was not trained on.
    stream = DreamStream(client.address, batch_size=1)
    stream.load_state_dict(torch.load(checkpoint, weights_only=True)["callbacks"]["StreamCheckpoint"])
    assert next(iter(stream)).info.first_sequence == 4 * BATCH // 2
    run("distill_lightning.py", client, tmp_path, "--steps", "5", "--resume", str(checkpoint))
    assert client.fetch_student()[1].step == 5
