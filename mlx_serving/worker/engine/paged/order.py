"""What orders the kernels that use a pool's blocks.

The kernels write to the pools in place, and MLX knows the pools as inputs only. On CUDA, and on
the CPU, kernels run one after the other as they are launched. On Metal only data orders them: one
that takes what another made. `PagedOps.ordered_by_stream` says which it is, and decides two things:

- where it is false, no decode step computes prompts (`cache_choice`);
- where it is false, `finish_writes` waits for all that was launched.

Who reads or rewrites blocks that an earlier kernel may still write or read:

| who | ordered by |
|---|---|
| a decode step, of its rows' blocks | data: its tokens come from the last step, its lengths from all stores |
| a decode step, of a row's next block | the rows that left it were read, or waited for (`settle`) |
| the gather of known blocks for a prefill | `finish_writes` |
| the store of prompts that join, in blocks that rows or gathers left | `finish_writes` |
| the copy of a block that is known in part | `finish_writes` |
| rows that are parked and that go on | `finish_writes` |
| pools that grow, or are moved together | they wait on every device: no step may run meanwhile |
| the last row leaves and known blocks stay | waits on every device |
| a prefill that is dropped after a gather | waits on every device |
| a join that failed and gives its blocks back | waits on every device |

A step is launched as soon as it is built, so to wait for what was launched is enough. What such a
wait raises is that step's error, see `launched`: every one of them is a `wait_for_launched`.
"""  # noqa: E501 - a table

import mlx.core as mx

from mlx_serving.worker.engine.launched import launched_work
from mlx_serving.worker.engine.paged.layers import PagedOps


def wait_for_launched(*stored: mx.array) -> None:
    """Launch stores, and wait for all that was launched.

    Raises:
        LaunchedWorkError: some of it failed.
    """
    with launched_work():
        mx.async_eval(*stored)
        mx.synchronize()


def finish_writes(ops: PagedOps, stored: mx.array) -> None:
    """Wait for steps and stores under way, where nothing else has them come before what follows.

    `stored`: int32 [1], 0; depends on every store so far.

    Raises:
        LaunchedWorkError: see `wait_for_launched`.
    """
    if not ops.ordered_by_stream:
        wait_for_launched(stored)
