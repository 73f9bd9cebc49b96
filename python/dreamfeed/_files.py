"""Files that appear whole or not at all, and what the daemon reads beside the weights."""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` at the end of the block, and vanishes on an error.

    A symbolic link stays, and what it points to is replaced. A device or a pipe is never replaced: it gets the bytes.

    Raises:
        OSError: it cannot be written; the sentence names it.
    """
    kind = _kind(path)
    if kind is None or stat.S_ISREG(kind):
        with _renamed(Path(os.path.realpath(path))) as partial:
            yield partial
        return
    _refuse_what_takes_no_bytes(path, kind)
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder) / "bytes"
        yield partial
        # Without waiting for a reader: a pipe that has none is an error, not a process that stands still.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        with partial.open("rb") as source, open(descriptor, "wb") as target:
            shutil.copyfileobj(source, target)


def _kind(path: Path) -> int | None:
    """What is there, behind links; None = nothing."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _refuse_what_takes_no_bytes(path: Path, kind: int) -> None:
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file", str(path))
    if not (stat.S_ISCHR(kind) or stat.S_ISFIFO(kind)):
        raise OSError(errno.EINVAL, "it is neither a file nor a pipe; name a file", str(path))


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process in its name: two that write the same file do not write into each other's.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        # Else the name may survive a power cut, and the content not.
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def metadata(
    arch: str,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: tuple[int, int],
    class_names: Sequence[str],
) -> dict[str, str]:
    """The metadata of a safetensors file of weights."""
    described = {
        "arch": arch,
        "mean": ",".join(f"{value:.9g}" for value in mean),
        "std": ",".join(f"{value:.9g}" for value in std),
        "image_size": f"{image_size[0]},{image_size[1]}",
    }
    if class_names:
        described["class_names"] = json.dumps(list(class_names))
    return described
