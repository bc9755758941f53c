"""An index of cached blocks by their tokens: the Python twin of `_native.PrefixIndex`.

A radix tree for each salt, whose digits are blocks of tokens: a node is a block of the cache, and
its path is all tokens from the start of a prompt to the block's end. Keys and values depend on
every token before them, so a block is found by its whole path and never by its tokens alone.

Blocks that a row holds are never evicted. A row that holds a block holds the path to it, so the
blocks that no row holds are whole subtrees, which can be evicted leaf by leaf.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final, NamedTuple, Protocol

TOKEN_BYTES: Final = 4


class PrefixKey(NamedTuple):
    """The key of a prefix: the salt of its requests, and its tokens as native int32s."""

    salt: bytes
    tokens: bytes


class PrefixIndexProtocol(Protocol):
    """Blocks by their tokens. Only one thread may call it."""

    @property
    def idle(self) -> int:
        """Blocks that no row holds: all of them can be evicted."""

    def __len__(self) -> int:
        """Return the number of blocks."""

    def match(self, salt: bytes, tokens: bytes) -> tuple[list[int], int]:
        """Return the blocks of the longest indexed prefix, in order, and its number of tokens.

        `tokens` are native int32s. Of the last block, maybe only the first tokens are the prefix's,
        if `tokens` end or differ within it. Changes nothing.
        """

    def insert(self, salt: bytes, tokens: bytes, blocks: Sequence[int]) -> list[int]:
        """Enter the blocks of a prefix, in order; return those that are new, which count as held.

        Stops at the end of the tokens or the blocks, or if another block has the same prefix.

        Raises:
            ValueError: a block is indexed by other tokens; nothing is changed then.
        """

    def hold(self, blocks: Sequence[int]) -> None:
        """Protect these blocks from eviction. Unknown blocks are ignored."""

    def release(self, blocks: Sequence[int]) -> None:
        """Note that no row uses these blocks from now on. Unknown blocks are ignored."""

    def evict(self, count: int) -> list[int]:
        """Remove up to `count` idle blocks, the least recently released first; return them."""

    def forget(self, blocks: Sequence[int]) -> list[int]:
        """Remove a path's blocks from its end up to the first with other children; return them."""

    def renumber(self, blocks: Sequence[int]) -> None:
        """Rename block `blocks[n]` to n. `blocks` are in rising order and hold every indexed one.

        Raises:
            ValueError: an indexed block is missing; nothing is changed then.
        """

    def blocks(self) -> dict[int, bool]:
        """Return every block, and whether a row holds it."""

    def check(self) -> None:
        """Check every block.

        Raises:
            RuntimeError: the index contradicts itself.
        """


@dataclass(slots=True, eq=False)
class _Node:
    block: int  # -1: a root
    parent: "_Node | None" = None
    digit: bytes = b""  # the block's tokens; a root's salt
    children: "dict[bytes, _Node]" = field(default_factory=dict)
    order: list[bytes] = field(default_factory=list)  # of the children's digits
    held: bool = True
    released_at: int = 0


class PrefixIndex:
    """See `PrefixIndexProtocol`."""

    def __init__(self, block_tokens: int) -> None:
        """Start empty.

        Raises:
            ValueError: blocks of no tokens.
        """
        if block_tokens < 1:
            message = f"block_tokens: must be at least 1, not {block_tokens}"
            raise ValueError(message)
        self._block_bytes = block_tokens * TOKEN_BYTES
        self._roots: dict[bytes, _Node] = {}
        self._nodes: dict[int, _Node] = {}
        self._idle = 0
        self._clock = 0
        # Idle leaves, and former ones: (released_at, block).
        self._leaves: list[tuple[int, int]] = []

    @property
    def idle(self) -> int:
        """See `PrefixIndexProtocol.idle`."""
        return self._idle

    def __len__(self) -> int:
        """See `PrefixIndexProtocol`."""
        return len(self._nodes)

    def match(self, salt: bytes, tokens: bytes) -> tuple[list[int], int]:
        """See `PrefixIndexProtocol.match`."""
        found: list[int] = []
        node = self._roots.get(salt)
        if node is None:
            return found, 0
        for digit in self._digits(tokens):
            child = node.children.get(digit)
            if child is None:
                break
            found.append(child.block)
            node = child
        known = len(found) * self._block_bytes
        rest = tokens[known : known + self._block_bytes]
        nearest, common = _nearest(node, rest)
        if nearest is not None:
            found.append(nearest.block)
        return found, known // TOKEN_BYTES + common

    def insert(self, salt: bytes, tokens: bytes, blocks: Sequence[int]) -> list[int]:
        """See `PrefixIndexProtocol.insert`."""
        root = node = self._roots.get(salt) or _Node(-1, digit=salt)
        path = list(zip(self._digits(tokens), blocks, strict=False))
        known = 0
        for digit, block in path:
            child = node.children.get(digit)
            if child is None:
                break
            if child.block != block:
                return []
            node, known = child, known + 1
        new = [block for _, block in path[known:]]
        self._require_unknown(new)
        for digit, block in path[known:]:
            child = node.children[digit] = self._nodes[block] = _Node(block, node, digit)
            insort(node.order, digit)
            node = child
        if new:
            self._roots[salt] = root
        return new

    def _require_unknown(self, blocks: list[int]) -> None:
        for block in blocks:
            if block < 0 or block in self._nodes:
                message = f"blocks: {block} holds other tokens"
                raise ValueError(message)
        if len(set(blocks)) < len(blocks):
            message = "blocks: one is given twice"
            raise ValueError(message)

    def hold(self, blocks: Sequence[int]) -> None:
        """See `PrefixIndexProtocol.hold`."""
        for block in blocks:
            node = self._nodes.get(block)
            if node is not None and not node.held:
                node.held = True
                self._idle -= 1

    def release(self, blocks: Sequence[int]) -> None:
        """See `PrefixIndexProtocol.release`."""
        self._clock += 1
        for block in blocks:
            node = self._nodes.get(block)
            if node is not None and node.held:
                node.held, node.released_at = False, self._clock
                self._idle += 1
                self._note(node)

    def evict(self, count: int) -> list[int]:
        """See `PrefixIndexProtocol.evict`."""
        evicted: list[int] = []
        while self._leaves and len(evicted) < count:
            released_at, block = heappop(self._leaves)
            node = self._nodes.get(block)
            if node is not None and node.released_at == released_at and _is_idle_leaf(node):
                self._remove(node)
                evicted.append(block)
        return evicted

    def forget(self, blocks: Sequence[int]) -> list[int]:
        """See `PrefixIndexProtocol.forget`."""
        gone = []
        for block in reversed(blocks):
            node = self._nodes.get(block)
            if node is not None:
                if node.children:
                    break
                self._remove(node)
                gone.append(block)
        return gone

    def renumber(self, blocks: Sequence[int]) -> None:
        """See `PrefixIndexProtocol.renumber`."""
        known = [(new, node) for new, old in enumerate(blocks) if (node := self._nodes.get(old))]
        if len(known) < len(self._nodes):
            message = "blocks: a known one is missing"
            raise ValueError(message)
        self._nodes = dict(known)
        for new, node in known:
            node.block = new
        self._gather_leaves()

    def blocks(self) -> dict[int, bool]:
        """See `PrefixIndexProtocol.blocks`."""
        return {block: node.held for block, node in self._nodes.items()}

    def check(self) -> None:
        """See `PrefixIndexProtocol.check`."""
        reached = [node for root in self._roots.values() for node in _below(root)]
        leaves = set(self._leaves)
        problems = [
            (len(reached) != len(self._nodes), "a block is lost"),
            (any(self._nodes.get(n.block) is not n for n in reached), "a block is known twice"),
            (any(n.order != sorted(n.children) for n in reached), "children are out of order"),
            (any(not root.children for root in self._roots.values()), "an empty tree is kept"),
            (sum(not n.held for n in reached) != self._idle, "the idle blocks are miscounted"),
            (any(map(_hangs, reached)), "a block is held and its path is not"),
            (
                any(_is_idle_leaf(n) and (n.released_at, n.block) not in leaves for n in reached),
                "an idle block can't be evicted",
            ),
        ]
        for wrong, problem in problems:
            if wrong:
                raise RuntimeError(problem)

    def _digits(self, tokens: bytes) -> Iterator[bytes]:
        size = self._block_bytes
        for start in range(0, len(tokens) - size + 1, size):
            yield tokens[start : start + size]

    def _note(self, node: _Node) -> None:
        if _is_idle_leaf(node):
            heappush(self._leaves, (node.released_at, node.block))
            if len(self._leaves) > 2 * len(self._nodes):
                self._gather_leaves()

    def _gather_leaves(self) -> None:
        leaves = filter(_is_idle_leaf, self._nodes.values())
        self._leaves = sorted((node.released_at, node.block) for node in leaves)  # a heap too

    def _remove(self, node: _Node) -> None:
        parent = node.parent
        assert parent is not None  # noqa: S101 - roots have no block
        del self._nodes[node.block], parent.children[node.digit]
        del parent.order[bisect_left(parent.order, node.digit)]
        self._idle -= not node.held
        if parent.block >= 0:
            self._note(parent)
        elif not parent.children:
            del self._roots[parent.digit]


def _nearest(node: _Node, tokens: bytes) -> tuple[_Node | None, int]:
    """Return the child with the longest common beginning with these tokens, and its length."""
    at = bisect_left(node.order, tokens)
    best, most = None, 0
    # In order, the nearest is one of two neighbours.
    for digit in node.order[max(0, at - 1) : at + 1][::-1]:
        common = _common_tokens(digit, tokens)
        if common > most:
            best, most = node.children[digit], common
    return best, most


def _common_tokens(one: bytes, other: bytes) -> int:
    size = min(len(one), len(other)) // TOKEN_BYTES
    places = range(0, size * TOKEN_BYTES, TOKEN_BYTES)
    differing = (n for n in places if one[n : n + TOKEN_BYTES] != other[n : n + TOKEN_BYTES])
    return next(differing, size * TOKEN_BYTES) // TOKEN_BYTES


def _is_idle_leaf(node: _Node) -> bool:
    return not node.held and not node.children and node.block >= 0


def _hangs(node: _Node) -> bool:
    parent = node.parent
    return node.held and parent is not None and parent.block >= 0 and not parent.held


def _below(root: _Node) -> Iterator[_Node]:
    waiting = [root]
    while waiting:
        children = list(waiting.pop().children.values())
        waiting += children
        yield from children
