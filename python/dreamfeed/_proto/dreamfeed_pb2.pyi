from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplaySampling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLAY_SAMPLING_UNSPECIFIED: _ClassVar[ReplaySampling]
    REPLAY_SAMPLING_UNIFORM: _ClassVar[ReplaySampling]
    REPLAY_SAMPLING_RECENCY: _ClassVar[ReplaySampling]
    REPLAY_SAMPLING_COMPETITION: _ClassVar[ReplaySampling]

class PixelFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PIXEL_FORMAT_UNSPECIFIED: _ClassVar[PixelFormat]
    PIXEL_FORMAT_U8: _ClassVar[PixelFormat]
    PIXEL_FORMAT_F32_NORMALIZED: _ClassVar[PixelFormat]
    PIXEL_FORMAT_F16_NORMALIZED: _ClassVar[PixelFormat]
REPLAY_SAMPLING_UNSPECIFIED: ReplaySampling
REPLAY_SAMPLING_UNIFORM: ReplaySampling
REPLAY_SAMPLING_RECENCY: ReplaySampling
REPLAY_SAMPLING_COMPETITION: ReplaySampling
PIXEL_FORMAT_UNSPECIFIED: PixelFormat
PIXEL_FORMAT_U8: PixelFormat
PIXEL_FORMAT_F32_NORMALIZED: PixelFormat
PIXEL_FORMAT_F16_NORMALIZED: PixelFormat

class SetSynthesizerRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SetSynthesizerResponse(_message.Message):
    __slots__ = ("synthesizer",)
    SYNTHESIZER_FIELD_NUMBER: _ClassVar[int]
    synthesizer: Synthesizer
    def __init__(self, synthesizer: _Optional[_Union[Synthesizer, _Mapping]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("teacher", "student", "log", "synthesizer", "daemon_version", "max_message_bytes", "max_student_bytes")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    STUDENT_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    SYNTHESIZER_FIELD_NUMBER: _ClassVar[int]
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STUDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    teacher: Teacher
    student: Student
    log: Log
    synthesizer: Synthesizer
    daemon_version: str
    max_message_bytes: int
    max_student_bytes: int
    def __init__(self, teacher: _Optional[_Union[Teacher, _Mapping]] = ..., student: _Optional[_Union[Student, _Mapping]] = ..., log: _Optional[_Union[Log, _Mapping]] = ..., synthesizer: _Optional[_Union[Synthesizer, _Mapping]] = ..., daemon_version: _Optional[str] = ..., max_message_bytes: _Optional[int] = ..., max_student_bytes: _Optional[int] = ...) -> None: ...

class Teacher(_message.Message):
    __slots__ = ("arch", "sha256", "num_classes", "class_names", "geometry", "normalization", "num_parameters")
    ARCH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NUM_CLASSES_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    NORMALIZATION_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    arch: str
    sha256: str
    num_classes: int
    class_names: _containers.RepeatedScalarFieldContainer[str]
    geometry: Geometry
    normalization: Normalization
    num_parameters: int
    def __init__(self, arch: _Optional[str] = ..., sha256: _Optional[str] = ..., num_classes: _Optional[int] = ..., class_names: _Optional[_Iterable[str]] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., normalization: _Optional[_Union[Normalization, _Mapping]] = ..., num_parameters: _Optional[int] = ...) -> None: ...

class Geometry(_message.Message):
    __slots__ = ("channels", "height", "width")
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    channels: int
    height: int
    width: int
    def __init__(self, channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class Normalization(_message.Message):
    __slots__ = ("mean", "std")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ...) -> None: ...

class Student(_message.Message):
    __slots__ = ("version", "arch", "byte_length", "sha256", "trainer_step", "accepted_at", "num_classes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ARCH_FIELD_NUMBER: _ClassVar[int]
    BYTE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    TRAINER_STEP_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_FIELD_NUMBER: _ClassVar[int]
    NUM_CLASSES_FIELD_NUMBER: _ClassVar[int]
    version: int
    arch: str
    byte_length: int
    sha256: bytes
    trainer_step: int
    accepted_at: _timestamp_pb2.Timestamp
    num_classes: int
    def __init__(self, version: _Optional[int] = ..., arch: _Optional[str] = ..., byte_length: _Optional[int] = ..., sha256: _Optional[bytes] = ..., trainer_step: _Optional[int] = ..., accepted_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., num_classes: _Optional[int] = ...) -> None: ...

class Log(_message.Message):
    __slots__ = ("log_id", "first_sequence", "next_sequence", "chunks", "bytes", "images", "lost_images")
    LOG_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    LOST_IMAGES_FIELD_NUMBER: _ClassVar[int]
    log_id: str
    first_sequence: int
    next_sequence: int
    chunks: int
    bytes: int
    images: int
    lost_images: int
    def __init__(self, log_id: _Optional[str] = ..., first_sequence: _Optional[int] = ..., next_sequence: _Optional[int] = ..., chunks: _Optional[int] = ..., bytes: _Optional[int] = ..., images: _Optional[int] = ..., lost_images: _Optional[int] = ...) -> None: ...

class Synthesizer(_message.Message):
    __slots__ = ("name", "preset", "settings_json", "batch_size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    preset: str
    settings_json: str
    batch_size: int
    def __init__(self, name: _Optional[str] = ..., preset: _Optional[str] = ..., settings_json: _Optional[str] = ..., batch_size: _Optional[int] = ...) -> None: ...

class StreamRequest(_message.Message):
    __slots__ = ("start", "shard", "replay", "staleness_bound", "batch_size", "pixel_format", "classes")
    START_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    STALENESS_BOUND_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIXEL_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    start: StreamStart
    shard: Shard
    replay: Replay
    staleness_bound: StalenessBound
    batch_size: int
    pixel_format: PixelFormat
    classes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, start: _Optional[_Union[StreamStart, _Mapping]] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ..., replay: _Optional[_Union[Replay, _Mapping]] = ..., staleness_bound: _Optional[_Union[StalenessBound, _Mapping]] = ..., batch_size: _Optional[int] = ..., pixel_format: _Optional[_Union[PixelFormat, str]] = ..., classes: _Optional[_Iterable[int]] = ...) -> None: ...

class StreamStart(_message.Message):
    __slots__ = ("earliest", "latest", "sequence", "cursor")
    EARLIEST_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    earliest: Earliest
    latest: Latest
    sequence: int
    cursor: bytes
    def __init__(self, earliest: _Optional[_Union[Earliest, _Mapping]] = ..., latest: _Optional[_Union[Latest, _Mapping]] = ..., sequence: _Optional[int] = ..., cursor: _Optional[bytes] = ...) -> None: ...

class Earliest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Latest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Shard(_message.Message):
    __slots__ = ("index", "count")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    index: int
    count: int
    def __init__(self, index: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Replay(_message.Message):
    __slots__ = ("share", "sampling")
    SHARE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    share: float
    sampling: ReplaySampling
    def __init__(self, share: _Optional[float] = ..., sampling: _Optional[_Union[ReplaySampling, str]] = ...) -> None: ...

class StalenessBound(_message.Message):
    __slots__ = ("max_student_versions", "max_age")
    MAX_STUDENT_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_AGE_FIELD_NUMBER: _ClassVar[int]
    max_student_versions: int
    max_age: _duration_pb2.Duration
    def __init__(self, max_student_versions: _Optional[int] = ..., max_age: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class StreamResponse(_message.Message):
    __slots__ = ("payload", "cursor", "first_sequence", "count", "current_student_version", "lag", "age", "realized_replay_ratio", "fresh_count", "stale_images")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CURRENT_STUDENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    REALIZED_REPLAY_RATIO_FIELD_NUMBER: _ClassVar[int]
    FRESH_COUNT_FIELD_NUMBER: _ClassVar[int]
    STALE_IMAGES_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    cursor: bytes
    first_sequence: int
    count: int
    current_student_version: int
    lag: int
    age: _duration_pb2.Duration
    realized_replay_ratio: float
    fresh_count: int
    stale_images: int
    def __init__(self, payload: _Optional[bytes] = ..., cursor: _Optional[bytes] = ..., first_sequence: _Optional[int] = ..., count: _Optional[int] = ..., current_student_version: _Optional[int] = ..., lag: _Optional[int] = ..., age: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., realized_replay_ratio: _Optional[float] = ..., fresh_count: _Optional[int] = ..., stale_images: _Optional[int] = ...) -> None: ...

class PushStudentRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: PushStudentHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[PushStudentHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PushStudentHeader(_message.Message):
    __slots__ = ("arch", "byte_length", "sha256", "trainer_step", "replaces_version")
    ARCH_FIELD_NUMBER: _ClassVar[int]
    BYTE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    TRAINER_STEP_FIELD_NUMBER: _ClassVar[int]
    REPLACES_VERSION_FIELD_NUMBER: _ClassVar[int]
    arch: str
    byte_length: int
    sha256: bytes
    trainer_step: int
    replaces_version: int
    def __init__(self, arch: _Optional[str] = ..., byte_length: _Optional[int] = ..., sha256: _Optional[bytes] = ..., trainer_step: _Optional[int] = ..., replaces_version: _Optional[int] = ...) -> None: ...

class PushStudentResponse(_message.Message):
    __slots__ = ("version", "already_current")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ALREADY_CURRENT_FIELD_NUMBER: _ClassVar[int]
    version: int
    already_current: bool
    def __init__(self, version: _Optional[int] = ..., already_current: bool = ...) -> None: ...

class FetchStudentRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class FetchStudentResponse(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: Student
    data: bytes
    def __init__(self, header: _Optional[_Union[Student, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...
