"""Compiles one model's grammars outside the engine thread, in bounded time; caches them."""

import json
import weakref
from collections import OrderedDict
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from mlx_serving.common.errors import InvalidSchema
from mlx_serving.worker.engine.structured.grammar_trial import (
    COMPILE_SECONDS,
    GrammarTrial,
    TokenizerSource,
    compile_grammar,
)
from mlx_serving.worker.engine.structured.masks import CompiledGrammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer

CACHED_GRAMMARS: Final = 128
CACHED_CHARS: Final = 4 * 1024 * 1024  # of grammar text; compiled grammars take a multiple


def tokenizer_source(tokenizer: Any, vocab_size: int, eos: frozenset[int]) -> TokenizerSource:  # noqa: ANN401 - a wrapper forwards by getattr
    """Return what llguidance builds its tokenizer from, of a fast tokenizer or mlx-lm's wrapper.

    `vocab_size` is the model's; no mask allows ids of the tokenizer beyond it.
    """
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    backend = getattr(inner, "backend_tokenizer", inner)
    content = json.loads(backend.to_str())
    content.update(truncation=None, padding=None)
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return TokenizerSource(json.dumps(content), max(size, vocab_size), tuple(sorted(eos)))


class GrammarCompiler:
    """One model's compiled grammars, by their text; the least recently used are dropped.

    Grammars that can't be compiled are remembered too. Thread-safe; a caller may wait for one other
    grammar that is being compiled. The engine's thread never waits.
    """

    def __init__(self, source: TokenizerSource, seconds: float = COMPILE_SECONDS) -> None:
        """Take the tokenizer; nothing is built before the first grammar or `warm_up`."""
        self._source = source
        self._trial = GrammarTrial(source, seconds)
        self._finalizer = weakref.finalize(self, self._trial.close)
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[str, CompiledGrammar | str] = OrderedDict()
        self._chars = 0
        self._lock = Lock()

    def warm_up(self) -> None:
        """Build now what every compilation needs, so that no job waits for it."""
        self._trial.start()
        with (
            self._lock,
            suppress(ValueError),
        ):  # the first grammar reports that the tokenizer can't be used
            self._built_tokenizer()

    def close(self) -> None:
        """End the process that tries grammars."""
        self._finalizer()

    def compile(self, grammar: str, path: str) -> CompiledGrammar:
        """Return the compiled grammar.

        Args:
            grammar: in llguidance's format.
            path: the field of the job that asks for it, for the error.

        Raises:
            InvalidSchema: it can't be compiled, or not in time.
        """
        with self._lock:
            found = self._cache.get(grammar)
            if found is None:
                found = self._compile(grammar)
                self._remember(grammar, found)
            self._cache.move_to_end(grammar)
        if isinstance(found, str):
            raise InvalidSchema([(path, found)])
        return found

    def special_ids(self, ids: list[int]) -> list[bool]:
        """Say of each id whether it is a special token, which grammars name by its id."""
        with self._lock:
            tokenizer = self._built_tokenizer()
        return [tokenizer.is_special_token(token) for token in ids]

    def _compile(self, grammar: str) -> CompiledGrammar | str:
        try:
            tokenizer = self._built_tokenizer()
        except ValueError:
            return "this model's tokenizer is none that structured output can use"
        reason = self._trial.try_grammar(grammar)
        if reason:
            return reason
        template, reason = compile_grammar(tokenizer, grammar)
        return reason or CompiledGrammar(template, tokenizer.vocab_size)

    def _built_tokenizer(self) -> "LLTokenizer":
        if self._tokenizer is None:
            self._tokenizer = self._source.build()
        return self._tokenizer

    def _remember(self, grammar: str, compiled: CompiledGrammar | str) -> None:
        self._cache[grammar] = compiled
        self._chars += len(grammar)
        while len(self._cache) > CACHED_GRAMMARS or self._chars > CACHED_CHARS:
            oldest, _ = self._cache.popitem(last=False)
            self._chars -= len(oldest)
