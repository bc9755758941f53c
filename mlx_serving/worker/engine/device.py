"""The device that MLX computes on, in words. Imports mlx."""

import mlx.core as mx


def device_name() -> str:
    """Return the default device, as `gpu: Apple M4 Max` or `cpu: x86_64`."""
    kind = mx.default_device().type.name
    info = mx.device_info(mx.default_device())
    name = info.get("device_name") or info.get("architecture")
    return f"{kind}: {name}" if name else kind
