"""Chooses whether an engine has a prefix cache, and its index: native or the twin."""

import random
from array import array
from collections.abc import Callable
from typing import Any, Final

from mlx_serving.worker.engine.kv.prefix import index as twin
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.kv.prefix.index import PrefixIndexProtocol
from mlx_serving.worker.engine.native import SWITCHED_OFF, AccelerationReport, load_native

PREFIX_INDEX: Final = "prefix index"
PREFIX_CACHE: Final = "prefix cache"
# The part of the KV budget that idle prefixes may keep, unless the settings say otherwise.
DEFAULT_IDLE_FRACTION: Final = 0.5

MakeIndex = Callable[[int], PrefixIndexProtocol]


def make_prefix_cache(
    block_tokens: int, capacity_tokens: int, idle_tokens: int | None, *, prefer_native: bool
) -> tuple[PrefixCache | None, AccelerationReport]:
    """Return an engine's prefix cache, or None and why it has none.

    Args:
        block_tokens: the block size of the decode batch's cache; 0: it has no blocks.
        capacity_tokens: how many tokens that cache may hold.
        idle_tokens: how many tokens may be kept that no row uses; None: a part of the capacity;
            0: none, and no prefix is looked up.
        prefer_native: False: use the twin.
    """
    if not block_tokens:
        reason = "the KV cache keeps no blocks that could be shared; every prompt is computed"
        return None, AccelerationReport(PREFIX_CACHE, "off", reason)
    if idle_tokens == 0:
        return None, AccelerationReport(PREFIX_CACHE, "off", SWITCHED_OFF)
    if idle_tokens is None:
        idle_tokens = int(capacity_tokens * DEFAULT_IDLE_FRACTION)
    make, report = choose_prefix_index(prefer_native=prefer_native)
    blocks = capacity_tokens // block_tokens, idle_tokens // block_tokens
    return PrefixCache(make(block_tokens), block_tokens, *blocks), report


def choose_prefix_index(*, prefer_native: bool) -> tuple[MakeIndex, AccelerationReport]:
    """Return the implementation to use; takes some 5 ms, most of it the self-check."""
    make, reason = _try_native(prefer_native=prefer_native)
    if make is None:
        return twin.PrefixIndex, AccelerationReport(PREFIX_INDEX, "twin", reason)
    return make, AccelerationReport(PREFIX_INDEX, "native", reason)


def _try_native(*, prefer_native: bool) -> tuple[MakeIndex | None, str]:
    if not prefer_native:
        return None, SWITCHED_OFF
    native, reason = load_native()
    if native is None:
        return None, reason
    expected = _check_run(twin.PrefixIndex)
    try:
        make: MakeIndex = native.PrefixIndex
        got = _check_run(make)
    except Exception as error:  # noqa: BLE001 - after any error the twin is used
        difference = f"{type(error).__name__}: {error}"
        return None, f"the native piece failed its self-check: {difference}"
    if got != expected:
        return None, "the native piece failed its self-check: its blocks differ from the twin's"
    return make, "self-check passed"


_CHECK_STEPS: Final = 200
_CHECK_BLOCK_TOKENS: Final = 3  # not a multiple of eight bytes
_CHECK_DEPTH: Final = 6


def _check_run(make: MakeIndex) -> list[Any]:
    """Add and remove rows with random prefixes of two salts; return every answer of the index."""
    chance = random.Random(0)  # noqa: S311 - test data
    index = make(_CHECK_BLOCK_TOKENS)
    seen: list[Any] = []
    for step in range(_CHECK_STEPS):
        salt = chance.choice((b"", b"a"))
        size = _CHECK_BLOCK_TOKENS * chance.randrange(_CHECK_DEPTH)
        tokens = array("i", [chance.randrange(2) for _ in range(size)]).tobytes()
        found, known = index.match(salt, tokens)
        blocks = found[: known // _CHECK_BLOCK_TOKENS]
        index.hold(blocks)
        fresh = [step * _CHECK_DEPTH + n for n in range(size // _CHECK_BLOCK_TOKENS - len(blocks))]
        seen += [found, known, index.insert(salt, tokens, blocks + fresh)]
        index.check()
        index.release(blocks + fresh)
        seen += [index.evict(chance.randrange(4)), index.idle, len(index)]
    return seen
