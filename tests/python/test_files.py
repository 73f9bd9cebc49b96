"""Outputs of the Python package: whole or not at all, never in the place of a device; damage is seen."""

import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from dreamfeed._files import replacing
from dreamfeed.checkpoint import TrainingCheckpoint


def write(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out"
    write(path, b"one")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        assert str(os.getpid()) in partial.name and partial.parent == path.parent
        partial.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"one"
    write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["out"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to("elsewhere/file")
    write(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"

    link.unlink()
    link.symlink_to("/dev/null")
    write(link, b"new")
    assert link.is_symlink() and stat.S_ISCHR(link.stat().st_mode)


def test_a_pipe_gets_the_bytes_and_one_that_nobody_reads_is_an_error(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe"):
        write(pipe, b"nobody")
    reader, got = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), []
    os.set_blocking(reader, True)
    thread = threading.Thread(target=lambda: got.append(os.fdopen(reader, "rb").read()))
    with open(pipe, "wb"):
        thread.start()
        write(pipe, b"somebody" * 100_000)
    thread.join(30)
    assert got == [b"somebody" * 100_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="name a file"):
        write(tmp_path, b"")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_is_written_into_and_stays_one(tmp_path: Path) -> None:
    null = tmp_path / "null"
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this machine makes no devices")
    write(null, b"gone")
    assert stat.S_ISCHR(null.stat().st_mode)
    assert os.listdir(tmp_path) == ["null"]


def trained(path: Path) -> tuple[TrainingCheckpoint, torch.nn.Linear]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return TrainingCheckpoint(path, model=model, optimizer=optimizer), model


def test_a_checkpoint_comes_back_and_one_of_a_changed_byte_step_or_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    checkpoint, model = trained(path)
    checkpoint.save(7)
    weight = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    assert checkpoint.load() == 7
    assert torch.equal(model.weight, weight)

    saved = torch.load(path, weights_only=True)
    saved["parts"]["model"]["weight"][0, 0] += 1
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"run\.ckpt is damaged"):
        checkpoint.load()
    assert torch.equal(model.weight, weight)

    checkpoint.save(-3)
    with pytest.raises(ValueError, match=r"run\.ckpt says step -3"):
        checkpoint.load()

    # Those of before had no checksum.
    torch.save(
        {"dreamfeed_training": 1, "step": 5, "parts": torch.load(path, weights_only=True)["parts"]}, path
    )
    assert checkpoint.load() == 5


def test_a_checkpoint_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    checkpoint, _ = trained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        checkpoint.load()
