"""How a person names a batch: by its id, its folder, the file it was made of, or not at all."""

from __future__ import annotations

import math
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_serving.common.errors import BatchNotFound, QueueUnavailable
from mlx_serving.producer.batch.folder import STATE, BatchFolder
from mlx_serving.producer.batch.registry import Report

if TYPE_CHECKING:
    from mlx_serving.producer.batch.registry import Registry


def new_id() -> str:
    """Name a new batch."""
    return f"batch_{secrets.token_hex(8)}"


def folder_beside(source: Path, batch_id: str) -> Path:
    """Where a batch's folder goes when nothing else is said: beside its file."""
    return source.with_name(f"{source.name}.{batch_id}")


def find_folder(name: str | None, registry: Registry) -> BatchFolder:
    """Find a batch that lies on this machine; without a name, the newest.

    Raises:
        BatchNotFound: there is none, or it lies elsewhere.
        QueueUnavailable: an id has to be asked of Redis, which is away.

    """
    if name is not None and (local := _local(Path(name))) is not None:
        return local
    report = find_report(name, registry)
    if not report.lies_here:
        raise BatchNotFound(f"batch {report.batch.id} lies in {report.folder} on {report.host}")
    return BatchFolder(Path(report.folder))


def find_report(name: str | None, registry: Registry) -> Report:
    """Find what Redis knows of a batch; without a name, the newest from here.

    Raises:
        BatchNotFound: there is none.
        QueueUnavailable: Redis is away, and the name is not that of a folder or file here.

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
    """What Redis knows of a batch that lies here; the folder knows better how it ended."""
    batch = folder.read().batch
    unheard = Report(batch=batch, folder=str(folder.path), age_s=math.inf)
    try:
        report = registry.find(batch.id)
    except (BatchNotFound, QueueUnavailable):
        return unheard
    return unheard if batch.ended and not report.batch.ended else report


def _local(path: Path) -> BatchFolder | None:
    """A batch's folder, or the newest one made of a file."""
    if (path / STATE).is_file():
        return BatchFolder(path)
    made = [
        found for found in path.parent.glob(f"{path.name}.batch_*") if (found / STATE).is_file()
    ]
    return BatchFolder(max(made, key=lambda f: (f / STATE).stat().st_ctime_ns)) if made else None
