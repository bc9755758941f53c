"""Functions that stock RQ workers run in `test_rq_defaults.py`, and workers that die or stop."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import redis
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer


def answer(text: str) -> str:
    """A job's result."""
    return text


def answer_when_told(text: str, folder: str) -> str:
    """Say that it runs; wait for the word to go on; say who ran it."""
    Path(folder, f"running.{os.getpid()}").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.01)
    return f"{text} {os.getpid()}"


class DiesAfterThePop(SimpleWorker):
    """SIGKILL, once the job has left its list and before a registry knows it."""

    def execute_job(self, job: Any, queue: Any) -> None:
        del job, queue
        os.kill(os.getpid(), signal.SIGKILL)


def main(url: str, how: str, *queues: str) -> None:
    """Run one stock worker until its queues are empty."""
    client = redis.Redis.from_url(url)
    kind = DiesAfterThePop if how == "dies" else SimpleWorker
    names = [Queue(name, connection=client, serializer=JSONSerializer) for name in queues]
    worker = kind(names, connection=client, serializer=JSONSerializer)
    worker.work(burst=True, logging_level="CRITICAL")


if __name__ == "__main__":
    main(*sys.argv[1:])
