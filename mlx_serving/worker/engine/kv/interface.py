"""What the model runner needs of the decode batch's KV cache.

`padded_cache.PaddedCache` keeps mlx-lm's batch caches: layers of any kind, every row padded to the
longest, all copied when rows join or leave. `paged.cache.PagedCache` keeps rows in blocks, for
plain attention layers: its time and memory follow the rows' tokens, and it copies only prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.kv.prefix.index import PrefixKey


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompts that were computed, and the rows that continue from them.

    `layers` are what `new_prompts` of the same cache returned. `lengths`: the tokens of each
    prompt. `prompts`: for each row that joins, the index of its prompt. `keys`: the keys of the
    prompts in the prefix cache; blocks that it has already are not stored again.
    """

    layers: list[Any]
    lengths: Sequence[int]
    prompts: Sequence[int]
    keys: Sequence[PrefixKey] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row's context that a decode step is to compute; `key` is its key in the prefix cache.

    Its first `cached_tokens` are in `cached_blocks` of the prefix cache.
    """

    context: list[int]
    key: PrefixKey
    cached_tokens: int = 0
    cached_blocks: Sequence[int] = ()


@dataclass(eq=False, slots=True)
class ParkedRow:
    """A row of `length` tokens outside the batch; only the cache that made it can use it.

    `state`: one plain cache for each layer, or the ids of the row's blocks.
    """

    state: list[Any]
    length: int


class DecodeCache(Protocol):
    """The KV cache of all rows that decode, in the batch's order."""

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, unused places included."""

    def limit(self, tokens: int) -> None:
        """Set the most tokens that the cache may hold; the scheduler admits no more."""

    def shrink(self) -> None:
        """Give back memory that no row and no cached prefix uses."""

    def reset(self) -> None:
        """Drop every row and every cached prefix, also after a failed step."""

    def new_prompts(self, prompts: int) -> list[Any]:
        """Return the caches, one for each layer, into which the model computes so many prompts."""

    def forward_prompts(self, contexts: list[list[int]], layers: list[Any]) -> None:
        """Build the computation of the prompts' next tokens into `layers` of `new_prompts`."""

    def join(self, prefilled: Prefilled) -> None:
        """Append rows; after an error, the other rows are unchanged."""

    def keep(self, kept: Sequence[int]) -> None:
        """Keep only these rows, in this order. A step with all of them may be running."""

    def step(self, tokens: mx.array) -> mx.array:
        """Build the model's step on one token a row, int32 [B]; returns logits [B, V]."""

    def settle(self) -> None:
        """Note that every step launched before the last call of `keep` is done."""

    def remember(self, row: int, key: PrefixKey | None) -> None:
        """Before a row leaves: cache its prefix by this key; None: drop what it alone used."""

    def park(self, row: int) -> ParkedRow:
        """Set a row aside; the next call is `keep`, without that row. No step may be running."""

    def resume(self, parked: ParkedRow) -> None:
        """Append a row that was set aside."""

    def release(self, parked: ParkedRow, key: PrefixKey | None) -> None:
        """Drop a row that was set aside; for `key` see `remember`."""


@runtime_checkable
class BlockCache(DecodeCache, Protocol):
    """A cache of blocks: rows share cached prefixes, and a decode step can compute prompts."""

    def use_prefixes(self, prefixes: PrefixCache) -> None:
        """Allocate blocks from `prefixes`, and cache the prefixes of rows there."""

    def gather(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
        """Do as `new_prompts`, with the first `tokens` of each prompt copied from its blocks."""

    def enter(self, prompts: Sequence[Prompt]) -> None:
        """Append a row for each prompt; the next step computes them beside its own tokens.

        After an error, the other rows are unchanged.
        """
