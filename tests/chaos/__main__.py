"""`python -m tests.chaos`: the delivery contract under kills, stops, restarts and lost replies."""

from __future__ import annotations

import argparse
import json
import sys
from argparse import BooleanOptionalAction
from dataclasses import fields, replace
from pathlib import Path

from tests.chaos.mutants import MUTANTS
from tests.chaos.plan import FORGETTING, FULL, QUICK, QUICK_FORGETTING, QUICK_STOPS, SHORT
from tests.chaos.run import Report, chaos

NUMBERS = (
    "jobs", "kills", "redis_kills", "lost_replies", "stops", "machine_kills", "clock_steps",
    "odd_keys", "failovers", "restores", "workers", "rows", "producers",
    "in_flight", "seed",
)  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--short", action="store_true", help="the form that `make test` runs")
    forms.add_argument("--forgetting", action="store_true", help="a Redis that forgets")
    forms.add_argument("--quick-forgetting", action="store_true", help="the same, as --quick")
    forms.add_argument("--quick-stops", action="store_true", help="the same, cancels and stops")
    forms.add_argument("--quick", action="store_true", help="the simulated engine, few faults")
    parser.add_argument("--engine", choices=("tally", "simulated"))
    parser.add_argument("--mutant", choices=MUTANTS, help="take one protection out")
    for name in ("forms", "prefix_cache"):
        parser.add_argument(f"--{name.replace('_', '-')}", action=BooleanOptionalAction)
    for name in NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("lease", "stall", "patience"):
        parser.add_argument(f"--{name}", type=float, help="seconds")
    parser.add_argument("--cancels", type=float, help="share of the jobs")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--keep", default="", help="new folder for logs and traces")
    return parser.parse_args()


def show(report: Report) -> None:
    for title, table in (("faults", report.faults), ("figures", report.figures)):
        say(f"\n{title}")
        for name, value in sorted(table.items()) if title == "faults" else table.items():
            say(f"  {name:<32} {value}")
    say(f"\n{len(report.violations)} violations")
    for kind, job_id, what in report.violations[:40]:
        say(f"  {kind}: {job_id} {what}")
    if report.missed:
        say(f"not enough happened: {report.missed} short")


def main() -> int:
    given = arguments()
    plans = {
        "short": SHORT, "quick": QUICK, "forgetting": FORGETTING,
        "quick_forgetting": QUICK_FORGETTING, "quick_stops": QUICK_STOPS,
    }  # fmt: skip
    plan = next((plan for name, plan in plans.items() if getattr(given, name)), FULL)
    asked = {f.name: getattr(given, f.name, None) for f in fields(plan)}
    changes = {name: value for name, value in asked.items() if value not in (None, "")}
    report = chaos(replace(plan, **changes), say, given.keep)
    show(report)
    if given.output:
        given.output.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    return bool(report.violations or report.missed)


if __name__ == "__main__":
    sys.exit(main())
