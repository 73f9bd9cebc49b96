"""PyTorch client of Dreamfeed, a daemon that dreams training images out of a teacher and streams them over gRPC.

- :class:`DreamStream`: an ``IterableDataset`` of ``(images, labels, teacher_logits, info)``.
- :class:`Client`: ``describe``, ``push_student``, ``fetch_student``, ``set_synthesizer``.
- :class:`StudentPusher`: pushes the student in the background of the training loop.
- :class:`TrainingCheckpoint` and :func:`save_student`: what a training goes on from, and what it is for.
- :func:`save_network`, :func:`load_network`: any classifier as operations and tensors in one file, and back; the daemon
  does not read such a file yet.
- :mod:`dreamfeed.convert`: PyTorch checkpoints to the safetensors files that the daemon reads.
- :mod:`dreamfeed.lightning`: a callback for Lightning.

Every error is a :class:`DreamfeedError`, and its message says what to do.
"""

from dreamfeed import _fork  # noqa: F401 (before whatever imports grpc)
from dreamfeed._batch import Batch, BatchInfo
from dreamfeed._channel import Tls
from dreamfeed.checkpoint import TrainingCheckpoint, save_student
from dreamfeed.client import (
    Client,
    DaemonInfo,
    LogInfo,
    PushResult,
    StudentInfo,
    SynthesizerInfo,
    TeacherInfo,
)
from dreamfeed.errors import (
    AuthenticationError,
    CallTimeoutError,
    ConflictError,
    DataLossError,
    DreamfeedError,
    InvalidRequestError,
    NotFoundError,
    PositionLostError,
    ProtocolError,
    ResourceExhaustedError,
    StudentPushWarning,
    UnavailableError,
)
from dreamfeed.graph import GraphError, load_network
from dreamfeed.network import save_network
from dreamfeed.pusher import StudentPusher
from dreamfeed.stream import DreamStream, merge_states

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "Batch",
    "BatchInfo",
    "CallTimeoutError",
    "Client",
    "ConflictError",
    "DaemonInfo",
    "DataLossError",
    "DreamStream",
    "DreamfeedError",
    "GraphError",
    "InvalidRequestError",
    "LogInfo",
    "NotFoundError",
    "PositionLostError",
    "ProtocolError",
    "PushResult",
    "ResourceExhaustedError",
    "StudentInfo",
    "StudentPushWarning",
    "StudentPusher",
    "SynthesizerInfo",
    "TeacherInfo",
    "Tls",
    "TrainingCheckpoint",
    "UnavailableError",
    "load_network",
    "merge_states",
    "save_network",
    "save_student",
]
