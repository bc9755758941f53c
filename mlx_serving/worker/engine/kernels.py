"""The texts of the GPU kernels, in the dialect of this device. Imports mlx late.

The sources stand in `native/kernels/`; an installed package has them as `mlx_serving/kernels/`.
"""

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

Dialect = Literal["cuda", "metal"]

_SUFFIXES: dict[Dialect, str] = {"cuda": "cu", "metal": "metal"}


def dialect() -> Dialect | None:
    """Which kernels MLX's default device can run; None on the CPU."""
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def folder() -> Path:
    """Return where the sources are: in the package, or in the tree of an editable install."""
    package = Path(__file__).parents[2]
    installed = package / "kernels"
    return installed if installed.is_dir() else package.parent / "native" / "kernels"


@cache
def source(name: str, language: Dialect) -> str:
    """Return the text of the kernel `name`.

    Raises:
        FileNotFoundError: this install has no such kernel.
    """
    return (folder() / f"{name}.{_SUFFIXES[language]}").read_text()


def make_kernel(
    name: str, inputs: list[str], outputs: list[str], language: Dialect, header: str = ""
) -> Any:  # noqa: ANN401 - MLX's kernels are untyped callables
    """Return MLX's kernel of the text `name`; nothing is compiled before its first use."""
    import mlx.core as mx

    make = mx.fast.metal_kernel if language == "metal" else mx.fast.cuda_kernel
    texts = [source(header, language) if header else "", source(name, language)]
    # MLX keeps compiled CUDA kernels on disk by name: another text must have another name.
    digest = sha256("".join(texts).encode()).hexdigest()[:12]
    return make(
        name=f"mlx_serving_{name}_{digest}",
        input_names=inputs,
        output_names=outputs,
        header=texts[0],
        source=texts[1],
    )
