"""Where a DreamStream stands: epochs, checkpoints and workers neither lose nor repeat an image in silence."""

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import dreamfeed
import lightning.pytorch as lightning
import pytest
from conftest import BATCH
from dreamfeed import Batch, DreamStream, TrainingCheckpoint
from dreamfeed.lightning import StreamCheckpoint
from lightning_module import Seeing
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

COUNT = 4 * BATCH
SMALL = 8
SECONDS = 60


def stream(address: str, **options: Any) -> DreamStream:
    return DreamStream(address, **({"start": "earliest", "batch_size": SMALL} | options))


def loader(
    dataset: DreamStream, workers: int, kind: type[DataLoader] = DataLoader, **more: Any
) -> DataLoader:
    return kind(dataset, batch_size=None, num_workers=workers, timeout=SECONDS * bool(workers), **more)


def sequences(batches: Any, count: int) -> list[int]:
    return [sequence for batch in islice(batches, count) for sequence in batch.info.sequence.tolist()]


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize(
    ("workers", "persistent"), [(0, False), (1, False), (2, False), (1, True), (2, True)]
)
def test_a_second_epoch_goes_on(address: str, workers: int, persistent: bool, kind: type[DataLoader]) -> None:
    batches = loader(stream(address), workers, kind, persistent_workers=persistent)
    seen = [sequence for _ in range(3) for sequence in sequences(batches, 2)]
    assert sorted(seen) == list(range(6 * SMALL))


def test_epochs_of_uneven_turns_give_every_image_once(address: str) -> None:
    dataset = stream(address)
    # The second worker hands out one batch fewer, and what it had ready comes again.
    seen = [sequence for _ in range(2) for sequence in sequences(loader(dataset, 2), 3)]
    assert len(seen) == len(set(seen)) == 6 * SMALL
    first, second = (set(range(part, COUNT, 2)) for part in range(2))
    assert set(seen) == set(sorted(first)[: 4 * SMALL]) | set(sorted(second)[: 2 * SMALL])
    # The next training goes on there, with the workers' turns as they come.
    again = stream(address)
    again.load_state_dict(dataset.state_dict())
    seen += sequences(loader(again, 2), 4)
    assert len(set(seen)) == 10 * SMALL


def test_a_collate_function_keeps_info_or_is_refused(address: str) -> None:
    def keeps(batch: Batch) -> dict[str, object]:
        return {"images": batch.images, "info": batch.info}

    dataset = stream(address)
    batches = loader(dataset, 1, collate_fn=keeps)
    seen = [item["info"].first_sequence for _ in range(2) for item in islice(batches, 2)]
    assert seen == [0, SMALL, 2 * SMALL, 3 * SMALL]

    dataset = stream(address)
    batches = loader(dataset, 1, collate_fn=lambda batch: batch.images)
    assert len(list(islice(batches, 2))) == 2
    with pytest.raises(RuntimeError, match="let it return the Batch"):
        dataset.state_dict()
    with pytest.raises(RuntimeError, match="let it return the Batch"):
        next(iter(batches))


def state_after(address: str, batches: int) -> dict[str, Any]:
    dataset = stream(address)
    sequences(iter(dataset), batches)
    return dataset.state_dict()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_position_cannot_be_loaded_into_a_stream_that_is_being_read(
    address: str, workers: int, tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    before = stream(address)
    sequences(loader(before, workers), 2)
    TrainingCheckpoint(path, stream=before).save(2)

    dataset = stream(address)
    batches = iter(loader(dataset, workers))
    with pytest.raises((ValueError, RuntimeError), match=r"before iter\(loader\)"):
        TrainingCheckpoint(path, stream=dataset).load()
        next(batches)
    del batches
    assert TrainingCheckpoint(path, stream=dataset).load() == 2
    assert sequences(loader(dataset, workers), 1) == list(range(2 * SMALL, 3 * SMALL))


def test_a_seek_ends_the_iteration_under_way(address: str) -> None:
    dataset = stream(address)
    batches = iter(dataset)
    next(batches)
    dataset.seek(3)
    with pytest.raises(RuntimeError, match="iterate anew"):
        next(batches)
    assert sequences(dataset, 1) == list(range(3, 3 + SMALL))


def test_persistent_workers_cannot_be_moved(address: str) -> None:
    dataset = stream(address)
    batches = loader(dataset, 1, persistent_workers=True)
    sequences(batches, 1)
    dataset.seek(3)
    with pytest.raises(RuntimeError, match="make a new DataLoader"):
        sequences(batches, 1)
    assert sequences(loader(dataset, 1), 1) == list(range(3, 3 + SMALL))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_recorded_batch_follows_the_one_before(address: str, workers: int) -> None:
    dataset = stream(address)
    batches = list(islice(loader(dataset, workers), 4))
    with pytest.raises(ValueError, match="does not follow"):
        dataset.record(batches[-1])
    for batch in batches[:2]:
        dataset.record(batch)
    with pytest.raises(ValueError, match="does not follow"):
        dataset.record(batches[1])  # for the second time
    # What was handed out and not recorded was not trained on.
    again = sequences(loader(dataset, workers), 2)
    assert again == [sequence for batch in batches[2:] for sequence in batch.info.sequence.tolist()]

    # A position that was loaded too late, as far as `record` can tell.
    loaded = stream(address)
    loaded.load_state_dict(state_after(address, 2))
    with pytest.raises(ValueError, match="does not follow"):
        loaded.record(batches[0])


@pytest.mark.parametrize("readers", [1, 3])
def test_another_number_of_readers_starts_from_the_lowest_position(
    address: str, readers: int, caplog: pytest.LogCaptureFixture
) -> None:
    states = []
    for rank, batches in ((0, 1), (1, 2)):
        dataset = stream(address, shard=(rank, 2))
        sequences(iter(dataset), batches)
        states.append(dataset.state_dict())
    # Rank 0 took 0, 2, ... 14, and rank 1 took 1, 3, ... 31: what comes twice is 15 + 2 k, up to 31.
    lowest, twice = 2 * SMALL - 1, 9
    seen: list[int] = []
    with caplog.at_level(logging.WARNING, "dreamfeed"):
        for rank in range(readers):
            dataset = stream(address, shard=(rank, readers), batch_size=1)
            dataset.load_state_dict(dreamfeed.merge_states(*states))
            seen += sequences(dataset, (COUNT - lowest) // readers)
    assert sorted(seen) == list(range(lowest, COUNT))
    (told,) = [record.getMessage() for record in caplog.records if "lowest" in record.getMessage()]
    assert f"sequence {lowest}" in told and f"{twice} images come twice" in told and "2 readers" in told

    alone = stream(address, shard=(0, readers))
    alone.load_state_dict(states[1])
    with pytest.raises(ValueError, match="merge_states"):
        iter(alone)


def test_other_workers_go_on_where_the_lowest_was(address: str) -> None:
    dataset = stream(address)
    seen = sequences(loader(dataset, 2), 1)  # the second worker has not moved
    seen += sequences(loader(dataset, 0), 4)
    assert sorted(set(seen)) == list(range(4 * SMALL))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("recorded", [False, True])
def test_the_epochs_of_lightning_go_on(address: str, workers: int, recorded: bool, tmp_path: Path) -> None:
    dataset, module = stream(address), Seeing()
    trainer = lightning.Trainer(
        max_epochs=3,
        limit_train_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StreamCheckpoint(dataset)] if recorded else [],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader(dataset, workers))
    assert sorted(module.seen) == list(range(6 * SMALL))
