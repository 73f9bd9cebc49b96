"""What `dreamfeed log export` makes, read by the tools it is made for; and chunks, read by plain safetensors."""

import io
import json
import subprocess
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import safetensors
import safetensors.numpy
from conftest import BATCH, BINARY, CHANNELS, CLASSES, SIZE, daemon
from numpy.typing import NDArray
from PIL import Image

COUNT = 4 * BATCH
SHARD = 40

Arrays = dict[str, NDArray]


def log(*arguments: str, store: Path) -> subprocess.CompletedProcess:
    command = [str(BINARY), "log", *arguments, "--store", str(store)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def store(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that a daemon filled with COUNT images, and left."""
    folder = tmp_path_factory.mktemp("daemon")
    with daemon(teacher_file, folder):
        deadline = time.monotonic() + 60
        # The store can be looked at while a daemon writes to it.
        while json.loads(log("ls", "--json", store=folder / "store").stdout)["images"] < COUNT:
            assert time.monotonic() < deadline, (folder / "serve.log").read_text()
            time.sleep(0.1)
    return folder / "store"


@pytest.fixture(scope="module")
def log_arrays(store: Path) -> Arrays:
    """Every tensor of the log, chunk after chunk, read with nothing but safetensors."""
    chunks = []
    for path in sorted((store / "log/chunks").iterdir()):
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
        assert metadata["format"] == "dreamfeed.chunk.v1"
        assert int(metadata["first_sequence"]) == sum(len(chunk["labels"]) for chunk in chunks)
        assert path.stem == metadata["first_sequence"].zfill(20)
        chunks.append(safetensors.numpy.load_file(path))
    arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    assert arrays["images"].shape == (COUNT, CHANNELS, *SIZE)
    return arrays


def export(store: Path, out: Path, form: str, *flags: str) -> Path:
    done = log("export", "--format", form, "--out", str(out), *flags, store=store)
    assert done.returncode == 0, done.stderr
    return out


def same_pixels(image: Image.Image, pixels: NDArray) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), pixels.transpose(1, 2, 0))


def same_row(row: dict, arrays: Arrays, sequence: int) -> bool:
    """Everything but the picture; floats exactly."""
    return (
        row["sequence"] == sequence
        and row["label"] == arrays["labels"][sequence]
        and row["student_version"] == arrays["student_version"][sequence]
        and np.float32(row["competition"]) == arrays["competition"][sequence]
        and np.array_equal(np.float32(row["teacher_logits"]), arrays["teacher_logits"][sequence])
    )


def test_store_is_sound(store: Path) -> None:
    done = log("verify", "--json", store=store)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["images"] == COUNT


def test_webdataset(store: Path, log_arrays: Arrays, tmp_path: Path) -> None:
    out = export(store, tmp_path / "tar", "webdataset", "--shard-images", str(SHARD))
    shards = sorted(out.iterdir())
    assert [shard.name for shard in shards] == [f"dreams-{i:06}.tar" for i in range(3)]
    samples: dict[str, dict[str, bytes]] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, kind = member.name.split(".")
                samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
    assert list(samples) == [f"{sequence:020}" for sequence in range(COUNT)]
    for sequence, sample in enumerate(samples.values()):
        assert same_pixels(Image.open(io.BytesIO(sample["png"])), log_arrays["images"][sequence])
        assert int(sample["cls"]) == log_arrays["labels"][sequence]
        assert same_row(json.loads(sample["json"]), log_arrays, sequence)


def test_webdataset_by_datasets(store: Path, log_arrays: Arrays, tmp_path: Path) -> None:
    out = export(store, tmp_path / "tar", "webdataset", "--shard-images", str(SHARD))
    loaded = datasets.load_dataset(
        "webdataset", data_files=str(out / "*.tar"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == COUNT
    for sequence, row in enumerate(loaded):
        assert same_pixels(row["png"], log_arrays["images"][sequence])
        assert row["cls"] == log_arrays["labels"][sequence]


def test_parquet_by_pyarrow(store: Path, log_arrays: Arrays, tmp_path: Path) -> None:
    out = export(store, tmp_path / "parquet", "parquet")
    assert [file.name for file in out.iterdir()] == ["dreams-000000.parquet"]
    table = pyarrow.parquet.read_table(out / "dreams-000000.parquet")
    assert table.column_names == [
        *("image", "label", "teacher_logits", "sequence", "student_version", "competition"),
    ]
    for sequence, row in enumerate(table.to_pylist()):
        assert row["image"]["path"] == f"{sequence:020}.png"
        assert same_pixels(Image.open(io.BytesIO(row["image"]["bytes"])), log_arrays["images"][sequence])
        assert same_row(row, log_arrays, sequence)
    assert table.num_rows == COUNT


def test_parquet_by_datasets(store: Path, log_arrays: Arrays, tmp_path: Path) -> None:
    out = export(store, tmp_path / "parquet", "parquet", "--shard-images", str(SHARD))
    loaded = datasets.load_dataset(
        "parquet", data_files=str(out / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features["image"] == datasets.Image()
    assert loaded.features["label"] == datasets.ClassLabel(names=[str(k) for k in range(CLASSES)])
    assert loaded.features["teacher_logits"] == datasets.List(datasets.Value("float32"))
    assert len(loaded) == COUNT
    for sequence, row in enumerate(loaded):
        assert same_pixels(row["image"], log_arrays["images"][sequence])
        assert same_row(row, log_arrays, sequence)


def test_folder_by_datasets(store: Path, log_arrays: Arrays, tmp_path: Path) -> None:
    kept = int(np.bincount(log_arrays["labels"]).argmax())
    out = export(store, tmp_path / "folder", "folder", "--classes", str(kept), "--from", "10")
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache")
    )
    wanted = [s for s in range(10, COUNT) if log_arrays["labels"][s] == kept]
    assert sorted(row["sequence"] for row in loaded) == wanted
    for row in loaded:
        assert same_pixels(row["image"], log_arrays["images"][row["sequence"]])
        assert same_row(row, log_arrays, row["sequence"])
    # Also those of classes without an image: whoever numbers the folders has the classes.
    assert sorted(path.name for path in out.iterdir()) == [*map(str, range(CLASSES)), "metadata.jsonl"]
