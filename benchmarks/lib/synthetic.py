"""Models of a given shape with random weights: no download, the cost of the real thing."""

import json
import tempfile
from pathlib import Path
from typing import Any, Final, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama, qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.fused_layers import fuse
from mlx_serving.worker.engine.interface import ModelInfo
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.loader import EngineOptions, build_engine
from mlx_serving.worker.engine.model_runner import ModelRunner

TINY: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
# Qwen3-0.6B's own config.json.
QWEN3_06B: Final[dict[str, Any]] = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
# Qwen3-8B's own config.json.
QWEN3_8B: Final[dict[str, Any]] = QWEN3_06B | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12_288,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
SHAPES: Final = {"tiny": TINY, "0.6b": QWEN3_06B, "8b": QWEN3_8B}
_ARCHITECTURES: Final = {"qwen3": qwen3, "llama": llama}


def build_model(
    shape: str = "tiny",
    architecture: str = "qwen3",
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
    **overrides: Any,
) -> LanguageModel:
    """Return an mlx-lm model of a shape in `SHAPES`, weights drawn from `seed`."""
    module = _ARCHITECTURES[architecture]
    config = {"model_type": architecture, **SHAPES[shape], **overrides}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda weight: weight.astype(dtype), model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return cast("LanguageModel", model)


def build_served_model(
    shape: str = "tiny", architecture: str = "qwen3", dtype: mx.Dtype = mx.float32, seed: int = 0
) -> LanguageModel:
    """Return the same weights once more, as `load_engine` holds them.

    A benchmark's bare loop and peers run `build_model`'s, which the engine has not touched.
    """
    model = build_model(shape, architecture, dtype, seed)
    if mx.default_device() != mx.cpu:
        fuse(model)
        mx.eval(cast("Any", model).parameters())
    return model


def build_tokenizer(vocab_size: int = TINY["vocab_size"]) -> Tokenizer:
    """Return a byte-level tokenizer: every byte is a token, then <|end|>, then filler words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "<|end|>", *(f"w{n}" for n in range(vocab_size - len(alphabet) - 1))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def build_bare_engine(runner: ModelRunner, vocab_size: int, **options: Any) -> Engine:
    """Return an engine on `build_tokenizer`'s tokenizer, in which no token ends a sequence."""
    info = ModelInfo("synthetic", "r", "t", vocab_size, frozenset())
    return build_engine(runner, build_tokenizer(vocab_size), info, EngineOptions(**options))


def save_model(
    folder: Path,
    shape: str = "tiny",
    architecture: str = "qwen3",
    dtype: mx.Dtype = mx.float32,
    **overrides: Any,
) -> Path:
    """Write a model folder that `mlx_lm.load` and `load_engine` take."""
    model = cast("Any", build_model(shape, architecture, dtype, **overrides))
    config = {"model_type": architecture, **SHAPES[shape], **overrides, "eos_token_id": 256}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    build_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


if __name__ == "__main__":
    print(save_model(Path(tempfile.mkdtemp()) / "synthetic"))
