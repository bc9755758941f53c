"""Fixtures that several integration tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.producer.batch.api import Batches
from tests.bulk_driver import make_quick

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.settings import Settings


@pytest.fixture
def quick_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners of bulk files write down and look more often."""
    make_quick(monkeypatch)


@pytest.fixture
def batches(settings: Settings, redis_client: redis.Redis) -> Batches:
    """Bulk files on an empty Redis, in which nothing may stay."""
    del redis_client
    return Batches(settings)
