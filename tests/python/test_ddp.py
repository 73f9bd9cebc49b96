"""Two ranks under DistributedDataParallel train from one daemon; one is killed, and both resume from checkpoints."""

import signal
from pathlib import Path

import ddp_trainer
import torch
import torch.multiprocessing
from conftest import BATCH, daemon

COUNT = 4 * BATCH
BATCH_SIZE = 8
STEPS = COUNT // BATCH_SIZE // ddp_trainer.RANKS
KILLED_RANK, KILLED_STEP = 1, 4
SECONDS = 120


def run(address: str, folder: Path, name: str, die: tuple[int, int] = (-1, -1)) -> list[int | None]:
    """The exit codes of the ranks."""
    spawn = torch.multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=ddp_trainer.train, args=(rank, address, folder, name, STEPS, BATCH_SIZE, die))
        for rank in range(ddp_trainer.RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in ranks]


def checkpoints(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ddp_trainer.RANKS)]


def test_ranks_see_each_fresh_image_once_also_across_a_kill(teacher_file: Path, tmp_path: Path) -> None:
    with daemon(teacher_file, tmp_path) as (address, _, _):
        survivor, killed = run(address, tmp_path, "first", die=(KILLED_RANK, KILLED_STEP))
        assert killed == -signal.SIGKILL
        assert survivor not in (0, None)  # it cannot meet the other in the killed one's step
        assert [checkpoint["step"] for checkpoint in checkpoints(tmp_path)] == [KILLED_STEP - 1] * 2

        assert run(address, tmp_path, "second") == [0, 0]
    states = checkpoints(tmp_path)
    assert sorted(states[0]["seen"] + states[1]["seen"]) == list(range(COUNT))
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"])
