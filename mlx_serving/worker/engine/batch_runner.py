"""What the engine asks of whatever computes its batch, and what it carries for its owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from mlx_serving.common.queues import Lane
    from mlx_serving.worker.engine.acceleration import AccelerationReport
    from mlx_serving.worker.engine.memory.kv_caches import KvMemory
    from mlx_serving.worker.engine.row import Row, SampledToken
    from mlx_serving.worker.engine.scheduling.chunk import PrefillChunk


@dataclass(frozen=True, slots=True)
class Attachments:
    """What an engine carries for its owner and doesn't use itself.

    `tokenizer` is mlx-lm's wrapper (for `prompts.PromptEncoder`), None without a model;
    `acceleration` says for each accelerated piece whether it is native or the twin; `kv_memory` is
    the memory guard's way to the KV caches, None where there are none.
    """

    tokenizer: Any = None
    acceleration: tuple[AccelerationReport, ...] = ()
    kv_memory: KvMemory | None = None


NOTHING = Attachments()


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

    def remove(self, rows: Iterable[Row]) -> None:
        """Take rows out of the decode batch, or drop what is kept of them; others are ignored."""

    def park(self, rows: Iterable[Row], keep: Container[Row]) -> list[SampledToken]:
        """Take rows out of the decode batch; return the tokens that were on their way.

        The keys and values of those in `keep` stay, for `resume` or `remove`.
        """

    def resume(self, row: Row) -> None:
        """Put a row that was kept back into the decode batch; whatever this raises, it is kept."""

    def reset(self) -> None:
        """Drop the decode batch and the prompt being prefilled, after a step that failed."""

    def decode(self) -> list[SampledToken]:
        """Return one new token a row; rows without news are left out.

        Raises:
            StepNotBuiltError: where that is so; after any other error the rows are lost.
        """
