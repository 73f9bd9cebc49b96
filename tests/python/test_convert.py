"""`python -m dreamfeed.convert`: PyTorch checkpoints as files that the daemon reads, without running code in them."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import dreamfeed
import pytest
import torch
from conftest import CHANNELS, CLASS_NAMES, CLASSES, MEAN, ROOT, SIZE, STD, daemon, random_network
from dreamfeed.convert import ConvertError, convert, main
from safetensors import safe_open

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
    assert "left out: epoch, optimizer" in done.stdout and "without the prefix module." in done.stdout

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
        ({"a": torch.ones(1), "epoch": 3}, {}, "'epoch'"),
        ({"a": torch.tensor(float("nan"))}, {}, "a has values"),
        ({"a": torch.ones(1)}, {"key": "ema"}, "no key"),
        ({"a": torch.ones(1)}, {"prefix": "student."}, "prefix"),
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


def test_the_command_line_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pth").write_text("hello")
    common = ["--arch", "resnet8", "--mean", "0.5", "--std", "0.5"]
    for source in ("text.pth", "nowhere.pth"):
        assert main([str(tmp_path / source), str(tmp_path / "out"), *common]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and source in error
