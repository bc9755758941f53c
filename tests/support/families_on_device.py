"""Greedy tokens beside mlx-lm's own on whatever device MLX computes on, family by family.

    python -m tests.support.families_on_device llama mistral qwen3_moe

`tests/acceptance/test_engine_families.py` does the same on the CPU, under pytest. Here the engine
has what it would have in a worker: the device's kernels, where they pass their self-check. A row
may part from mlx-lm only at a near-tie. On NVIDIA set `MLX_ENABLE_TF32=0`: with it, MLX multiplies
float32 matrices in 10 bits of mantissa.
"""

from __future__ import annotations

import random
import sys
import time
from typing import TYPE_CHECKING, Final

from mlx_serving.worker.engine.fused_layers import fuse
from mlx_serving.worker.engine.interface import Request
from mlx_serving.worker.engine.kv.choice import PAGED_CACHE
from tests.support.engine_support import GREEDY, Collected, drive, tiny_engine
from tests.support.figures import show
from tests.support.model_families import FAMILIES, VOCABULARY, Reference, build, by_mlx_lm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NEAR_TIE: Final = 1e-4  # between the two likeliest tokens, in log probability
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


def compare(family: str) -> str:
    """Compare one family's rows, alone and in a batch with churn; the result in words.

    Raises:
        AssertionError: a row parts where there is no near-tie.
    """
    model = build(family, FAMILIES[family])
    asked = requests()
    expected = {r.id: by_mlx_lm(model, r.prompt, r.max_tokens) for r in asked}
    fuse(model)
    engine = tiny_engine(model, rows=4, chunk=CHUNK, eos=())
    parted = [f"alone: {row}" for one in asked
              for row in near_ties(drive(engine, [one]), {one.id: expected[one.id]})]  # fmt: skip
    parted += [f"in a batch: {row}" for row in near_ties(drive(engine, asked, every=2), expected)]
    cache = next((str(r) for r in engine.acceleration if r.piece == PAGED_CACHE), "padded KV cache")
    return f"{len(parted)} of {2 * len(asked)} rows part at a near-tie {parted}; {cache}"


def main(families: Sequence[str]) -> None:
    """Print a line a family; end with status 1 where a row parts elsewhere."""
    failed = False
    for family in families or FAMILIES:
        started = time.perf_counter()
        try:
            found = compare(family)
        except AssertionError as error:
            failed, found = True, f"FAILED: {error}"
        show(f"{time.perf_counter() - started:5.1f} s  {family}: {found}")
        sys.stdout.flush()
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
