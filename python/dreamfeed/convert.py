"""PyTorch checkpoints as the safetensors files that the daemon reads.

    python -m dreamfeed.convert model.pth resnet20.safetensors --arch resnet20 \\
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --image-size 32,32 --class-names airplane,automobile,...

Checkpoints are read with ``torch.load(weights_only=True)``: no code in them is ever run. Beside tensors and
plain values the inert types are allowed that training scripts keep there: ``argparse.Namespace``, numbers and arrays of
numpy, paths.
"""

import argparse
import json
import math
import pathlib
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreamfeed._files import metadata, replacing
from dreamfeed._state import StateError, bare

#: Keys under which training scripts keep the weights.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
#: Two state_dicts of which the smaller shares this part of its names with the other are the same network twice.
_SAME_NETWORK = 0.5
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class ConvertError(ValueError):
    """The checkpoint or an argument cannot be used; the message says what would be right."""


@dataclass(frozen=True)
class Converted:
    """What was written."""

    path: Path
    #: Name, shape and dtype of every tensor in the file.
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    metadata: dict[str, str]
    #: The keys under which the weights lay in the checkpoint, from outside in.
    unwrapped: tuple[str, ...]
    #: What was taken off names: prefixes of every name, and the parts that wrappers put in anywhere.
    stripped: tuple[str, ...]
    #: What else the checkpoint held beside the weights, and was left out: for example the optimizer.
    left_out: tuple[str, ...]
    #: The name of the head in the checkpoint, where the architecture has another.
    head: str | None = None


def convert(
    source: Path | str,
    target: Path | str,
    *,
    arch: str,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: tuple[int, int] = (32, 32),
    class_names: Sequence[str] = (),
    key: str | None = None,
    prefix: str | None = None,
    dtype: Literal["keep", "f32", "f16", "bf16"] = "keep",
) -> Converted:
    """Writes the weights of a checkpoint, and what the daemon has to know of them, to a safetensors file.

    Every tensor of the state_dict is in the file, contiguous and under the name that it has in the bare network;
    nothing is dropped but what :attr:`Converted.left_out` names. Masks of torch.nn.utils.prune are multiplied in.

    Args:
        source: a file of torch.save, with a state_dict or one wrapped in a dict; or a safetensors file.
        target: the file to write; it appears under this name only when it is complete.
        arch: the architecture, for example ``"resnet20"``.
        mean, std: one number a channel, in units of pixel / 255.
        image_size: (height, width).
        class_names: one a class, in order; empty where they are not known.
        key: where the weights lie in the checkpoint, with dots between nested keys, where that is ambiguous: for
            example the moving average beside the weights that it is of.
        prefix: of the network that is wanted where the state_dict holds several, for example ``"student."``; it is
            taken off, and the tensors of the others are left out.
        dtype: ``"keep"``, or what floating tensors are converted to.

    Raises:
        ConvertError: the checkpoint holds more than tensors and plain values, no state_dict, several, or an argument
            does not fit it.
        FileNotFoundError: there is no such file.
    """
    source, target = Path(source), Path(target)
    _check_metadata(arch, mean, std, image_size)
    described = metadata(arch, mean, std, image_size, class_names)
    checkpoint = _load(source)
    state, unwrapped, left_out = _unwrap(source, checkpoint, key)
    tensors, stripped, more = _bare(source, state, prefix)
    head = _rename_head(tensors)
    tensors = {name: _plain(source, name, value, dtype) for name, value in tensors.items()}
    _check(source, tensors, len(mean), class_names)
    with replacing(target) as partial:
        save_file(tensors, partial, metadata=described)
    written = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return Converted(target, written, described, unwrapped, stripped, left_out + more, head)


def _check_metadata(
    arch: str, mean: Sequence[float], std: Sequence[float], image_size: tuple[int, int]
) -> None:
    if not arch:
        raise ConvertError("arch is empty; name the architecture, for example resnet20")
    if not mean or len(mean) != len(std):
        raise ConvertError(f"mean has {len(mean)} and std has {len(std)} values; give one of each a channel")
    if not all(math.isfinite(m) for m in mean) or not all(math.isfinite(s) and s > 0 for s in std):
        raise ConvertError(
            f"mean is {list(mean)} and std is {list(std)}; mean must be finite and std positive"
        )
    if max(map(abs, mean)) > 1 or max(std) > 1:
        raise ConvertError(
            f"mean is {list(mean)} and std is {list(std)}; give them in units of pixel / 255, for example 0.485"
        )
    if len(image_size) != 2 or any(not 1 <= size <= 4096 for size in image_size):
        raise ConvertError(f"image_size is {image_size}; give height and width in pixels, for example 32,32")


def _load(source: Path) -> object:
    if source.exists() and not source.is_file():
        raise ConvertError(f"{source} is not a regular file (but a folder, a pipe or a device); give a file")
    with source.open("rb"):
        pass  # "no such file" in the system's words
    if source.suffix == ".safetensors":
        try:
            with safe_open(source, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConvertError(f"{source} is not a safetensors file: {error}") from error
    try:
        # Of an archive of TorchScript torch warns before it refuses.
        with torch.serialization.safe_globals(list(_inert())), warnings.catch_warnings(action="ignore"):
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConvertError(f"{source} {_refused(error)}") from error
    except Exception as error:  # the unpickler meets what is not a pickle with whatever it stumbles over
        if "TorchScript" in str(error):
            raise ConvertError(f"{source} {_TORCHSCRIPT}") from error
        raise ConvertError(f"{source} is not a file of torch.save: {error}") from error


_TORCHSCRIPT = (
    "is a TorchScript archive, which is a program, and programs are not run; "
    "save the state_dict() of the module that it was made from"
)


def _inert() -> Iterator[Any]:
    """Types that hold values and run nothing when they are read."""
    yield from (argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath)
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    yield from (multiarray.scalar, multiarray._reconstruct, np.ndarray, np.dtype)
    # As older versions of numpy wrote them.
    yield from ((multiarray.scalar, "numpy.core.multiarray.scalar"),)
    yield from ((multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),)
    for code in "?bBhHiIlLqQefdUS":
        yield type(np.dtype(code))


def _refused(error: pickle.UnpicklingError) -> str:
    text = str(error)
    if "TorchScript" in text:
        return _TORCHSCRIPT
    found = re.search(r"GLOBAL ([\w.]+)", text)
    what = f" ({found[1]})" if found else f" ({text.partition(chr(10))[0]})"
    return (
        f"holds more than tensors and plain values{what}, and code in it is not run. "
        "Where you trust it, load it in the program that made it and save model.state_dict()"
    )


def _is_state(value: object) -> bool:
    """Whether weights lie here themselves: tensors, and no mapping that holds weights of its own beside them."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, Tensor) for item in value.values())
        and not any(_holds_state(item) for item in value.values())
    )


def _holds_state(value: object) -> bool:
    """Whether a state_dict lies here or below."""
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(item, Tensor) for item in value.values()) or any(map(_holds_state, value.values()))


def _states(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every state_dict in a checkpoint, and the key that leads to it."""
    if _is_state(value):
        assert isinstance(value, Mapping)
        yield ".".join(path), value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _states(item, (*path, str(name)))


def _names(state: Mapping[Any, Any]) -> set[str]:
    """The names of a state_dict as far as wrappers do not change them."""
    return {str(name).rpartition("module.")[2] for name, item in state.items() if isinstance(item, Tensor)}


def _unwrap(
    source: Path, checkpoint: object, key: str | None
) -> tuple[Mapping[Any, Any], tuple[str, ...], tuple[str, ...]]:
    """The state_dict, the keys that led to it, and the other keys on the way."""
    value = checkpoint
    path: list[str] = []
    left_out: list[str] = []

    def enter(name: str) -> None:
        nonlocal value
        assert isinstance(value, Mapping)
        left_out.extend(".".join([*path, str(other)]) for other in value if other != name)
        value = value[name]
        path.append(name)

    for name in key.split(".") if key else ():
        if not isinstance(value, Mapping) or name not in value:
            held = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise ConvertError(f"{source} has no key {key!r}; at {name!r} it holds {held}")
        enter(name)
    while key is None and isinstance(value, Mapping) and not _is_state(value):
        inside = [str(name) for name, item in value.items() if _holds_state(item)]
        found = [name for name in WRAPPERS if name in inside] or inside
        if len(found) != 1:
            break
        enter(found[0])
    if not isinstance(value, Mapping) or not _is_state(value):
        held = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise ConvertError(
            f"{source} has no one state_dict; it holds {held}: say with key (--key) where the weights lie"
        )
    if key is None:
        own, names = ".".join(path), _names(value)
        twins = [
            other
            for other, state in _states(checkpoint)
            if other != own
            and len(names & _names(state)) >= _SAME_NETWORK * min(len(names), len(_names(state)))
        ]
        if twins:
            keys = ", ".join([own, *twins])
            raise ConvertError(
                f"{source} holds the same network more than once ({keys}), for example a moving average beside "
                "the weights that it is of: say with key (--key) which one is meant"
            )
    return value, tuple(path), tuple(left_out)


def _bare(
    source: Path, state: Mapping[Any, Any], prefix: str | None
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The tensors under the names of the bare network, what was taken off names, and what was left out."""
    left_out = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    try:
        found = bare(tensors)
    except StateError as error:
        raise ConvertError(f"{source}: {error}") from error
    named, stripped = found.tensors, list(found.stripped)
    left_out += found.left_out
    if prefix:
        others = [name for name in named if not name.startswith(prefix)]
        if len(others) == len(named):
            raise ConvertError(
                f"{source}: no tensor has the prefix {prefix!r}; there are {_sample(_beginnings(named))}"
            )
        named = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
        stripped.append(prefix)
        left_out += others
    # A network inside of another module, as in Lightning: all names begin with the attribute that holds it.
    while len(beginnings := _beginnings(named)) == 1 and any(name.count(".") > 1 for name in named):
        if not all("." in name for name in named):
            break
        stripped.append(f"{beginnings[0]}.")
        named = {name.partition(".")[2]: value for name, value in named.items()}
    return named, tuple(stripped), tuple(left_out)


def _beginnings(named: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in named))


def _sample(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _rename_head(tensors: dict[str, Tensor]) -> str | None:
    """Gives the head of a residual network the name that the daemon's architectures have for it; its name before."""
    if "linear.weight" in tensors or "fc.weight" in tensors:
        return None
    matrices = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.ndim == 2]
    if "conv1.weight" not in tensors or len(matrices) != 1 or f"{matrices[0]}.weight" not in tensors:
        return None
    for part in ("weight", "bias"):
        if f"{matrices[0]}.{part}" in tensors:
            tensors[f"linear.{part}"] = tensors.pop(f"{matrices[0]}.{part}")
    return matrices[0]


def _plain(source: Path, name: str, value: Tensor, dtype: str) -> Tensor:
    if value.layout is not torch.strided or value.is_quantized:
        raise ConvertError(f"{source}: {name!r} is sparse or quantized; save it dense and in floating point")
    if dtype != "keep" and value.is_floating_point():
        value = value.to(_DTYPES[dtype])
    # A copy: tensors that share memory are refused by safetensors.
    return value.detach().clone(memory_format=torch.contiguous_format)


def _check(source: Path, tensors: Mapping[str, Tensor], channels: int, class_names: Sequence[str]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ConvertError(f"{source}: {name} has values that are not finite")
    first = tensors.get("conv1.weight")
    if first is not None and first.ndim == 4 and first.shape[1] != channels:
        raise ConvertError(
            f"mean and std have {channels} values, but the network takes {first.shape[1]} channels"
        )
    last = next((tensors[name] for name in ("linear.weight", "fc.weight") if name in tensors), None)
    if class_names and last is not None and last.shape[0] != len(class_names):
        raise ConvertError(
            f"class_names has {len(class_names)} names, but the network has {last.shape[0]} outputs"
        )


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _size(text: str) -> tuple[int, int]:
    height, width = (int(part) for part in text.split(","))
    return height, width


def _class_names(text: str) -> list[str]:
    names = json.loads(text) if text.lstrip().startswith("[") else [name.strip() for name in text.split(",")]
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(text)
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dreamfeed.convert",
        description="Converts a PyTorch checkpoint to the safetensors file that Dreamfeed reads. Runs no code in it.",
    )
    parser.add_argument("source", type=Path, help="a file of torch.save, or a safetensors file")
    parser.add_argument("target", type=Path, help="the safetensors file to write")
    parser.add_argument("--arch", required=True, help="the architecture, for example resnet20")
    parser.add_argument(
        "--mean", required=True, type=_numbers, metavar="LIST", help="for example 0.485,0.456,0.406"
    )
    parser.add_argument(
        "--std", required=True, type=_numbers, metavar="LIST", help="for example 0.229,0.224,0.225"
    )
    parser.add_argument("--image-size", type=_size, default=(32, 32), metavar="H,W", help="default: 32,32")
    parser.add_argument(
        "--class-names", type=_class_names, default=(), metavar="LIST", help="a,b,c or a JSON array"
    )
    parser.add_argument("--key", help="where in the checkpoint the weights lie, where that is ambiguous")
    parser.add_argument("--prefix", help="of the network that is wanted, where there are several: student.")
    parser.add_argument("--dtype", choices=("keep", *_DTYPES), default="keep", help="of floating tensors")
    options = vars(parser.parse_args(arguments))
    try:
        done = convert(options.pop("source"), options.pop("target"), **options)
    except (ConvertError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{done.path}: {len(done.tensors)} tensors, {done.metadata}\n")
    if done.unwrapped:
        sys.stdout.write(f"found under {'.'.join(done.unwrapped)}\n")
    if done.stripped:
        sys.stdout.write(f"names without {', '.join(done.stripped)}\n")
    if done.head:
        sys.stdout.write(f"the head {done.head} is now called linear\n")
    if done.left_out:
        sys.stdout.write(f"left out: {_sample(done.left_out)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
