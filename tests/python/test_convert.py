"""`python -m dreamfeed.convert`: PyTorch checkpoints as files that the daemon reads, without running code in them."""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dreamfeed
import numpy as np
import pytest
import torch
from conftest import CHANNELS, CLASS_NAMES, CLASSES, MEAN, ROOT, SIZE, STD, daemon, random_network
from dreamfeed.convert import ConvertError, convert, main
from safetensors import safe_open
from torch.optim.swa_utils import AveragedModel

KNOWN = {"arch": "resnet8", "mean": MEAN, "std": STD, "image_size": SIZE}


def test_a_wrapped_checkpoint_becomes_a_teacher(tmp_path: Path) -> None:
    network = random_network(1)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    state["module.conv1.weight"] = state["module.conv1.weight"].to(memory_format=torch.channels_last)
    torch.save({"state_dict": state, "epoch": 7, "optimizer": {"lr": 0.1}}, tmp_path / "model.pth")

    command = [
        sys.executable,
        "-m",
        "dreamfeed.convert",
        "model.pth",
        "teacher.safetensors",
        "--arch",
        "resnet8",
    ]
    command += ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
    command += ["--image-size", ",".join(map(str, SIZE)), "--class-names", ",".join(CLASS_NAMES)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "left out: epoch, optimizer" in done.stdout and "names without module." in done.stdout

    with safe_open(tmp_path / "teacher.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["class_names"]) == CLASS_NAMES
    expected = network.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)

    with (
        daemon(tmp_path / "teacher.safetensors", tmp_path) as (address, _, _),
        dreamfeed.Client(address) as client,
    ):
        teacher = client.describe().teacher
    assert (teacher.arch, teacher.num_classes, teacher.image_shape) == ("resnet8", CLASSES, (CHANNELS, *SIZE))
    assert teacher.class_names == tuple(CLASS_NAMES)
    assert teacher.mean == pytest.approx(MEAN) and teacher.std == pytest.approx(STD)


class Malicious:
    """What a pickle can do to who loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_code_in_a_checkpoint_is_not_run(save: Any, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    save({"state_dict": {"w": Malicious(trap)}}, tmp_path / "evil.pth")
    with pytest.raises(ConvertError, match="code in it is not run"):
        convert(tmp_path / "evil.pth", tmp_path / "out.safetensors", **KNOWN)
    assert not trap.exists() and not (tmp_path / "out.safetensors").exists()


def convert_state(tmp_path: Path, checkpoint: object, **options: Any) -> Any:
    torch.save(checkpoint, tmp_path / "model.pth")
    return convert(tmp_path / "model.pth", tmp_path / "out.safetensors", **(KNOWN | options))


def test_nothing_is_dropped_in_silence(tmp_path: Path) -> None:
    shared = torch.ones(2, 3).t()
    done = convert_state(
        tmp_path,
        {"model": {"student.a": shared, "student.b": shared, "student.n": torch.tensor(3)}},
        prefix="student.",
    )
    assert done.unwrapped == ("model",) and done.stripped == ("student.",) and done.left_out == ()
    assert done.tensors == {
        "a": ((3, 2), torch.float32),
        "b": ((3, 2), torch.float32),
        "n": ((), torch.int64),
    }
    half = convert_state(tmp_path, {"a": torch.ones(1), "n": torch.tensor(3)}, dtype="f16")
    assert half.tensors == {"a": ((1,), torch.float16), "n": ((), torch.int64)}
    nested = convert_state(
        tmp_path, {"ema": {"model": {"a": torch.ones(1)}, "decay": 0.9}, "model": 3}, key="ema.model"
    )
    assert nested.unwrapped == ("ema", "model") and nested.left_out == ("model", "ema.decay")


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ({"net": {"a": torch.ones(1)}, "model": {"a": torch.ones(1)}}, {}, "--key"),
        ({"epoch": 3}, {}, "no one state_dict"),
        ([torch.ones(1)], {}, "no one state_dict"),
        ({"a": torch.tensor(float("nan"))}, {}, "a has values"),
        ({"a": torch.ones(1)}, {"key": "ema"}, "no key"),
        ({"a": torch.ones(1)}, {"prefix": "student."}, "no tensor has the prefix 'student.'; there are a"),
        ({"net._orig_mod.a": torch.ones(1), "net.a": torch.ones(1)}, {}, "without their wrappers"),
        ({"parametrizations.a.original0": torch.ones(1)}, {}, "remove_parametrizations"),
        ({"a_orig": torch.ones(2), "a_mask": torch.ones(1)}, {}, "shape of what it masks"),
        ({"a": torch.ones(1)}, {"mean": (123.0, 117.0, 104.0)}, "pixel / 255"),
        ({"a": torch.ones(1)}, {"std": (0.2,)}, "one of each a channel"),
        ({"conv1.weight": torch.ones(4, 1, 3, 3)}, {}, "takes 1 channels"),
        ({"fc.weight": torch.ones(4, 8)}, {"class_names": ["a", "b"]}, "4 outputs"),
        ({"a": torch.ones(1)}, {"image_size": (0, 32)}, "image_size"),
    ],
)
def test_what_cannot_be_used_is_told(
    checkpoint: object, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConvertError, match=message):
        convert_state(tmp_path, checkpoint, **options)
    assert list(tmp_path.iterdir()) == [tmp_path / "model.pth"]


def network_state() -> dict[str, torch.Tensor]:
    return random_network(1).state_dict()


def as_namespace(state: dict[str, torch.Tensor]) -> dict[str, object]:
    arguments = argparse.Namespace(lr=0.1, out=Path("runs"), seed=np.int64(3), betas=np.array([0.9, 0.999]))
    return {"model": state, "args": arguments, "best": np.float32(88.5)}


def as_average(state: dict[str, torch.Tensor]) -> dict[str, object]:
    network = random_network(1)
    network.load_state_dict(state)
    average = AveragedModel(network, use_buffers=True)
    average.update_parameters(network)
    return {"model_ema": average.state_dict(), "epoch": 3}


def as_compiled_layers(state: dict[str, torch.Tensor]) -> dict[str, object]:
    return {
        "module." + re.sub(r"^(layer\d)", r"\1._orig_mod", name): tensor for name, tensor in state.items()
    }


def as_one_of_two(state: dict[str, torch.Tensor]) -> dict[str, object]:
    return {f"student.{name}": t for name, t in state.items()} | {"teacher.a": torch.ones(1), "epoch": 3}


def as_lightning(state: dict[str, torch.Tensor]) -> dict[str, object]:
    return {"state_dict": {f"net.{name}": t for name, t in state.items()}, "pytorch-lightning_version": "2.6"}


def as_masked(state: dict[str, torch.Tensor]) -> dict[str, object]:
    masked = dict(state)
    weight = masked.pop("conv1.weight")
    return masked | {"conv1.weight_orig": weight + (weight == 0), "conv1.weight_mask": (weight != 0).float()}


def with_a_head_called(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, object]]:
    return lambda state: {re.sub(r"^(linear|fc)\.", f"{name}.", key): t for key, t in state.items()}


@pytest.mark.parametrize(
    ("keep", "options", "left_out"),
    [
        # The ImageNet example's best accuracy is a mean of tensors, so it is a tensor.
        (lambda state: {"state_dict": state, "best_acc1": torch.tensor(72.5)}, {}, "best_acc1"),
        (lambda state: {"model": state, "best_acc": torch.tensor([72.5])}, {}, "best_acc"),
        (as_namespace, {}, "args, best"),
        (as_average, {}, "epoch, n_averaged"),
        (as_compiled_layers, {}, ""),
        (as_one_of_two, {"prefix": "student."}, "epoch, teacher.a"),
        (lambda state: {**state, "epoch": 3}, {}, "epoch"),
        (as_lightning, {}, "pytorch-lightning_version"),
        (as_masked, {}, ""),
        (with_a_head_called("classifier"), {}, ""),
        (with_a_head_called("fc"), {}, ""),
        (
            lambda state: {"model": state, "model_ema": {"module." + n: t for n, t in state.items()}},
            {"key": "model_ema"},
            "model",
        ),
    ],
)
def test_whatever_people_keep_is_read(
    keep: Callable[[dict[str, torch.Tensor]], dict[str, object]],
    options: dict[str, Any],
    left_out: str,
    tmp_path: Path,
) -> None:
    state = network_state()
    done = convert_state(tmp_path, keep(dict(state)), **options)
    assert ", ".join(done.left_out) == left_out
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if done.head is None:
        # The daemon reads both names of a head.
        tensors = {name.replace("fc.", "linear."): tensor for name, tensor in tensors.items()}
    expected = {name.replace("fc.", "linear."): tensor for name, tensor in state.items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    # "Converted" means that the daemon takes it.
    with (
        daemon(tmp_path / "out.safetensors", tmp_path) as (address, _, _),
        dreamfeed.Client(address) as client,
    ):
        assert client.describe().teacher.num_classes == CLASSES


def test_a_moving_average_beside_the_weights_is_asked_about(tmp_path: Path) -> None:
    state = network_state()
    average = {f"module.{name}": tensor.clone() for name, tensor in state.items()}
    for checkpoint, keys in (
        ({"model": state, "model_ema": average, "args": {}}, "model, model_ema"),
        ({"state_dict": state, "state_dict_ema": average}, "state_dict, state_dict_ema"),
        ({"model": state, "ema": {"model": average, "updates": 3}}, "model, ema.model"),
    ):
        with pytest.raises(ConvertError, match=re.escape(f"more than once ({keys})")):
            convert_state(tmp_path, checkpoint)


def test_programs_are_told_apart_from_weights(tmp_path: Path) -> None:
    scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    scripted.save(tmp_path / "model.pt")
    with pytest.raises(ConvertError, match="TorchScript"):
        convert(tmp_path / "model.pt", tmp_path / "out.safetensors", **KNOWN)
    with pytest.raises(ConvertError, match=r"torch\.nn\.modules\.linear\.Linear"):
        convert_state(tmp_path, torch.nn.Linear(2, 2))


def test_the_command_line_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pth").write_text("hello")
    common = ["--arch", "resnet8", "--mean", "0.5", "--std", "0.5"]
    for source in ("text.pth", "nowhere.pth"):
        assert main([str(tmp_path / source), str(tmp_path / "out"), *common]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and source in error


def test_a_pipe_is_refused_and_nobody_waits_for_it(tmp_path: Path) -> None:
    pipe = tmp_path / "model.pth"
    os.mkfifo(pipe)
    with pytest.raises(ConvertError, match="not a regular file"):
        convert(pipe, tmp_path / "out.safetensors", **KNOWN)
