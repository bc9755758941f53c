"""What one forward pass of prefill computes."""

from dataclasses import dataclass

from mlx_serving.common.job.schema import Lane
from mlx_serving.worker.engine.sequence import Sequence

Group = tuple[Sequence, ...]  # rows with one context, never empty


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One forward pass of prefill: tokens [start, start + length) of what each group must compute.

    That is its context after what was `found` of it in the prefix cache, which is as much in each
    group of a chunk. Rows of a group have one context, which is computed once: they are choices
    of one request. More than one group only where all that each of them must compute fits.
    The first group's lane is the chunk's; prompts of lower lanes may ride along. A lane has at most
    one prefill under way, and a chunk of several prompts ends in the step that it begins in.

    A mixed chunk has no pass of its own: the decode step computes it with its rows' own tokens. It
    has all that each of its prompts must compute, which may differ in what was found of them.
    """

    groups: tuple[Group, ...]
    start: int
    length: int
    mixed: bool = False

    @property
    def rows(self) -> tuple[Sequence, ...]:
        """Every row of the chunk, in order of arrival."""
        return tuple(row for group in self.groups for row in group)

    @property
    def leaders(self) -> tuple[Sequence, ...]:
        """One row of each group: the ones that are computed."""
        return tuple(group[0] for group in self.groups)

    @property
    def computed_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        if self.mixed:
            return sum(row.context_length - row.found for row in self.leaders)
        return self.length * len(self.groups)

    @property
    def lane(self) -> Lane:
        """The lane that the chunk is for: its first rows'."""
        return self.groups[0][0].request.lane

    @property
    def completes(self) -> bool:
        """Whether the rows' contexts are in the cache after this chunk."""
        end = self.start + self.length
        return all(row.found + end >= row.context_length for row in self.leaders)
