"""The interface of what computes an engine's batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from mlx_serving.common.queues import Lane
    from mlx_serving.worker.engine.memory.kv_caches import KvMemory
    from mlx_serving.worker.engine.native import AccelerationReport
    from mlx_serving.worker.engine.row import Row, SampledToken
    from mlx_serving.worker.engine.scheduling.chunk import PrefillChunk


@dataclass(frozen=True, slots=True)
class Attachments:
    """Values that an engine has for the code around it.

    `tokenizer` is mlx-lm's wrapper (for `prompts.PromptEncoder`), None without a model;
    `acceleration` says for each accelerated piece whether it is native or the twin; `kv_memory` is
    the memory guard's view of the KV caches, None without caches.
    """

    tokenizer: Any = None
    acceleration: tuple[AccelerationReport, ...] = ()
    kv_memory: KvMemory | None = None


NOTHING = Attachments()


class StepNotBuiltError(RuntimeError):
    """A decode step could not be built: nothing of it was launched, and no row has changed."""


class BatchRunner(Protocol):
    """Computes the batch: `model_runner.ModelRunner`, or `simulated.SimulatedRunner`.

    A method that waits for the device may raise `LaunchedWorkError`: the batch's rows are lost.
    """

    on_launch: Callable[[], None]
    """Called before a launch, which releases the interpreter to other threads while it lasts."""

    def prefill(self, chunk: PrefillChunk) -> None:
        """Compute one chunk of prompts; wait for it if no row decodes."""

    def drop_prefill(self, lane: Lane) -> None:
        """Forget the prompt being prefilled for a lane."""

    def join(self, chunk: PrefillChunk) -> None:
        """Move the rows of the chunk that was prefilled last into the decode batch.

        A mixed chunk is computed by the next `decode`. After an error, the batch is unchanged.
        """

    def remove(self, rows: Iterable[Row]) -> None:
        """Take rows out of the decode batch, and drop the kept keys and values of parked rows.

        Other rows are ignored.
        """

    def park(self, rows: Iterable[Row], keep: Container[Row]) -> list[SampledToken]:
        """Take rows out of the decode batch; return their tokens of the running step.

        The keys and values of the rows in `keep` are kept, for `resume` or `remove`.
        """

    def resume(self, row: Row) -> None:
        """Put a parked row back into the decode batch; after an error, it is parked as before."""

    def reset(self) -> None:
        """Drop the decode batch and the prompt being prefilled, after a step that failed."""

    def decode(self) -> list[SampledToken]:
        """Return one new token for each row that has one.

        Raises:
            StepNotBuiltError: see there; after any other error the rows are lost.
        """
