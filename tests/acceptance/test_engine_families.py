"""Greedy tokens in float32 are mlx-lm's own, for each architecture family, alone and in a batch.

A row may part from mlx-lm only at a near-tie: where the two likeliest tokens are less than 1e-4
apart in log probability. Each such row is counted and shown (`pytest -s`).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import pytest

from mlx_serving.worker.engine.cache_choice import paged_choice
from mlx_serving.worker.engine.fused_layers import fuse
from mlx_serving.worker.engine.kv_cache import UnsupportedModelError
from mlx_serving.worker.engine.paged.reference import ReferenceOps
from mlx_serving.worker.engine.sequence import Request
from tests.engine_support import GREEDY, Collected, drive, tiny_engine
from tests.figures import show
from tests.model_families import (
    FAMILIES,
    FORGETFUL,
    REFUSED,
    VOCABULARY,
    Reference,
    build,
    by_mlx_lm,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

NEAR_TIE: Final = 1e-4
CHUNK: Final = 32  # tokens; prompts of the tests take up to four chunks
# Prompt and completion lengths: rows that join and leave at different steps, one of one token,
# some that outgrow the sliding window by prompt, some while they decode.
LENGTHS: Final = [(1, 12), (5, 26), (20, 8), (33, 5), (70, 14), (120, 9)]


def requests() -> list[Request]:
    chance = random.Random(7)
    return [
        Request(f"{length}+{tokens}", tuple(chance.choices(range(VOCABULARY), k=length)), GREEDY,
                tokens)
        for length, tokens in LENGTHS
    ]  # fmt: skip


def near_ties(rows: Mapping[str, Collected], expected: Mapping[str, Reference]) -> list[str]:
    """Compare rows; return those that part at a near-tie, fail on any that parts elsewhere."""
    parted = []
    for name, reference in expected.items():
        tokens = rows[name].token_ids
        if tokens == reference.tokens:
            continue
        assert len(tokens) == len(reference.tokens), name
        first = next(
            index
            for index, pair in enumerate(zip(tokens, reference.tokens, strict=True))
            if len(set(pair)) > 1
        )
        gap = reference.gaps[first]
        assert gap < NEAR_TIE, f"{name}: token {first} differs where the gap is {gap:.2g}"
        parted.append(f"{name} at token {first}, gap {gap:.1e}")
    return parted


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_mlx_lms_own(family: str) -> None:
    model = build(family, FAMILIES[family])
    asked = requests()
    expected = {r.id: by_mlx_lm(model, r.prompt, r.max_tokens) for r in asked}
    alone = drive(tiny_engine(model, rows=1, chunk=CHUNK, eos=()), asked)
    together = drive(tiny_engine(model, rows=4, chunk=CHUNK, eos=()), asked, every=2)
    parted = [f"alone: {row}" for row in near_ties(alone, expected)]
    parted += [f"in a batch: {row}" for row in near_ties(together, expected)]
    fuse(model)
    paged = bool(paged_choice(model, ReferenceOps()).block_tokens)
    as_on_gpu = tiny_engine(model, rows=4, chunk=CHUNK, eos=(), paged=paged)
    kind = "paged" if paged else "mlx-lm's caches"
    parted += [
        f"fused layers, {kind}: {row}"
        for row in near_ties(drive(as_on_gpu, asked, every=2), expected)
    ]
    show(f"{family} ({kind}): {len(parted)} of {3 * len(asked)} rows part at a near-tie {parted}")
    assert len(parted) <= len(asked), "near-ties are rare"


@pytest.mark.parametrize("family", FAMILIES)
def test_these_models_tell_a_wrong_cache(family: str) -> None:
    """The comparison above says something: a token back in the prompt changes what follows."""
    model = build(family, FAMILIES[family])
    prompt = requests()[2].prompt
    place = len(prompt) - (3 if family in FORGETFUL else 16)
    changed = (*prompt[:place], (prompt[place] + 1) % VOCABULARY, *prompt[place + 1 :])
    assert by_mlx_lm(model, prompt, 8).tokens != by_mlx_lm(model, changed, 8).tokens


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_can_not_be_batched_is_refused_by_name(family: str) -> None:
    reason, config = REFUSED[family]
    with pytest.raises(UnsupportedModelError, match=reason):
        tiny_engine(build(family, config))
