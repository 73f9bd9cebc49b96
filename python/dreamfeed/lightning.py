"""Callbacks for Lightning (``lightning`` or ``pytorch_lightning``): push the student, keep the stream's position."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch import nn

from dreamfeed._batch import Batch
from dreamfeed.client import Client
from dreamfeed.pusher import StudentPusher
from dreamfeed.stream import DreamStream, merge_states

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:
        try:
            from pytorch_lightning import Callback, LightningModule, Trainer
        except ImportError as error:
            raise ImportError(
                "dreamfeed.lightning needs Lightning: pip install 'dreamfeed[lightning]'"
            ) from error


class PushStudent(Callback):
    """Pushes the student every `every_n_steps` optimizer steps and at the end, in the background, from rank zero only.

    Args:
        client: the daemon, or its address.
        arch: the student's architecture, for example ``"resnet20"``; default: the student's attribute ``arch``.
        every_n_steps: optimizer steps (``trainer.global_step``) between two pushes.
        student: the attribute of the LightningModule that holds the student, or a function of the LightningModule that
            gives it; default: the LightningModule itself.
        on_error: as of :class:`StudentPusher`: ``"warn"`` or ``"raise"``.
    """

    def __init__(
        self,
        client: Client | str,
        arch: str | None = None,
        *,
        every_n_steps: int = 100,
        student: str | Callable[[LightningModule], nn.Module] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; give at least 1")
        self._client = Client(client) if isinstance(client, str) else client
        self._arch, self._every, self._student, self._on_error = arch, every_n_steps, student, on_error
        self._pusher: StudentPusher | None = None
        self._pushed_at = 0

    @property
    def pusher(self) -> StudentPusher | None:
        """What pushes, while training."""
        return self._pusher

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pushed_at = trainer.global_step
        if trainer.is_global_zero:
            self._pusher = StudentPusher(self._client, self._arch, on_error=self._on_error)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        # Steps, not batches: with gradient accumulation several batches make one step.
        if trainer.global_step - self._pushed_at >= self._every:
            self._push(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._pushed_at:
            self._push(trainer, pl_module)
        self._close(60.0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(0.0)

    def _push(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pushed_at = trainer.global_step
        if self._pusher is not None:
            self._pusher.push(self._module(pl_module), trainer.global_step)

    def _module(self, pl_module: LightningModule) -> nn.Module:
        if self._student is None:
            return pl_module
        if isinstance(self._student, str):
            student: nn.Module = getattr(pl_module, self._student)
            return student
        return self._student(pl_module)

    def _close(self, timeout: float) -> None:
        pusher, self._pusher = self._pusher, None
        if pusher is not None:
            pusher.close(timeout)


class StreamCheckpoint(Callback):
    """Keeps the position after the last batch that was *trained on* in Lightning's checkpoints, of all ranks.

    ``Trainer.fit(..., ckpt_path=...)`` then goes on with the very next image, with a plain DataLoader and any number of
    workers. A StatefulDataLoader alone does not do that: Lightning fetches one batch ahead, and keeps the position
    after that.

    Args:
        stream: the dataset of the training's DataLoader; its batches must reach ``training_step`` as they are.
    """

    def __init__(self, stream: DreamStream) -> None:
        super().__init__()
        self._stream = stream

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._stream.record(batch)

    def state_dict(self) -> dict[str, Any]:
        state = self._stream.state_dict()
        if not (dist.is_available() and dist.is_initialized()):
            return state
        # Lightning asks every rank, and keeps what rank zero says.
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, state)
        return merge_states(*states)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stream.load_state_dict(state_dict)
