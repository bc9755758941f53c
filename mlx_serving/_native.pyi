from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_serving.worker.engine.vocabulary import VocabularyKind

class Vocabulary:
    def __init__(
        self,
        tokens: Sequence[bytes],
        kind: VocabularyKind,
        special_ids: set[int],
        strip_leading_space: bool = False,
    ) -> None: ...
    def __len__(self) -> int: ...

class Detokenizer:
    def __init__(self, vocabulary: Vocabulary) -> None: ...
    def open(self, stops: Sequence[str] = ()) -> int: ...
    def push(self, slots: list[int], tokens: list[int]) -> list[tuple[str, bool]]: ...
    def replay(self, slot: int, tokens: list[int]) -> tuple[str, bool]: ...
    def finish(self, slot: int) -> str: ...
    def close(self, slot: int) -> None: ...

def sample(
    logits: NDArray[Any],
    table: NDArray[np.int32],
    state: NDArray[np.int32],
    inputs: NDArray[np.int32],
    lists: NDArray[np.int32],
    mask: NDArray[np.int32] | None,
    outputs: Sequence[NDArray[Any]],
    by_groups: bool = False,
) -> None: ...
