"""Whoever starts the ranks, each fresh image reaches exactly one of them, or the stream says what to write."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import BATCH, ROOT
from dreamfeed import DreamStream

RANKS = 2
BATCH_SIZE = 8
STEPS = 4 * BATCH // BATCH_SIZE // RANKS
SECONDS = 120


def run(kind: str, address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += [str(Path(__file__).with_name("ranks_trainer.py")), kind, address, str(STEPS), str(BATCH_SIZE)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )


@pytest.mark.parametrize("kind", ["plain", "lightning", "accelerate"])
def test_each_image_reaches_exactly_one_rank(kind: str, address: str, tmp_path: Path) -> None:
    done = run(kind, address, tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("sequences")]
    assert len(told) == RANKS
    assert sorted(int(sequence) for rank in told for sequence in rank) == list(
        range(RANKS * STEPS * BATCH_SIZE)
    )


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("accelerate-dispatches", "leave the loader out of accelerator.prepare(...)"),
        ("accelerate-shards", "leave the loader out of accelerator.prepare(...)"),
        ("late", "call init_process_group before iter(loader)"),
    ],
)
def test_what_would_lose_or_repeat_images_is_told_what_to_write(
    kind: str, line: str, address: str, tmp_path: Path
) -> None:
    done = run(kind, address, tmp_path)
    assert done.returncode != 0 and line in done.stderr, done.stderr
    assert "sequences" not in done.stdout


def test_a_worker_of_ray_train_is_a_rank_without_a_process_group(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray itself is no requirement of the tests: this is the part of it that is asked.
    train = ModuleType("ray.train")
    train.get_context = lambda: SimpleNamespace(  # type: ignore[attr-defined]
        get_world_rank=lambda: 1, get_world_size=lambda: 4
    )
    monkeypatch.setitem(sys.modules, "ray.train", train)
    batch = next(iter(DreamStream(address, start="earliest", batch_size=2)))
    assert batch.info.shard == (1, 4) and batch.info.sequence.tolist() == [1, 5]

    def outside() -> None:
        raise RuntimeError("not in a training session")

    train.get_context = outside  # type: ignore[attr-defined]
    assert next(iter(DreamStream(address, start="earliest", batch_size=2))).info.shard == (0, 1)
