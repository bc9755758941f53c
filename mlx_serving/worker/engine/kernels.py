"""Source texts of the GPU kernels, in the dialect of this device. Imports mlx only when called.

The sources are in `native/kernels/`; an installed package has them as `mlx_serving/kernels/`.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal

Dialect = Literal["cuda", "metal"]

_INCLUDES: Final = re.compile(r"^#(pragma once|include .*)\n", re.MULTILINE)


def dialect() -> Dialect | None:
    """Return the dialect of kernels that MLX's default device can run; None on the CPU."""
    import mlx.core as mx

    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def folder() -> Path:
    """Return the folder of the sources: in the package, or in the tree of an editable install."""
    package = Path(__file__).parents[2]
    installed = package / "kernels"
    return installed if installed.is_dir() else package.parent / "native" / "kernels"


def read_source(room: str, *files: str) -> str:
    """Return the texts of these files of `native/kernels/<room>/`, one after the other.

    Raises:
        FileNotFoundError: this install has no such kernel.
    """
    text = "".join((folder() / room / file).read_text() for file in files)
    # MLX compiles one text: `files` are in the order in which they include each other.
    return _INCLUDES.sub("", text)


def make_kernel(
    name: str,
    arrays: tuple[Iterable[str], Iterable[str]],
    language: Dialect,
    *,
    source: str,
    header: str = "",
) -> Any:  # noqa: ANN401 - MLX's kernels are untyped callables
    """Return MLX's kernel of these texts; MLX compiles it on its first use.

    `arrays` names its inputs and its outputs.
    """
    import mlx.core as mx

    make = mx.fast.metal_kernel if language == "metal" else mx.fast.cuda_kernel
    inputs, outputs = arrays
    # MLX caches compiled CUDA kernels on disk by name: another text must have another name.
    digest = hashlib.sha256((header + source).encode()).hexdigest()[:16]
    return make(
        name=f"mlx_serving_{name}_{digest}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
    )
