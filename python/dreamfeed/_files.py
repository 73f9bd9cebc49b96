"""Files that appear whole or not at all, and what the daemon reads beside the weights."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` at the end of the block, and vanishes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        # Else the name may survive a power cut, and the content not.
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
