"""A message of the stream as tensors."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamfeed._position import Origin
from dreamfeed._proto import dreamfeed_pb2 as pb
from dreamfeed.errors import ProtocolError

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_CHUNK, _BATCH = "dreamfeed.chunk.v1", "dreamfeed.batch.v1"
# Of every tensor in its block of memory.
_ALIGNMENT = 64
_UPGRADE = "daemon and client do not speak the same version: upgrade the older one"
# Field 1 of StreamResponse, length-delimited.
_PAYLOAD_KEY = pb.StreamResponse.PAYLOAD_FIELD_NUMBER << 3 | 2


@dataclass(frozen=True, eq=False, slots=True)
class BatchInfo:
    """What is known of N images beside pixels, labels and logits. Fresh images come first, then replayed ones."""

    #: i64 [N]: each image's number in the log.
    sequence: Tensor
    #: i64 [N]: the newest student that each image was optimized against; 0 = none.
    student_version: Tensor
    #: f32 [N]: Jensen-Shannon divergence of teacher and student in nats, 0..ln 2; 0 where there was no student.
    competition: Tensor
    #: i64 [N]: what made each image, as an index into `synthesizers`; -1 = something this daemon does not know.
    synthesizer: Tensor
    #: The names that `synthesizer` points to.
    synthesizers: tuple[str, ...]
    #: The position after this message; opaque. ``DreamStream(start=cursor)`` goes on with the very next image.
    cursor: bytes
    #: The sequence of the first image.
    first_sequence: int
    #: How many of the images are fresh.
    fresh_count: int
    #: The newest accepted student when this was sent; 0 = none.
    current_student_version: int
    #: Images in the log after this message: how far this reader is behind.
    lag: int
    #: The age of the oldest image in seconds.
    age: float
    #: The share of images sent on this stream so far that were replayed, 0..1.
    replay_ratio: float
    #: Images that this stream passed over so far because they were too stale.
    stale_images: int
    #: Which reader of how many this message was for: (index, count).
    shard: tuple[int, int]
    #: The log's identity; cursors are valid within one log only.
    log_id: str
    #: The teacher's identity.
    teacher_sha256: str
    #: Which batch of which reader it is, for :meth:`DreamStream.record`.
    origin: Origin | None = None

    @property
    def count(self) -> int:
        """The number of images N."""
        return self.sequence.numel()

    def to(self, *args: Any, **kwargs: Any) -> "BatchInfo":
        """A copy whose tensors went through :meth:`torch.Tensor.to`."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self, device: Any = None) -> "BatchInfo":
        """A copy in pinned memory; what ``DataLoader(pin_memory=True)`` calls."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "BatchInfo":
        mapped: dict[str, Any] = {name: function(getattr(self, name)) for name in _INFO_TENSORS}
        return replace(self, **mapped)


_INFO_TENSORS = ("sequence", "student_version", "competition", "synthesizer")
_INFO_FIELDS = tuple(f.name for f in fields(BatchInfo) if f.name not in _INFO_TENSORS)


class Batch(NamedTuple):
    """N images; unpacks as ``images, labels, teacher_logits, info``. All its tensors share one block of memory."""

    #: f32 or f16 [N,C,H,W] as the teacher wants them, or u8 [N,C,H,W] of 0..255: as DreamStream's `pixels` says.
    images: Tensor
    #: i64 [N]: the class that each image was made for.
    labels: Tensor
    #: f32 [N,K]: the teacher's logits on exactly these pixels, unscaled.
    teacher_logits: Tensor
    info: BatchInfo

    def __reduce__(self) -> tuple[Any, ...]:
        # From a DataLoader's worker a tensor travels as a file descriptor: one for the batch instead of one a tensor.
        tensors = [*self[:3], *(getattr(self.info, name) for name in _INFO_TENSORS)]
        rest = tuple(getattr(self.info, name) for name in _INFO_FIELDS)
        storage = tensors[0].untyped_storage()
        if any(
            t.device.type != "cpu"
            or not t.is_contiguous()
            or t.untyped_storage().data_ptr() != storage.data_ptr()
            for t in tensors
        ):
            return _assemble, (tensors, rest)
        block = torch.empty(0, dtype=torch.uint8).set_(storage)
        places = [(t.dtype, t.storage_offset() * t.element_size(), tuple(t.shape)) for t in tensors]
        return _reassemble, (block, places, rest)


def _assemble(tensors: list[Tensor], rest: tuple[Any, ...]) -> Batch:
    images, labels, teacher_logits, *others = tensors
    values: list[Any] = [*others, *rest]
    info = BatchInfo(**dict(zip((*_INFO_TENSORS, *_INFO_FIELDS), values, strict=True)))
    return Batch(images, labels, teacher_logits, info)


def _reassemble(
    block: Tensor, places: list[tuple[torch.dtype, int, tuple[int, ...]]], rest: tuple[Any, ...]
) -> Batch:
    return _assemble([_view(block, *place) for place in places], rest)


def _view(block: Tensor, dtype: torch.dtype, offset: int, shape: tuple[int, ...]) -> Tensor:
    """The tensor that lies in `block` (u8) from `offset` on, which is a multiple of its elements' size."""
    data = block[offset : offset + math.prod(shape) * dtype.itemsize]
    return data.view(dtype).view(shape)


@dataclass(frozen=True)
class Normalization:
    """(pixel / 255 - mean) / std, in the order of operations of the daemon, so that the floats are the same."""

    #: f32 [C,1,1].
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @classmethod
    def of(cls, message: pb.Normalization) -> "Normalization":
        mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (message.mean, message.std))
        return cls(mean, std)

    def apply(self, pixels: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """u8 [N,C,H,W] to f32 [N,C,H,W]. By numpy, which does not start a team of threads on this one."""
        np.copyto(out, pixels, casting="unsafe")
        out /= np.float32(255)
        out -= self.mean
        out /= self.std


def decode(
    message: bytes, *, shard: tuple[int, int], shared: bool, normalization: Normalization | None = None
) -> Batch:
    """A serialized StreamResponse as a batch; its bytes are copied once, with `shared` into shared memory.

    Pixels of u8 are normalized on the way where `normalization` says how.

    Raises:
        ProtocolError: the message is not what the contract says.
    """
    try:
        payload, response = _split(message)
        first, count = response.first_sequence, response.count
        # A chunk lacks two tensors of i64 [N].
        tensors, metadata, spare = _tensors(payload, 2 * 8 * count, shared, normalization)
        form = metadata.get("format")
        if form == _CHUNK:
            tensors["sequence"], tensors["synthesizer"] = spare.view(torch.int64).view(2, count)
            torch.arange(first, first + count, out=tensors["sequence"])
            tensors["synthesizer"].zero_()
            names: tuple[str, ...] = (metadata["synthesizer"],)
        elif form == _BATCH:
            names = tuple(metadata["synthesizers"].split(","))
        else:
            raise ProtocolError(f"a message has the format {form!r}, not {_CHUNK} or {_BATCH}; {_UPGRADE}")
        for name in (*Batch._fields[:3], *_INFO_TENSORS):
            if tensors[name].shape[:1] != (count,):
                raise ValueError(
                    f"{name} has the shape {tuple(tensors[name].shape)} in a message of {count} images"
                )
        age = response.age
        info = BatchInfo(
            sequence=tensors["sequence"],
            student_version=tensors["student_version"],
            competition=tensors["competition"],
            synthesizer=tensors["synthesizer"],
            synthesizers=names,
            cursor=response.cursor,
            first_sequence=first,
            fresh_count=response.fresh_count,
            current_student_version=response.current_student_version,
            lag=response.lag,
            age=age.seconds + age.nanos / 1e9,
            replay_ratio=response.realized_replay_ratio,
            stale_images=response.stale_images,
            shard=shard,
            log_id=metadata["log_id"],
            teacher_sha256=metadata["teacher_sha256"],
        )
        return Batch(tensors["images"], tensors["labels"], tensors["teacher_logits"], info)
    except ProtocolError:
        raise
    except Exception as error:  # whatever a damaged message makes of JSON, slices and shapes
        raise ProtocolError(
            f"a message cannot be read ({type(error).__name__}: {error}); {_UPGRADE}"
        ) from error


def _split(message: bytes) -> tuple[memoryview, pb.StreamResponse]:
    """The payload where it lies, and the message without it: protobuf would copy the payload twice."""
    view, rest, position = memoryview(message), bytearray(), 0
    payload = view[:0]
    while position < len(view):
        start = position
        key, position = _varint(view, position)
        match key & 7:
            case 0:
                _, end = _varint(view, position)
            case 1:
                end = position + 8
            case 2:
                length, position = _varint(view, position)
                end = position + length
            case 5:
                end = position + 4
            case wire_type:
                raise ValueError(f"wire type {wire_type}")
        if end > len(view):
            raise ValueError("the message is cut off")
        if key == _PAYLOAD_KEY:
            payload = view[position:end]
        else:
            rest += view[start:end]
        position = end
    return payload, pb.StreamResponse.FromString(bytes(rest))


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _tensors(
    payload: memoryview, spare: int, shared: bool, normalization: Normalization | None
) -> tuple[dict[str, Tensor], dict[str, str], Tensor]:
    """The tensors and the metadata of a safetensors file, and `spare` more bytes in the same block of memory."""
    start = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(bytes(payload[8:start]))
    metadata = header.pop("__metadata__", {})
    size, offset, places = len(payload) - start, 0, {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        if not 0 <= begin <= end <= size or end - begin != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{name}: {entry} in {size} bytes of data")
        becomes = torch.float32 if normalization and name == "images" and dtype == torch.uint8 else dtype
        places[name] = (
            np.frombuffer(payload, np.uint8, end - begin, start + begin),
            dtype,
            becomes,
            shape,
            offset,
        )
        offset += -(-becomes.itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
    if shared:
        # As torch's own collation does in a worker: what is made in shared memory needs no copy on its way out.
        block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(offset + spare))
    else:
        block = torch.empty(offset + spare, dtype=torch.uint8)
    # Copied by numpy, because torch.frombuffer warns of memory that is not writable.
    memory, tensors = block.numpy(), {}
    for name, (source, dtype, becomes, shape, place) in places.items():
        tensors[name] = _view(block, becomes, place, shape)
        if normalization is not None and becomes != dtype:
            normalization.apply(source.reshape(shape), tensors[name].numpy())
        else:
            memory[place : place + source.size] = source
    return tensors, metadata, block[offset:]
