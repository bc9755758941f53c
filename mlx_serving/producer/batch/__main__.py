"""The background runner: `python -m mlx_serving.producer.batch FOLDER`, settings on stdin."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import msgspec
import structlog

from mlx_serving.common.errors import MlxServingError
from mlx_serving.common.settings import load_settings
from mlx_serving.common.telemetry import configure_logging
from mlx_serving.producer.batch.folder import BatchFolder
from mlx_serving.producer.batch.runner import BulkRunner
from mlx_serving.producer.client import Client


def main() -> int:
    """Run the batch; return 0 at its end or if another runner has it, 1 if it can't go on."""
    settings = load_settings(**msgspec.json.decode(sys.stdin.buffer.read()))
    configure_logging(log_format=settings.log.format, level=settings.log.level)
    folder = BatchFolder.open(Path(sys.argv[1]))
    with folder.lock() as free:
        if not free:
            return 0
        try:
            batch = BulkRunner(folder, settings, partial(Client, settings=settings)).run()
        except (MlxServingError, OSError) as error:
            kind = getattr(error, "code", type(error).__name__)
            structlog.get_logger(__name__).error("batch_stopped", code=kind, error=str(error))
            return 1
    structlog.get_logger(__name__).info("batch_ended", batch=batch.id, status=batch.status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
