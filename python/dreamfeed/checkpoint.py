"""What a training leaves on disk: the checkpoint that it goes on from, and the student."""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dreamfeed._files import metadata, replacing
from dreamfeed.client import Snapshot, TeacherInfo, Weights, arch_of

# 1 had no checksum; it is still read.
_FORMAT = 2


class Stateful(Protocol):
    """A module, an optimizer, a learning rate schedule, a :class:`DreamStream`, and whatever else has these two."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class TrainingCheckpoint:
    """One file from which a training goes on where it was: every part's state, and the step.

        checkpoint = TrainingCheckpoint("run.ckpt", model=model, optimizer=optimizer, stream=stream)
        step = checkpoint.load()  # 0 at the first start
        for step, batch in enumerate(DataLoader(stream, batch_size=None), step + 1):
            ...
            if step % 200 == 0:
                checkpoint.save(step)

    With the :class:`DreamStream` among the parts the next batch begins with the very next image; load before iterating.
    Where a loader fetches ahead, tell the stream what was trained on: ``stream.record(batch)``. Every rank of a
    distributed training needs a file of its own, because every rank has its own position.

    Args:
        path: the file; a crash while it is written leaves the one before.
        parts: what is saved, under its name. States of tensors and plain values only: loading runs no code in the file.
    """

    def __init__(self, path: Path | str, **parts: Stateful) -> None:
        self.path = Path(path)
        self._parts = parts

    def save(self, step: int) -> None:
        """Writes the parts as they are after `step` steps in the place of what was there."""
        states = {name: part.state_dict() for name, part in self._parts.items()}
        with replacing(self.path) as partial:
            saved = {"dreamfeed_training": _FORMAT, "step": step, "parts": states}
            torch.save(saved | {"sha256": _checksum(step, states)}, partial)

    def load(self) -> int:
        """Puts every part into its saved state; the step of :meth:`save`, or 0 where there is no file yet.

        Raises:
            ValueError: the file is none that :meth:`save` wrote, is damaged, or is one of other parts.
        """
        if not self.path.exists():
            return 0
        if not self.path.is_file():
            raise ValueError(
                f"{self.path} is not a regular file (but a folder, a pipe or a device); give another path"
            )
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{self.path} cannot be read as a checkpoint ({str(error).partition(chr(10))[0]}); "
                "remove it, or give another path"
            ) from error
        if not isinstance(saved, dict) or saved.get("dreamfeed_training") not in (1, _FORMAT):
            raise ValueError(
                f"{self.path} is not a checkpoint that this version of TrainingCheckpoint wrote; give another path"
            )
        step, parts = saved.get("step"), saved.get("parts")
        whole = saved["dreamfeed_training"] == 1 or saved.get("sha256") == _checksum(step, parts)
        if not whole or not isinstance(parts, dict):
            raise ValueError(
                f"{self.path} is damaged (its checksum is another); remove it, or give another path"
            )
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(
                f"{self.path} says step {step!r}, which makes no sense; remove it, or give another path"
            )
        if parts.keys() != self._parts.keys():
            raise ValueError(
                f"{self.path} holds {sorted(saved['parts'])}, and this training has {sorted(self._parts)}; "
                "give another path, or the same parts"
            )
        for name, state in parts.items():
            self._parts[name].load_state_dict(state)
        return step


def _checksum(*values: Any) -> str:
    """SHA-256 over plain values and tensors, which are the same after a file as before it."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            if value.layout is torch.strided and not value.is_quantized:
                flat = value.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"map {len(value)};".encode())
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, list | tuple):
            digest.update(f"list {len(value)};".encode())
            for item in value:
                feed(item)
        elif value is None or isinstance(value, bool | int | float | str | bytes):
            digest.update(f"{value!r};".encode())
        else:
            # What such a value looks like in text is not the same in every process.
            digest.update(f"{type(value).__qualname__};".encode())

    feed(values)
    return digest.hexdigest()


def save_student(
    model: Weights,
    path: Path | str,
    teacher: TeacherInfo,
    *,
    arch: str | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes a student as the safetensors file that ``dreamfeed`` reads, as a network or as a teacher.

    Args:
        model: as for :meth:`Client.push_student`.
        path: the file; it appears under this name only when it is complete.
        teacher: whose images it learned from: ``client.describe().teacher``. It takes its input as the teacher does.
        arch: the architecture, for example ``"resnet20"``; default: the module's attribute ``arch``. A pruned network
            names the architecture it was pruned from.
        class_names: one an output, in order, or empty where they are not known; default: the teacher's.

    Raises:
        ValueError: nothing names the architecture.
    """
    described = metadata(
        arch_of(model, arch),
        _shortest(teacher.mean),
        _shortest(teacher.std),
        teacher.image_shape[1:],
        teacher.class_names if class_names is None else class_names,
    )
    with replacing(Path(path)) as partial:
        partial.write_bytes(Snapshot.take(model).encode(described))


def _shortest(values: Sequence[float]) -> list[float]:
    """0.485 for what came over the wire as an f32, and is 0.485000014 as a Python float."""
    return [float(str(np.float32(value))) for value in values]
