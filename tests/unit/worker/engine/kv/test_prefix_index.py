"""One contract, two implementations: the Python twin, then the same tests over the C++ module."""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlx_serving.worker.engine.kv.prefix import index as twin
from mlx_serving.worker.engine.native import load_native

BLOCK = 4
SALTS = (b"", b"a", b"tenant b")

_native, _why_not = load_native()


def as_bytes(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def spelled(digits: Sequence[int]) -> bytes:
    """A block of tokens a digit."""
    return as_bytes([token for digit in digits for token in [digit] * BLOCK])


class TestTwin:
    """The contract; subclasses change the implementation only."""

    index_class: Any = twin.PrefixIndex

    def make(self, block_tokens: int = BLOCK) -> Any:
        return self.index_class(block_tokens)

    def find(self, index: Any, tokens: bytes, salt: bytes = b"") -> list[int]:
        """Whole blocks only."""
        blocks, known = index.match(salt, tokens)
        assert len(blocks) == -(-known // BLOCK)
        return list(blocks[: known // BLOCK])

    def test_a_prefix_is_found_as_far_as_it_is_known(self) -> None:
        index = self.make()
        assert index.insert(b"", spelled([1, 2, 3]), [10, 11, 12]) == [10, 11, 12]
        assert self.find(index, spelled([1, 2, 3]), b"") == [10, 11, 12]
        assert self.find(index, spelled([1, 2, 3, 4]), b"") == [10, 11, 12]
        assert self.find(index, spelled([1, 2, 9]), b"") == [10, 11]
        assert self.find(index, spelled([2, 3]), b"") == []
        assert self.find(index, b"", b"") == []
        assert (len(index), index.idle) == (3, 0)

    def test_only_full_blocks_are_taken_in(self) -> None:
        index = self.make()
        tokens = spelled([1, 2])
        assert index.insert(b"", tokens[:-4], [10, 11]) == [10]
        assert index.match(b"", tokens) == ([10], BLOCK)

    def test_the_first_tokens_of_a_block_are_found_too(self) -> None:
        index = self.make()
        tails = [(5, 5, 5, 5), (5, 6, 7, 8), (5, 6, 9, 9), (256, 1, 1, 1), (-1, 4, 4, 4)]
        for number, tail in enumerate(tails):
            index.insert(b"", spelled([1]) + as_bytes(tail), [10, 20 + number])
        for tokens, block, common in [
            ([5, 6, 7, 9], 21, 3),
            ([5, 6, 9], 22, 3),
            ([5, 5], 20, 2),
            ([256, 2, 1, 1], 23, 1),
            ([-1, 4], 24, 2),
        ]:
            found = index.match(b"", spelled([1]) + as_bytes(tokens))
            assert found == ([10, block], BLOCK + common)
        assert index.match(b"", spelled([1]) + as_bytes([0, 6, 7, 8])) == ([10], BLOCK)
        assert index.match(b"", as_bytes([1, 1, 2])) == ([10], 2)
        assert index.match(b"", as_bytes([1])[:3]) == ([], 0)

    def test_the_same_tokens_elsewhere_are_another_block(self) -> None:
        index = self.make()
        index.insert(b"", spelled([1, 7]), [10, 11])
        index.insert(b"", spelled([2, 7]), [20, 21])
        assert self.find(index, spelled([2, 7]), b"") == [20, 21]
        assert self.find(index, spelled([7]), b"") == []

    def test_a_salt_sees_its_own_blocks_only(self) -> None:
        index = self.make()
        index.insert(b"a", spelled([1, 2]), [10, 11])
        assert self.find(index, spelled([1, 2]), b"") == []
        assert self.find(index, spelled([1, 2]), b"b") == []
        index.insert(b"b", spelled([1]), [20])
        assert self.find(index, spelled([1, 2]), b"a") == [10, 11]
        assert self.find(index, spelled([1, 2]), b"b") == [20]

    def test_what_is_known_is_not_taken_in_twice(self) -> None:
        index = self.make()
        index.insert(b"", spelled([1]), [10])
        assert index.insert(b"", spelled([1, 2]), [10, 11]) == [11]
        assert index.insert(b"", spelled([1, 2]), [10, 11]) == []

    def test_insertion_ends_where_another_block_holds_the_prefix(self) -> None:
        index = self.make()
        index.insert(b"", spelled([1, 2]), [10, 11])
        assert index.insert(b"", spelled([1, 2, 3]), [10, 99, 98]) == []
        assert self.find(index, spelled([1, 2, 3]), b"") == [10, 11]

    @pytest.mark.parametrize(
        ("blocks", "message"),
        [([11, 10], "10 holds other tokens"), ([-1], "-1 holds"), ([3, 3], "given twice")],
    )
    def test_a_block_can_hold_one_prefix_only(self, blocks: list[int], message: str) -> None:
        index = self.make()
        index.insert(b"", spelled([1]), [10])
        with pytest.raises(ValueError, match=f"blocks: .*{message}|blocks: one is {message}"):
            index.insert(b"", spelled([5, 6]), blocks)
        assert self.find(index, spelled([5]), b"") == []
        index.check()

    def test_blocks_of_no_tokens_are_refused(self) -> None:
        with pytest.raises(ValueError, match="block_tokens: must be at least 1, not 0"):
            self.make(0)

    def test_the_least_recently_released_go_first_leaves_before_their_path(self) -> None:
        index = self.make()
        index.insert(b"", spelled([1, 2, 3]), [10, 11, 12])
        index.insert(b"", spelled([1, 5]), [10, 15])
        index.insert(b"", spelled([9]), [19])
        index.release([19])
        index.release([10, 11, 12])
        index.release([15])
        assert index.idle == 5
        assert index.evict(2) == [19, 12]
        assert self.find(index, spelled([1, 2, 3]), b"") == [10, 11]
        assert index.evict(10) == [11, 15, 10]
        assert (len(index), index.idle) == (0, 0)

    def test_what_is_held_stays(self) -> None:
        index = self.make()
        index.insert(b"", spelled([1, 2, 3]), [10, 11, 12])
        assert index.evict(3) == []
        index.release([10, 11, 12])
        index.hold([10, 11])
        index.hold([11])
        assert index.idle == 1
        assert index.evict(3) == [12]
        assert self.find(index, spelled([1, 2, 3]), b"") == [10, 11]

    def test_use_makes_a_block_recent(self) -> None:
        index = self.make()
        for block in (10, 20, 30):
            index.insert(b"", spelled([block]), [block])
            index.release([block])
        index.hold([10])
        index.release([10])
        assert index.evict(2) == [20, 30]

    def test_a_leaf_that_another_goes_on_from_is_evicted_after_it(self) -> None:
        index = self.make()
        index.insert(b"", spelled([1]), [10])
        index.release([10])
        index.insert(b"", spelled([1, 2]), [10, 11])
        assert index.evict(2) == []
        index.release([11])
        assert index.evict(2) == [11, 10]

    def test_unknown_blocks_are_ignored(self) -> None:
        index = self.make()
        index.hold([1])
        index.release([1])
        assert index.forget([1]) == []
        assert index.evict(1) == []
        assert index.evict(-1) == []
        assert (len(index), index.idle) == (0, 0)

    def test_a_path_is_forgotten_up_to_where_others_go_on(self) -> None:
        index = self.make()
        index.insert(b"", spelled([1, 2, 3]), [10, 11, 12])
        index.insert(b"", spelled([1, 5]), [10, 15])
        assert index.forget([10, 11, 12, 77]) == [12, 11]
        assert self.find(index, spelled([1, 2]), b"") == [10]
        assert index.blocks() == {10: True, 15: True}
        index.check()

    def test_blocks_can_be_renumbered(self) -> None:
        index = self.make()
        index.insert(b"", spelled([1, 2]), [10, 12])
        index.release([10, 12])
        with pytest.raises(ValueError, match="blocks: a known one is missing"):
            index.renumber([10, 11])
        index.renumber([10, 11, 12])
        assert self.find(index, spelled([1, 2]), b"") == [0, 2]
        index.check()
        assert index.evict(2) == [2, 0]

    def test_10_000_blocks_are_told_apart(self) -> None:
        index = self.make(32)
        chance = random.Random(0)
        tokens = as_bytes([chance.randrange(150_000) for _ in range(320_000)])
        blocks = list(range(10_000))
        chance.shuffle(blocks)
        assert index.insert(b"", tokens, blocks) == blocks
        assert index.match(b"", tokens) == (blocks, 320_000)
        index.check()
        index.release(blocks)
        assert index.evict(10_000) == blocks[::-1]

    def test_under_any_order_of_calls(self) -> None:
        machine: Any = type("Machine", (IndexMachine,), {"index_class": self.index_class})
        case = machine.TestCase
        case.settings = settings(
            max_examples=60, stateful_step_count=40, deadline=None, database=None
        )
        case().runTest()


@pytest.mark.skipif(_native is None, reason=f"mlx_serving._native: {_why_not}")
class TestNative(TestTwin):
    """The same contract over the C++ module."""

    index_class = _native and _native.PrefixIndex


@dataclass
class Model:
    """What the index must say: every path with its block, and who holds what since when."""

    paths: dict[tuple[bytes, tuple[int, ...]], int] = field(default_factory=dict)
    released: dict[int, int] = field(default_factory=dict)  # block -> when; held where absent
    clock: int = 0

    def match(self, salt: bytes, digits: tuple[int, ...]) -> list[int]:
        """All tokens of a block are the same here: a block is known whole or not at all."""
        found = []
        for end in range(1, len(digits) + 1):
            block = self.paths.get((salt, digits[:end]))
            if block is None:
                break
            found.append(block)
        return found

    def path_of(self, block: int) -> tuple[bytes, tuple[int, ...]]:
        return next(path for path, known in self.paths.items() if known == block)

    def is_leaf(self, block: int) -> bool:
        salt, digits = self.path_of(block)
        return not any(
            s == salt and d[: len(digits)] == digits and len(d) > len(digits) for s, d in self.paths
        )

    def evict(self, count: int) -> list[int]:
        evicted: list[int] = []
        while len(evicted) < count:
            leaves = [(when, block) for block, when in self.released.items() if self.is_leaf(block)]
            if not leaves:
                break
            _, block = min(leaves)
            del self.paths[self.path_of(block)], self.released[block]
            evicted.append(block)
        return evicted


PATHS = st.lists(st.integers(0, 2), min_size=0, max_size=5).map(tuple)


class IndexMachine(RuleBasedStateMachine):
    """Rows come with a path, hold it and let go of it, in any order, beside a plain model."""

    index_class: Any = twin.PrefixIndex

    def __init__(self) -> None:
        super().__init__()
        self.index = self.index_class(BLOCK)
        self.model = Model()
        self.rows: list[list[int]] = []
        self.next_block = 0

    @rule(salt=st.sampled_from(SALTS), digits=PATHS)
    def come(self, salt: bytes, digits: tuple[int, ...]) -> None:
        blocks, known = self.index.match(salt, spelled(digits))
        assert blocks == self.model.match(salt, digits)
        assert known == len(blocks) * BLOCK
        self.index.hold(blocks)
        for block in blocks:
            self.model.released.pop(block, None)
        fresh = list(range(self.next_block, self.next_block + len(digits) - len(blocks)))
        self.next_block += len(fresh)
        assert self.index.insert(salt, spelled(digits), blocks + fresh) == fresh
        for end, block in enumerate(blocks + fresh, start=1):
            self.model.paths[salt, digits[:end]] = block
        self.rows.append(blocks + fresh)

    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        if not self.rows:
            return
        gone = self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))
        still = {block for row in self.rows for block in row}
        free = [block for block in gone if block not in still]
        self.index.release(free)
        self.model.clock += 1
        self.model.released |= dict.fromkeys(free, self.model.clock)

    @rule(others=st.lists(st.integers(0, 60)))
    def renumber(self, others: list[int]) -> None:
        """As a pool does it: blocks that nothing knows here are among them."""
        known = set(self.model.paths.values())
        names = sorted(known | set(others))
        self.index.renumber(names)
        moved = {old: new for new, old in enumerate(names)}
        self.model.paths = {path: moved[block] for path, block in self.model.paths.items()}
        self.model.released = {moved[b]: when for b, when in self.model.released.items()}
        self.rows = [[moved[block] for block in row] for row in self.rows]
        self.next_block = len(names)

    @rule(count=st.integers(0, 6))
    def evict(self, count: int) -> None:
        assert self.index.evict(count) == self.model.evict(count)

    @invariant()
    def they_agree(self) -> None:
        self.index.check()
        assert len(self.index) == len(self.model.paths)
        assert self.index.idle == len(self.model.released)
        held = {block: block not in self.model.released for block in self.model.paths.values()}
        assert self.index.blocks() == held

    def teardown(self) -> None:
        """All idle blocks can be evicted, and nothing is left of a tree without blocks."""
        self.index.release(list(self.index.blocks()))
        assert len(self.index.evict(len(self.index))) == len(self.model.paths)
        assert len(self.index) == 0
        self.index.check()
