"""The native detokenizer against its Python twin, at batch 64.

    python -m benchmarks.studies.detokenizer

One figure: microseconds per decode step, that is one `push` of a token to each of 64 slots. The
vocabulary has 151,936 byte-level tokens, as Qwen3's; tokens are words, with a tenth of them
parts of characters. mlx-lm's own streaming detokenizer, one object a row, runs beside them.
"""

import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mlx_serving.worker.engine.acceleration import choose_detokenizer
from mlx_serving.worker.engine.text.detokenizer import DetokenizerProtocol
from mlx_serving.worker.engine.text.vocabulary import VocabularyTable, byte_alphabet

BATCH = 64
STEPS = 400
ROUNDS = 5
VOCABULARY_SIZE = 151_936
STOPS = {"no stop strings": (), "4 stop strings": ("\n\n", "</s>", "User:", "###")}


def synthetic_table() -> VocabularyTable:
    chance = random.Random(0)
    spelled = {byte: character for character, byte in byte_alphabet().items()}
    tokens = [spelled[byte] for byte in range(256)]
    while len(tokens) < VOCABULARY_SIZE:
        letters = chance.choices("etaoinshrdlu", k=chance.randint(1, 8))
        tokens.append(chance.choice(("", "Ġ")) + "".join(letters))
    return VocabularyTable(
        [token.encode() for token in tokens], "byte_level", set(), strip_leading_space=False
    )


def synthetic_steps() -> list[list[int]]:
    """[STEPS][BATCH] ids: nine words to one emoji, spelled in its four bytes."""
    chance = random.Random(1)
    rows = []
    for _ in range(BATCH):
        row: list[int] = []
        while len(row) < STEPS:
            word = [chance.randrange(256, VOCABULARY_SIZE)]
            row += word if chance.random() < 0.9 else list("🙂".encode())
        rows.append(row[:STEPS])
    return [list(step) for step in zip(*rows, strict=True)]


def seconds_a_step(run: Callable[[list[int]], object], steps: list[list[int]]) -> float:
    started = time.perf_counter()
    for step in steps:
        run(step)
    return (time.perf_counter() - started) / len(steps)


def batch_runner(
    detokenizer: DetokenizerProtocol, stops: tuple[str, ...]
) -> Callable[[list[int]], object]:
    slots = [detokenizer.open(stops) for _ in range(BATCH)]
    return lambda step: detokenizer.push(slots, step)


def mlx_lm_runner(table: VocabularyTable) -> Callable[[list[int]], object]:
    """mlx-lm's BPE detokenizer, one a row, sharing one token map."""
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer

    class Tokens:
        def __len__(self) -> int:
            return len(table.tokens)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [table.tokens[token].decode() for token in ids]

    first: Any = BPEStreamingDetokenizer(Tokens())
    rows = [copy.copy(first) for _ in range(BATCH)]

    def run(step: list[int]) -> None:
        for row, token in zip(rows, step, strict=True):
            row.add_token(token)
            _ = row.last_segment

    return run


def measure() -> dict[str, float]:
    """Microseconds a step, by implementation and stop strings: the median of some rounds."""
    table, steps = synthetic_table(), synthetic_steps()
    makers = {}
    for prefer_native in (True, False):
        make, report = choose_detokenizer(prefer_native=prefer_native)
        makers[report.implementation] = make(table)
    runners: dict[str, Callable[[], Callable[[list[int]], object]]] = {
        f"{name}, {label}": partial(batch_runner, makers[name], stops)
        for name in makers
        for label, stops in STOPS.items()
    }
    runners["mlx-lm, no stop strings"] = partial(mlx_lm_runner, table)
    figures: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):  # interleaved, so that a busy moment hits all alike
        for name, runner in runners.items():
            figures[name].append(seconds_a_step(runner(), steps) * 1e6)
    return {name: round(statistics.median(values), 1) for name, values in figures.items()}


def main() -> None:
    """Print the table as JSON."""
    print(json.dumps({"unit": "µs a step of 64 rows", **measure()}, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
