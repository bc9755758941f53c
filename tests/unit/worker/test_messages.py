"""Messages to the main loop come out in order, and nobody waits to leave one."""

from __future__ import annotations

import queue

import pytest

from mlx_serving.worker.messages import Messages


def test_they_come_out_in_the_order_in_which_they_were_left() -> None:
    messages = Messages()
    messages.post("wake", "tally:bulk")
    messages.post("drain")
    assert messages.get(timeout=1) == ("wake", "tally:bulk")
    assert messages.get_nowait() == ("drain", "")


def test_when_there_is_none_that_is_said() -> None:
    messages = Messages()
    with pytest.raises(queue.Empty):
        messages.get(timeout=0.001)
    with pytest.raises(queue.Empty):
        messages.get_nowait()
