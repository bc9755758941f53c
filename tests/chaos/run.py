"""One run: an undisturbed measurement, the faults, the audit, the figures."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.producer.client import Client
from tests.chaos import answers, audit, figures, trace, work
from tests.chaos.faults import Tormentors
from tests.chaos.fleet import Fleet
from tests.chaos.forgetting import ForgetfulRedis
from tests.support.lossy_proxy import LossyProxy
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chaos.plan import Plan
    from tests.chaos.work import Work


@dataclass(frozen=True)
class Report:
    """What became of a run. `violations`: kind, job id or '', what."""

    plan: Plan
    violations: list[tuple[str, str, str]]
    faults: dict[str, int]
    figures: dict[str, Any]

    @property
    def missed(self) -> dict[str, int]:
        """Faults that did not happen often enough, by how many are missing."""
        quotas = self.plan.faults | {"long jobs": self.plan.jobs}
        done = self.faults | {"long jobs": self.figures["long jobs"]}
        return {name: n - done.get(name, 0) for name, n in quotas.items() if done.get(name, 0) < n}

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"missed": self.missed}


class Run:
    """The parts of one run; see `chaos`."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self.plan, self.folder, self.say = plan, folder, say
        self.server = ForgetfulRedis() if plan.forgets else LocalRedis(appendonly="always")
        self.producers: list[subprocess.Popen[bytes]] = []
        self.probe: subprocess.Popen[bytes] | None = None
        self.seconds = 0.0

    def go(self) -> Report:
        with ExitStack() as stack:
            stack.enter_context(self.server)
            works = self._measured(work.make(self.plan))
            with self.server.client() as client:
                client.flushall()
            proxies = [stack.enter_context(LossyProxy(self.server.socket)) for _ in range(3)]
            to_workers, to_producers, plain = proxies
            folder = self.folder / "workers"
            folder.mkdir()
            fleet = stack.enter_context(Fleet(self.plan, to_workers.url, folder))
            tormentors = Tormentors(self.plan, fleet, self.server, self.folder, *proxies)
            stack.callback(self._end_producers)
            url = plain.url if self.plan.forgets else self.server.url
            self._start_producers(works, url, to_producers.url)
            self._torment(tormentors)
            over = audit.Audit(tormentors.forgettings)
            for error in tormentors.errors:
                over.add("the run itself", "", repr(error))
            if not self._broken():
                for wrong in fleet.drain():
                    over.add("drain", "", wrong)
            with self.server.client() as client:
                odd = tormentors.hand.take_back(client)
                over.odd_keys(client, set(tormentors.hand.planted) - set(odd))
                return self._report(over, client, fleet, tormentors, works)

    def _measured(self, works: list[Work]) -> list[Work]:
        """Run each job once with nothing in its way: its tokens are what chaos must not change."""
        if self.plan.engine == "simulated":
            return works
        calm = replace(self.plan, workers=1, rows=8, mutant="", lease=10.0, prefix_cache=False)
        folder = self.folder / "calm"
        folder.mkdir()
        with Fleet(calm, self.server.url, folder), Client(self.server.url) as client:
            handles = client.submit_many([each.job for each in works])
            results = [handle.result(timeout=600).raise_for_state() for handle in handles]
        known = [
            replace(each, answer=answers.told(result.choices))
            for each, result in zip(works, results, strict=True)
        ]
        wrong = [each.kind for each in known if answers.wrong(each, each.answer)]
        known = [each for each in known if not answers.wrong(each, each.answer)]
        # Tally is a model: it may get a long echo wrong by itself. Such a prompt is left out.
        assert len(known) > 0.8 * len(works), f"{len(known)} of {len(works)} right undisturbed"
        self.say(f"undisturbed: {len(known)} of {len(works)} prompts answered right; not: {wrong}")
        return known

    def _start_producers(self, works: list[Work], url: str, proxy_url: str) -> None:
        for index in range(self.plan.producers):
            given = {
                "url": url, "proxy_url": proxy_url, "folder": str(self.folder),
                "cancels": self.plan.cancels,
                "index": index, "seed": self.plan.seed, "in_flight": self.plan.in_flight,
                "work": [asdict(each) for each in works],
            }  # fmt: skip
            path = self.folder / f"producer-{index}.json"
            path.write_text(json.dumps(given))
            self.producers.append(self._run(f"producer-{index}", "producer", str(path)))
        path = self.folder / "probe.jsonl"
        self.probe = self._run("probe", "probe", url, str(path))

    def _run(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"tests.chaos.{module}", *arguments]
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def _torment(self, tormentors: Tormentors) -> None:
        """Until all has happened that should; then until every job has ended.

        It is given up only once nothing happens any more: how long it takes is the machine's.
        """
        started = said = time.monotonic()
        tormentors.start()
        enough = False
        progress = Progress(self.plan.stall)
        while not self._broken():
            time.sleep(0.25)
            tormentors.done = self._done()
            if progress.stalled((tormentors.done, dict(tormentors.counts))):
                break
            enough = enough or tormentors.done >= self._wanted()
            if enough and tormentors.over:
                break
            if time.monotonic() - said > 10:
                said = time.monotonic()
                self.say(f"{said - started:4.0f} s  {self._done()} jobs  {_quotas(tormentors)}")
        tormentors.stop()
        (self.folder / "stop").touch()
        self.say(f"{time.monotonic() - started:4.0f} s  {self._done()} jobs  the faults are over")
        progress = Progress(self.plan.stall)
        while any(p.poll() is None for p in self.producers) and not self._broken():
            if progress.stalled(self._done()):
                break
            time.sleep(0.05)
        self.seconds = time.monotonic() - started

    def _wanted(self) -> float:
        """Jobs to end: a few more than asked for, because echoes are short."""
        return self.plan.jobs * (1.3 if self.plan.engine == "tally" else 1.0)

    def _facts(self) -> list[Any]:
        return self._lines("producer-*.jsonl")

    def _lines(self, names: str) -> list[Any]:
        """What other processes wrote down, as far as its lines are whole."""
        found = []
        for path in sorted(self.folder.glob(names)):
            for line in path.read_text().splitlines():
                with suppress(ValueError):  # the last line of one that was just killed
                    found.append(json.loads(line))
        return found

    def _done(self) -> int:
        return sum(fact["what"] == "done" for fact in self._facts())

    def _broken(self) -> bool:
        """Whether a mutant has shown itself to a consumer: enough, then."""
        if not self.plan.mutant:
            return False
        return any(fact.get("problems") for fact in self._facts())

    def _end_producers(self) -> None:
        for process in (*self.producers, *([self.probe] if self.probe else [])):
            process.kill()
            process.wait()

    def _report(
        self, over: audit.Audit, client: Any, fleet: Fleet, tormentors: Tormentors,
        works: list[Work],
    ) -> Report:  # fmt: skip
        facts = self._facts()
        for index, process in enumerate(self.producers):
            log = (self.folder / f"producer-{index}.log").read_text()[-3000:]
            lost = process.poll() is None or process.returncode != 0
            over.find(lost and not self._broken(), "lost", "", f"producer {index}: {log}")
        jobs = self._read_jobs(client, facts, works)
        traces = trace.read_all(self.folder / "workers")
        if self._broken():
            for job in jobs.values():
                for consumer in job.consumers:
                    over._consumer(job, consumer)
        else:
            for job in jobs.values():
                over.job(job)
            over.view(client, list(jobs.values()))
            over.kept(traces, jobs)
        over.fences(traces)
        return Report(
            self.plan, over.violations, dict(tormentors.counts),
            self._figures(jobs, traces, fleet, tormentors, facts),
        )  # fmt: skip

    def _read_jobs(
        self, client: Any, facts: list[dict[str, Any]], works: list[Work]
    ) -> dict[str, audit.Job]:
        jobs = {
            fact["job"]: audit.read_job(client, fact["job"], works[fact["work"]])
            for fact in facts
            if fact["what"] == "job"
        }
        for fact in facts:
            if fact["what"] == "job":
                jobs[fact["job"]].sent = fact["sent"]
            elif fact["what"] == "cancel":
                jobs[fact["job"]].cancelled = True
            elif fact["what"] == "consumer":
                jobs[fact["job"]].consumers.append(fact)
        return jobs

    def _figures(
        self, jobs: dict[str, audit.Job], traces: list[trace.Trace], fleet: Fleet,
        tormentors: Tormentors, facts: list[dict[str, Any]],
    ) -> dict[str, Any]:  # fmt: skip
        consumers = [fact for fact in facts if fact["what"] == "consumer"]
        outages = tormentors.outages
        late = [tuple(each) for fact in facts if fact["what"] == "lag" for each in fact["late"]]
        moments = [tuple(each) for line in self._lines("probe.jsonl") for each in line]
        attempts = Counter(sum(e.type == "attempt" for e in job.events) for job in jobs.values())
        return {
            "seconds": round(self.seconds, 1),
            "jobs": len(jobs),
            "long jobs": sum(len(j.token_ids) >= self.plan.long_tokens for j in jobs.values()),
            "kinds": dict(Counter(job.work.kind for job in jobs.values())),
            "events": sum(len(job.events) for job in jobs.values()),
            "tokens": sum(len(job.token_ids) for job in jobs.values()),
            "prompt tokens": figures.prompt_tokens(jobs.values()),
            "jobs/s": round(len(jobs) / max(self.seconds, 0.001), 1),
            "attempts a job": dict(sorted(attempts.items())),
            "rows killed in": figures.phases(traces, fleet.deaths),
            "commits fenced": sum(c.status == "FENCED" for t in traces for c in t.commits),
            "commits resent": sum(c.status == "DUP" for t in traces for c in t.commits),
            "takeover s": figures.takeovers(traces, fleet.deaths, outages, jobs, self.plan.lease),
            "re-decoded tokens a takeover": figures.spread(
                figures.redecoded(traces, fleet.deaths, outages, jobs)
            ),
            "resume ms": figures.resumes(consumers, outages),
            "slow resumes": figures.slow_resumes(consumers, outages, late, moments),
            "their event loop late by ms": figures.spread((ms for _, ms in late), 1),
            "bare process late by ms": figures.spread((turn for _, turn, _ in moments), 1),
            "bare PING ms": figures.spread((ping for *_, ping in moments), 1),
            "consumers": len(consumers),
            "connections of consumers": sum(c["connections"] for c in consumers),
            "resets of consumers": sum(c["resets"] for c in consumers),
            "jobs unknown to consumers": len({c["job"] for c in consumers if c["unknown"]}),
            "jobs forgotten": sum(not job.state for job in jobs.values()),
            "jobs cancelled": sum(job.state == "cancelled" for job in jobs.values()),
            "consumers told to come back": sum(c["unavailable"] for c in consumers),
            "redis outage ms": figures.spread(((up - k) / 1e6 for k, up in outages), 0),
        }


class Progress:
    """Whether anything has changed in the last `stall` seconds."""

    def __init__(self, stall: float) -> None:
        self._stall = stall
        self._seen: object = None
        self._changed_at = time.monotonic()

    def stalled(self, seen: object) -> bool:
        if seen != self._seen:
            self._seen, self._changed_at = seen, time.monotonic()
        return time.monotonic() - self._changed_at > self._stall


def chaos(plan: Plan, say: Callable[[str], None] = lambda _: None, keep: str = "") -> Report:
    """Run a plan. Raises AssertionError where the run itself could not be made.

    `keep`: an empty or new folder that keeps logs and traces.
    """
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        return Run(plan, Path(keep), say).go()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        return Run(plan, Path(folder), say).go()


def _quotas(tormentors: Tormentors) -> str:
    counts = tormentors.counts
    return "  ".join(f"{name} {counts[name]}/{n}" for name, n in tormentors._plan.faults.items())
