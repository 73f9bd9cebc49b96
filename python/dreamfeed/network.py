"""Any classifier that ``torch.export`` takes, as a file of the format in docs/network-format.md."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from dreamfeed._files import metadata, replacing
from dreamfeed.graph import (
    LOWEST,
    RESERVED,
    Extent,
    Graph,
    GraphError,
    Node,
    build,
    golden_images,
    load_network,
)

#: Of the largest absolute value: what the file's network may differ from the module by, in f32.
_TOLERANCE = 1e-4


def save_network(
    model: nn.Module,
    path: Path | str,
    *,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] = (),
) -> Graph:
    """Writes a classifier as one file: its operations, its weights, and a golden sample to check readers with.

    The module is exported from a copy in evaluation mode, and the file read back and compared with the module at three
    batch sizes before it appears under its name.

    Args:
        model: takes normalized images, [N, channels, height, width], and gives logits, [N, K].
        path: the safetensors file.
        image_size: height and width.
        mean: of each channel, in units of pixel/255: what the images are normalized with.
        std: the same for the standard deviation.
        class_names: one an output, or empty where they are not known.

    Raises:
        GraphError: the module does something that the format has no word for; the message names the line.
    """
    channels = len(mean)
    if len(std) != channels:
        raise GraphError(f"mean has {channels} channels and std {len(std)}; they must have the same")
    module = copy.deepcopy(model).cpu().float().eval()
    graph, tensors = export(module, (channels, *image_size))
    images = golden_images(channels, *image_size)
    with torch.no_grad():
        logits = module(images)
    if class_names and len(class_names) != logits.shape[1]:
        raise GraphError(
            f"{len(class_names)} class names were given, but the network has {logits.shape[1]} outputs"
        )
    reader = build(graph, tensors).eval()
    golden = {
        f"{RESERVED}golden.{name}": tensor for name, tensor in _golden(reader, graph, images, logits).items()
    }
    described = metadata("", mean, std, image_size, class_names)
    del described["arch"]
    path = Path(path)
    with replacing(path) as partial:
        save_file(
            {name: tensor.detach().clone().contiguous() for name, tensor in {**tensors, **golden}.items()},
            partial,
            {**described, "graph": graph.encode()},
        )
        _compare(load_network(partial), module, images)
    return graph


def _golden(reader: fx.GraphModule, graph: Graph, images: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """The module's logits, and mean and biased variance of each channel at the input of each batch norm."""
    sample = {"logits": logits}

    def keep(tap: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            dims = [dim for dim in range(inputs[0].dim()) if dim != 1]
            var, mean = torch.var_mean(inputs[0], dims, correction=0)
            sample[f"mean.{tap}"], sample[f"var.{tap}"] = mean, var

        return hook

    hooks = [
        reader.get_submodule(f"node_{index}").register_forward_pre_hook(keep(tap))
        for tap, index in enumerate(graph.taps())
    ]
    with torch.no_grad():
        reader(images)
    for hook in hooks:
        hook.remove()
    return sample


def _compare(reader: nn.Module, module: nn.Module, images: Tensor) -> None:
    batch = torch.cat([images, images.flip(3)[:1]])
    with torch.no_grad():
        for size in (1, 2, 3):
            expected, computed = module(batch[:size]), reader(batch[:size])
            if not torch.isfinite(expected).all():
                raise GraphError(
                    "the module's logits are not finite; is it trained, and are its weights loaded?"
                )
            if expected.shape != computed.shape:
                raise GraphError(
                    f"the module gives logits of shape {list(expected.shape)}, its graph {list(computed.shape)}"
                )
            difference = ((expected - computed).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
            if difference > _TOLERANCE:
                raise GraphError(
                    f"the graph's logits differ from the module's by {difference:.1e} of the largest at batch {size}, "
                    f"at most {_TOLERANCE:.0e} is allowed; does its forward pass depend on the batch, or on chance?"
                )


def export(module: nn.Module, size: tuple[int, int, int]) -> tuple[Graph, dict[str, Tensor]]:
    """The graph of a module in evaluation mode, and the tensors that it names.

    Raises:
        GraphError: as :func:`save_network`.
    """
    # Takes seconds to import, and only this needs it.
    from torch.export import Dim
    from torch.export import export as torch_export

    example = golden_images(*size)
    try:
        # A batch of 2, because a batch of 1 is taken for a constant.
        program = torch_export(
            module, (example,), dynamic_shapes=({0: Dim("batch", min=1, max=4096)},), strict=False
        )
    except Exception as error:  # torch.export raises whatever the module's own code raises
        first = str(error).strip().partition("\n")[0]
        raise GraphError(
            f"torch.export does not take the module ({type(error).__name__}: {first})"
        ) from error
    return _Exporter(module, program, size).run()


@dataclass(frozen=True)
class _Value:
    """A value of the graph; those of one memory change together when one is written in place."""

    index: int
    memory: int


@dataclass(frozen=True)
class _Constant:
    tensor: Tensor
    trainable: bool


class _Stale:
    """A view of what was written in place after it was taken."""


#: The batch size, or what was computed from it: shapes tell it.
_SYMBOL = object()


def _extent(size: Any) -> Extent:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    symbols = expression.free_symbols
    if not symbols:
        return int(expression)
    factor = expression / next(iter(symbols))
    if not factor.is_Integer:
        raise GraphError(f"a size of {expression} is not a multiple of the batch size")
    return {"batch": int(factor)}


def _pair(values: Any) -> list[int]:
    pair: list[int] = [values] if isinstance(values, int) else list(values)
    return pair * 2 if len(pair) == 1 else pair


_UNCHANGED = {
    "contiguous", "alias", "clone", "detach", "lift_fresh_copy", "type_as", "_to_copy", "to", "detach_",
}  # fmt: skip
_RESHAPES = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "reshape_as", "view_as",
}  # fmt: skip
#: Results that share memory with their input.
_VIEWS = {*_UNCHANGED, *_RESHAPES, "permute", "transpose", "t", "swapaxes", "movedim", "expand", "expand_as", "slice",
          "select", "split", "split_with_sizes", "chunk", "unbind", "narrow"}  # fmt: skip
_ACTIVATIONS = {"relu", "sigmoid", "tanh", "silu", "hardsigmoid", "hardswish"}
#: Of a shape that is given, and of the type and perhaps the shape of another tensor.
_LIKE = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
_CREATORS = {"zeros", "ones", "full", *_LIKE}


@dataclass
class _Exporter:
    module: nn.Module
    program: Any
    size: tuple[int, int, int]
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    #: What each node of torch.export's graph gave.
    known: dict[fx.Node, Any] = field(default_factory=dict)
    #: Of :class:`_Value`: the next number.
    memories: int = 1
    #: Name and version of each tensor that has a name, by its `id`; one written in place has lost it.
    names: dict[int, tuple[str, int]] = field(default_factory=dict)
    #: Values of `constant` nodes, by `id` and version of their tensors.
    constants: dict[tuple[int, int], int] = field(default_factory=dict)
    #: What is known by its `id` has to live.
    kept: list[Tensor] = field(default_factory=list)

    def run(self) -> tuple[Graph, dict[str, Tensor]]:
        self.state = {**dict(self.module.named_buffers(remove_duplicate=False)),
                      **dict(self.module.named_parameters(remove_duplicate=False))}  # fmt: skip
        self.saved = set(self.module.state_dict())
        signature = self.program.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        output = None
        with torch.no_grad():
            for node in self.program.graph.nodes:
                if node.op == "placeholder":
                    self.known[node] = self._placeholder(specs[node.name])
                elif node.op == "get_attr":
                    value = getattr(self.program.graph_module, node.target)
                    self.known[node] = _Constant(value, False) if isinstance(value, Tensor) else value
                elif node.op == "output":
                    output = self._output(node, signature)
                else:
                    try:
                        self.known[node] = self._call(node)
                    except GraphError as error:
                        raise GraphError(f"{error}{_where(node)}") from error
        assert output is not None
        return self._finish(output)

    def _placeholder(self, spec: Any) -> Any:
        kind = spec.kind.name
        if kind == "USER_INPUT":
            return _Value(0, 0)
        if spec.target in self.state:
            tensor = self.state[spec.target]
            trainable = kind == "PARAMETER"
            tensor = tensor.detach()
            self.kept.append(tensor)
            if spec.target in self.saved:
                self.names[id(tensor)] = (spec.target, tensor._version)
            return _Constant(tensor, trainable)
        return _Constant(self.program.constants[spec.target], False)

    def _output(self, node: fx.Node, signature: Any) -> int:
        specs = [spec.arg for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"]
        if len(specs) != 1:
            raise GraphError(
                f"the module gives {len(specs)} outputs, and a classifier gives one, its logits; wrap it in a "
                "module that gives only these"
            )
        result: Any = next(arg for arg in node.args[0] if arg.name == specs[0].name)  # type: ignore[union-attr]
        value = self.known[result]
        shape = [_extent(size) for size in result.meta["val"].shape]
        if not isinstance(value, _Value) or len(shape) != 2 or shape[0] != {"batch": 1}:
            raise GraphError(f"the module's output has shape {shape}, and logits are [batch, classes]")
        return value.index

    def _finish(self, output: int) -> tuple[Graph, dict[str, Tensor]]:
        """Without what no logit depends on."""
        used = {output}
        for index in range(len(self.nodes), 0, -1):
            if index in used:
                used.update(self.nodes[index - 1].inputs)
        numbers = {0: 0}
        kept = []
        for index, node in enumerate(self.nodes, 1):
            if index in used:
                node.inputs = [numbers[i] for i in node.inputs]
                kept.append(node)
                numbers[index] = len(kept)
        if 0 not in used:
            raise GraphError("the logits do not depend on the image")
        names = {name for node in kept for name in node.tensors.values()}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in names}
        return Graph(self.size, kept, numbers[output]), tensors

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        if not hasattr(target, "_schema"):
            if getattr(target, "__name__", "") == "getitem":
                return self.known[node.args[0]][node.args[1]]  # type: ignore[index]
            return _SYMBOL  # arithmetic of sizes
        value: Any = node.meta.get("val")
        name = target._schema.name.partition("::")[2]
        if name.startswith("_assert") or name == "sym_constrain_range_for_size":
            return None
        if name.startswith("sym_"):
            return _SYMBOL
        known = [self.known[arg] for arg in node.all_input_nodes]
        if not any(isinstance(k, (_Value, _Stale)) for k in known):
            if all(k is not _SYMBOL for k in known):
                return self._execute(node, known)
            if name in _CREATORS:
                return self._create(node, value)
        elif name in _LIKE and all(isinstance(size, int) for size in value.shape):
            # It takes only type and device of the image, and may be filled in place later.
            fill = self._arguments(node).get("fill_value", 0.0 if "zeros" in name else 1.0)
            return _Constant(torch.full(list(value.shape), fill, dtype=value.dtype), False)
        elif name in _LIKE:
            return self._create(node, value)
        if name.endswith("_") and name != "detach_" and isinstance(self.known.get(node.args[0]), _Value):  # type: ignore[arg-type]
            return self._in_place(node, name[:-1])
        return self._translate(node, name)

    def _execute(self, node: fx.Node, known: list[Any]) -> Any:
        """A constant region, in order: views and writes into them do what they do in PyTorch."""

        def plain(arg: fx.Node) -> Any:
            found = self.known[arg]
            return found.tensor if isinstance(found, _Constant) else found

        result = node.target(*fx.map_arg(node.args, plain), **fx.map_arg(node.kwargs, plain))  # type: ignore[operator]
        trainable = any(isinstance(k, _Constant) and k.trainable for k in known)
        if isinstance(result, Tensor):
            for arg in node.all_input_nodes:
                found = self.known[arg]
                if isinstance(found, _Constant) and found.tensor is result:
                    return found
            return _Constant(result, trainable)
        if isinstance(result, (list, tuple)):
            return [_Constant(r, trainable) if isinstance(r, Tensor) else r for r in result]
        return result

    def _create(self, node: fx.Node, value: Any) -> _Value:
        """A tensor of equal elements whose shape has the batch."""
        shape = [_extent(size) for size in value.shape]
        name = node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]
        fill = 0.0 if "zeros" in name else 1.0 if "ones" in name else self._arguments(node)["fill_value"]
        index = self._constant(_Constant(torch.full([1] * len(shape), float(fill)), False))
        return self._emit(node, "expand", [index], shape=shape)

    def _in_place(self, node: fx.Node, name: str) -> Any:
        written: _Value = self.known[node.args[0]]  # type: ignore[index]
        result = self._translate(node, name)
        for other, value in self.known.items():
            if value == written:
                self.known[other] = result
            elif isinstance(value, _Value) and value.memory == written.memory:
                self.known[other] = _Stale()
        return result

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """By the names of the operator's schema, defaults included."""
        given = dict(node.kwargs)
        arguments = {}
        for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if position < len(node.args):
                arguments[argument.name] = node.args[position]
            elif argument.name in given:
                arguments[argument.name] = given[argument.name]
            elif argument.has_default_value():
                arguments[argument.name] = argument.default_value
        return arguments

    def _ref(self, node: Any) -> int:
        """The value that an argument is."""
        found = self.known[node]
        if isinstance(found, _Value):
            return found.index
        if isinstance(found, _Constant):
            return self._constant(found)
        if isinstance(found, _Stale):
            raise GraphError(
                "it reads a view of a tensor that was written in place after the view was taken; write a copy"
            )
        raise GraphError("it takes something that is not a tensor")

    def _name(self, constant: _Constant) -> str:
        tensor = constant.tensor
        known = self.names.get(id(tensor))
        if known is None or known[1] != tensor._version:
            if tensor.dtype == torch.bool:
                stored = torch.zeros(tensor.shape).masked_fill(~tensor, LOWEST)
            else:
                stored = tensor.float().clone()
            number = len([name for name in self.tensors if name.startswith("constant.")])
            while (name := f"constant.{number}") in self.state or name in self.tensors:
                number += 1
            self.names[id(tensor)] = known = (name, tensor._version)
            self.kept.append(tensor)
            self.tensors[name] = stored
        name = known[0]
        self.tensors.setdefault(name, tensor)
        return name

    def _tensor(self, node: Any) -> str:
        found = self.known[node]
        if not isinstance(found, _Constant):
            raise GraphError("its weights are computed from the image, for which the format has no word")
        return self._name(found)

    def _constant(self, constant: _Constant) -> int:
        key = (id(constant.tensor), constant.tensor._version)
        if key not in self.constants:
            name = self._name(constant)
            self.nodes.append(Node("constant", [], {"value": name}, {"trainable": constant.trainable}))
            self.constants[key] = len(self.nodes)
        return self.constants[key]

    def _emit(
        self,
        node: fx.Node,
        op: str,
        inputs: list[int],
        *,
        tensors: dict[str, Any] | None = None,
        **attributes: Any,
    ) -> _Value:
        named = {role: self._tensor(arg) for role, arg in (tensors or {}).items() if arg is not None}
        self.nodes.append(Node(op, inputs, named, attributes, _module(node)))
        target = getattr(node.target, "_schema", None)
        memory = self.memories
        if target is not None and target.name.partition("::")[2] in _VIEWS:
            first = self.known[node.args[0]]  # type: ignore[index]
            memory = first.memory if isinstance(first, _Value) else memory
        self.memories += 1
        return _Value(len(self.nodes), memory)

    def _same_shape(self, node: fx.Node) -> bool:
        first: Any = node.args[0]
        return [_extent(s) for s in first.meta["val"].shape] == [_extent(s) for s in node.meta["val"].shape]

    def _translate(self, node: fx.Node, name: str) -> Any:
        a = self._arguments(node)
        first: Any = next(iter(a.values()), None)
        value = node.meta["val"]
        outputs = value if isinstance(value, (list, tuple)) else [value]
        shapes = [[_extent(size) for size in v.shape] for v in outputs if isinstance(v, Tensor)]
        shape = shapes[0]
        before: list[Extent] = []
        if isinstance(first, fx.Node) and isinstance(first.meta.get("val"), Tensor):
            before = [_extent(size) for size in first.meta["val"].shape]
        rank = len(before)

        def emit(op: str, *inputs: Any, **rest: Any) -> _Value:
            return self._emit(
                node, op, [i.index if isinstance(i, _Value) else self._ref(i) for i in inputs], **rest
            )

        def scalar(x: Any) -> bool:
            return isinstance(x, (int, float))

        if name in _UNCHANGED:
            if any(v.dtype != torch.float32 for v in outputs):
                raise GraphError(
                    f"it computes in {outputs[0].dtype}, and all of a graph has one type of float"
                )
            return self.known[first]
        if name in _RESHAPES:
            return self.known[first] if before == shape else emit("reshape", first, shape=shape)
        if name in ("permute", "transpose", "t", "swapaxes"):
            dims: Any = list(range(rank))
            if name == "permute":
                dims = [dim % rank for dim in a["dims"]]
            elif rank == 2 and name == "t":
                dims = [1, 0]
            else:
                one, other = (a["dim0"], a["dim1"]) if name == "transpose" else (a["axis0"], a["axis1"])
                dims[one], dims[other] = dims[other], dims[one]
            return emit("permute", first, dims=dims)
        if name in ("expand", "expand_as"):
            return (
                self.known[first]
                if before == shape and isinstance(self.known[first], _Value)
                else emit("expand", first, shape=shape)
            )
        if name == "slice":
            if before == shape and a["step"] == 1:
                return self.known[first]
            dim = a["dim"] % rank
            length = before[dim]
            if not isinstance(length, int):
                raise GraphError("it takes some images of the batch, and every image has its own logits")
            start, end, step = slice(a["start"], a["end"], a["step"]).indices(length)
            return emit("slice", first, dim=dim, start=start, end=end, step=step)
        if name == "select":
            dim = a["dim"] % rank
            length = before[dim]
            if not isinstance(length, int):
                raise GraphError("it takes one image of the batch, and every image has its own logits")
            start = a["index"] % length
            part = emit("slice", first, dim=dim, start=start, end=start + 1, step=1)
            return emit("reshape", part, shape=shape)
        if name in ("chunk", "split", "split_with_sizes", "tensor_split", "unbind"):
            dim, start, parts = a["dim"] % rank, 0, []
            if not isinstance(before[dim], int):
                raise GraphError("it splits the batch, and every image has its own logits")
            for each in shapes:
                length = 1 if name == "unbind" else each[dim]
                part = emit("slice", first, dim=dim, start=start, end=start + length, step=1)
                parts.append(emit("reshape", part, shape=each) if name == "unbind" else part)
                start += length
            return parts
        if name in ("cat", "stack"):
            items = list(a["tensors"])
            dim = a["dim"] % len(shape)
            if name == "stack":
                item = [*shape[:dim], 1, *shape[dim + 1 :]]
                items = [emit("reshape", i, shape=item) for i in items]
            if not isinstance(shape[dim], int):
                raise GraphError("it joins batches, and every image has its own logits")
            return emit("cat", *items, dim=dim)
        if name == "conv2d":
            padding = a["padding"]
            x: Any = first
            weight = a["weight"].meta["val"].shape
            dilation = _pair(a["dilation"])
            if isinstance(padding, str):
                sides = [0, 0]
                if padding == "same":
                    total = [d * (int(k) - 1) for d, k in zip(dilation, weight[2:], strict=True)]
                    sides = [t // 2 for t in total]
                    if any(t % 2 for t in total):
                        widths = [[0, 0], [0, 0], *([t // 2, t - t // 2] for t in total)]
                        x, sides = emit("pad", first, widths=widths, mode="constant", value=0.0), [0, 0]
                padding = sides
            return emit(
                "conv2d", x, tensors={"weight": a["weight"], "bias": a["bias"]}, stride=_pair(a["stride"]),
                padding=_pair(padding), dilation=dilation, groups=a["groups"],
            )  # fmt: skip
        if name == "linear":
            return emit("linear", first, tensors={"weight": a["weight"], "bias": a["bias"]})
        if name == "batch_norm":
            if a["training"] or a["running_mean"] is None or a["running_var"] is None:
                raise GraphError(
                    "this batch norm has no running statistics to evaluate with (track_running_stats=False, or left in "
                    "training mode); give it running statistics, or use another norm"
                )
            roles = ("weight", "bias", "running_mean", "running_var")
            return emit(
                "batch_norm",
                first,
                tensors={r: a[r] for r in roles},
                eps=float(a["eps"]),
                momentum=float(a["momentum"]),
            )
        if name == "layer_norm":
            return emit("layer_norm", first, tensors={r: a[r] for r in ("weight", "bias")},
                        shape=list(a["normalized_shape"]), eps=float(a["eps"]))  # fmt: skip
        if name == "group_norm":
            return emit("group_norm", first, tensors={r: a[r] for r in ("weight", "bias")},
                        groups=a["num_groups"], eps=float(a["eps"]))  # fmt: skip
        if name in _ACTIVATIONS:
            return emit("activation", first, kind=name)
        if name == "gelu":
            return emit("activation", first, kind="gelu_tanh" if a["approximate"] == "tanh" else "gelu")
        if name in ("hardtanh", "clamp", "clamp_min", "clamp_max", "relu6"):
            low, high = a.get("min_val", a.get("min")), a.get("max_val", a.get("max"))
            if name == "relu6":
                low, high = 0.0, 6.0
            if not all(limit is None or scalar(limit) for limit in (low, high)):
                raise GraphError("it clamps to tensors, for which the format has no word")
            limits = {
                key: None if limit is None else float(limit) for key, limit in (("min", low), ("max", high))
            }
            return emit("activation", first, kind="clamp", **limits)
        if name == "leaky_relu":
            return emit("activation", first, kind="leaky_relu", slope=float(a["negative_slope"]))
        if name == "elu" and a["scale"] == 1 and a["input_scale"] == 1:
            return emit("activation", first, kind="elu", alpha=float(a["alpha"]))
        if name in ("add", "sub"):
            alpha = float(a.get("alpha", 1)) * (1 if name == "add" else -1)
            if scalar(a["other"]):
                return emit("affine", first, scale=1.0, shift=alpha * a["other"])
            return emit("add", first, a["other"], alpha=alpha)
        if name == "rsub" and scalar(a["other"]):
            return emit("affine", first, scale=-float(a["alpha"]), shift=float(a["other"]))
        if name in ("mul", "div") and a.get("rounding_mode") is None:
            if scalar(a["other"]):
                scale = float(a["other"]) if name == "mul" else 1 / a["other"]
                return emit("affine", first, scale=scale, shift=0.0)
            return emit(name, first, a["other"])
        if name == "neg":
            return emit("affine", first, scale=-1.0, shift=0.0)
        if name == "square" or (name == "pow" and a["exponent"] == 2):
            return emit("mul", first, first)
        if name == "addcmul":
            product = emit("mul", a["tensor1"], a["tensor2"])
            return emit("add", first, product, alpha=float(a["value"]))
        if name in ("mean", "sum", "amax", "linalg_vector_norm"):
            kind = {"amax": "max", "linalg_vector_norm": "norm"}.get(name, name)
            dims = a.get("dim")
            if kind == "norm" and a["ord"] != 2:
                raise GraphError(f"a norm of order {a['ord']} is not in the format; 2 is")
            dims = sorted({dim % rank for dim in ([dims] if isinstance(dims, int) else dims or [])})
            if not dims or any(not isinstance(before[dim], int) for dim in dims):
                raise GraphError("it reduces over the batch, and every image has its own logits")
            return emit("reduce", first, kind=kind, dims=dims, keepdim=a["keepdim"])
        if name in ("softmax", "_softmax"):
            return emit("softmax", first, dim=a["dim"] % rank)
        if name in ("matmul", "bmm") and rank > 1 and len(node.args[1].meta["val"].shape) > 1:  # type: ignore[union-attr]
            return emit("matmul", *node.args)
        if name == "scaled_dot_product_attention" and not a["enable_gqa"]:
            inputs = [a["query"], a["key"], a["value"]]
            if a["attn_mask"] is not None:
                inputs.append(a["attn_mask"])
            scale = a["scale"] if a["scale"] is not None else before[-1] ** -0.5  # type: ignore[operator]
            return emit("attention", *inputs, scale=float(scale), causal=a["is_causal"])
        if name == "max_pool2d":
            kernel = _pair(a["kernel_size"])
            return emit(
                "max_pool2d", first, kernel=kernel, stride=_pair(a["stride"] or kernel), padding=_pair(a["padding"]),
                dilation=_pair(a["dilation"]), ceil_mode=a["ceil_mode"],
            )  # fmt: skip
        if name == "avg_pool2d" and a["divisor_override"] is None:
            kernel = _pair(a["kernel_size"])
            return emit(
                "avg_pool2d", first, kernel=kernel, stride=_pair(a["stride"] or kernel), padding=_pair(a["padding"]),
                ceil_mode=a["ceil_mode"], count_include_pad=a["count_include_pad"],
            )  # fmt: skip
        if name == "adaptive_avg_pool2d":
            return emit("adaptive_avg_pool2d", first, size=shape[2:])
        if name == "upsample_nearest2d":
            return emit("upsample", first, kind="nearest", size=shape[2:])
        if name in ("pad", "constant_pad_nd"):
            flat = list(a["pad"])
            pairs = [flat[i : i + 2] for i in range(0, len(flat), 2)][::-1]
            fill = float(a.get("value") or 0)
            return emit("pad", first, widths=[[0, 0]] * (rank - len(pairs)) + pairs, mode=a.get("mode", "constant"),
                        value=fill if abs(fill) != float("inf") else "inf" if fill > 0 else "-inf")  # fmt: skip
        if name == "roll":
            return emit("roll", first, dims=[dim % rank for dim in a["dims"]], shifts=list(a["shifts"]))
        if name in ("dropout", "feature_dropout") and not a["train"]:
            if not a["p"]:
                return self.known[first]
            return emit("dropout", first, p=float(a["p"]), whole_maps=name == "feature_dropout")
        raise GraphError(f"the operation {node.target} is not in the format")


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(stack.values())), "")
    return re.sub(r"@\d+", "", path.replace("L['self']", "").lstrip("."))


def _where(node: fx.Node) -> str:
    """The line of the user's module."""
    frames = re.findall(
        r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or ""
    )
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    module = _module(node)
    line = f" at {own[-1][0]}:{own[-1][1]}: {own[-1][2].strip()}" if own else ""
    return f"{line} (module {module!r})" if module else line
