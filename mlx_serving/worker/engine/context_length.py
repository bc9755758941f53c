"""How many tokens a model's positions reach, read from its configuration."""

from collections.abc import Mapping
from typing import Any, Final

# By the first of these names that a configuration has; Llama's is the usual one.
NAMES: Final = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
    "seq_length", "model_max_length",
)  # fmt: skip
# With these the configuration already names the extended length.
EXTENDED_ALREADY: Final = ("default", "llama3", "longrope", "su", "mrope", "proportional")
EXTENDED_FAMILIES: Final = ("gemma3", "gemma4")  # their linear factor too


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens that prompt and answer may have together; None if it is not said.

    `config` is the content of `config.json`; a vision model's text part goes before the whole.
    Rope scaling counts as vLLM counts it: YaRN reaches `factor` times its original length, linear
    and dynamic scaling `factor` times the named one, and the other kinds the named one.
    """
    text = config.get("text_config")
    part = {**config, **text} if isinstance(text, Mapping) else config
    named = next((part[name] for name in NAMES if _is_length(part.get(name))), None)
    if named is None:
        return None
    scaling = part.get("rope_scaling") or part.get("rope_parameters")
    return _scaled(named, scaling, str(part.get("model_type", "")))


def _scaled(named: int, scaling: object, family: str) -> int:
    if not isinstance(scaling, Mapping) or family.startswith(EXTENDED_FAMILIES):
        return named
    kind, factor = scaling.get("rope_type", scaling.get("type", "default")), scaling.get("factor")
    if kind in EXTENDED_ALREADY or not isinstance(factor, int | float) or not factor > 1:
        return named
    original = scaling.get("original_max_position_embeddings")
    if kind == "yarn" and isinstance(original, int) and _is_length(original):
        return max(named, int(original * factor))
    return int(named * factor)


def _is_length(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 40
