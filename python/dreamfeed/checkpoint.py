"""What a training leaves on disk: the checkpoint that it goes on from, and the student."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dreamfeed._files import metadata, replacing
from dreamfeed.client import Snapshot, TeacherInfo, Weights, arch_of

_FORMAT = 1


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
    In a DataLoader with workers the stream has to be told what was trained on: ``stream.record(batch)``. Every rank of
    a distributed training needs a file of its own, because every rank has its own position.

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
            torch.save({"dreamfeed_training": _FORMAT, "step": step, "parts": states}, partial)

    def load(self) -> int:
        """Puts every part into its saved state; the step of :meth:`save`, or 0 where there is no file yet.

        Raises:
            ValueError: the file is none that :meth:`save` wrote, or one of other parts.
        """
        if not self.path.exists():
            return 0
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{self.path} cannot be read as a checkpoint ({str(error).partition(chr(10))[0]}); "
                "remove it, or give another path"
            ) from error
        if not isinstance(saved, dict) or saved.get("dreamfeed_training") != _FORMAT:
            raise ValueError(
                f"{self.path} is no checkpoint that this version of TrainingCheckpoint wrote; give another path"
            )
        if saved["parts"].keys() != self._parts.keys():
            raise ValueError(
                f"{self.path} holds {sorted(saved['parts'])}, and this training has {sorted(self._parts)}; "
                "give another path, or the same parts"
            )
        for name, state in saved["parts"].items():
            self._parts[name].load_state_dict(state)
        step: int = saved["step"]
        return step


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
