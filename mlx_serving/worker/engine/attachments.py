"""What an engine carries for its owner."""

from dataclasses import dataclass
from typing import Any

from mlx_serving.worker.engine.acceleration import AccelerationReport
from mlx_serving.worker.engine.memory.kv_caches import KvMemory


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
