"""The one place that spells Redis keys and channels, for Python and for the Lua scripts.

Own keys live under ``prefix``; RQ's keys, which are a view of ours for RQ's own tools, under
``rq_prefix``. The Lua scripts call functions generated from the same table
(:meth:`Keys.lua_functions`), so a key is written down once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# name → (which prefix, parts); a part in angle brackets is the argument.
_TEMPLATES: dict[str, tuple[str, str]] = {
    # ours: the authority
    "job": ("own", ":job:<>"),  # control hash of a job
    "events": ("own", ":ev:<>"),  # stream of a job's events, entry id "<seq>-0"
    "channel": ("own", ":ch:<>"),  # pub/sub: a job's events, live
    "open": ("own", ":open:<>"),  # zset of a queue's jobs that are not terminal, by enqueue time
    "leases": ("own", ":leases:<>"),  # zset of a queue's running jobs, by lease deadline
    "deadlines": ("own", ":deadlines"),  # zset of open jobs that have a deadline
    "wake": ("own", ":wake:<>"),  # pub/sub: something was enqueued
    "control": ("own", ":ctl:<>"),  # pub/sub to one worker: "cancel <id>"
    "claim": ("own", ":claim:<>"),  # ids that the claim of a nonce took; expires
    "isolated": ("own", ":isolated:<>"),  # zset of a queue's jobs that nobody may claim
    "machine": ("own", ":machine:<>"),  # when a machine was awake, and who was lost there; expires
    "reserved": ("own", ":reserved:<>"),  # worker that makes room for a queue's suspects
    "bringing": ("own", ":bringing:<>"),  # worker that is about to load a model; expires
    "limits": ("own", ":limits"),  # hash, an operator's: queued, running, queued:<tenant>, …
    "tenants": ("own", ":tenants"),  # set of tenants that have open jobs
    "tenant_queued": ("own", ":tenant:<>:queued"),  # set of a tenant's queued jobs
    "tenant_running": ("own", ":tenant:<>:running"),  # set of a tenant's running jobs
    "line": ("own", ":line:<>"),  # list of a tenant's queued jobs; argument: "<queue>:<tenant>"
    "turns": (
        "own",
        ":turns:<>",
    ),  # list of tenants with a line in a queue, next one first
    "warm": ("own", ":warm:<>"),  # workers that took jobs of a mark lately; expires
    "worker": ("own", ":worker:<>"),  # hash: what a worker is and can hold; expires
    "batch": ("own", ":batch:<>"),  # hash: what a bulk file's runner says of it; expires
    "batches": ("own", ":batches"),  # zset of bulk files, by the time they were last heard of
    "quarantine": ("own", ":quarantine"),  # zset: notes of keys of a wrong type, by time
    "quarantined": ("own", ":quarantine:<>"),  # such a key; argument: "<name>:<time>"
    # RQ's: the view
    "rq_job": ("rq", ":job:<>"),
    "rq_queue": ("rq", ":queue:<>"),
    "rq_queues": ("rq", ":queues"),
    "rq_started": ("rq", ":wip:<>"),
    "rq_finished": ("rq", ":finished:<>"),
    "rq_failed": ("rq", ":failed:<>"),
    "rq_canceled": ("rq", ":canceled:<>"),
    "rq_results": ("rq", ":results:<>"),
    "rq_execution": ("rq", ":execution:<>"),  # argument: "<job>:<execution>"
    "rq_executions": ("rq", ":executions:<>"),
    "rq_worker": ("rq", ":worker:<>"),
    "rq_worker_executions": ("rq", ":worker:<>:executions"),
    "rq_suspended": ("rq", ":suspended"),
    "rq_commands": ("rq", ":pubsub:<>"),
}

_PREFIX = re.compile(r"[A-Za-z0-9_.:{}-]{1,64}")


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of every key and channel under a pair of prefixes.

    Raises:
        ValueError: a prefix is empty or holds a character that Redis tools or Lua would misread.
    """

    prefix: str = "mlxs"
    rq_prefix: str = "rq"

    def __post_init__(self) -> None:
        """Refuse a prefix that can't be spelled safely."""
        for name in ("prefix", "rq_prefix"):
            if not _PREFIX.fullmatch(getattr(self, name)):
                message = f"{name}: {getattr(self, name)!r}: 1 to 64 of A-Z a-z 0-9 _ . : - {{ }}"
                raise ValueError(message)

    def _spell(self, name: str, argument: str = "") -> str:
        which, template = _TEMPLATES[name]
        prefix = self.prefix if which == "own" else self.rq_prefix
        return prefix + template.replace("<>", argument)

    def job(self, job_id: str) -> str:
        """Control hash: the authority on a job."""
        return self._spell("job", job_id)

    def events(self, job_id: str) -> str:
        """Stream of the job's events; the truth that consumers replay."""
        return self._spell("events", job_id)

    def channel(self, job_id: str) -> str:
        """Pub/sub channel of the job's events; the fast path."""
        return self._spell("channel", job_id)

    def open(self, queue: str) -> str:
        """Index of the queue's jobs that are not terminal."""
        return self._spell("open", queue)

    def leases(self, queue: str) -> str:
        """Lease deadlines (ms, Redis TIME) of the queue's running jobs."""
        return self._spell("leases", queue)

    def isolated(self, queue: str) -> str:
        """Jobs of the queue that nobody may claim, by when they were isolated."""
        return self._spell("isolated", queue)

    def wake(self, queue: str) -> str:
        """Channel that tells idle workers of a new job."""
        return self._spell("wake", queue)

    def control(self, worker: str) -> str:
        """Channel of hints to one worker."""
        return self._spell("control", worker)

    def bringing(self, model: str) -> str:
        """Worker that is about to load a model, so that no other does at the same time."""
        return self._spell("bringing", model)

    def worker(self, worker: str) -> str:
        """What a worker says of itself."""
        return self._spell("worker", worker)

    def warm(self, mark: str) -> str:
        """Workers that took jobs of a mark lately; see `producer.affinity`."""
        return self._spell("warm", mark)

    def limits(self) -> str:
        """Limits on tenants; see `tenancy`."""
        return self._spell("limits")

    def tenants(self) -> str:
        """Index of the tenants that have open jobs."""
        return self._spell("tenants")

    def tenant_queued(self, tenant: str) -> str:
        """Ids of the tenant's queued jobs."""
        return self._spell("tenant_queued", tenant)

    def tenant_running(self, tenant: str) -> str:
        """Ids of the tenant's running jobs."""
        return self._spell("tenant_running", tenant)

    def line(self, queue: str, tenant: str) -> str:
        """Ids of the tenant's jobs that wait in the queue, in their order."""
        return self._spell("line", f"{queue}:{tenant}")

    def turns(self, queue: str) -> str:
        """Tenants that have jobs waiting in the queue; the first one is next."""
        return self._spell("turns", queue)

    def rq_job(self, job_id: str) -> str:
        """RQ's hash of the job: payload, and the view that RQ's tools read."""
        return self._spell("rq_job", job_id)

    def rq_queue(self, queue: str) -> str:
        """RQ's list of queued ids."""
        return self._spell("rq_queue", queue)

    def rq_results(self, job_id: str) -> str:
        """RQ's stream of the job's results."""
        return self._spell("rq_results", job_id)

    def rq_ended(self, queue: str) -> tuple[str, str, str]:
        """RQ's registries of the queue's ended jobs: finished, failed, canceled."""
        names = ("rq_finished", "rq_failed", "rq_canceled")
        finished, failed, canceled = (self._spell(name, queue) for name in names)
        return finished, failed, canceled

    def batch(self, batch_id: str) -> str:
        """What a bulk file's runner says of it."""
        return self._spell("batch", batch_id)

    def batches(self) -> str:
        """Index of the bulk files that were heard of lately."""
        return self._spell("batches")

    def quarantine(self) -> str:
        """Notes of the keys that were quarantined; see `quarantine`."""
        return self._spell("quarantine")

    def quarantined(self, key_and_time: str) -> str:
        """Place of a key that was quarantined, by ``<key>:<ms>``."""
        return self._spell("quarantined", key_and_time)

    def rq_queues(self) -> str:
        """RQ's set of queues."""
        return self._spell("rq_queues")

    def rq_commands(self, worker: str) -> str:
        """RQ's command channel of a worker."""
        return self._spell("rq_commands", worker)

    def rq_worker_executions(self, worker: str) -> str:
        """RQ's set of the attempts (``<job>:<epoch>``) that a worker runs."""
        return self._spell("rq_worker_executions", worker)

    def lua_functions(self, script: str) -> str:
        """Lua source that defines ``k_<name>(argument)`` for every key that a script names.

        Lua allows 200 locals, and each of these is one. Scripts get the prefixes as ``ARGV[1]`` and
        ``ARGV[2]``, so one script text serves all.
        """
        lines = ["local P, R = ARGV[1], ARGV[2]"]
        named = set(re.findall(r"\bk_(\w+)", script))
        for name, (which, template) in _TEMPLATES.items():
            if name not in named:
                continue
            prefix = "P" if which == "own" else "R"
            head, marker, tail = template.partition("<>")
            pieces = [prefix, f"'{head}'"]
            if marker:
                pieces.append("a")
            if tail:
                pieces.append(f"'{tail}'")
            lines.append(f"local function k_{name}(a) return {' .. '.join(pieces)} end")
        return "\n".join(lines) + "\n"
