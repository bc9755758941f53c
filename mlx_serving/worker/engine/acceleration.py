"""Chooses the native implementation or the Python twin of each accelerated piece, and says why.

Every native piece has a self-check: on start it runs beside its twin on this machine, and if the
results differ, the twin is used. Every choice gives a report, which the log, `mlx-serving doctor`
and the demo show. The setting that switches native pieces off is passed as `prefer_native`.
"""

import random
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from mlx_serving.worker.engine.kv.prefix.choice import choose_prefix_index
from mlx_serving.worker.engine.native import SWITCHED_OFF, AccelerationReport, load_native
from mlx_serving.worker.engine.text import detokenizer as twin
from mlx_serving.worker.engine.text.detokenizer import DetokenizerProtocol
from mlx_serving.worker.engine.text.vocabulary import Vocabulary, VocabularyTable, read_vocabulary

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_serving.worker.engine.sampling.sampler import MakeDraw

DETOKENIZER: Final = "detokenizer"
SAMPLER: Final = "sampler"

MakeDetokenizer = Callable[[VocabularyTable], DetokenizerProtocol]


def make_detokenizer(
    tokenizer: Any,  # noqa: ANN401 - mlx-lm's wrapper forwards by getattr
    *,
    prefer_native: bool,
) -> tuple[DetokenizerProtocol, AccelerationReport]:
    """Return a detokenizer for a model, one per engine: all of its slots share one table.

    Args:
        tokenizer: as `read_vocabulary` takes it.
        prefer_native: False: use the twin.

    Raises:
        UnsupportedVocabularyError: see `read_vocabulary`.
    """
    make, report = choose_detokenizer(prefer_native=prefer_native)
    return make(read_vocabulary(tokenizer)), report


def reports(*, prefer_native: bool) -> list[AccelerationReport]:
    """Return what an engine that starts now would use, piece by piece."""
    choices = (choose_detokenizer, choose_sampler, choose_prefix_index)
    return [choose(prefer_native=prefer_native)[1] for choose in choices]


def choose_sampler(
    *, prefer_native: bool, logits_dtype: "mx.Dtype | None" = None
) -> "tuple[MakeDraw, AccelerationReport]":
    """Return the sampler to use: the GPU's kernel or the CPU's C++; their twin is in pure MLX.

    The self-check is for the model's `logits_dtype`; None: for every dtype. A GPU that never
    compiled the kernel takes a few seconds for each.
    """
    # Imported here: a process that only simulates does not import MLX.
    from mlx_serving.worker.engine.sampling.reference import ReferenceDraw
    from mlx_serving.worker.engine.sampling.self_check import first_difference

    make, reason = _accelerated_sampler() if prefer_native else (None, SWITCHED_OFF)
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
    """Return this device's sampler and its name, or None and why there is none."""
    from mlx_serving.worker.engine import kernels
    from mlx_serving.worker.engine.sampling.kernels import KernelDraw, native_sampler

    dialect = kernels.dialect()
    if dialect is not None:
        return KernelDraw, f"the {dialect} kernel"
    native, reason = load_native()
    return (None, reason) if native is None else (native_sampler(native), "the native piece")


def choose_detokenizer(*, prefer_native: bool) -> tuple[MakeDetokenizer, AccelerationReport]:
    """Return the implementation to use; takes some 10 ms, most of it the self-check."""
    make, reason = _try_native(prefer_native=prefer_native)
    if make is None:
        return _make_twin, AccelerationReport(DETOKENIZER, "twin", reason)
    return make, AccelerationReport(DETOKENIZER, "native", reason)


def _try_native(*, prefer_native: bool) -> tuple[MakeDetokenizer | None, str]:
    if not prefer_native:
        return None, SWITCHED_OFF
    native, reason = load_native()
    if native is None:
        return None, reason
    difference = _self_check(_maker(native))
    if difference is not None:
        return None, f"the native piece failed its self-check: {difference}"
    return _maker(native), "self-check passed"


def _maker(native: ModuleType) -> MakeDetokenizer:
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


# Both kinds of table have words, parts of characters, spaces and a special token.
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


def _self_check(make: MakeDetokenizer) -> str | None:
    """Run the same random streams through a piece and its twin; return the first difference."""
    for table in _CHECK_TABLES:
        expected = _check_run(_make_twin(table))
        try:
            got = _check_run(make(table))
        except Exception as error:  # noqa: BLE001 - after any error the twin is used
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
