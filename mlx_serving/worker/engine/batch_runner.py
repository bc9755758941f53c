"""What the engine asks of whatever computes its batch."""

from collections.abc import Callable, Container, Iterable
from typing import Protocol

from mlx_serving.common.job.schema import Lane
from mlx_serving.worker.engine.scheduling.prefill_chunk import PrefillChunk
from mlx_serving.worker.engine.sequence import SampledToken, Sequence


class StepNotBuiltError(RuntimeError):
    """A decode step could not be built: nothing of it was launched, and no row has moved."""


class BatchRunner(Protocol):
    """What computes: `model_runner.ModelRunner`, or `simulated.SimulatedRunner` without a model.

    Whatever waits for the device may raise `LaunchedWorkError`: the rows of the batch are lost.
    """

    on_launch: Callable[[], None]
    """Called before a launch, which leaves the interpreter to other threads while it lasts."""

    def prefill(self, chunk: PrefillChunk) -> None:
        """Compute one chunk of prompts; wait for it where no row decodes."""

    def drop_prefill(self, lane: Lane) -> None:
        """Forget the prompt being prefilled for a lane."""

    def join(self, chunk: PrefillChunk) -> None:
        """Move the rows of the chunk that was prefilled last into the decode batch.

        Where it is a mixed one, the next step of `decode` computes it. Whatever this raises, the
        decode batch is as it was.
        """

    def remove(self, rows: Iterable[Sequence]) -> None:
        """Take rows out of the decode batch, or drop what is kept of them; others are ignored."""

    def park(self, rows: Iterable[Sequence], keep: Container[Sequence]) -> list[SampledToken]:
        """Take rows out of the decode batch; return the tokens that were on their way.

        The keys and values of those in `keep` stay, for `resume` or `remove`.
        """

    def resume(self, row: Sequence) -> None:
        """Put a row that was kept back into the decode batch; whatever this raises, it is kept."""

    def reset(self) -> None:
        """Drop the decode batch and the prompt being prefilled, after a step that failed."""

    def decode(self) -> list[SampledToken]:
        """Return one new token a row; rows without news are left out.

        Raises:
            StepNotBuiltError: where that is so; after any other error the rows are lost.
        """
