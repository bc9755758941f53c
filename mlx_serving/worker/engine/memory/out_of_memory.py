"""Tells a device that ran out of memory from other errors of MLX, which has no type for it. Pure.

Metal: "[metal::malloc] Resource limit (499000) exceeded.", "… greater than the maximum allowed
buffer size …", "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)". CUDA:
"cudaMallocAsync(…) failed: out of memory", "[malloc] Unable to allocate … bytes".
"""

import re
from typing import Final

_SIGNS: Final = re.compile(
    r"out of memory|OutOfMemory|insufficient memory|unable to allocate|\[metal::malloc\]"
    r"|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether the error is the device's lack of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ValueError) and bool(_SIGNS.search(str(error)))
    )
