"""Names the fields of our hashes and stream entries, once for Python and for the Lua scripts.

A stored name is short if every job has the field. Code never spells a stored name: Python says
``JobField.STATE``, a script ``F.state`` (`lua_tables`). The fields of a worker's hash are those of
`WorkerRecord`: a script says ``WORKER.state``.
"""

from __future__ import annotations

from dataclasses import fields
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from mlx_serving.common import lifetimes
from mlx_serving.common.attempts import TAG_CHARS
from mlx_serving.common.worker_record import WorkerRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SIGNATURE_FIELD: Final = "mlxs_sig"
"""Field of RQ's job hash that holds our signature; see `signing`."""

EVENT_OPENING: Final = '{"v":1,"attempt":%s,"tag":"%s","seq":%s,'
"""How the JSON of every event begins: what an entry of the stream says by other means."""

TOKENS_OPENING: Final = '"type":"tokens","choices":[{"index":0,'
"""How the body of most events begins: new tokens, first of choice 0."""


QUARANTINED: Final = "QUARANTINED"
"""How the reply of a script begins that quarantined keys; see `quarantine`."""


class JobField(StrEnum):
    """A job's control hash: the authority on the job. Times are ms of Redis TIME."""

    # From the enqueue on
    STATE = "st"  # `states.JobState`
    QUEUE = "q"  # "<model>:<lane>"
    EPOCH = "ep"  # claims so far, as Redis remembers them
    OWNER = "ow"  # worker that holds the job or held it last; '' while it waits
    SEQ = "seq"  # number of the last committed event
    CRASHES = "at"  # crashes of an engine that the job was charged with
    MAX_ATTEMPTS = "ma"  # so many crashes, and it is dead
    MIN_PROTOCOL = "mp"  # oldest protocol whose workers may run it
    DEADLINE_MS = "dl"  # when the job ends, whether or not it ran; 0: never
    TIMEOUT_MS = "to"  # ms from the first claim to its end; 0: no limit
    ABANDON_MS = "ab"  # ms without a listener that end it; 0: no limit
    RESULT_TTL = "ttl"  # seconds that the keys are kept after its end
    QUEUED_TTL = "qt"  # seconds that it may wait for a worker
    EVENTS_TTL = "et"  # seconds that its events are kept after its end
    FAILED_TTL = "fl"  # seconds that its keys are kept if it failed or is dead
    STREAM = "sm"  # 1: events are published; 0: they are only stored
    CANCEL_REASON = "ca"  # why the job is to stop; '' if it is not
    ENQUEUED_MS = "en"  # when it was enqueued
    NEEDED_TOKENS = "nd"  # KV tokens that it needs, once a worker had too few; 0: not known

    # From the enqueue on, if the job has it
    MARKS = "af"  # "<conversation>,<beginning>" of its prompt, see `producer.marks`
    TENANT = "tn"  # on whose behalf
    DIGEST = "pd"  # of its payload, if its id comes from an idempotency key

    # From the first claim on
    NONCE = "no"  # of the last claim
    STARTED_MS = "sa"  # when it was first claimed
    FIRST_TOKEN_MS = "ft"  # noqa: S105 -- when its first token was committed
    LISTENED_MS = "ls"  # when an event last found a listener; only with ABANDON_MS

    # From an event of its life on
    NEEDED_ROWS = "nr"  # rows of the batch that it needs, once a worker had too few
    OVERTAKEN_MS = "po"  # when a job further back was first taken before it
    MAX_UNPROVEN = "co"  # a suspect: unproven rows that may run with it, itself included
    SUSPECT_SINCE_MS = "su"  # when it was last charged with a crash
    CHARGED_NONCE = "cr"  # nonce of the attempt that was charged last

    LOSSES = "lo"  # attempts whose worker was lost and has not come back, see `losses.lua`
    ALONE = "al"  # "<nonce> <seq> <ms>" of the last claim that made it run alone for its losses

    # From its end on
    FINISHED_MS = "fi"  # when it ended
    ERROR_CODE = "err"  # '' if it ended well
    MESSAGE = "msg"  # the error in a sentence
    RESULT = "res"  # result record, JSON; not there if it ended without a worker


class EntryField(StrEnum):
    """An entry of a job's stream. Its id is "<seq>-0"; EVENT_OPENING is not stored."""

    WRITER = "a"  # "<epoch>-<tag>" of the attempt that wrote it
    BODY = "e"  # the event's JSON after EVENT_OPENING
    TOKENS = "t"  # instead of BODY: the JSON after EVENT_OPENING and TOKENS_OPENING


class LimitField(StrEnum):
    """The limits on tenants, an operator's. A value is a number or ``none``."""

    QUEUED = "queued"  # most jobs that wait, of each tenant; see `limit_field` for one tenant's
    RUNNING = "running"  # most jobs that run


class BatchField(StrEnum):
    """What Redis holds of a bulk file."""

    REPORT = "report"  # how far its runner is, JSON
    CANCEL = "cancel"  # 1: somebody asked the runner to cancel it


TENANT_MARK: Final = ":"
"""Between the kind of a limit and the tenant whose own it is."""


def limit_field(kind: str, tenant: str) -> str:
    """Field of one tenant's own limit of a kind, which goes before the limit of all."""
    return f"{kind}{TENANT_MARK}{tenant}"


def lua_tables() -> str:
    """Lua source of the same names: ``F.state``, ``ENTRY.body``, ``DEFAULT.queued_ttl``."""
    texts = {
        "SIGNATURE_FIELD": SIGNATURE_FIELD,
        "EVENT_OPENING": EVENT_OPENING,
        "TOKENS_OPENING": TOKENS_OPENING,
        "TENANT_MARK": TENANT_MARK,
        "QUARANTINED": QUARANTINED,
    }
    lines = [f"local {name} = '{text}'" for name, text in texts.items()]
    lines.append(f"local TAG_CHARS = {TAG_CHARS}")
    lines += [_table("F", JobField), _table("ENTRY", EntryField), _table("LIMIT", LimitField)]
    lines.append(_lua_table("WORKER", {field.name: field.name for field in fields(WorkerRecord)}))
    kept = {f"{name}_ttl": str(seconds) for name, seconds in lifetimes.DEFAULT._asdict().items()}
    lines.append(_lua_table("DEFAULT", kept))  # of a job that no producer of ours enqueued
    return "\n".join(lines) + "\n"


def _table(name: str, members: Iterable[StrEnum]) -> str:
    return _lua_table(name, {member.name.lower(): member.value for member in members})


def _lua_table(name: str, texts: Mapping[str, str]) -> str:
    pairs = ", ".join(f"{key} = '{text}'" for key, text in texts.items())
    return f"local {name} = {{{pairs}}}"
