"""Finds the batch that a person means: by id, by folder, by input file, or the newest."""

from __future__ import annotations

import math
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_serving.common.errors import BatchNotFound, QueueFailure
from mlx_serving.producer.batch.folder import STATE, BatchFolder
from mlx_serving.producer.batch.registry import Report

if TYPE_CHECKING:
    from mlx_serving.producer.batch.registry import Registry


def new_id() -> str:
    """Make the id of a new batch."""
    return f"batch_{secrets.token_hex(8)}"


def folder_beside(source: Path, batch_id: str) -> Path:
    """The default folder of a batch: beside its file."""
    return source.with_name(f"{source.name}.{batch_id}")


def find_folder(name: str | None, registry: Registry) -> BatchFolder:
    """Find the folder of a batch on this machine; without a name, of the newest one.

    Raises:
        BatchNotFound: there is none, or its folder is on another machine.
        QueueUnavailable: only Redis can tell, and it is away.

    """
    if name is not None and (local := _local(Path(name))) is not None:
        return local
    report = find_report(name, registry)
    if not report.lies_here:
        raise BatchNotFound(f"batch {report.batch.id} is in {report.folder} on {report.host}")
    return BatchFolder(Path(report.folder))


def find_report(name: str | None, registry: Registry) -> Report:
    """Find the last report on a batch; without a name, on the newest one from this machine.

    Raises:
        BatchNotFound: there is none.
        QueueUnavailable: Redis is away, and no folder or file here has this name.

    """
    if name is None:
        reports = registry.reports()
        here = [report for report in reports if report.host == socket.gethostname()]
        if not reports:
            raise BatchNotFound("Redis knows no batch")
        return (here or reports)[0]
    local = _local(Path(name))
    return registry.find(name) if local is None else _report_of(local, registry)


def _report_of(folder: BatchFolder, registry: Registry) -> Report:
    """The report on a batch whose folder is here; the folder decides whether it has ended."""
    batch = folder.read().batch
    unheard = Report(batch=batch, folder=str(folder.path), age_s=math.inf)
    try:
        report = registry.find(batch.id)
    except (BatchNotFound, QueueFailure):
        return unheard
    return unheard if batch.ended and not report.batch.ended else report


def _local(path: Path) -> BatchFolder | None:
    """The batch in this folder, or the newest one made of this file."""
    if (path / STATE).is_file():
        return BatchFolder(path)
    made = [
        found for found in path.parent.glob(f"{path.name}.batch_*") if (found / STATE).is_file()
    ]
    return BatchFolder(max(made, key=lambda f: (f / STATE).stat().st_ctime_ns)) if made else None
