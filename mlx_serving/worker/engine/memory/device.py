"""The device that MLX computes on, its memory, and the limits set on it. Imports mlx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import mlx.core as mx

from mlx_serving.worker.engine.memory.guard import MemoryReading

if TYPE_CHECKING:
    from collections.abc import Callable


def device_name() -> str:
    """Return the default device, as `gpu: Apple M4 Max` or `cpu: x86_64`."""
    kind = mx.default_device().type.name
    info = mx.device_info(mx.default_device())
    name = info.get("device_name") or info.get("architecture")
    return f"{kind}: {name}" if name else kind


CACHE_FRACTION: Final = 0.1  # of the limit: freed buffers that MLX keeps for reuse
LEAST_CACHE_BYTES: Final = 256 << 20


class DeviceMemory(Protocol):
    """Reads a device's memory and trims it; tests make the numbers up."""

    def read(self) -> MemoryReading:
        """Return the memory in use; the peak starts again from here."""

    def trim(self) -> None:
        """Give freed buffers back to the system."""


class MlxMemory:
    """The default device's memory.

    `available` returns how many bytes the system can still give, or None. It is called only if
    the device shares the system's memory: on Metal and on a CPU, not on CUDA.
    """

    def __init__(self, available: Callable[[], int | None]) -> None:
        """Limit MLX: allocations beyond the limit raise, before the system runs out.

        On a CPU, MLX keeps no freed buffers, and only the guard applies the limit.
        """
        self._available = available
        self.limit = device_limit()
        if mx.default_device() != mx.cpu:
            mx.set_memory_limit(self.limit)
            mx.set_cache_limit(max(LEAST_CACHE_BYTES, int(CACHE_FRACTION * self.limit)))

    def read(self) -> MemoryReading:
        """See `DeviceMemory`; some 2 µs beside the system's answer."""
        active, peak = mx.get_active_memory(), mx.get_peak_memory()
        mx.reset_peak_memory()
        available = self._available() if shares_memory() else None
        return MemoryReading(active, mx.get_cache_memory(), peak, self.limit, available)

    def trim(self) -> None:
        """See `DeviceMemory`."""
        mx.clear_cache()


def device_limit() -> int:
    """Return the most that one process should hold on the default device, in bytes.

    On Metal its recommended working set, else the limit that MLX chose: 95% of a GPU's memory.
    """
    info = mx.device_info(mx.default_device())
    recommended = info.get("max_recommended_working_set_size")
    return int(recommended) if recommended else int(mx.get_memory_limit())


def shares_memory() -> bool:
    """Say whether the default device computes in the system's own memory."""
    return mx.default_device() == mx.cpu or mx.metal.is_available()
