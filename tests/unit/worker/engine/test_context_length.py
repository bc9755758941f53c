"""The context length that published configurations mean (the fields that count, as published)."""

from typing import Any

import pytest

from mlx_serving.worker.engine.context_length import context_length

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CONFIGS: list[tuple[str, dict[str, Any], int | None]] = [
    ("SmolLM2-135M", {"max_position_embeddings": 8192, "rope_scaling": None}, 8192),
    ("Qwen3-8B", {"max_position_embeddings": 40960}, 40960),
    ("Qwen2.5 with YaRN", {"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
    ("Llama 3.2", {"max_position_embeddings": 131072,
                   "rope_scaling": {"rope_type": "llama3", "factor": 32.0,
                                    "original_max_position_embeddings": 8192}}, 131072),
    ("Phi-3.5", {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
                 "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, 131072),
    ("gpt-oss", {"max_position_embeddings": 131072,
                 "rope_scaling": {"rope_type": "yarn", "factor": 32.0,
                                  "original_max_position_embeddings": 4096}}, 131072),
    ("DeepSeek-V3", {"max_position_embeddings": 163840,
                     "rope_scaling": {"type": "yarn", "factor": 40,
                                      "original_max_position_embeddings": 4096}}, 163840),
    ("Gemma-3-4B", {"model_type": "gemma3", "text_config": {
        "model_type": "gemma3_text", "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}}, 131072),
    ("Vicuna 16k", {"max_position_embeddings": 4096,
                    "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
    ("rope_parameters", {"max_position_embeddings": 32768, "rope_parameters": YARN}, 131072),
    ("GPT-2", {"n_positions": 1024, "n_ctx": 1024}, 1024),
    ("a text part's own", {"max_position_embeddings": 77,
                           "text_config": {"max_position_embeddings": 32768}}, 32768),
    ("Mamba", {"state_size": 16}, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "expected"), CONFIGS, ids=[c[0] for c in CONFIGS])
def test_the_length_of_a_published_configuration(
    name: str, config: dict[str, Any], expected: int | None
) -> None:
    assert context_length(config) == expected, name


@pytest.mark.parametrize("odd", ["8192", -1, 0, True, 1e9, None, [], 1 << 50])
def test_what_is_no_length_is_not_taken_for_one(odd: object) -> None:
    assert context_length({"max_position_embeddings": odd}) is None
    assert context_length({"max_position_embeddings": odd, "n_positions": 512}) == 512


@pytest.mark.parametrize("scaling", [[], "yarn", {"type": "yarn", "factor": "4"}, {"factor": 8},
                                     {"type": "yarn", "factor": float("nan")}])  # fmt: skip
def test_odd_scaling_changes_nothing(scaling: object) -> None:
    config = {"max_position_embeddings": 4096, "rope_scaling": scaling}
    assert context_length(config) == 4096
