"""The product with one protection taken out, to show that the auditor would see it.

Each is a substitution in the text of a script or a function, made in the worker's child of the
test alone. The product has no switch for any of it.
"""

from __future__ import annotations

import inspect
import textwrap
from typing import Final

from mlx_serving.common.protocol import client, scripts

LUA: Final[dict[str, dict[str, dict[str, str]]]] = {
    # mutant → script → what is replaced by what
    "fencing off": {
        script: {
            "job.state == 'running' and job.owner == worker and job.queue and "
            "is_attempt(job, epoch, nonce)": "job.state and not TERMINAL[job.state]",
        }
        for script in ("commit", "renew")
    },
    # An attempt is its epoch alone, which Redis may forget and give again.
    "nonce check off": {
        script: {"job.epoch == epoch and job.nonce == nonce": "job.epoch == epoch"}
        for script in ("commit", "renew", "release", "crash")
    },
    # Whatever comes with a seq that is written is called a resend of it.
    "resends not compared": {
        "commit": {"if not found then return false end": "if true then return found ~= nil end"},
    },
    # A stream refuses an id twice by itself, so without the check an event takes the next one.
    "seq check off": {
        "commit": {
            "if is_written(id, seq, entry) then return {'DUP', job.cancel_reason or ''} end\n"
            "    return {'FENCED', ''}": "seq = committed + 1",
            "if seq ~= committed + 1 then return {'GAP', job.cancel_reason or ''} end": "",
        },
    },
}
RESTART: Final = "restart from zero"
MUTANTS: Final = (*LUA, RESTART)
_RESUME: Final = "committed = read_committed(payloads, claimed.seq)"


def apply(mutant: str) -> None:
    """Change this process. Raises AssertionError where the text to replace is not there."""
    assert mutant in MUTANTS, mutant
    if mutant == RESTART:
        _restart_from_zero()
        return
    assert vars(client)["script_text"] is scripts.script_text
    vars(client)["script_text"] = script_texts(mutant).__getitem__


def script_texts(mutant: str) -> dict[str, str]:
    """Every script as a worker sends it; `mutant` may be '' or one that changes none."""
    texts = {name: scripts.script_text(name) for name in scripts.NAMES}
    for name, replacements in LUA.get(mutant, {}).items():
        texts[name] = _replaced(texts[name], replacements)
    return texts


def _restart_from_zero() -> None:
    from mlx_serving.worker.claiming.intake import Preparation

    source = textwrap.dedent(inspect.getsource(Preparation.request))
    changed = _replaced(source, {_RESUME: "committed = Committed()"})
    module = vars(inspect.getmodule(Preparation))
    made: dict[str, object] = {}
    exec("from __future__ import annotations\n" + changed, module, made)  # noqa: S102 -- our own source
    Preparation.request = made["request"]  # type: ignore[method-assign, assignment]


def _replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        assert text.count(old) == 1, f"{text.count(old)} times in the source: {old}"
        text = text.replace(old, new)
    return text
