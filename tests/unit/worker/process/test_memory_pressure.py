"""The kernel's counters of out-of-memory kills, by files that look like its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.worker.process.memory_pressure import (
    AvailableMemory,
    DarwinProbe,
    LinuxProbe,
    default_probe,
    linux_available,
    parse_vm_stat,
)

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


MEMINFO = "MemTotal:       16000 kB\nMemFree:          100 kB\nMemAvailable:    8000 kB\n"
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10.
Pages active:                            500.
Pages inactive:                           20.
Pages speculative:                         3.
Pages throttled:                           0.
Pages wired down:                        300.
Pages purgeable:                           4.
"Translation faults":                 123456.
"""


def cgroup(root: Path, limit: str, used: int, inactive: int) -> None:
    write(root, "sys/fs/cgroup/memory.max", f"{limit}\n")
    write(root, "sys/fs/cgroup/memory.current", f"{used}\n")
    write(root, "sys/fs/cgroup/memory.stat", f"anon 5\ninactive_file {inactive}\nactive_file 7\n")


def test_available_is_what_the_kernel_estimates(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", MEMINFO)
    assert linux_available(tmp_path) == 8000 * 1024
    cgroup(tmp_path, "max", 5, 5)
    assert linux_available(tmp_path) == 8000 * 1024


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", MEMINFO)
    cgroup(tmp_path, "1000000", 900_000, 50_000)
    assert linux_available(tmp_path) == 150_000
    cgroup(tmp_path, "1000000", 1_100_000, 0)
    assert linux_available(tmp_path) == 0


def test_a_system_that_says_nothing_leaves_it_open(tmp_path: Path) -> None:
    assert linux_available(tmp_path) is None


def test_a_mac_counts_pages_that_can_be_had() -> None:
    assert parse_vm_stat(VM_STAT) == (10 + 20 + 3 + 4) * 16384
    assert parse_vm_stat("vm_stat: no such thing") is None


def test_available_memory_is_asked_in_a_thread() -> None:
    available = AvailableMemory()
    available.start()
    available.stop()
    assert available.value is None or available.value > 0
