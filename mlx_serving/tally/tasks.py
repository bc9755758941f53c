"""What Tally can do: for each task a sampler of prompts and a check of answers.

Pure Python, importable without mlx. One prompt in ten, picked by a hash of what it asks, is held
out: training never samples it, evaluation samples nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mlx_serving.tally import one_turn, two_turns
from mlx_serving.tally.examples import (
    Example,
    is_held_out,
)

MODEL_PATH = Path(__file__).parent / "model"

_SPANS, _SPAN_WEIGHTS = (12, 60, 250, 999), (50, 30, 15, 5)


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of prompt. `draw(rng, longest)` makes one; a count lists ≤ `longest` numbers."""

    name: str
    draw: Callable[[Random, int], Example]

    def sample(
        self, rng: Random, *, held_out: bool | None = None, longest: int | None = None
    ) -> Example:
        """A random example; `held_out` asks for one side of the split, None for either."""
        while True:
            cap = longest or rng.choices(_SPANS, _SPAN_WEIGHTS)[0]
            example = self.draw(rng, cap)
            if held_out is None or is_held_out(example) == held_out:
                return example


TASKS: dict[str, Task] = {
    name: Task(name, draw) for name, draw in {**one_turn.DRAWS, **two_turns.DRAWS}.items()
}
