"""`dreamfeed.Client` and `dreamfeed.StudentPusher`: students, TLS, tokens, and what a scripted daemon answers."""

import copy
import http.server
import ipaddress
import json
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cifar_resnet
import dreamfeed
import grpc
import pytest
import safetensors.torch
import torch
from conftest import BATCH, CHANNELS, CLASS_NAMES, CLASSES, MEAN, ROOT, SIZE, STD, daemon, random_network
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from dreamfeed import Client, DreamStream, StudentPusher, StudentPushWarning, Tls
from dreamfeed._proto import dreamfeed_pb2 as pb
from dreamfeed._proto import dreamfeed_pb2_grpc as pb_grpc
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

SECONDS = 60


@pytest.fixture
def client(teacher_file: Path, tmp_path: Path) -> Iterator[Client]:
    torch.set_num_threads(1)
    with daemon(teacher_file, tmp_path) as (address, _, _), Client(address, timeout=SECONDS) as client:
        yield client


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Students --------------------------------------------------


def test_a_student_comes_back_as_it_was_pushed(client: Client) -> None:
    described = client.describe()
    assert described.teacher.arch == "resnet8"
    assert described.teacher.class_names == tuple(CLASS_NAMES)
    assert described.teacher.image_shape == (CHANNELS, *SIZE)
    assert described.teacher.mean == pytest.approx(MEAN) and described.teacher.std == pytest.approx(STD)
    assert described.student is None
    assert (described.synthesizer.name, described.synthesizer.batch_size) == ("noise", BATCH)
    with pytest.raises(dreamfeed.NotFoundError):
        client.fetch_student()

    network = random_network(2)
    pushed = client.push_student(nn.DataParallel(network), step=17)  # the prefixes of wrappers are taken off
    assert (pushed.version, pushed.already_current) == (1, False)
    weights, info = client.fetch_student()
    assert equal(weights, network.state_dict())
    assert (info.version, info.arch, info.step, info.num_classes) == (1, "resnet8", 17, CLASSES)
    assert info.accepted_at > datetime.now(UTC) - timedelta(minutes=5)
    assert client.describe().student == info

    again = pickle.loads(pickle.dumps(client)).push_student(network.state_dict(), "resnet8")
    assert (again.version, again.already_current) == (1, True)
    other = random_network(3)
    with pytest.raises(dreamfeed.ConflictError):
        client.push_student(other, replaces=0)
    assert client.push_student(other, replaces=1).version == 2
    assert equal(client.fetch_student(1)[0], network.state_dict())
    restored = cifar_resnet.ResNet("resnet8", CHANNELS, CLASSES)
    restored.load_state_dict(client.fetch_student()[0])


def averaged(network: nn.Module) -> nn.Module:
    average = AveragedModel(network, use_buffers=True)
    average.update_parameters(network)
    return average


def compiled_by_layer(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    for name in ("layer1", "layer2", "layer3"):
        setattr(network, name, torch.compile(getattr(network, name)))
    return network


def masked(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    prune.custom_from_mask(network.get_submodule("conv1"), "weight", torch.ones(16, CHANNELS, 3, 3))
    return network


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, averaged, compiled_by_layer, masked])
def test_a_wrapped_student_is_the_network_inside(
    wrap: Callable[[nn.Module], nn.Module], client: Client
) -> None:
    network = random_network(2)
    client.push_student(network)
    assert client.push_student(
        wrap(network), "resnet8"
    ).already_current  # the same weights are the same bytes


def test_a_student_whose_weights_are_elsewhere_is_told_what_to_give(client: Client) -> None:
    network = random_network(2)
    nn.utils.parametrizations.weight_norm(network.get_submodule("conv1"))
    with pytest.raises(ValueError, match="remove_parametrizations"):
        client.push_student(network)


def test_a_student_that_does_not_fit_is_refused_by_name(client: Client) -> None:
    weights = random_network(2).state_dict()
    weights["layer2.0.conv2.weight"] = weights["layer2.0.conv2.weight"][:, :-1]
    with pytest.raises(dreamfeed.InvalidRequestError, match=r"layer2\.0\.conv2\.weight"):
        client.push_student(weights, "resnet8")
    with pytest.raises(ValueError, match="arch="):
        client.push_student(weights)
    with pytest.raises(dreamfeed.InvalidRequestError, match="warm-adi"):
        client.set_synthesizer("magic")
    assert client.set_synthesizer("noise").name == "noise"


def test_the_background_pushes_what_the_weights_were(client: Client) -> None:
    network = random_network(2)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with StudentPusher(client, on_error="raise") as pusher:
        pusher.push(network, step=5)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1.0)
        assert pusher.flush(SECONDS)
        assert pusher.last == dreamfeed.PushResult(1, False)
    weights, info = client.fetch_student()
    assert equal(weights, expected) and info.step == 5


class Recorder(Client):
    """A client whose pushes wait until they are let through, and then meet `fate`."""

    def __init__(self, fate: Callable[[int], None] = lambda step: None) -> None:
        super().__init__("127.0.0.1:1")
        self.let_through, self.started = threading.Event(), threading.Event()
        self.pushed: list[tuple[int, float]] = []
        self.fate = fate

    def push_encoded(
        self, file: bytes, arch: str, step: int = 0, *_: object, **__: object
    ) -> dreamfeed.PushResult:
        self.started.set()
        assert self.let_through.wait(SECONDS)
        self.pushed.append((step, safetensors.torch.load(file)["w"].item()))
        self.fate(step)
        return dreamfeed.PushResult(len(self.pushed), False)


def test_the_newest_push_wins_and_none_waits_for_the_network() -> None:
    client, weight = Recorder(), torch.tensor([0.0])
    pusher = StudentPusher(client, "resnet8")
    for step in range(5):
        weight.fill_(step)
        pusher.push({"w": weight}, step)  # returns although nothing gets through
        assert client.started.wait(SECONDS)
    assert not pusher.flush(0.0)
    client.let_through.set()
    assert pusher.close(SECONDS)
    assert client.pushed == [(0, 0.0), (4, 4.0)]
    assert pusher.superseded == 3
    with pytest.raises(RuntimeError, match="closed"):
        pusher.push({"w": weight})


def test_errors_of_the_background_warn_at_the_next_call_or_raise_there() -> None:
    def refuse(step: int) -> None:
        raise dreamfeed.InvalidRequestError("w is not finite")

    weight = {"w": torch.tensor([1.0])}
    client = Recorder(refuse)
    client.let_through.set()
    pusher = StudentPusher(client, "resnet8")
    pusher.push(weight, 1)
    with pytest.warns(StudentPushWarning, match="w is not finite"):
        pusher.flush(SECONDS)
    pusher.push(weight, 2)
    # Not even with warnings as errors, or with weights that are none, does it raise into the step.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while client.pushed[-1][0] != 2:
            pass
        pusher.push(weight, 3)
        pusher.push({"w": "no tensor"}, 4)
        pusher.push(weight, 5)
    with pytest.warns(StudentPushWarning):
        pusher.close(SECONDS)

    strict = StudentPusher(client, "resnet8", on_error="raise")
    strict.push(weight, 6)
    with pytest.raises(dreamfeed.InvalidRequestError, match="w is not finite"):
        strict.close(SECONDS)


def test_a_push_is_tried_again_until_a_newer_one_takes_its_place() -> None:
    attempts: list[int] = []

    def fate(step: int) -> None:
        attempts.append(step)
        if step == 1 or len(attempts) < 5:
            raise dreamfeed.UnavailableError("away")

    client = Recorder(fate)
    client.let_through.set()
    pusher = StudentPusher(client, "resnet8")
    weight = {"w": torch.tensor([1.0])}
    pusher.push(weight, 1)
    assert client.started.wait(SECONDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StudentPushWarning)
        pusher.push(weight, 2)
    assert pusher.flush(SECONDS)  # without a warning: what the first attempts met is settled
    assert attempts[0] == 1 and attempts[-1] == 2 and len(attempts) >= 5
    assert pusher.last is not None and pusher.superseded == 1


# A scripted daemon --------------------------------------------------


class Scripted(pb_grpc.DreamfeedServiceServicer):
    """Answers Describe, keeps the metadata of every call, and gives `script` each request for a stream."""

    def __init__(
        self, script: Callable[[pb.StreamRequest, grpc.ServicerContext], Iterator[pb.StreamResponse]]
    ) -> None:
        self.script = script
        self.metadata: list[dict[str, str]] = []

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:
        self.metadata.append(dict(context.invocation_metadata()))
        return pb.DescribeResponse(max_message_bytes=64 << 20, log=pb.Log(next_sequence=100))

    def Stream(self, request: pb.StreamRequest, context: grpc.ServicerContext) -> Iterator[pb.StreamResponse]:
        self.metadata.append(dict(context.invocation_metadata()))
        yield from self.script(request, context)


@contextmanager
def served(scripted: Scripted, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        pb_grpc.add_DreamfeedServiceServicer_to_server(scripted, server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait(SECONDS)


def response(first: int, count: int = 2, form: str = "dreamfeed.batch.v1") -> pb.StreamResponse:
    tensors = {
        "images": torch.zeros(count, 1, 2, 2),
        "labels": torch.zeros(count, dtype=torch.int64),
        "teacher_logits": torch.zeros(count, 3),
        "sequence": torch.arange(first, first + count),
        "student_version": torch.zeros(count, dtype=torch.int64),
        "competition": torch.zeros(count),
        "synthesizer": torch.zeros(count, dtype=torch.int64),
    }
    metadata = {"format": form, "log_id": "log", "teacher_sha256": "0" * 64, "synthesizers": "adi,noise"}
    payload = safetensors.torch.save(tensors, metadata)
    cursor = str(first + count).encode()
    return pb.StreamResponse(
        payload=payload, cursor=cursor, first_sequence=first, count=count, fresh_count=count
    )


def asks_for(request: pb.StreamRequest) -> int:
    """The sequence that a request starts at."""
    kind = request.start.WhichOneof("position")
    assert kind in ("cursor", "sequence"), request
    return int(request.start.cursor) if kind == "cursor" else request.start.sequence


def lost(context: grpc.ServicerContext, code: grpc.StatusCode, following: int) -> None:
    context.set_trailing_metadata([("dreamfeed-next-sequence", str(following))])
    context.abort(code, f"the next image is lost; the next that is there is {following}")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.OUT_OF_RANGE, dreamfeed.PositionLostError),
        (grpc.StatusCode.DATA_LOSS, dreamfeed.DataLossError),
    ],
)
def test_a_gap_says_where_to_go_on(code: grpc.StatusCode, kind: type[dreamfeed.DreamfeedError]) -> None:
    def script(request: pb.StreamRequest, context: grpc.ServicerContext) -> Iterator[pb.StreamResponse]:
        first = asks_for(request)
        if first < 108:
            yield response(first)
            lost(context, code, 108)
        yield response(first)

    with served(Scripted(script)) as address:
        stream = DreamStream(address)
        batches = iter(stream)
        assert (
            next(batches).info.first_sequence == 100
        )  # latest is the next image at the time of the connection
        with pytest.raises(kind) as caught:
            next(batches)
        assert caught.value.next_sequence == 108
        assert kind(str(caught.value)).next_sequence == 108  # as a DataLoader's worker hands it on
        stream.seek(108)
        assert next(iter(stream)).info.first_sequence == 108

        skipping = iter(DreamStream(address, on_gap="skip"))
        assert [next(skipping).info.first_sequence for _ in range(2)] == [100, 108]


def test_a_stream_reconnects_from_its_last_cursor() -> None:
    def script(request: pb.StreamRequest, context: grpc.ServicerContext) -> Iterator[pb.StreamResponse]:
        yield response(asks_for(request))
        context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    scripted = Scripted(script)
    with served(scripted) as address:
        batches = iter(DreamStream(address, token="secret"))
        assert [next(batches).info.first_sequence for _ in range(4)] == [100, 102, 104, 106]
        batches.close()
    assert all(metadata["authorization"] == "Bearer secret" for metadata in scripted.metadata)


def spoilt_format(good: pb.StreamResponse) -> None:
    good.CopyFrom(response(0, form="dreamfeed.batch.v9"))


def spoilt_header(good: pb.StreamResponse) -> None:
    good.payload = b"\xff" * 7 + good.payload


def spoilt_count(good: pb.StreamResponse) -> None:
    good.count = 3


def cut_off(good: pb.StreamResponse) -> None:
    good.payload = good.payload[:-1]


@pytest.mark.parametrize("spoil", [spoilt_format, spoilt_header, spoilt_count, cut_off])
def test_a_message_that_is_not_of_the_contract_is_refused(spoil: Callable[[pb.StreamResponse], None]) -> None:
    def script(request: pb.StreamRequest, context: grpc.ServicerContext) -> Iterator[pb.StreamResponse]:
        bad = response(0)
        spoil(bad)
        yield bad

    with served(Scripted(script)) as address, pytest.raises(dreamfeed.ProtocolError, match="upgrade"):
        next(iter(DreamStream(address)))


# Tokens and TLS --------------------------------------------------


@pytest.mark.parametrize("make", [Client, DreamStream])
def test_a_token_never_leaves_the_machine_unencrypted(make: Callable[..., object]) -> None:
    for address in ("10.0.0.1:7461", "dreams.example", "[2001:db8::1]:7461"):
        with pytest.raises(ValueError, match="tls=True"):
            make(address, token="secret")
        assert "secret" not in repr(make(address, token="secret", tls=True))
    with pytest.raises(ValueError, match="tls=True"):
        make("http://dreams.example:7461", token="secret")
    for address in (
        "localhost:7461",
        "127.0.0.1",
        "http://[::1]:7461",
        "unix:/run/dreamfeed",
        "https://dreams.example",
    ):
        make(address, token="secret")
    with pytest.raises(ValueError, match="printable"):
        make("localhost", token="secret\n")


@pytest.mark.parametrize("address", ["", "ftp://host:1", "host:port", "host:0", ":7461", "host:1/path"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        Client(address)


def test_the_port_has_a_default() -> None:
    assert [Client(a).address for a in ("host", "http://host/", "::1", "[::1]", "host:1")] == [
        "host:7461",
        "host:7461",
        "[::1]:7461",
        "[::1]:7461",
        "host:1",
    ]


def certificate() -> tuple[bytes, bytes]:
    """A self-signed certificate of localhost and 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return signed.public_bytes(pem), private


def test_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    public, private = certificate()
    (tmp_path / "ca.pem").write_bytes(public)

    def script(request: pb.StreamRequest, context: grpc.ServicerContext) -> Iterator[pb.StreamResponse]:
        yield response(0)

    scripted = Scripted(script)
    with served(scripted, grpc.ssl_server_credentials([(private, public)])) as address:
        with Client(address, token="secret", tls=Tls(ca=tmp_path / "ca.pem")) as client:
            client.describe(timeout=SECONDS)
        assert scripted.metadata[0]["authorization"] == "Bearer secret"
        assert next(iter(DreamStream(f"https://{address}", tls=Tls(ca=public)))).info.count == 2
        with Client(address, tls=True) as stranger, pytest.raises(dreamfeed.UnavailableError):
            stranger.describe(timeout=SECONDS)


# The package --------------------------------------------------


def test_the_stubs_are_those_of_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "python")
    import generate_stubs

    for name, text in generate_stubs.generate().items():
        assert (generate_stubs.PACKAGE / name).read_text() == text, (
            f"{name} is older than the contract: run `.venv/bin/python python/generate_stubs.py`"
        )


# Addresses that lead elsewhere -----------------------------


def test_the_admin_port_is_no_address(teacher_file: Path, tmp_path: Path) -> None:
    with daemon(teacher_file, tmp_path):
        admin = json.loads((tmp_path / "ready.json").read_text())["admin"]
        for call in (Client(admin).describe, lambda: next(iter(DreamStream(admin)))):
            with pytest.raises(
                dreamfeed.DreamfeedError, match="admin pages do; give the address of its gRPC port"
            ):
                call()


def test_a_proxy_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(dreamfeed.UnavailableError) as met:
            Client("dreams.example:7461").describe(timeout=SECONDS)
        server.shutdown()
    assert "http_proxy" in str(met.value) and "set no_proxy=dreams.example" in str(met.value)
    assert "dreamfeed serve" not in str(met.value)
