"""The short form of `make chaos`, in `make test` too; and the mutants, which show what it sees."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.chaos import mutants
from tests.chaos.plan import QUICK, QUICK_FORGETTING, QUICK_STOPS, SHORT
from tests.chaos.run import Report, chaos
from tests.support.figures import show

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PLANS = {"nonce check off": QUICK_FORGETTING, "resends not compared": QUICK_STOPS}


def summary(report: Report) -> str:
    takeover = report.figures["takeover s"]["to the next attempt"]
    return (
        f"chaos: {report.figures['jobs']} jobs, {report.figures['tokens']} tokens, "
        f"{report.faults}, takeover {takeover}, {len(report.violations)} violations"
    )


def test_nothing_is_lost_and_nothing_comes_twice() -> None:
    report = chaos(SHORT)
    show(summary(report))
    assert report.violations == []
    assert report.missed == {}
    assert report.figures["prompt tokens"]["from the cache"] > 0


@pytest.mark.chaos
@pytest.mark.parametrize("mutant", mutants.MUTANTS)
def test_the_auditor_sees_a_missing_protection(mutant: str) -> None:
    report = chaos(replace(PLANS.get(mutant, QUICK), mutant=mutant))
    kinds = Counter(kind for kind, _, _ in report.violations)
    show(f"{mutant}: {dict(kinds)}")
    # What the run itself got wrong would prove nothing.
    shows = {"zombie", "consumer", "wrong tokens", "gap or order", "row not kept"}
    assert kinds.keys() & shows, report.missed
