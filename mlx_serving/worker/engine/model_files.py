"""Checks a model folder before it is loaded, and identifies model and tokenizer. Needs no mlx.

Only safetensors weights and mlx-lm's own architectures are loaded: nothing in the folder is ever
imported or unpickled (mlx-lm CVE-2026-5843: remote code named by a config). Folders downloaded
from a hub are checked too.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, BinaryIO, Final

_REVISION_DIGITS: Final = 16
_HEADER_BYTES_MAX: Final = 100_000_000  # as in the safetensors library
_SAMPLED_BLOCKS: Final = 64
_TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip
_SAMPLED_BLOCK_BYTES: Final = 1 << 16
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npy", "*.npz")
_CODE_KEYS: Final = ("auto_map", "model_file", "custom_pipelines")
# mlx-lm imports its own modules by these names; a dot would lead to others.
_MODULE_KEYS: Final = ("model_type", "chat_template_type", "tool_parser_type")
_MODULE_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")


class ModelFilesError(ValueError):
    """The model folder is incomplete, or has something in it that is never loaded."""


def check_model_files(path: Path) -> None:
    """Refuse a folder that can't be loaded safely.

    Raises:
        ModelFilesError: a part is missing, weights are not safetensors, or a config names code.
    """
    if not path.is_dir():
        message = (
            f"model path: {path} is not a folder on this machine (nothing is downloaded here; "
            "organisation/name@commit names a model of a hub)"
        )
        raise ModelFilesError(message)
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            message = f"{name}: missing in {path}"
            raise ModelFilesError(message)
    _refuse_escapes(path)
    for name in ("config.json", "tokenizer_config.json"):
        if (path / name).is_file():
            _refuse_code(name, read_json(path / name))
    _require_safetensors(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelFilesError: the file is anything else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        message = f"{path.name}: is not a JSON object"
        raise ModelFilesError(message)
    return data


def model_revision(path: Path) -> str:
    """Identify config and weights: 16 hex digits.

    Reads each weight file's header and blocks spread evenly over it, never all of a large file:
    fine-tunes of one model differ everywhere, and a start must not read 100 GB twice.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in weight_files(path):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            digest.update(_header(stream, file))
            _sample(stream, file.stat().st_size, digest.update)
    return digest.hexdigest()[:_REVISION_DIGITS]


def tokenizer_hash(path: Path) -> str:
    """Identify the files that tokenize a job and name its end tokens: 16 hex digits.

    Another chat template gives another prompt: no other completion may continue with it.
    """
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (path / name).is_file():
            content = (path / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:_REVISION_DIGITS]


def weight_files(path: Path) -> list[Path]:
    """Return the files that mlx-lm loads, by name."""
    return sorted(path.glob("model*.safetensors"))


def weight_bytes(path: Path) -> int:
    """Return the size of the files that mlx-lm loads, which is that of the weights in memory."""
    return sum(file.stat().st_size for file in weight_files(path))


def _refuse_escapes(path: Path) -> None:
    """Refuse links out of the folder: a model that was unpacked here could name any file.

    In the hub's cache, files are links into the same model's `blobs`, beside its `snapshots`.
    """
    root = path.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    for file in sorted(path.iterdir()):
        if not file.resolve().is_relative_to(root):
            message = f"{file.name}: links to a file outside of {root}"
            raise ModelFilesError(message)


def _require_safetensors(path: Path) -> None:
    files = weight_files(path)
    if not files:
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        found = f"; {pickles[0]} is not loaded, it could run code" if pickles else ""
        message = f"weights: no model*.safetensors in {path}{found}"
        raise ModelFilesError(message)
    for file in files:
        with file.open("rb") as stream:
            _header(stream, file)


def _header(stream: BinaryIO, file: Path) -> bytes:
    """Read the JSON header: 8 bytes of length, little endian, then the JSON."""
    length = int.from_bytes(stream.read(8), "little")
    if length > min(_HEADER_BYTES_MAX, file.stat().st_size - 8):
        message = f"weights: {file.name} is not a safetensors file"
        raise ModelFilesError(message)
    return stream.read(length)


def _sample(stream: BinaryIO, size: int, update: Any) -> None:  # noqa: ANN401 - hashlib's own type
    stride = max(size // _SAMPLED_BLOCKS, _SAMPLED_BLOCK_BYTES)
    for offset in range(0, size, stride):
        stream.seek(offset)
        update(stream.read(_SAMPLED_BLOCK_BYTES))


def _refuse_code(name: str, config: dict[str, Any]) -> None:
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        for key in _CODE_KEYS:
            if part.get(key):
                message = f"{name}: {key} names code to run, which is never loaded"
                raise ModelFilesError(message)
        for key in _MODULE_KEYS:
            value = part.get(key)
            if value is not None and not _MODULE_NAME.fullmatch(str(value)):
                message = f"{name}: {key} is not a plain name"
                raise ModelFilesError(message)
