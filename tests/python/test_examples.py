"""The examples of the Python package, Lightning's callback, and what a training leaves on disk, on a real daemon."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cifar_resnet
import numpy as np
import pytest
import torch
from conftest import (
    BATCH,
    BINARY,
    CHANNELS,
    CLASS_NAMES,
    CLASSES,
    MEAN,
    ROOT,
    SIZE,
    STD,
    daemon,
    random_network,
)
from dreamfeed import Client, DreamStream, TrainingCheckpoint, save_student
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

EXAMPLES = ROOT / "examples/python"
SECONDS = 120
NEW = ["fir", "ginkgo"]


@pytest.fixture
def client(teacher_file: Path, tmp_path: Path) -> Iterator[Client]:
    with daemon(teacher_file, tmp_path) as (address, _, _), Client(address, timeout=SECONDS) as client:
        yield client


def execute(example: str, client: Client, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / example), "--connect", client.address, "--arch", "resnet8"]
    command += ["--batch-size", str(BATCH), "--push-every", "2", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )


def run(example: str, client: Client, folder: Path, *more: str) -> str:
    done = execute(example, client, folder, *more)
    # "Exception ignored" is what Python says of an iterator that cannot be closed at the end.
    assert done.returncode == 0 and "Exception ignored" not in done.stderr, done.stderr
    return done.stdout


def pictures(seed: int, count: int) -> np.ndarray:
    """u8 [count,C,H,W]"""
    return np.random.default_rng(seed).integers(0, 256, (count, CHANNELS, *SIZE), np.uint8)


def cifar_file(path: Path, classes: int) -> Path:
    """Four random pictures a class, in CIFAR binary format."""
    labels = np.arange(4 * classes, dtype=np.uint8) % classes
    pixels = pictures(3, len(labels)).reshape(len(labels), -1)
    path.write_bytes(np.concatenate([labels[:, None], pixels], 1).tobytes())
    return path


def evaluated(model: Path, data: Path) -> int:
    """How many pictures `dreamfeed evaluate` showed to the network; it knows nothing of it but its file."""
    command = [
        str(BINARY),
        "evaluate",
        "--model",
        str(model),
        "--data",
        str(data),
        "--threads",
        "1",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["count"]


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


def test_pruning_really_removes_filters(client: Client, teacher_file: Path, tmp_path: Path) -> None:
    steps = ["--rounds", "2", "--steps-per-round", "2", "--fine-tune-steps", "3"]
    output = run("prune.py", client, tmp_path, "--model", str(teacher_file), "--remove", "0.5", *steps)
    assert "round 2: " in output
    weights, info = client.fetch_student()
    assert (info.arch, info.step) == ("resnet8", 7)
    inner = [weights[f"layer{stage}.0.conv1.weight"].shape[0] for stage in (1, 2, 3)]
    assert sum(inner) == (16 + 32 + 64) // 2 and weights["layer3.0.conv2.weight"].shape[:2] == (64, inner[2])
    saved = load_file(tmp_path / "pruned.safetensors")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)
    assert (
        evaluated(tmp_path / "pruned.safetensors", cifar_file(tmp_path / "test.bin", CLASSES)) == 4 * CLASSES
    )


def test_new_classes_are_learned_beside_dreams(client: Client, teacher_file: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(NEW):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number, pixels in enumerate(pictures(seed, 3)):
            # Of another size than the teacher's.
            image = Image.fromarray(pixels.transpose(1, 2, 0)).resize((20, 24))
            image.save(tmp_path / "train" / name / f"{number}.png")
    test = cifar_file(tmp_path / "test.bin", CLASSES + len(NEW))
    told = ["--model", str(teacher_file), "--new-classes", ",".join(NEW), "--steps", "4"]
    folders = ["--images", str(tmp_path / "train"), "--test-data", str(test)]
    output = run("continual.py", client, tmp_path, *told, *folders)
    assert all(f"{kind} classes " in output for kind in ("old", "new", "all")) and "nan" not in output
    _, info = client.fetch_student()
    assert (info.arch, info.step, info.num_classes) == ("resnet8", 4, CLASSES + len(NEW))
    _, metadata = cifar_resnet.load(tmp_path / "continual.safetensors")
    assert json.loads(metadata["class_names"]) == CLASS_NAMES + NEW
    assert evaluated(tmp_path / "continual.safetensors", test) == 4 * (CLASSES + len(NEW))
    # From a file in CIFAR binary format, old classes' pictures are left out: here there are no others.
    old = ["--images", str(cifar_file(tmp_path / "old.bin", CLASSES))]
    assert "no image of fir, ginkgo" in execute("continual.py", client, tmp_path, *told, *old).stderr


@pytest.mark.parametrize("example", ["prune.py", "continual.py --new-classes fir --images test.bin"])
def test_another_network_than_the_teacher_is_refused(client: Client, tmp_path: Path, example: str) -> None:
    cifar_resnet.save(random_network(2), tmp_path / "other.safetensors", mean=MEAN, std=STD, image_size=SIZE)
    cifar_file(tmp_path / "test.bin", CLASSES + 1)
    name, *more = example.split()
    done = execute(name, client, tmp_path, "--model", "other.safetensors", *more)
    assert done.returncode == 1 and "give --model the daemon's teacher" in done.stderr


def test_a_training_goes_on_from_its_checkpoint(client: Client, tmp_path: Path) -> None:
    def training() -> tuple[torch.nn.Module, torch.optim.Optimizer, DreamStream, TrainingCheckpoint]:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        stream = DreamStream(client.address, start="earliest", batch_size=2)
        parts = {"model": model, "optimizer": optimizer, "stream": stream}
        return model, optimizer, stream, TrainingCheckpoint(tmp_path / "runs" / "a.ckpt", **parts)

    model, optimizer, stream, checkpoint = training()
    assert checkpoint.load() == 0
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    next(iter(stream))
    checkpoint.save(7)
    again, optimizer_again, stream_again, checkpoint_again = training()
    assert checkpoint_again.load() == 7
    assert torch.equal(again.weight, model.weight)
    momentum = [o.state_dict()["state"][0]["momentum_buffer"] for o in (optimizer, optimizer_again)]
    assert torch.equal(*momentum)
    assert next(iter(stream_again)).info.first_sequence == 2


def test_a_checkpoint_is_whole_or_refused(tmp_path: Path) -> None:
    class Unsaveable(torch.nn.Module):
        def state_dict(self) -> dict[str, object]:
            return {"a function": lambda: None}

    path, model = tmp_path / "a.ckpt", torch.nn.Linear(2, 2)
    TrainingCheckpoint(path, model=model).save(1)
    with pytest.raises(Exception, match="pickle"):
        TrainingCheckpoint(path, model=Unsaveable()).save(2)
    assert TrainingCheckpoint(path, model=model).load() == 1 and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"holds \['model'\], and this training has \['net'\]"):
        TrainingCheckpoint(path, net=model).load()
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match="not a checkpoint that"):
        TrainingCheckpoint(path, model=model).load()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        TrainingCheckpoint(path, model=model).load()


def test_a_saved_student_says_what_its_teacher_says(client: Client, tmp_path: Path) -> None:
    network = random_network(3)
    path = tmp_path / "students" / "student.safetensors"
    save_student(torch.nn.DataParallel(network), path, client.describe().teacher)
    tensors = load_file(path)
    assert tensors.keys() == network.state_dict().keys()
    assert torch.equal(tensors["linear.weight"], network.linear.weight)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["arch"] == "resnet8" and metadata["image_size"] == ",".join(map(str, SIZE))
    assert metadata["mean"] == ",".join(map(str, MEAN)) and metadata["std"] == ",".join(map(str, STD))
    assert json.loads(metadata["class_names"]) == CLASS_NAMES
