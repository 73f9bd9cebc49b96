"""`dreamfeed.DreamStream` on a real daemon: every image exactly once, whoever asks and whatever breaks."""

import pickle
import socket
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import cifar_resnet
import dreamfeed
import grpc
import pytest
import safetensors.torch
import torch
from conftest import BATCH, CHANNELS, CLASS_NAMES, CLASSES, MEAN, SIZE, STD, daemon, random_network
from dreamfeed import Batch, DreamStream
from dreamfeed._proto import dreamfeed_pb2 as pb
from dreamfeed._proto import dreamfeed_pb2_grpc as pb_grpc
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

COUNT = 4 * BATCH
SMALL = 12
SECONDS = 60


def stream(address: str, **options: object) -> DreamStream:
    return DreamStream(address, **({"start": "earliest", "batch_size": SMALL} | options))


def take(batches: Iterator[Batch], count: int) -> list[int]:
    """The sequences of the next `count` images."""
    seen: list[int] = []
    for batch in batches:
        seen += batch.info.sequence.tolist()
        if len(seen) >= count:
            break
    return seen


def test_a_batch_is_what_the_contract_says(address: str) -> None:
    images, labels, logits, info = next(iter(stream(address)))
    assert (images.shape, images.dtype) == ((SMALL, CHANNELS, *SIZE), torch.float32)
    assert (labels.shape, labels.dtype) == ((SMALL,), torch.int64)
    assert (logits.shape, logits.dtype) == ((SMALL, CLASSES), torch.float32)
    assert info.sequence.tolist() == list(range(SMALL))
    assert (info.count, info.first_sequence, info.fresh_count, info.shard) == (SMALL, 0, SMALL, (0, 1))
    assert {info.synthesizers[index] for index in info.synthesizer} == {"noise"}
    assert info.replay_ratio == 0 and info.age > 0 and info.cursor
    # Normalized as the teacher wants it, and its logits are those of PyTorch on exactly these pixels.
    with torch.no_grad():
        torch.testing.assert_close(logits, random_network(1)(images), rtol=1e-4, atol=1e-4)
    images.add_(1.0)  # the memory is the receiver's own
    assert torch.equal(info.to(torch.float64).sequence, info.sequence.double())


def test_pixels_as_stored_and_in_half_precision(address: str) -> None:
    # Whole chunks as they are stored come in another format than batches that were put together.
    whole = next(iter(DreamStream(address, start="earliest", pixels="u8")))
    assert (whole.images.dtype, whole.info.count) == (torch.uint8, BATCH)
    assert whole.info.sequence.tolist() == list(range(BATCH))
    assert whole.info.synthesizers == ("noise",) and not whole.info.synthesizer.any()
    normalization = {"mean": ",".join(map(str, MEAN)), "std": ",".join(map(str, STD))}
    expected = cifar_resnet.normalize(whole.images, normalization)
    full = next(iter(stream(address, batch_size=BATCH)))
    half = next(iter(stream(address, batch_size=BATCH, pixels="f16")))
    torch.testing.assert_close(full.images, expected)
    # They are normalized here, to the very floats that the daemon would send.
    request = pb.StreamRequest(batch_size=BATCH, pixel_format=pb.PIXEL_FORMAT_F32_NORMALIZED)
    request.start.sequence = 0
    with grpc.insecure_channel(address) as channel:
        answer = next(pb_grpc.DreamfeedServiceStub(channel).Stream(request, timeout=SECONDS))
    assert torch.equal(full.images, safetensors.torch.load(answer.payload)["images"])
    assert half.images.dtype == torch.float16
    torch.testing.assert_close(half.images.float(), expected, rtol=1e-3, atol=1e-3)
    for batch in (whole, full, half):
        copy = pickle.loads(pickle.dumps(batch))
        assert isinstance(copy, Batch) and copy.info.cursor == batch.info.cursor
        assert torch.equal(copy.images, batch.images) and torch.equal(copy.labels, batch.labels)
        assert torch.equal(copy.info.sequence, batch.info.sequence)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_sees_every_image_exactly_once(address: str, workers: int) -> None:
    with dreamfeed.Client(address) as client:  # a connection is open while the workers are forked
        client.describe()
        loader = DataLoader(
            stream(address), batch_size=None, num_workers=workers, timeout=SECONDS * bool(workers)
        )
        assert sorted(take(iter(loader), COUNT)) == list(range(COUNT))


def test_the_shards_of_two_ranks_are_disjoint_and_complete(address: str) -> None:
    shards = [take(iter(stream(address, shard=(rank, 2))), COUNT // 2) for rank in range(2)]
    assert sorted(shards[0] + shards[1]) == list(range(COUNT))
    assert not set(shards[0]) & set(shards[1])


def test_rank_and_ranks_come_from_the_environment(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    batch = next(iter(stream(address)))
    assert batch.info.shard == (2, 4)
    assert batch.info.sequence.tolist() == list(range(2, 4 * SMALL, 4))


def test_a_state_dict_goes_on_after_the_last_batch_that_was_yielded(address: str, tmp_path: Path) -> None:
    first = stream(address, prefetch=4)
    iterator = iter(first)
    seen = take(iterator, 3 * SMALL)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    next(iterator)  # later than the checkpoint
    iterator.close()
    again = stream(address)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert seen + take(iter(again), COUNT - len(seen)) == list(range(COUNT))


def test_iterating_again_goes_on_and_seek_goes_back(address: str) -> None:
    dataset = stream(address)
    assert take(iter(dataset), SMALL) + take(iter(dataset), SMALL) == list(range(2 * SMALL))
    cursor = next(iter(dataset)).info.cursor
    dataset.seek(5)
    assert take(iter(dataset), SMALL) == list(range(5, 5 + SMALL))
    dataset.seek(cursor)
    assert take(iter(dataset), SMALL) == list(range(3 * SMALL, 4 * SMALL))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_dataloader_resumes_exactly(address: str, workers: int) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(stream(address), batch_size=None, num_workers=workers)

    first = loader()
    seen = take(iter(first), 3 * SMALL)
    state = first.state_dict()
    again = loader()
    again.load_state_dict(state)
    assert sorted(seen + take(iter(again), COUNT - len(seen))) == list(range(COUNT))


def test_a_plain_dataloader_with_workers_resumes_from_what_was_recorded(address: str) -> None:
    dataset = stream(address)
    seen = []
    for batch in islice(DataLoader(dataset, batch_size=None, num_workers=2, timeout=SECONDS), 3):
        seen += batch.info.sequence.tolist()
        dataset.record(batch)
    again = stream(address)
    again.load_state_dict(dataset.state_dict())
    # The second worker goes on where it was: two batches of the first were recorded, one of the second.
    rest = DataLoader(again, batch_size=None, num_workers=2, timeout=SECONDS)
    # Round robin ends with the first worker, which has one batch fewer.
    for batch in islice(rest, 4):
        seen += batch.info.sequence.tolist()
    assert len(seen) == len(set(seen)) == 7 * SMALL


def test_a_state_of_other_readers_is_refused(address: str) -> None:
    states = []
    for rank in range(2):
        dataset = stream(address, shard=(rank, 2))
        next(iter(dataset))
        states.append(dataset.state_dict())
    other = stream(address, shard=(1, 2))
    other.load_state_dict(states[0])
    with pytest.raises(ValueError, match="merge_states"):
        iter(other)
    other.load_state_dict(dreamfeed.merge_states(*states))
    assert take(iter(other), SMALL) == list(range(2 * SMALL + 1, 4 * SMALL, 2))
    alone = stream(address)
    alone.load_state_dict(states[0])
    with pytest.raises(ValueError, match="of 2 readers"):
        iter(alone)


def test_replay_never_starves_and_classes_are_named(address: str) -> None:
    replaying = stream(address, start="latest", replay=1.0, sampling="competition", batch_size=2 * COUNT)
    batch = next(iter(replaying))
    assert (batch.info.count, batch.info.fresh_count, batch.info.replay_ratio) == (2 * COUNT, 0, 1.0)

    labels = [batch.labels for batch in islice(DreamStream(address, start="earliest", pixels="u8"), 4)]
    wanted = int(torch.cat(labels).mode().values)
    some = next(iter(stream(address, classes=[CLASS_NAMES[wanted]], batch_size=1, replay=0.5)))
    assert some.labels.tolist() == [wanted]
    with pytest.raises(dreamfeed.InvalidRequestError, match="aloe, birch"):
        next(iter(stream(address, classes=["zebra"])))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_start_beyond_the_log_is_an_error_of_its_own(address: str, workers: int) -> None:
    def error() -> Exception | None:
        # Without its traceback, in which the DataLoader's iterator would hang on until garbage is collected; its queues
        # could go first, and then torch waits five seconds for a worker that never hears of it.
        try:
            next(iter(DataLoader(stream(address, start=10_000), batch_size=None, num_workers=workers)))
        except dreamfeed.DreamfeedError as error:
            return error.with_traceback(None)
        return None

    met = error()
    assert isinstance(met, dreamfeed.PositionLostError) and "sequence 10000" in str(met)


def test_what_the_daemon_refuses_is_told_once_and_not_tried_again(address: str) -> None:
    with pytest.raises(dreamfeed.InvalidRequestError, match="batch_size"):
        next(iter(stream(address, batch_size=10_000_000)))
    with pytest.raises(dreamfeed.InvalidRequestError):
        next(iter(stream(address, classes=[CLASSES])))


def test_a_stream_outlives_a_restart_of_the_daemon(teacher_file: Path, tmp_path: Path) -> None:
    with daemon(teacher_file, tmp_path) as (address, _, _):
        # Another reader has seen COUNT images: a daemon that ends earlier would leave fewer than the test counts on.
        made = iter(stream(address))
        take(made, COUNT)
        made.close()
        # With all that there is ahead of the trainer, the reader hears of the daemon's end at once.
        batches = iter(stream(address, prefetch=COUNT))
        seen = take(batches, 2 * SMALL)
    # The same log goes on; it gets COUNT more images.
    with daemon(teacher_file, tmp_path, listen=address):
        seen += take(batches, 2 * COUNT - len(seen))
        batches.close()
    assert seen == list(range(2 * COUNT))


def test_a_daemon_that_is_not_there_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(dreamfeed.UnavailableError, match="dreamfeed serve"):
        next(iter(DreamStream(f"unix:{tmp_path}/nobody", give_up_after=0.0)))


def test_a_daemon_that_takes_connections_and_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(dreamfeed.UnavailableError, match="does not answer"):
            next(iter(DreamStream(address, give_up_after=1.5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"replay": 1.5}, "replay"),
        ({"sampling": "best"}, "uniform, recency, competition"),
        ({"pixels": "f64"}, "f32, f16"),
        ({"prefetch": 0}, "prefetch"),
        ({"start": -1}, "start"),
        ({"start": "now"}, "start"),
        ({"shard": (2, 2)}, "shard"),
        ({"classes": []}, "classes"),
        ({"on_gap": "ignore"}, "on_gap"),
        ({"max_age": -1.0}, "max_age"),
    ],
)
def test_a_malformed_argument_is_refused_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DreamStream("127.0.0.1:1", **options)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_a_loader_that_would_batch_batches_is_refused(
    address: str, kind: type[DataLoader], workers: int
) -> None:
    # At once, and not when 64 batches have come.
    with pytest.raises(ValueError, match=r"DataLoader\(stream, batch_size=None\)"):
        next(iter(kind(stream(address), batch_size=64, num_workers=workers)))
