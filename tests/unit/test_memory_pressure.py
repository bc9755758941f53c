"""The kernel's counters of out-of-memory kills, by files that look like its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.worker.memory_pressure import DarwinProbe, LinuxProbe, default_probe

if TYPE_CHECKING:
    from pathlib import Path

V2 = ("0::/user.slice/worker\n", "sys/fs/cgroup/user.slice/worker/memory.events")
V2_CONTAINER = ("0::/\n", "sys/fs/cgroup/memory.events")
V1 = ("4:memory:/docker/x\n3:cpu,cpuacct:/\n", "sys/fs/cgroup/memory/docker/x/memory.oom_control")
SYSTEM = ("", "proc/vmstat")


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(("groups", "counter"), [V2, V2_CONTAINER, V1, SYSTEM])
def test_a_counter_that_rose_is_a_sign(tmp_path: Path, groups: str, counter: str) -> None:
    write(tmp_path, "proc/self/cgroup", groups)
    write(tmp_path, counter, "low 0\noom 9\noom_kill 3\n")
    probe = LinuxProbe(tmp_path)
    probe.start()
    assert not probe.pressed()
    write(tmp_path, counter, "low 0\noom 10\noom_kill 4\n")
    assert probe.pressed()


def test_the_whole_systems_counter_is_not_asked_where_our_groups_is_there(tmp_path: Path) -> None:
    """In a container the system's counter tells of other containers' deaths."""
    write(tmp_path, "proc/self/cgroup", V2[0])
    write(tmp_path, V2[1], "oom_kill 0\n")
    write(tmp_path, "proc/vmstat", "oom_kill 5\n")
    probe = LinuxProbe(tmp_path)
    probe.start()
    write(tmp_path, "proc/vmstat", "oom_kill 6\n")
    assert not probe.pressed()


def test_without_any_counter_there_is_no_sign(tmp_path: Path) -> None:
    probe = LinuxProbe(tmp_path)
    probe.start()
    assert not probe.pressed()
    write(tmp_path, "proc/vmstat", "oom_kill 6\n")
    assert not probe.pressed()


def test_this_systems_probe_works() -> None:
    probe = default_probe()
    probe.start()
    assert probe.pressed() in {True, False}


def test_a_mac_without_the_tool_shows_no_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("subprocess.run", missing)
    assert not DarwinProbe().pressed()
