"""The contract of proto/dreamfeed/v1 from another language: reads a batch, pushes a student, fetches it back."""

import hashlib
import json
from collections.abc import Iterator

import cifar_resnet
import grpc
import pytest
import safetensors.torch
import torch
from conftest import BATCH, CHANNELS, CLASS_NAMES, CLASSES, MEAN, SIZE, STD, Client, random_network
from torch import Tensor

SECONDS = 60
PIECE = 64 << 10


def encode(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(tensors)


def student(seed: int = 2, classes: int = CLASSES) -> dict[str, Tensor]:
    return {
        name: tensor.clone()
        for name, tensor in cifar_resnet.weights_of(random_network(seed, classes)).items()
    }


def push(client: Client, file: bytes, **header: object) -> object:
    """PushStudentResponse; fields of the header default to the truth about `file`."""
    m = client.messages
    fields = {
        "arch": "resnet8",
        "byte_length": len(file),
        "sha256": hashlib.sha256(file).digest(),
        "trainer_step": 17,
    }

    def parts() -> Iterator[object]:
        yield m.PushStudentRequest(header=m.PushStudentHeader(**(fields | header)))
        for begin in range(0, len(file), PIECE):
            yield m.PushStudentRequest(data=file[begin : begin + PIECE])

    return client.stub.PushStudent(parts(), timeout=SECONDS)


def fetch(client: Client, version: int = 0) -> tuple[object, bytes]:
    """The header and the file."""
    request = client.messages.FetchStudentRequest(version=version)
    parts = list(client.stub.FetchStudent(request, timeout=SECONDS))
    assert [part.WhichOneof("part") for part in parts] == ["header"] + ["data"] * (len(parts) - 1)
    return parts[0].header, b"".join(part.data for part in parts[1:])


def first_batches(client: Client, count: int) -> list[object]:
    m = client.messages
    request = m.StreamRequest(start=m.StreamStart(earliest=m.Earliest()))
    call = client.stub.Stream(request, timeout=SECONDS)
    batches = [response for response, _ in zip(call, range(count), strict=False)]
    call.cancel()
    assert len(batches) == count
    return batches


def refused(client: Client, file: bytes, **header: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        push(client, file, **header)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    return caught.value


def test_describe_tells_what_the_file_holds(client: Client) -> None:
    answer = client.stub.Describe(client.messages.DescribeRequest(), timeout=SECONDS)
    teacher = answer.teacher
    assert teacher.arch == "resnet8"
    assert teacher.num_classes == CLASSES
    assert list(teacher.class_names) == CLASS_NAMES
    assert (teacher.geometry.channels, teacher.geometry.height, teacher.geometry.width) == (CHANNELS, *SIZE)
    assert list(teacher.normalization.mean) == pytest.approx(MEAN, abs=1e-6)
    assert list(teacher.normalization.std) == pytest.approx(STD, abs=1e-6)
    assert teacher.num_parameters == sum(p.numel() for p in random_network(1).parameters())
    assert len(teacher.sha256) == 64
    assert not answer.HasField("student")
    assert answer.synthesizer.name == "noise"
    assert answer.synthesizer.batch_size == BATCH
    json.loads(answer.synthesizer.settings_json)


def test_a_batch_is_plain_safetensors_labelled_by_the_teacher(client: Client) -> None:
    describe = client.stub.Describe(client.messages.DescribeRequest(), timeout=SECONDS)
    first, second = first_batches(client, 2)
    assert (first.first_sequence, first.count) == (0, BATCH)
    assert (second.first_sequence, second.count) == (BATCH, BATCH)

    payload = first.payload
    tensors = safetensors.torch.load(payload)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert shapes == {
        "images": (torch.uint8, (BATCH, CHANNELS, *SIZE)),
        "labels": (torch.int64, (BATCH,)),
        "teacher_logits": (torch.float32, (BATCH, CLASSES)),
        "student_version": (torch.int64, (BATCH,)),
        "competition": (torch.float32, (BATCH,)),
    }
    assert (tensors["student_version"] == 0).all() and (tensors["competition"] == 0).all()
    assert ((tensors["labels"] >= 0) & (tensors["labels"] < CLASSES)).all()

    header_bytes = int.from_bytes(payload[:8], "little")
    metadata = json.loads(payload[8 : 8 + header_bytes])["__metadata__"]
    assert metadata["format"] == "dreamfeed.chunk.v1"
    assert metadata["log_id"] == describe.log.log_id
    assert (metadata["first_sequence"], metadata["count"]) == ("0", str(BATCH))
    assert metadata["teacher_sha256"] == describe.teacher.sha256
    assert metadata["synthesizer"] == "noise"
    json.loads(metadata["settings"])
    assert metadata["replica"] and metadata["created_at"]
    assert metadata["data_sha256"] == hashlib.sha256(payload[8 + header_bytes :]).hexdigest()

    # The logits are those of PyTorch on exactly these pixels.
    normalization = {"mean": ",".join(map(str, MEAN)), "std": ",".join(map(str, STD))}
    with torch.no_grad():
        expected = random_network(1)(cifar_resnet.normalize(tensors["images"], normalization))
    torch.testing.assert_close(tensors["teacher_logits"], expected, rtol=1e-4, atol=1e-4)
    # Random images are labelled by the teacher.
    assert torch.equal(tensors["labels"], tensors["teacher_logits"].argmax(1))
    assert not torch.equal(tensors["images"], safetensors.torch.load(second.payload)["images"])


def test_a_cursor_continues_with_the_very_next_image(client: Client) -> None:
    m = client.messages
    (first,) = first_batches(client, 1)
    request = m.StreamRequest(start=m.StreamStart(cursor=first.cursor))
    call = client.stub.Stream(request, timeout=SECONDS)
    assert next(call).first_sequence == first.first_sequence + first.count
    call.cancel()


def test_a_pushed_student_comes_back_byte_for_byte(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        fetch(client)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    file = encode(student(classes=CLASSES + 2))  # a student may know more classes than the teacher
    answer = push(client, file)
    assert (answer.version, answer.already_current) == (1, False)
    header, fetched = fetch(client)
    assert fetched == file
    assert (header.version, header.arch, header.trainer_step) == (1, "resnet8", 17)
    assert (header.byte_length, header.num_classes) == (len(file), CLASSES + 2)
    assert header.sha256 == hashlib.sha256(file).digest()

    again = push(client, file)
    assert (again.version, again.already_current) == (1, True)
    described = client.stub.Describe(client.messages.DescribeRequest(), timeout=SECONDS)
    assert described.student.version == 1


def misshapen(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)


def not_finite(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[3] = float("nan")


def missing(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def of_integers(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int32)


@pytest.mark.parametrize("spoil", [misshapen, not_finite, missing, of_integers])
def test_a_spoilt_tensor_is_refused_by_name(client: Client, spoil) -> None:
    good = encode(student())
    push(client, good)
    name = "layer2.0.conv2.weight"
    tensors = student(seed=3)
    spoil(tensors, name)
    error = refused(client, encode(tensors))
    assert name in error.details()
    header, fetched = fetch(client)  # the current student stays
    assert (header.version, fetched) == (1, good)


def test_a_file_that_is_not_what_its_header_says_is_refused(client: Client) -> None:
    file = encode(student())
    flipped = bytearray(file)
    flipped[-1] ^= 1
    refused(client, bytes(flipped), sha256=hashlib.sha256(file).digest())
    refused(client, file[:-10], byte_length=len(file))
    refused(client, file, arch="vgg11")
    described = client.stub.Describe(client.messages.DescribeRequest(), timeout=SECONDS)
    assert not described.HasField("student")
