"""Greedy tokens in float32 are mlx-lm's own, for each architecture family, alone and in a batch.

A row may part from mlx-lm only at a near-tie: where the two likeliest tokens are less than 1e-4
apart in log probability. Each such row is counted and shown (`pytest -s`).
"""

from __future__ import annotations

import pytest

from mlx_serving.worker.engine.fused_layers import fuse
from mlx_serving.worker.engine.kv.padded import UnsupportedModelError
from tests.support.engine_support import checked_choice, drive, tiny_engine
from tests.support.families_on_device import CHUNK, near_ties, requests
from tests.support.figures import show
from tests.support.model_families import FAMILIES, FORGETFUL, REFUSED, VOCABULARY, build, by_mlx_lm


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
    paged = bool(checked_choice(model).block_tokens)
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
