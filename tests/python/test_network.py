"""Modules become files of docs/network-format.md, and files modules, that compute the same."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MEAN, ROOT, STD
from dreamfeed import GraphError, load_network, save_network
from dreamfeed.graph import Graph, Node, build, canonical, golden_images, number
from safetensors import safe_open
from torch import Tensor, nn

SIZE = (12, 12)


class Classified(nn.Module):
    """Maps of a body, averaged, and five logits of them."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Twice(nn.Module):
    """One norm called twice, and memory written in place that is read again under its old name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same", bias=False)
        self.bn = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        F.relu_(y)
        return self.bn(y) + y


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3, padding=1))
        self.two = nn.Sequential(nn.BatchNorm2d(7), nn.SiLU(), nn.Conv2d(7, 4, (3, 1), padding=(1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.one(x)], 1)
        return torch.cat([x, self.two(x)], -3)


class Odd(nn.Module):
    """Arguments of pooling and padding that occur, and shapes by chunks and shuffles."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2, padding="same", dilation=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.pad(x, (0, 1, 0, 1), value=float("-inf"))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        x = F.pad(x, (1, 1, 1, 0), mode="reflect")
        x = F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)
        a, b = x.chunk(2, 1)
        x = torch.stack([1 - a / 3, F.hardtanh(b, 0.0, 6.0)], 2).flatten(1, 2)
        x = F.interpolate(F.pad(x, (-1, 0, 0, 0)), scale_factor=2)
        return x.roll((1, -1), (2, 3)) * F.adaptive_avg_pool2d(x, 1).sigmoid()


class Tokens(nn.Module):
    """A class token, positions, a mask that is filled in place, attention in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 10, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        mask = x.new_zeros(10, 10)
        mask[:3, 5:].fill_(-100.0)
        scores = (x @ x.transpose(-2, -1)) * 8**-0.5 + mask
        x = x + scores.softmax(-1) @ self.norm(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.drop(x).transpose(1, 2).reshape(-1, 8, 5, 2)


BODIES: dict[str, Any] = {
    "twice": (Twice, 4),
    "standardized": (lambda: nn.Sequential(Standardized(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU("tanh")), 4),
    "dense": (Dense, 11),
    "odd": (Odd, 6),
    "tokens": (Tokens, 8),
}


def randomized(module: nn.Module) -> nn.Module:
    """With statistics that no fresh norm has."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features)
            layer.running_var = torch.rand(layer.num_features) + 0.5
    return module


def save(module: nn.Module, path: Path, **rest: Any) -> Graph:
    return save_network(module, path, image_size=SIZE, mean=MEAN, std=STD, **rest)


@pytest.mark.parametrize("name", BODIES)
def test_modules_come_back_as_they_went(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    body, channels = BODIES[name]
    module = randomized(Classified(body(), channels)).train()
    save(module, tmp_path / "net.safetensors")
    assert module.training, "the trainer's module is left as it is"
    module.eval()
    read = load_network(tmp_path / "net.safetensors")
    assert not list(tmp_path.glob("*.partial"))
    for module_or_read in (module, read):
        module_or_read.double()
    for size in (1, 2, 5):
        images = torch.randn(size, 3, *SIZE, dtype=torch.float64, requires_grad=True)
        expected, computed = module(images), read(images)
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            computed, expected, rtol=0, atol=1e-9 * scale + (1e-6 * scale if name == "standardized" else 0)
        )
        gradients = [torch.autograd.grad(logits.square().sum(), images)[0] for logits in (expected, computed)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * gradients[0].abs().max().item())
    if name != "standardized":  # its weights are stored as they are used
        kept = {key for key in module.state_dict() if not key.endswith("num_batches_tracked")}
        assert {key for key in read.state_dict() if not key.startswith("constant.")} == kept


def test_a_network_read_trains_as_the_module(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = randomized(Classified(Twice(), 4))
    save(module, tmp_path / "net.safetensors")
    read = load_network(tmp_path / "net.safetensors")
    assert not read.training
    images = torch.randn(6, 3, *SIZE)
    for trained in (module.train(), read.train()):
        optimizer = torch.optim.SGD(trained.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(trained(images), torch.arange(6) % 5).backward()
            optimizer.step()
    trained_state = module.state_dict()
    for name, tensor in read.state_dict().items():
        torch.testing.assert_close(tensor, trained_state[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_golden_sample_is_the_modules(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = randomized(Classified(Twice(), 4)).eval()
    graph = save(module, tmp_path / "net.safetensors", class_names=list("abcde"))
    images = golden_images(3, *SIZE)
    assert images.flatten()[:3].tolist() == [1.533243179321289, -0.27388811111450195, -1.8942649364471436]
    assert len(graph.taps()) == 2, "a module called twice has two taps"
    seen: list[Tensor] = []
    module.body.bn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))  # type: ignore[union-attr,operator]
    with torch.no_grad():
        logits = module(images)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        described = file.metadata()
        torch.testing.assert_close(file.get_tensor("dreamfeed.golden.logits"), logits)
        for tap, x in enumerate(seen):
            torch.testing.assert_close(
                file.get_tensor(f"dreamfeed.golden.mean.{tap}"), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5
            )
            var = x.var((0, 2, 3), correction=0)
            torch.testing.assert_close(
                file.get_tensor(f"dreamfeed.golden.var.{tap}"), var, rtol=1e-4, atol=1e-5
            )
    assert json.loads(described["class_names"]) == list("abcde")
    assert "arch" not in described
    assert Graph.decode(described["graph"]).encode() == described["graph"]
    norms = [node for node in graph.nodes if node.op == "batch_norm"]
    assert [(node.attributes, node.module) for node in norms] == [
        ({"eps": 0.001, "momentum": 0.2}, "body.bn")
    ] * 2


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1)[0]  # the line to be named


class StaleView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        part = y[:, 1:]
        y.relu_()
        return y[:, 1:] + part


@pytest.mark.parametrize(
    ("body", "channels", "said"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            4,
            "track_running_stats",
        ),
        (
            Sorted,
            3,
            r"test_network.py:\d+: return x.sort\(1\)\[0\]  # the line to be named \(module 'body'\)",
        ),
        (StaleView, 2, "written in place"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(body: Any, channels: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=said):
        save(Classified(body(), channels), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_numbers_have_one_spelling() -> None:
    for value, text in (
        (1.0, "1"), (-0.0, "0"), (1e-5, "0.00001"), (1e-6, "0.000001"), (1e-7, "1e-7"), (1.5e-10, "1.5e-10"),
        (0.1, "0.1"), (123.25, "123.25"), (1e20, "100000000000000000000"), (1e21, "1e+21"), (-2.5e22, "-2.5e+22"),
        (8**-0.5, "0.3535533905932738"),
    ):  # fmt: skip
        assert number(value) == text
        assert float(text) == value
    assert canonical({"b": [1, True, None], "a": "ä\n"}) == '{"a":"ä\\n","b":[1,true,null]}'


@pytest.mark.parametrize("change", [{"inputs": [9]}, {"op": "eval"}, {"inputs": None}])
def test_a_graph_that_is_none_is_refused(change: dict[str, Any]) -> None:
    text = Graph((3, 4, 4), [], 1).encode()
    node = {"op": "softmax", "inputs": [0], "attributes": {"dim": 1}, **change}
    with pytest.raises(GraphError):
        Graph.decode(text.replace('"nodes":[]', f'"nodes":[{json.dumps(node)}]'))


@pytest.mark.parametrize(
    "node",
    [
        {"op": "linear", "tensors": {"weight": 'w" + print("run") + "'}},
        {"op": "softmax", "attributes": {"dim": 1, "x": 0}},
        {"op": "softmax", "attributes": {"dim=print('run'), y": 1}},
        {"op": "activation", "attributes": {"kind": "clamp", "min=print('run'), max": 1}},
        {"op": "add", "attributes": {"alpha": 1}},
        {"op": "dropout", "attributes": {"p": 0.1}},
    ],
)
def test_nothing_in_a_graph_becomes_code(node: dict[str, Any]) -> None:
    graph = Graph((3, 4, 4), [Node(inputs=[0], **node)], 1)
    names = graph.nodes[0].tensors.values()
    with pytest.raises(GraphError, match="node 0"):
        build(graph, {name: torch.zeros(4, 4) for name in names})


def test_a_file_without_a_graph_says_so(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(GraphError, match=r"bare.safetensors: it has no graph"):
        load_network(tmp_path / "bare.safetensors")


@pytest.mark.parametrize("name", ["vgg", "mobilenetv2", "resnet_gn", "vit"])
def test_shared_networks(name: str, tmp_path: Path) -> None:
    path = ROOT / "../shared/models/definitions.py"
    if not path.exists():
        pytest.skip("../shared is not there")
    spec = importlib.util.spec_from_file_location("definitions", path)
    assert spec is not None and spec.loader is not None
    definitions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(definitions)
    module = randomized(getattr(definitions, name)()).eval()
    save_network(module, tmp_path / "net.safetensors", image_size=(32, 32), mean=MEAN, std=STD)
    read = load_network(tmp_path / "net.safetensors").double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, computed = module.double()(images), read(images)
    assert (expected - computed).abs().max() <= 1e-9 * expected.abs().max()
