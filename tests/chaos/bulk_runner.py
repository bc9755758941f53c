"""A background runner that kills itself where a trap says.

`python -m tests.chaos.bulk_runner FOLDER TRAP`, settings on stdin. The trap is a file that holds
the name of a place; whoever comes by there removes it and dies of SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from mlx_serving.producer.batch import folder, results
from mlx_serving.producer.batch.__main__ import main
from mlx_serving.producer.batch.result_file import ResultFile
from mlx_serving.producer.batch.store import JobStore
from mlx_serving.producer.client import Client

PLACES = (
    "half submitted",
    "torn line",
    "submitted",
    "synced",
    "appended",
    "half forgotten",
    "state not renamed",
)
"""Of the feeder and the collector in turn."""


class Trap:
    """The file that says where to die."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def is_set(self, place: str) -> bool:
        try:
            return self._path.read_text() == place
        except FileNotFoundError:
            return False

    def spring(self) -> NoReturn:
        self._path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def at(self, place: str) -> None:
        if self.is_set(place):
            self.spring()


def install(trap: Trap) -> None:
    """Put a trap at each place."""
    submit_many, sync, forget = Client.submit_many, results.Results.sync, JobStore.forget
    append, replace = ResultFile.append, folder.replace

    def submitting(client: Client, jobs: Any) -> Any:
        if trap.is_set("half submitted") and len(jobs) > 1:
            submit_many(client, jobs[: len(jobs) // 2])
            trap.spring()
        handles = submit_many(client, jobs)
        trap.at("submitted")
        return handles

    def appending(file: ResultFile, line: bytes) -> None:
        if trap.is_set("torn line"):
            file._file.write(line[: len(line) // 2])
            file._file.flush()
            trap.spring()
        append(file, line)
        trap.at("appended")

    def syncing(all_results: results.Results) -> None:
        sync(all_results)
        trap.at("synced")

    def replacing(path: Path, data: bytes) -> None:
        if trap.is_set("state not renamed"):
            path.with_name(path.name + ".part").write_bytes(data[: len(data) // 2])
            trap.spring()
        replace(path, data)

    def forgetting(store: JobStore, job_ids: Any) -> None:
        if trap.is_set("half forgotten") and job_ids:
            forget(store, job_ids[: len(job_ids) // 2 + 1])
            trap.spring()
        forget(store, job_ids)

    setattr(Client, "submit_many", submitting)  # noqa: B010 -- mypy takes no assignment to a method
    setattr(ResultFile, "append", appending)  # noqa: B010
    setattr(results.Results, "sync", syncing)  # noqa: B010
    setattr(JobStore, "forget", forgetting)  # noqa: B010
    folder.replace = replacing


if __name__ == "__main__":
    install(Trap(Path(sys.argv[2])))
    sys.exit(main())
