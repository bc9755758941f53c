"""A process that does nothing but ask Redis whether it is there: what a run's machine costs anyone.

Writes a JSON line every fifty times: `[ns, ms that its sleep was late, ms that PING took]` each.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import redis

from tests.chaos.trace import now

if TYPE_CHECKING:
    from tests.chaos.figures import Moment

PAUSE_SECONDS = 0.01
LINE = 50


def moment(client: redis.Redis) -> Moment | None:
    """One look; None while Redis is away."""
    due = now() + int(PAUSE_SECONDS * 1e9)
    time.sleep(PAUSE_SECONDS)
    began = now()
    try:
        client.ping()
    except redis.RedisError:
        return None
    return due, (began - due) / 1e6, (now() - began) / 1e6


def main(url: str, path: str) -> None:
    with Path(path).open("a", buffering=1) as file, redis.Redis.from_url(url) as client:
        while True:
            moments = [moment(client) for _ in range(LINE)]
            file.write(json.dumps([each for each in moments if each]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
