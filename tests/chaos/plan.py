"""How much is done to a run, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Engine = Literal["tally", "simulated"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Quotas of a run: jobs are submitted until all faults have happened and `jobs` have ended.

    `jobs` counts those of at least `long_tokens` tokens. Times in seconds; `stall`: without
    a fault and without a job that ends for so long, the run is given up.
    """

    engine: Engine = "tally"
    jobs: int = 500
    kills: int = 100
    redis_kills: int = 20
    lost_replies: int = 50
    stops: int = 50
    machine_kills: int = 5  # all workers of a machine at once
    clock_steps: int = 30
    odd_keys: int = 20
    failovers: int = 0  # to a replica that is behind
    restores: int = 0  # of an older copy of Redis's files
    cancels: float = 0.04  # share of the jobs that their producer cancels
    workers: int = 3
    rows: int = 16
    producers: int = 2
    in_flight: int = 40  # jobs a producer process has open
    answers: int = 60  # different prompts
    lease: float = 2.0
    stall: float = 120.0
    seed: int = 1
    mutant: str = ""
    forms: bool = True  # schemas, regexes, grammars, tool calls, choices, log probabilities
    prefix_cache: bool = True  # and with it the paged cache; the undisturbed run has neither
    long_tokens: int = 50
    patience: float = 6.0  # the longest pause between two kills, or two stops
    redis_pause: tuple[float, float] = (5.0, 13.0)  # between two Redis kills

    @property
    def faults(self) -> dict[str, int]:
        """What has to happen, how often."""
        return {
            "kills": self.kills,
            "redis_kills": self.redis_kills,
            "lost_replies": self.lost_replies,
            "stops": self.stops,
            "machine_kills": self.machine_kills,
            "clock_steps": self.clock_steps,
            "odd_keys": self.odd_keys,
            "failovers": self.failovers,
            "restores": self.restores,
        }

    @property
    def forgets(self) -> bool:
        """Whether Redis forgets what it acknowledged."""
        return self.failovers + self.restores > 0


FULL = Plan()
FORGETTING = Plan(
    jobs=150, kills=8, redis_kills=3, lost_replies=15, stops=6, machine_kills=1, clock_steps=10,
    odd_keys=0, failovers=9, restores=6, patience=20.0,
)  # fmt: skip
SHORT = Plan(
    jobs=50, kills=4, redis_kills=2, lost_replies=8, stops=4, machine_kills=1, clock_steps=4,
    odd_keys=6,
    workers=2, producers=1,
    in_flight=32, answers=20, lease=1.5, patience=4.0,
    redis_pause=(3.0, 5.0),
)  # fmt: skip
QUICK = replace(
    SHORT, engine="simulated", jobs=40, kills=6, redis_kills=0, lost_replies=16, stops=10,
    machine_kills=0, clock_steps=0, odd_keys=0, cancels=0.1, lease=1.0, stall=40.0, patience=0.5,
)  # fmt: skip
QUICK_STOPS = replace(QUICK, kills=0, lost_replies=0, cancels=0.5)
QUICK_FORGETTING = replace(
    QUICK, kills=0, lost_replies=0, stops=0, failovers=4, restores=1, cancels=0.0, in_flight=44,
)  # fmt: skip
"""For the mutants: what each removes is found by these faults or not at all."""
