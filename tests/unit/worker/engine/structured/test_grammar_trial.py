"""The process that tries grammars: its words, its deaths, its end."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from llguidance import LLTokenizer

from benchmarks.lib.synthetic import build_tokenizer
from benchmarks.studies.structured import grammars, word_tokenizer
from mlx_serving.common.errors import InvalidSchema
from mlx_serving.worker.engine.structured import grammar_compiler
from mlx_serving.worker.engine.structured.grammar_compiler import GrammarCompiler, tokenizer_source
from mlx_serving.worker.engine.structured.grammar_trial import GrammarTrial, compile_grammar, serve

if TYPE_CHECKING:
    from collections.abc import Iterator

EOS = frozenset({256})
SLOW = 'start: %json {"type": "integer", "multipleOf": 999983}'


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tokenizer_source(build_tokenizer(), 300, EOS))
    yield made
    made.close()


def settings(seconds: float) -> dict[str, Any]:
    source = tokenizer_source(build_tokenizer(), 300, EOS)
    return {"json": source.json, "vocab_size": source.vocab_size, "eos": source.eos,
            "seconds": seconds}  # fmt: skip


def lines(*messages: Any) -> bytes:
    return b"".join(json.dumps(message).encode() + b"\n" for message in messages)


def test_it_answers_a_line_a_grammar_until_its_input_ends() -> None:
    replies = io.BytesIO()
    serve(io.BytesIO(lines(settings(5), 'start: "a"', "start: b")), replies)
    ready, good, bad = map(json.loads, replies.getvalue().splitlines())
    assert (ready, good) == ("ready", "")
    assert "unknown name" in bad


def test_a_grammar_that_hangs_ends_it_even_where_nobody_is_left_to_kill_it() -> None:
    module = "mlx_serving.worker.engine.structured.grammar_trial"
    process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE)
    process.communicate(lines(settings(0.3), SLOW), timeout=30)
    assert process.returncode == -signal.SIGALRM


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_is_not() -> None:
    trial = GrammarTrial(tokenizer_source(build_tokenizer(), 300, EOS), seconds=0.3)
    try:
        assert trial.try_grammar(SLOW) == "takes longer than 0.3 s to compile"
        assert trial.try_grammar('start: "a"') == ""
    finally:
        trial.close()
    assert trial._process is None


def test_a_refusal_names_the_path_and_shows_none_of_the_grammar(
    compiler: GrammarCompiler,
) -> None:
    with pytest.raises(InvalidSchema) as raised:
        compiler.compile("start: nothing\n// hush, a secret", "response_format.grammar")
    (error,) = raised.value.errors
    assert error.path == "response_format.grammar"
    assert "hush" not in error.reason


def test_the_least_recently_used_grammars_are_dropped(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "CACHED_GRAMMARS", 2)
    first, second, third = (f'start: "{letter}"' for letter in "abc")
    kept = compiler.compile(first, "x")
    compiler.compile(second, "x")
    assert compiler.compile(first, "x") is kept
    compiler.compile(third, "x")
    assert list(compiler._cache) == [first, third]
    monkeypatch.setattr(grammar_compiler, "CACHED_CHARS", len(third))
    compiler.compile(second, "x")
    assert list(compiler._cache) == [second]


def test_a_tokenizer_that_llguidance_can_not_use_refuses_grammars_by_name() -> None:
    source = tokenizer_source(build_tokenizer(), 300, EOS)
    compiler = GrammarCompiler(type(source)("{}", source.vocab_size, source.eos))
    try:
        compiler.warm_up()
        with pytest.raises(InvalidSchema, match="tokenizer is none"):
            compiler.compile('start: "a"', "response_format")
    finally:
        compiler.close()


def test_masks_are_those_of_llguidances_own_classes_of_tokens() -> None:
    source = tokenizer_source(word_tokenizer(2000), 2000, EOS)
    plain = LLTokenizer(source.json, n_vocab=2000, eos_token=[256])
    chance = random.Random(0)
    seen = 0
    for text in grammars():
        ours, theirs = (compile_grammar(each, text)[0] for each in (source.build(), plain))
        for _ in range(20):
            mask = ours.compute_bitmask()
            assert mask == theirs.compute_bitmask()
            token = chance.choice([t for t in range(2000) if mask[t // 8] >> t % 8 & 1])
            assert ours.consume_token(token)
            assert theirs.consume_token(token)
            seen += 1
    assert seen == 20 * len(grammars())
