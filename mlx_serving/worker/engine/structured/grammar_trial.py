"""Tries a grammar in a process of its own, which can be killed.

A schema or grammar is foreign input to a compiler that can't be interrupted: a small one can take
minutes or gigabytes, or crash the process (a deep chain of rules overflows the stack). So each is
first compiled, and its first masks computed, in another process. That process is started by
`start` or by the first trial, gets the tokenizer once, and ends when its standard input ends.
"""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any, Final

import msgspec

from mlx_serving.common import interpreter

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

COMPILE_SECONDS: Final = 0.5
START_SECONDS: Final = 30.0
STEP_LEXER_FUEL: Final = 50_000
STEP_MAX_ITEMS: Final = 20_000
"""llguidance's limits on one mask, a third of its defaults: a few milliseconds at most."""

WALKED_TOKENS: Final = 8
_REASON_CHARS: Final = 300
# Classes of tokens that a mask takes as a whole if a JSON string may have as many more characters.
# llguidance's own begin at 10 characters: near a string's `maxLength` it checks every token.
_STRING_SLICES: Final = [
    r'[^"\\\x00-\x1F\x7F]' + f"{{1,{length}}}" for length in (2, 3, 4, 5, 6, 8, 14, 20)
]


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Input of llguidance's tokenizer: tokenizer.json's text, the model's width, its eos ids."""

    json: str
    vocab_size: int
    eos: tuple[int, ...]

    def build(self) -> LLTokenizer:
        """Build the tokenizer; takes up to a second for a large vocabulary. Raises ValueError."""
        from llguidance import LLTokenizer  # imported when the first job asks for a grammar

        return LLTokenizer(
            self.json, n_vocab=self.vocab_size, eos_token=list(self.eos),
            slices=[*_STRING_SLICES, *LLTokenizer.general_slices()],
        )  # fmt: skip


def parser_limits() -> LLParserLimits:
    """Return limits on the cost of one mask, without errors that quote the grammar and the text."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        step_lexer_fuel=STEP_LEXER_FUEL, step_max_items=STEP_MAX_ITEMS, verbose_errors=False
    )


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> tuple[LLMatcher, str]:
    """Return a matcher at the grammar's start, and why it can't be used ("": it can)."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    return matcher, _reason(matcher)


def walk(matcher: LLMatcher, tokens: int, *, last: bool) -> str:
    """Follow a grammar by its first (or last) allowed tokens; return why that fails, or "".

    Some grammars compile, and their first or second mask is too complex.
    """
    for _ in range(tokens):
        allowed = _allowed(matcher.compute_bitmask())
        if matcher.is_error() or matcher.is_stopped() or not allowed:
            break
        matcher.consume_token(allowed[-1 if last else 0])
    return _reason(matcher)


def _allowed(bitmask: bytes) -> list[int]:
    """Return the ids of the first and of the last byte that has any bit set."""
    found = [at for at, byte in enumerate(bitmask) if byte]
    return [8 * at + bit for at in found[:1] + found[-1:] for bit in range(8)
            if bitmask[at] >> bit & 1]  # fmt: skip


def _reason(matcher: LLMatcher) -> str:
    """Return the first line of a matcher's error: the others quote the grammar."""
    if not matcher.is_error():
        return ""
    message = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return message.partition("\n")[0][:_REASON_CHARS] or "is refused without a reason"


class GrammarTrial:
    """Says whether a grammar can be used with this model's tokenizer. One caller at a time."""

    def __init__(self, source: TokenizerSource, seconds: float = COMPILE_SECONDS) -> None:
        self._source, self._seconds = source, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._ready = False

    def start(self) -> None:
        """Start the process without waiting for it."""
        with self._lock:
            self._start()

    def try_grammar(self, grammar: str) -> str:
        """Return why the grammar can't be used; "": it can."""
        with self._lock:
            process = self._start()
            try:
                if not self._ready:
                    self._receive(process, START_SECONDS)
                    self._ready = True
                self._send(process, grammar)
                return str(self._receive(process, self._seconds))
            except TimeoutError:
                self._restart()
                return f"takes longer than {self._seconds} s to compile"
            except (OSError, EOFError, msgspec.DecodeError):
                self._restart()
                return "can't be compiled: it is too deep"

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(  # noqa: S603 -- our own module
                interpreter.command("-m", __name__),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # the worker handles Ctrl-C
            )
            self._ready = False
            with contextlib.suppress(OSError):  # it died: the first answer will be missing
                self._send(self._process, asdict(self._source) | {"seconds": self._seconds})
        return self._process

    def _restart(self) -> None:
        """End the process and start a new one for the next grammar."""
        self._end()
        self._start()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    @staticmethod
    def _send(process: subprocess.Popen[bytes], message: object) -> None:
        pipe = _pipe(process.stdin)
        pipe.write(msgspec.json.encode(message) + b"\n")
        pipe.flush()

    @staticmethod
    def _receive(process: subprocess.Popen[bytes], seconds: float) -> Any:  # noqa: ANN401 -- JSON
        pipe = _pipe(process.stdout)
        if not select.select([pipe], [], [], seconds)[0]:
            raise TimeoutError
        line = pipe.readline()
        if not line:
            raise EOFError
        return msgspec.json.decode(line)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # noqa: S101 -- both were asked for
    return pipe


def serve(lines: IO[bytes], replies: IO[bytes]) -> None:
    """Answer one grammar a line until the input ends."""
    settings = msgspec.json.decode(lines.readline())
    seconds = settings.pop("seconds")
    tokenizer = msgspec.convert(settings, TokenizerSource).build()
    _reply(replies, "ready")
    for line in lines:
        # If the parent is gone, the alarm ends this process.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        reason = try_grammar(tokenizer, msgspec.json.decode(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, reason)


def try_grammar(tokenizer: LLTokenizer, grammar: str) -> str:
    """Compile a grammar and follow it for some tokens; return why that fails, "": it doesn't."""
    matcher, reason = compile_grammar(tokenizer, grammar)
    for last in (False, True):
        reason = reason or walk(matcher.deep_copy(), WALKED_TOKENS, last=last)
    return reason


def _reply(replies: IO[bytes], message: str) -> None:
    replies.write(msgspec.json.encode(message) + b"\n")
    replies.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
