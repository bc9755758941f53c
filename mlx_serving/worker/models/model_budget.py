"""Which models may be in memory together: a budget in bytes, pins, least recently used go first.

Pure. A model's size is that of its weights on disk. They take the same in memory, because they are
loaded in the types that the files have.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelBudget:
    """The models of one worker, in the order in which they were named.

    `budget_bytes` None: no bound. Models in `pinned` never leave once they are loaded.
    """

    sizes: Mapping[str, int]
    budget_bytes: int | None = None
    pinned: frozenset[str] = frozenset()

    def bytes_of(self, models: Collection[str]) -> int:
        """Sum of their sizes."""
        return sum(self.sizes[model] for model in models)

    def fits(self, models: Collection[str]) -> bool:
        """Whether all of them may be in memory at once."""
        return self.budget_bytes is None or self.bytes_of(models) <= self.budget_bytes

    def ever_fits(self, model: str) -> bool:
        """Whether the model fits beside those that never leave."""
        return self.fits({model, *self.pinned})

    def first(self) -> tuple[str, ...]:
        """Models to load before the first claim: the pinned ones, then in order all that still fit.

        A pinned model that is too large is among them, so that loading it says so.
        """
        chosen = [model for model in self.sizes if model in self.pinned]
        for model in self.sizes:
            if model not in chosen and self.fits([*chosen, model]):
                chosen.append(model)
        return tuple(chosen)

    def victims(self, model: str, loaded: Sequence[str]) -> tuple[str, ...] | None:
        """Models that have to leave before this one is loaded; (): there is room already.

        `loaded` are those in memory, the least recently used first. None: pins leave no room.
        """
        if not self.ever_fits(model):
            return None
        stay, leave = list(loaded), []
        for candidate in loaded:
            if self.fits([*stay, model]):
                break
            if candidate not in self.pinned:
                stay.remove(candidate)
                leave.append(candidate)
        return tuple(leave)

    def most_at_once(self) -> int:
        """The most models that can be in memory at once; at least 1."""
        chosen = [model for model in self.sizes if model in self.pinned]
        for model in sorted(self.sizes, key=self.sizes.__getitem__):
            if model not in chosen and self.fits([*chosen, model]):
                chosen.append(model)
        return max(1, len(chosen))
