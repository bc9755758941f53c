"""Defaults that hold for a setting and for the code that can do without settings, each once."""

from typing import Final

REDIS_URL: Final = "redis://localhost:6379/0"
REDIS_TIMEOUT_SECONDS: Final = 5.0
SENTINEL_SERVICE: Final = "mymaster"
KEY_PREFIX: Final = "mlxs"
RQ_PREFIX: Final = "rq"

LEASE_SECONDS: Final = 10.0
DRAIN_SECONDS: Final = 30.0
BUFFER_TOKENS: Final = 65_536
"""Decoded, but not yet in Redis."""

MAX_BATCH_ROWS: Final = 64
LANE_MIN_SHARE: Final = 0.1
PREFILL_CHUNK_TOKENS: Final = 512
