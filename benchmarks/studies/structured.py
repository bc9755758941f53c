"""What a decode step costs when its rows follow JSON schemas, over the same step without.

    python -m benchmarks.studies.structured --shape 0.6b --batch 64 --output structured.json

One process, model and device; every row samples at temperature 1, and the loops are timed in
turn. Weights are random, so rows walk through their schemas at random: no text is a common one,
which is the harder case for masks. The vocabulary is made up of words, numbers and JSON's marks
in about the mix that a real one has.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import mlx.core as mx
import numpy as np
from msgspec.structs import replace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.contract.engine import Case, device_name, measure, start_engine, time_calls
from benchmarks.lib.synthetic import SHAPES, build_served_model
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import SamplingParams
from mlx_serving.worker.engine.structured.grammar_compiler import GrammarCompiler, tokenizer_source

if TYPE_CHECKING:
    from mlx_serving.worker.engine.model_runner import ModelRunner

EOS: Final = 256
MARKS: Final = ('":', '",', '"}', "},", "],", '{"', '["', '": "', '": ', ', "', "\n  ", "\n    ")
LETTERS: Final = "etaoinshrdlucmfwypvbgkjqxz"


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a byte-level tokenizer: bytes, an end of sequence, then words, numbers and marks."""
    chance = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys([*alphabet, "<|end|>", *map(_byte_level, MARKS)])
    while len(words) < vocab_size:
        length = min(2 + int(chance.expovariate(0.25)), 12)
        if chance.random() < 0.08:
            word = str(chance.randrange(10 ** min(length, 4)))
        else:
            word = "".join(chance.choices(LETTERS, range(26, 0, -1), k=length))
            word = word.capitalize() if chance.random() < 0.2 else word
        words[_byte_level(" " + word if chance.random() < 0.6 else word)] = None
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def _byte_level(text: str) -> str:
    return text.replace(" ", "Ġ").replace("\n", "Ċ")


def schemas() -> list[dict[str, Any]]:
    """Eight schemas of lists that no row comes to the end of."""
    text, number = {"type": "string", "maxLength": 40}, {"type": "integer"}
    items: list[dict[str, Any]] = [
        _object({"name": text, "age": number, "mail": {"type": "string", "format": "email"}}),
        _object({"kind": {"enum": ["a", "b", "other"]}, "at": {"type": "number"}}),
        _object({"tags": {"type": "array", "items": text}, "ok": {"type": "boolean"}}),
        {"anyOf": [number, text, {"type": "null"}, _object({"x": number, "y": number})]},
        _object({"at": {"type": "string", "format": "date-time"}, "count": number}),
        _object({"a": _object({"b": _object({"c": text})})}),
        {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 6},
        {"type": "string", "pattern": "^[A-Z]{2,4}-[0-9]{3,8}$"},
    ]  # fmt: skip
    return [{"type": "array", "items": item, "minItems": 100_000} for item in items]


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


def grammars() -> list[str]:
    return [f"start: %json {json.dumps(schema)}" for schema in schemas()]


def constrained_engine(case: Case, compiler: GrammarCompiler, constrained: int) -> Engine:
    """Return an engine whose first rows follow schemas and whose other rows are free."""
    settings = [SamplingParams(temperature=1.0, seed=row) for row in range(case.batch)]
    engine = start_engine(case, settings)
    runner = cast("ModelRunner", engine._runner)  # noqa: SLF001 - rows that decode already
    texts = grammars()
    for index, row in enumerate(runner._rows[:constrained]):  # noqa: SLF001
        grammar = compiler.compile(texts[index % len(texts)], "schema")
        row.request = replace(row.request, grammar=grammar)
        row.matcher = grammar.start()
    # What the rows were before is no part of their texts.
    runner._joined = len(runner._rows)  # noqa: SLF001
    runner._rows_changed()  # noqa: SLF001
    return engine


def loop(case: Case, compiler: GrammarCompiler, constrained: int) -> Iterator[None]:
    engine = constrained_engine(case, compiler, constrained)
    engine.step()
    while True:
        outputs = engine.step()
        assert len(outputs) == case.batch
        assert not any(output.finish_reason for output in outputs)
        yield


def parts(case: Case, compiler: GrammarCompiler) -> dict[str, float]:
    """What masks cost the host by themselves, and how much they allow."""
    engine = constrained_engine(case, compiler, case.batch)
    runner = cast("ModelRunner", engine._runner)  # noqa: SLF001
    for _ in range(20):
        engine.step()
    masks = runner._masks()  # noqa: SLF001
    allowed = np.unpackbits(np.array(masks.compute()).view(np.uint8)).sum() / case.batch
    return {
        "masks_host_ms": time_calls(masks.compute, 20),
        "tokens_allowed_a_row": float(allowed),
    }


def run(case: Case, tokenizer: Tokenizer) -> dict[str, float]:
    compiler = GrammarCompiler(tokenizer_source(tokenizer, case.vocab_size, frozenset({EOS})), 10.0)
    compiler.warm_up()
    try:
        started = time.perf_counter()
        for text in grammars():
            compiler.compile(text, "schema")
        compile_ms = (time.perf_counter() - started) * 1e3 / len(grammars())
        few = max(1, case.batch // 8)
        loops = {
            "free": loop(case, compiler, 0),
            f"{few}_constrained": loop(case, compiler, few),
            "all_constrained": loop(case, compiler, case.batch),
        }
        rounds = measure(case, loops)
        times = {name: statistics.median(found) for name, found in rounds.items()}
        figures = {f"{name}_ms": value for name, value in times.items()}
        figures["all_over_free"] = times["all_constrained"] / times["free"]
        figures[f"{few}_over_free"] = times[f"{few}_constrained"] / times["free"]
        return figures | parts(case, compiler) | {"compile_ms": compile_ms}
    finally:
        compiler.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    vocab_size = SHAPES[arguments.shape]["vocab_size"]
    model = build_served_model(arguments.shape, dtype=getattr(mx, arguments.dtype))
    case = Case(model, model, vocab_size, arguments.batch, arguments.steps)
    report = {"device": device_name()} | run(case, word_tokenizer(vocab_size))
    for name, value in report.items():
        print(f"{name:36} {value:.3f}" if isinstance(value, float) else f"{name:36} {value}")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
