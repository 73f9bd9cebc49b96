"""Networks as data, ``dreamfeed.graph.v1``, the format of docs/network-format.md, and PyTorch modules of them."""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx, nn

FORMAT = "dreamfeed.graph.v1"
#: Tensors about a network and not of it.
RESERVED = "dreamfeed."
MAX_NODES = 20_000
MAX_BYTES = 1 << 20
MAX_NAME = 256
#: The lowest f32: what a boolean mask leaves out.
LOWEST = -3.4028234663852886e38

#: An extent: a number, or a multiple of the batch size.
Extent = int | dict[str, int]


class GraphError(ValueError):
    """A file or a module that is not a network of the format; the message says what would be right."""


@dataclass
class Node:
    """One operation."""

    op: str
    inputs: list[int] = field(default_factory=list)
    tensors: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    #: Path of the module that made it.
    module: str = ""

    def as_json(self) -> dict[str, Any]:
        written: dict[str, Any] = {"op": self.op, "inputs": self.inputs}
        for key, value in (
            ("tensors", self.tensors),
            ("attributes", self.attributes),
            ("module", self.module),
        ):
            if value:
                written[key] = value
        return written


@dataclass
class Graph:
    """The operations of a network; value 0 is the batch of images, and node i makes value i + 1."""

    #: Channels, height, width.
    input: tuple[int, int, int]
    nodes: list[Node]
    #: Index of the logits.
    output: int

    def encode(self) -> str:
        """The canonical text (RFC 8785)."""
        channels, height, width = self.input
        return canonical(
            {
                "format": FORMAT,
                "input": {"channels": channels, "height": height, "width": width},
                "nodes": [node.as_json() for node in self.nodes],
                "output": self.output,
            }
        )

    @classmethod
    def decode(cls, text: str) -> "Graph":
        """Reads what :meth:`encode` wrote.

        Raises:
            GraphError: it is none.
        """
        if len(text.encode()) > MAX_BYTES:
            raise GraphError(f"the graph has more than {MAX_BYTES} bytes, which is the limit")
        try:
            read = json.loads(text)
            if read["format"] != FORMAT:
                raise GraphError(f"the graph's format is {read['format']!r}; this version reads {FORMAT!r}")
            size = read["input"]
            nodes = [
                Node(
                    node["op"],
                    node["inputs"],
                    node.get("tensors", {}),
                    node.get("attributes", {}),
                    node.get("module", ""),
                )
                for node in read["nodes"]
            ]
            graph = cls((size["channels"], size["height"], size["width"]), nodes, read["output"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, GraphError):
                raise
            raise GraphError(f"the graph is not of the format {FORMAT} ({error!r})") from error
        graph._check()
        return graph

    def _check(self) -> None:
        if len(self.nodes) > MAX_NODES:
            raise GraphError(f"the graph has {len(self.nodes)} nodes; at most {MAX_NODES} are allowed")
        for index, node in enumerate(self.nodes):
            if node.op not in OPERATIONS:
                raise GraphError(f"node {index}: there is no operation {node.op!r}")
            if not isinstance(node.inputs, list) or not all(
                type(i) is int and 0 <= i <= index for i in node.inputs
            ):
                raise GraphError(f"node {index} ({node.op}): its inputs must be values made before it")
        if type(self.output) is not int or not 0 < self.output <= len(self.nodes):
            raise GraphError(f"output: {self.output!r} is not a value of the graph")

    def taps(self) -> list[int]:
        """The nodes that are batch norms, in order."""
        return [index for index, node in enumerate(self.nodes) if node.op == "batch_norm"]


def canonical(value: Any) -> str:
    """JSON as RFC 8785 writes it; keys here are ASCII."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, float):
        return number(value)
    return json.dumps(value, ensure_ascii=False)


def number(value: float) -> str:
    """A float as ECMAScript spells it."""
    if not math.isfinite(value):
        raise GraphError(f"{value} is not a JSON number")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    mantissa, _, exponent = f"{abs(value)!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    # The value is 0.digits times ten to the `point`.
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    if len(digits) <= point <= 21:
        return sign + digits.ljust(point, "0")
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    return f"{sign}{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{point - 1:+d}"


def golden_images(channels: int, height: int, width: int) -> Tensor:
    """The two images of the golden sample, [2, channels, height, width] in [-2, 2)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, 2 * channels * height * width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) >> np.uint64(40)
    images = (z.astype(np.float64) / 2**22 - 2).astype(np.float32)
    return torch.from_numpy(images).reshape(2, channels, height, width)


class _BatchNorm(nn.Module):
    """Knows whether the network is trained; the tensors stand where the file names them."""

    def __init__(self, eps: float, momentum: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum

    def forward(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)


def _extents(x: Tensor, shape: Sequence[Extent]) -> list[int]:
    """The shape for this batch; a constant has no batch, and the images tell it."""
    return [extent if isinstance(extent, int) else extent["batch"] * x.shape[0] for extent in shape]


def _reshape(x: Tensor, shape: Sequence[Extent]) -> Tensor:
    return x.reshape([extent if isinstance(extent, int) else -1 for extent in shape])


def _expand(x: Tensor, images: Tensor, shape: Sequence[Extent]) -> Tensor:
    return x.expand(_extents(images, shape))


def _activation(x: Tensor, kind: str, **rest: Any) -> Tensor:
    return ACTIVATIONS[kind](x, **rest)


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "clamp": lambda x, min, max: torch.clamp(x, min, max),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "elu": lambda x, alpha: F.elu(x, alpha),
}


def _reduce(x: Tensor, kind: str, dims: list[int], keepdim: bool) -> Tensor:
    if kind == "norm":
        norm: Tensor = torch.linalg.vector_norm(x, 2, dims, keepdim)
        return norm
    reductions: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}
    return reductions[kind](x, dims, keepdim)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float, causal: bool
) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


def _pad(x: Tensor, widths: list[list[int]], mode: str, value: float | str) -> Tensor:
    while widths and widths[0] == [0, 0]:
        widths = widths[1:]
    flat = [width for pair in reversed(widths) for width in pair]
    return F.pad(x, flat, mode, float(value)) if mode == "constant" else F.pad(x, flat, mode)


def _slice(x: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    return x[(slice(None),) * dim + (slice(start, end, step),)]


def _constant(value: Tensor, trainable: bool) -> Tensor:
    return value


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def _layer_norm(
    x: Tensor, shape: list[int], eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _group_norm(
    x: Tensor, groups: int, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def _add(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    return torch.add(x, y, alpha=alpha)


def _mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def _div(x: Tensor, y: Tensor) -> Tensor:
    return x / y


def _affine(x: Tensor, scale: float, shift: float) -> Tensor:
    return x * scale + shift


def _softmax(x: Tensor, dim: int) -> Tensor:
    return F.softmax(x, dim)


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


def _max_pool2d(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)


def _avg_pool2d(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> Tensor:
    return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad)


def _adaptive_avg_pool2d(x: Tensor, size: list[int]) -> Tensor:
    return F.adaptive_avg_pool2d(x, size)  # type: ignore[arg-type]  # a list will do


def _upsample(x: Tensor, kind: str, size: list[int]) -> Tensor:
    return F.interpolate(x, size, mode=kind)


def _permute(x: Tensor, dims: list[int]) -> Tensor:
    return x.permute(dims)


def _cat(*inputs: Tensor, dim: int) -> Tensor:
    return torch.cat(inputs, dim)


def _roll(x: Tensor, dims: list[int], shifts: list[int]) -> Tensor:
    return torch.roll(x, shifts, dims)


#: What computes an operation from its inputs, in order, and its tensors and attributes, by name.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "constant": _constant,
    "conv2d": _conv2d,
    "linear": _linear,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "activation": _activation,
    "add": _add,
    "mul": _mul,
    "div": _div,
    "affine": _affine,
    "reduce": _reduce,
    "softmax": _softmax,
    "matmul": _matmul,
    "attention": _attention,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "upsample": _upsample,
    "pad": _pad,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "cat": _cat,
    "slice": _slice,
    "roll": _roll,
}
#: The rest differs between training and evaluation, and is a module.
OPERATIONS = {*FUNCTIONS, "batch_norm", "dropout"}


_NORM = ("running_mean", "running_var", "weight", "bias")


def _check_call(index: int, node: Node) -> None:
    """Everything that torch.fx writes into Python code: names are plain, and arguments those of the operation.

    Raises:
        GraphError: they are not.
    """
    where = f"node {index} ({node.op} of {node.module!r})"
    for name in node.tensors.values():
        if not isinstance(name, str) or len(name) > MAX_NAME or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
            raise GraphError(
                f"{where}: {name!r:.80} is not the name of a tensor; letters, digits, _ and - with dots between are"
            )
    inputs = len(node.inputs)
    if node.op == "batch_norm":
        complete = inputs == 1 and set(_NORM[:2]) <= set(node.tensors) <= set(_NORM)
        complete = complete and set(node.attributes) == {"eps", "momentum"}
    elif node.op == "dropout":
        complete = inputs == 1 and not node.tensors and set(node.attributes) == {"p", "whole_maps"}
    else:
        arguments = {**node.tensors, **node.attributes}
        # The images are an argument of their own, which the file does not name.
        given = [None] * (inputs + (node.op == "expand"))
        complete = all(type(key) is str and key.isidentifier() for key in arguments)
        try:
            inspect.signature(FUNCTIONS[node.op]).bind(*given, **arguments)
        except TypeError:
            complete = False
    if not complete:
        raise GraphError(
            f"{where}: {inputs} inputs, tensors {sorted(node.tensors)!r:.80} and attributes "
            f"{sorted(node.attributes)!r:.80} are not those of the operation"
        )


def build(graph: Graph, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The network as a module whose state dict has the names of `tensors`.

    Raises:
        GraphError: a node names a tensor that is not there.
    """
    root = nn.Module()
    made = fx.Graph()
    images = made.placeholder("images")
    values: list[fx.Node] = [images]
    for index, node in enumerate(graph.nodes):
        _check_call(index, node)
        inputs = [values[i] for i in node.inputs]
        named = {}
        for role, name in node.tensors.items():
            if name not in tensors:
                raise GraphError(
                    f"node {index} ({node.op} of {node.module!r}): there is no tensor {name!r} in the file"
                )
            fixed = role.startswith("running_") or not node.attributes.get("trainable", True)
            _register(root, name, tensors[name], fixed)
            named[role] = made.get_attr(name)
        attributes = node.attributes
        if node.op in ("batch_norm", "dropout"):
            layer: nn.Module
            if node.op == "batch_norm":
                layer = _BatchNorm(attributes["eps"], attributes["momentum"])
                arguments = (*inputs, *(named.get(role) for role in _NORM))
            else:
                layer = (nn.Dropout2d if attributes["whole_maps"] else nn.Dropout)(attributes["p"])
                arguments = tuple(inputs)
            root.add_module(f"node_{index}", layer)
            values.append(made.call_module(f"node_{index}", arguments))
            continue
        if node.op == "expand":
            inputs.append(images)
        values.append(made.call_function(FUNCTIONS[node.op], tuple(inputs), {**named, **attributes}))
    made.output(values[graph.output])
    return fx.GraphModule(root, made, "Network")


def _register(root: nn.Module, name: str, tensor: Tensor, fixed: bool) -> None:
    *path, leaf = name.split(".")
    holder = root
    for part in path:
        if part not in holder._modules:
            if hasattr(fx.GraphModule, part):
                raise GraphError(
                    f"a module of torch.fx cannot hold a tensor named {name!r}: {part!r} is taken; rename it"
                )
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    if leaf in holder._parameters or leaf in holder._buffers:
        return
    if fixed:
        holder.register_buffer(leaf, tensor.detach().clone())
    else:
        setattr(holder, leaf, nn.Parameter(tensor.detach().clone()))


def load_network(path: Path | str) -> fx.GraphModule:
    """The network in a file that :func:`save_network` wrote, in evaluation mode: a module that trains, with the names
    of the file's tensors in its state dict.

    Raises:
        GraphError: the file is none, or has no graph.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("graph")
            if text is None:
                raise GraphError("it has no graph in its metadata; save_network writes one")
            graph = Graph.decode(text)
            tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(RESERVED)}  # noqa: SIM118
    except SafetensorError as error:
        raise GraphError(f"{path} is not a safetensors file ({error})") from error
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error
    return build(graph, tensors).eval()
