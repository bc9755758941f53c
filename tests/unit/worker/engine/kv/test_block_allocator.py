"""Blocks under any order of allocating, sharing, freeing and renumbering."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlx_serving.worker.engine.kv.paged.block_allocator import BlockAllocator, OutOfBlocksError

LIMIT = 24


class AllocatorMachine(RuleBasedStateMachine):
    """Compares with a plain list of owners, each with the blocks that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(LIMIT)
        self.owners: list[list[int]] = []

    @property
    def in_use(self) -> set[int]:
        return {block for blocks in self.owners for block in blocks}

    @rule(count=st.integers(0, 10))
    def allocate(self, count: int) -> None:
        before = self.in_use
        if not self.allocator.can_allocate(count):
            assert len(before) + count > LIMIT
            with pytest.raises(OutOfBlocksError, match=f"{count} blocks wanted"):
                self.allocator.allocate(count)
            return
        blocks = self.allocator.allocate(count)
        assert len(set(blocks)) == count, "no block is given twice"
        assert not before & set(blocks), "no block in use is given"
        unused = [block for block in range(LIMIT) if block not in before]
        assert sorted(blocks) == unused[:count], "the lowest free blocks come first"
        self.owners.append(blocks)

    @precondition(lambda self: bool(self.owners))
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.owners))
        self.allocator.share(blocks)
        self.owners.append(list(blocks))

    @precondition(lambda self: bool(self.owners))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.owners) - 1))
        self.allocator.free(self.owners.pop(index))

    @rule()
    def compact(self) -> None:
        moved = self.allocator.compact()
        assert list(moved) == sorted(self.in_use)
        assert list(moved.values()) == list(range(len(moved)))
        self.owners = [[moved[block] for block in blocks] for blocks in self.owners]
        assert self.allocator.extent == self.allocator.used

    @invariant()
    def counts_agree(self) -> None:
        assert self.allocator.used == len(self.in_use) <= LIMIT
        assert self.allocator.extent <= LIMIT
        assert self.allocator.extent > max(self.in_use, default=-1)
        for block in range(LIMIT):
            assert self.allocator.owners(block) == sum(block in held for held in self.owners)

    def teardown(self) -> None:
        """Nothing is lost: what every owner frees is all there is."""
        for blocks in self.owners:
            self.allocator.free(blocks)
        assert (self.allocator.used, self.allocator.extent) == (0, 0)
        assert sorted(self.allocator.allocate(LIMIT)) == list(range(LIMIT))


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("method", ["free", "share"])
def test_a_block_that_is_not_in_use_is_an_error(method: str) -> None:
    allocator = BlockAllocator(4)
    allocator.free(allocator.allocate(2))
    with pytest.raises(KeyError):
        getattr(allocator, method)([0])
