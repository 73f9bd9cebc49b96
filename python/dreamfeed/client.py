"""The unary calls and the student: describe, push, fetch, switch."""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import grpc
import safetensors.torch
import torch
from torch import Tensor, nn

from dreamfeed import _fork
from dreamfeed._channel import Endpoint, Tls
from dreamfeed._proto import dreamfeed_pb2 as pb
from dreamfeed._proto import dreamfeed_pb2_grpc as pb_grpc
from dreamfeed._state import bare
from dreamfeed.errors import DreamfeedError, ProtocolError, translate

#: What :meth:`Client.push_student` takes: a module or its state_dict.
Weights = nn.Module | Mapping[str, Tensor]
_PIECE = 2 << 20


@dataclass(frozen=True)
class TeacherInfo:
    """The network that the images are dreamed from."""

    #: For example "resnet20".
    arch: str
    #: SHA-256 over its weights, 64 hexadecimal digits.
    sha256: str
    num_classes: int
    #: In order, or empty where the checkpoint does not tell.
    class_names: tuple[str, ...]
    #: (channels, height, width) of one image.
    image_shape: tuple[int, int, int]
    #: One a channel: network_input = (pixel / 255 - mean) / std.
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_parameters: int


@dataclass(frozen=True)
class StudentInfo:
    """One accepted version of the student."""

    #: 1 for the first accepted push, and one more for each after it.
    version: int
    arch: str
    byte_length: int
    #: SHA-256 of the file, 64 hexadecimal digits.
    sha256: str
    #: The trainer's own step counter at the push.
    step: int
    accepted_at: datetime
    num_classes: int


@dataclass(frozen=True)
class LogInfo:
    """The extent of the log."""

    log_id: str
    #: The oldest image from which a stream can go on to the newest.
    first_sequence: int
    #: The sequence that the next image will get.
    next_sequence: int
    chunks: int
    bytes: int
    images: int
    lost_images: int


@dataclass(frozen=True)
class SynthesizerInfo:
    """What makes the images."""

    #: "adi", "warm-adi", "fast", "hybrid" or "noise".
    name: str
    preset: str
    #: Every setting in force, as JSON; for people and logs.
    settings_json: str
    #: Images made in one synthesis run.
    batch_size: int


@dataclass(frozen=True)
class DaemonInfo:
    """What a daemon dreams from, and what it holds."""

    teacher: TeacherInfo
    #: The newest accepted student; None until the first push.
    student: StudentInfo | None
    log: LogInfo
    synthesizer: SynthesizerInfo
    daemon_version: str
    #: The largest message of a stream at present, in bytes.
    max_message_bytes: int
    #: The largest student that can be pushed, in bytes.
    max_student_bytes: int


@dataclass(frozen=True)
class PushResult:
    """An accepted student."""

    #: The version that now holds these weights.
    version: int
    #: These very bytes already were the current version, and no new one was made.
    already_current: bool


class Client:
    """Calls to one daemon. Connects at the first call; may be used by several threads, be pickled, and outlive a fork.

    Args:
        address: ``"HOST:PORT"``, with ``http://`` or ``https://`` in front or not (https turns TLS on).
        token: sent with each call as ``authorization: Bearer TOKEN``. Refused without TLS, except to loopback.
        tls: ``True`` for the system's authorities, or a :class:`Tls`.
        timeout: seconds that a call may take; each method can be given another.

    Raises:
        ValueError: the address is malformed, or the token would travel in the clear to another machine.

    Each method raises :class:`UnavailableError` where the daemon does not answer, and :class:`CallTimeoutError` after
    `timeout`.
    """

    def __init__(
        self, address: str, token: str | None = None, tls: Tls | bool | None = None, *, timeout: float = 120.0
    ) -> None:
        self._endpoint = Endpoint.of(address, token, tls)
        self.timeout = timeout
        self._connect_lock = threading.Lock()
        self._connected: tuple[int, grpc.Channel, pb_grpc.DreamfeedServiceStub] | None = None

    @property
    def address(self) -> str:
        return self._endpoint.target

    def __repr__(self) -> str:
        return f"Client({self.address!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_endpoint": self._endpoint, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect_lock = threading.Lock()
        self._connected = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; a later call opens a new one."""
        with self._connect_lock:
            if self._connected is not None and self._connected[0] == os.getpid():
                self._connected[1].close()
                _fork.closed()
            self._connected = None

    def describe(self, *, timeout: float | None = None) -> DaemonInfo:
        """What the daemon dreams from, and what it holds."""
        try:
            with _fork.calling():
                answer = self._stub().Describe(pb.DescribeRequest(), **self._call(timeout))
        except grpc.RpcError as error:
            raise self._error(error, "Describe") from error
        return daemon_info(answer)

    def push_student(
        self,
        model: Weights,
        arch: str | None = None,
        step: int = 0,
        replaces: int | None = None,
        *,
        timeout: float | None = None,
    ) -> PushResult:
        """Makes these weights the student that new images compete against, and waits until they are stored.

        Args:
            model: a module, also one wrapped by DistributedDataParallel or torch.compile, or a state_dict. Floating
                tensors may be f32, f16, bf16 or f64.
            arch: the architecture, for example ``"resnet20"``; default: the module's attribute ``arch``. A pruned
                network names the architecture it was pruned from: the daemon reads widths from the shapes.
            step: your own step counter, told by describe and fetch_student.
            replaces: accept the push only while this is the current version; 0 = while there is none yet.

        Raises:
            InvalidRequestError: this daemon cannot use such a student; the message names the tensor.
            ConflictError: `replaces` is not the current version.
            ResourceExhaustedError: the file is too large, or too many pushes are under way.
        """
        arch = arch_of(model, arch)
        return self.push_encoded(Snapshot.take(model).encode(), arch, step, replaces, timeout=timeout)

    def push_encoded(
        self,
        file: bytes,
        arch: str,
        step: int = 0,
        replaces: int | None = None,
        *,
        timeout: float | None = None,
    ) -> PushResult:
        """:meth:`push_student` of the bytes of a safetensors file."""
        header = pb.PushStudentHeader(
            arch=arch,
            byte_length=len(file),
            sha256=hashlib.sha256(file).digest(),
            trainer_step=step,
            replaces_version=replaces,
        )

        def parts() -> Iterator[pb.PushStudentRequest]:
            yield pb.PushStudentRequest(header=header)
            view = memoryview(file)
            for begin in range(0, len(file), _PIECE):
                yield pb.PushStudentRequest(data=bytes(view[begin : begin + _PIECE]))

        try:
            with _fork.calling():
                answer = self._stub().PushStudent(parts(), **self._call(timeout))
        except grpc.RpcError as error:
            raise self._error(error, f"PushStudent of a {arch}") from error
        return PushResult(answer.version, answer.already_current)

    def fetch_student(
        self, version: int | None = None, *, timeout: float | None = None
    ) -> tuple[dict[str, Tensor], StudentInfo]:
        """The weights of a student on the CPU, by default of the newest, and what is known of it.

        Raises:
            NotFoundError: no student was pushed yet, or this version is not held any more.
        """
        request = pb.FetchStudentRequest(version=version or 0)
        header, pieces = None, []
        try:
            with _fork.calling():
                for part in self._stub().FetchStudent(request, **self._call(timeout)):
                    if part.WhichOneof("part") == "header":
                        header = part.header
                    else:
                        pieces.append(part.data)
        except grpc.RpcError as error:
            raise self._error(error, "FetchStudent") from error
        file = b"".join(pieces)
        if header is None or hashlib.sha256(file).digest() != header.sha256:
            raise ProtocolError(
                f"FetchStudent at {self.address}: the file is not what its header says; fetch it again"
            )
        return safetensors.torch.load(file), student_info(header)

    def set_synthesizer(self, name: str, *, timeout: float | None = None) -> SynthesizerInfo:
        """Lets "adi", "warm-adi", "fast", "hybrid" or "noise" make the images from the next batch on.

        Raises:
            InvalidRequestError: there is none of this name; the message lists them.
        """
        try:
            with _fork.calling():
                answer = self._stub().SetSynthesizer(
                    pb.SetSynthesizerRequest(name=name), **self._call(timeout)
                )
        except grpc.RpcError as error:
            raise self._error(error, f"SetSynthesizer to {name!r}") from error
        return synthesizer_info(answer.synthesizer)

    def _stub(self) -> pb_grpc.DreamfeedServiceStub:
        with self._connect_lock:
            if self._connected is None or self._connected[0] != os.getpid():
                channel = self._endpoint.channel()
                self._connected = (os.getpid(), channel, pb_grpc.DreamfeedServiceStub(channel))
            return self._connected[2]

    def _call(self, timeout: float | None) -> dict[str, Any]:
        return {
            "timeout": self.timeout if timeout is None else timeout,
            "metadata": self._endpoint.metadata(),
        }

    def _error(self, error: grpc.RpcError, action: str) -> DreamfeedError:
        return translate(error, action, self.address)


@dataclass(frozen=True)
class Snapshot:
    """A copy of a student's weights in CPU memory, its names without the prefixes of DDP and torch.compile."""

    tensors: dict[str, Tensor]
    # Reached when the copies from the GPUs are complete.
    copied: list[torch.cuda.Event]

    @classmethod
    def take(cls, model: Weights) -> "Snapshot":
        """The weights as they are after what was launched so far; does not wait for the GPU.

        Raises:
            ValueError: the weights are sharded or parametrized; the message says what to give instead.
            TypeError: something in the state_dict is not a tensor.
        """
        state = model.state_dict() if isinstance(model, nn.Module) else model
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise TypeError(f"{name!r} in the state_dict is a {kind}, not a tensor; leave it out")
        tensors: dict[str, Tensor] = {}
        for name, tensor in bare(state).tensors.items():
            cuda = tensor.device.type == "cuda"
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
            tensors[name] = copy.copy_(tensor.detach(), non_blocking=cuda)
        copied = []
        for device in {tensor.device for tensor in state.values() if tensor.device.type == "cuda"}:
            with torch.cuda.device(device):
                copied.append(torch.cuda.Event())
                copied[-1].record()
        return cls(tensors, copied)

    def encode(self, metadata: dict[str, str] | None = None) -> bytes:
        """A safetensors file; without metadata, whose order varies, the same weights make the same bytes."""
        for event in self.copied:
            event.synchronize()
        return safetensors.torch.save(self.tensors, metadata)


def arch_of(model: Weights, arch: str | None) -> str:
    """`arch`, or what the module says of itself."""
    inner: object = model
    while arch is None and inner is not None:
        arch = getattr(inner, "arch", None)
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
    if not isinstance(arch, str) or not arch:
        raise ValueError(
            'the student does not name its architecture; pass arch=, for example arch="resnet20"'
        )
    return arch


def daemon_info(answer: pb.DescribeResponse) -> DaemonInfo:
    """A DescribeResponse in plain Python."""
    teacher, log = answer.teacher, answer.log
    geometry, normalization = teacher.geometry, teacher.normalization
    return DaemonInfo(
        teacher=TeacherInfo(
            arch=teacher.arch,
            sha256=teacher.sha256,
            num_classes=teacher.num_classes,
            class_names=tuple(teacher.class_names),
            image_shape=(geometry.channels, geometry.height, geometry.width),
            mean=tuple(normalization.mean),
            std=tuple(normalization.std),
            num_parameters=teacher.num_parameters,
        ),
        student=student_info(answer.student) if answer.HasField("student") else None,
        log=LogInfo(
            log_id=log.log_id,
            first_sequence=log.first_sequence,
            next_sequence=log.next_sequence,
            chunks=log.chunks,
            bytes=log.bytes,
            images=log.images,
            lost_images=log.lost_images,
        ),
        synthesizer=synthesizer_info(answer.synthesizer),
        daemon_version=answer.daemon_version,
        max_message_bytes=answer.max_message_bytes,
        max_student_bytes=answer.max_student_bytes,
    )


def student_info(student: pb.Student) -> StudentInfo:
    return StudentInfo(
        version=student.version,
        arch=student.arch,
        byte_length=student.byte_length,
        sha256=student.sha256.hex(),
        step=student.trainer_step,
        accepted_at=student.accepted_at.ToDatetime(UTC),
        num_classes=student.num_classes,
    )


def synthesizer_info(synthesizer: pb.Synthesizer) -> SynthesizerInfo:
    return SynthesizerInfo(
        synthesizer.name, synthesizer.preset, synthesizer.settings_json, synthesizer.batch_size
    )
