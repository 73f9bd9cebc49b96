"""State dicts under the names of the bare network, whatever the network was wrapped in."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

#: Parts of a name that wrappers put in, wherever they stand: torch.compile of the whole or of a layer, activation
#: checkpointing, FSDP.
WRAPPER_PARTS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
#: What DataParallel, DistributedDataParallel and AveragedModel put before every name.
_MODULE = "module."
#: AveragedModel's own counter, beside the names that it wraps.
_AVERAGED = "n_averaged"
#: What torch.nn.utils.prune makes of a parameter: the parameter itself, and the mask that it is multiplied by.
_ORIGINAL, _MASK = "_orig", "_mask"
#: Where torch.nn.utils.parametrize keeps what a parameter is computed from.
_PARAMETRIZED = ".parametrizations."


class StateError(ValueError):
    """A state dict that is not the weights of one plain network; the message says what would be right."""


@dataclass(frozen=True)
class State:
    """Weights under the names of the bare network."""

    #: Views of the tensors that were given, but for those that a mask was multiplied into.
    tensors: dict[str, Tensor]
    #: What was taken off names, in the order in which it was found.
    stripped: tuple[str, ...]
    #: Names of what are not weights, for example the counter of AveragedModel.
    left_out: tuple[str, ...]


def bare(state: Mapping[str, Tensor]) -> State:
    """The weights of the network inside of wrappers: DataParallel, DistributedDataParallel, torch.compile of the whole
    or of single layers, AveragedModel, activation checkpointing; masks of torch.nn.utils.prune multiplied in.

    Raises:
        StateError: a tensor is sharded (FSDP2, tensor parallelism) or parametrized, a mask stands alone, or two names
            are one without their wrappers.
    """
    named: dict[str, Tensor] = {}
    stripped: list[str] = []
    left_out: list[str] = []
    names = {name: _without_parts(name, stripped) for name in state}
    if _AVERAGED in names and all(name.startswith(_MODULE) for name in names.values() if name != _AVERAGED):
        del names[_AVERAGED]
        left_out.append(_AVERAGED)
    while names and all(name.startswith(_MODULE) for name in names.values()):
        names = {given: name.removeprefix(_MODULE) for given, name in names.items()}
        _once(stripped, _MODULE)
    for given, name in names.items():
        if name in named:
            raise StateError(
                f"{given!r} and another tensor are both {name!r} without their wrappers; leave one out"
            )
        named[name] = _whole(name, state[given])
    return State(_with_masks(named), tuple(stripped), tuple(left_out))


def _without_parts(name: str, stripped: list[str]) -> str:
    kept = []
    for part in name.split("."):
        if part in WRAPPER_PARTS:
            _once(stripped, f"{part}.")
        else:
            kept.append(part)
    return ".".join(kept)


def _once(found: list[str], prefix: str) -> None:
    if prefix not in found:
        found.append(prefix)


def _whole(name: str, tensor: Tensor) -> Tensor:
    # By name: importing torch.distributed.tensor takes longer than everything else here.
    if type(tensor).__name__ == "DTensor":
        raise StateError(
            f"{name} is sharded over several ranks (DTensor: FSDP2 or tensor parallelism); call "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True, cpu_offload=True)) on every rank, and give its result on rank 0"
        )
    if _PARAMETRIZED in f".{name}":
        raise StateError(
            f"{name} belongs to a parametrization, and the weight itself is not in the state_dict; call "
            "torch.nn.utils.parametrize.remove_parametrizations on a copy, and give that"
        )
    return tensor


def _with_masks(named: dict[str, Tensor]) -> dict[str, Tensor]:
    masked = [name.removesuffix(_MASK) for name in named if name.endswith(_MASK)]
    for name in masked:
        original = named.get(name + _ORIGINAL)
        if original is None:
            continue  # a tensor of the network's own that happens to be called so
        mask = named[name + _MASK]
        if mask.shape != original.shape:
            raise StateError(
                f"{name}{_MASK} is {tuple(mask.shape)} and {name}{_ORIGINAL} is {tuple(original.shape)}; "
                "a mask has the shape of what it masks"
            )
        named[name] = original.detach() * mask.to(original.dtype)
        del named[name + _ORIGINAL], named[name + _MASK]
    return named
