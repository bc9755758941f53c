"""Native or twin: which implementation of each accelerated piece is in use, and why.

A native piece proves itself: on start it runs beside its twin on this machine, and where the two
differ the twin is used. Every choice is a report that the log, `mlx-serving doctor` and the demo
show. Whether native pieces are wanted at all is a setting, handed in as `prefer_native`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal

from mlx_serving.worker.engine.text import detokenizer as twin
from mlx_serving.worker.engine.text.detokenizer import DetokenizerProtocol
from mlx_serving.worker.engine.text.vocabulary import Vocabulary, VocabularyTable, read_vocabulary

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_serving.worker.engine.sampling import MakeDraw

DETOKENIZER: Final = "detokenizer"
SAMPLER: Final = "sampler"
_SWITCHED_OFF: Final = "switched off by the settings"

Make = Callable[[VocabularyTable], DetokenizerProtocol]


@dataclass(frozen=True, slots=True)
class AccelerationReport:
    """One piece's choice; "off": the engine goes without it. `reason` can stand after a colon."""

    piece: str
    implementation: Literal["native", "twin", "off"]
    reason: str

    def __str__(self) -> str:
        return f"{self.piece}: {self.implementation} ({self.reason})"


def load_native() -> tuple[ModuleType | None, str]:
    """The native module, or None and why it can't be had."""
    try:
        return import_module("mlx_serving._native"), "built"
    except ModuleNotFoundError:
        return None, "this install was built without the native module"
    except ImportError as error:  # another Python's or another machine's build
        return None, f"the native module does not load: {error}"


def make_detokenizer(
    tokenizer: Any,  # noqa: ANN401 - mlx-lm's wrapper forwards by getattr
    *,
    prefer_native: bool,
) -> tuple[DetokenizerProtocol, AccelerationReport]:
    """A detokenizer for a model, one per engine: its table is shared by all of its slots.

    Args:
        tokenizer: as `read_vocabulary` takes it.
        prefer_native: False asks for the twin.

    Raises:
        UnsupportedVocabularyError: see `read_vocabulary`.
    """
    make, report = choose_detokenizer(prefer_native=prefer_native)
    return make(read_vocabulary(tokenizer)), report


def reports(*, prefer_native: bool) -> list[AccelerationReport]:
    """What an engine started now would use, piece by piece."""
    # Imported here: it uses this module.
    from mlx_serving.worker.engine.kv.prefix.choice import choose_prefix_index

    choices = (choose_detokenizer, choose_sampler, choose_prefix_index)
    return [choose(prefer_native=prefer_native)[1] for choose in choices]


def choose_sampler(
    *, prefer_native: bool, logits_dtype: "mx.Dtype | None" = None
) -> "tuple[MakeDraw, AccelerationReport]":
    """The sampler to use: the GPU's kernel or the CPU's C++; the pure-MLX reference as their twin.

    It is checked for the model's `logits_dtype`, without one for all that there are. A GPU that
    never compiled the kernel takes a few seconds for each.
    """
    # Imported here: MLX stays out of a process that only simulates.
    from mlx_serving.worker.engine.sampling.reference import ReferenceDraw
    from mlx_serving.worker.engine.sampling.self_check import first_difference

    make, reason = _accelerated_sampler() if prefer_native else (None, _SWITCHED_OFF)
    if make is None:
        return ReferenceDraw, AccelerationReport(SAMPLER, "twin", reason)
    try:
        difference = first_difference(make, logits_dtype)
    except Exception as error:  # noqa: BLE001 - a kernel that does not compile is not used
        difference = f"{type(error).__name__}: {error}"
    if difference is not None:
        reason = f"{reason} failed its self-check: {difference}"
        return ReferenceDraw, AccelerationReport(SAMPLER, "twin", reason)
    return make, AccelerationReport(SAMPLER, "native", f"{reason}, self-check passed")


def _accelerated_sampler() -> "tuple[MakeDraw | None, str]":
    """What this device has, and its name; or None and why."""
    from mlx_serving.worker.engine import kernels
    from mlx_serving.worker.engine.sampling.kernels import KernelDraw, native_sampler

    dialect = kernels.dialect()
    if dialect is not None:
        return KernelDraw, f"the {dialect} kernel"
    native, reason = load_native()
    return (None, reason) if native is None else (native_sampler(native), "the native piece")


def choose_detokenizer(*, prefer_native: bool) -> tuple[Make, AccelerationReport]:
    """The implementation to use; some 10 ms, most of it the self-check."""
    make, reason = _try_native(prefer_native=prefer_native)
    if make is None:
        return _make_twin, AccelerationReport(DETOKENIZER, "twin", reason)
    return make, AccelerationReport(DETOKENIZER, "native", reason)


def _try_native(*, prefer_native: bool) -> tuple[Make | None, str]:
    if not prefer_native:
        return None, _SWITCHED_OFF
    native, reason = load_native()
    if native is None:
        return None, reason
    difference = _self_check(_maker(native))
    if difference is not None:
        return None, f"the native piece failed its self-check: {difference}"
    return _maker(native), "self-check passed"


def _maker(native: ModuleType) -> Make:
    def make(table: VocabularyTable) -> DetokenizerProtocol:
        vocabulary = native.Vocabulary(
            table.tokens, table.kind, table.special_ids, table.strip_leading_space
        )
        made: DetokenizerProtocol = native.Detokenizer(vocabulary)
        return made

    return make


def _make_twin(table: VocabularyTable) -> DetokenizerProtocol:
    vocabulary = Vocabulary(table.tokens, table.kind, table.special_ids, table.strip_leading_space)
    return twin.Detokenizer(vocabulary)


# What both kinds of table know: words, halves of characters, spaces, a special token.
_CHECK_TABLES: Final = (
    VocabularyTable(
        [piece.encode() for piece in ("a", "b", "Ġ", "ð", "Ł", "Ļ", "Ĥ", "Ġab", "<t x>", "<s>")],
        "byte_level",
        {9},
        strip_leading_space=False,
    ),
    VocabularyTable(
        [piece.encode() for piece in ("a", "b", "▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁ab",
                                      "é", "<s>")],
        "byte_fallback",
        {9},
        strip_leading_space=True,
    ),
)  # fmt: skip
_CHECK_STOPS: Final = ((), ("ab",), ("bb a", "🙂"), ("aba", " a"))
_CHECK_STEPS: Final = 96
_CHECK_EMOJI: Final = {0: 3, 1: 4, 2: 5, 3: 6}  # step -> id: a whole character, byte by byte
_CHECK_EMOJI_EVERY: Final = 12  # steps; in between, any ids


def _self_check(make: Make) -> str | None:
    """Runs the same random streams through a piece and its twin; the first difference, or None."""
    for table in _CHECK_TABLES:
        expected = _check_run(_make_twin(table))
        try:
            got = _check_run(make(table))
        except Exception as error:  # noqa: BLE001 - whatever a broken module does, the twin is used
            return f"{table.kind}: {type(error).__name__}: {error}"
        if got != expected:
            return f"{table.kind}: its text differs from the twin's"
    return None


def _check_run(detokenizer: DetokenizerProtocol) -> list[Any]:
    chance = random.Random(0)  # noqa: S311 - test data
    slots = [detokenizer.open(stops) for stops in _CHECK_STOPS]
    seen: list[Any] = []
    for step in range(_CHECK_STEPS):
        emoji = _CHECK_EMOJI.get(step % _CHECK_EMOJI_EVERY)
        tokens = [chance.randrange(11) if emoji is None else emoji for _ in slots]
        seen.append(detokenizer.push(slots, tokens))
    return [*seen, [detokenizer.finish(slot) for slot in slots]]
