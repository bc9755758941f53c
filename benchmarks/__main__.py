"""Every benchmark: one table and one JSON file under benchmarks/results/.

python -m benchmarks                    # all, P1-P3 on a tiny shape where MLX has no GPU
python -m benchmarks --quick            # all, small: does it run, not what does it say
python -m benchmarks --only p6,p7
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.contract import dispatch, lanes, latency, scale, streaming
from benchmarks.lib.harness import Figure, Goal, machine, table
from benchmarks.lib.scale_report import QUICK, SMALL, Plan
from benchmarks.peers import streams
from benchmarks.studies import affinity, grouping, tenants

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = Path(__file__).parent / "results"
ENGINE_GOALS: Final = {  # of 64 rows on a GPU
    "P1_greedy_over_bare[64]": Goal("≤", 1.05),
    "P2_mixed_over_bare[64]": Goal("≤", 1.15),
    "P3_first_over_steady[64]": Goal("≤", 1.5),
}
HAS_GPU: Final = (
    "import mlx.core as mx, sys; sys.exit(mx.default_device().type != mx.DeviceType.gpu)"
)


def run_module(name: str, *arguments: str) -> str:
    """Standard output of a benchmark in a process of its own: MLX stays out of this one."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def has_gpu() -> bool:
    """Whether MLX computes on a GPU here."""
    return not subprocess.run([sys.executable, "-c", HAS_GPU], check=False).returncode


def module_figures(name: str, *arguments: str) -> list[Figure]:
    """Figures of a benchmark that imports MLX and takes --output."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        run_module(name, *arguments, "--output", str(output))
        return [Figure.from_json(figure) for figure in json.loads(output.read_text())]


def module_report(name: str, *arguments: str) -> dict[str, Any]:
    """What a benchmark that imports MLX writes as one object of plain numbers."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        run_module(name, *arguments, "--output", str(output))
        report: dict[str, Any] = json.loads(output.read_text())
        return report


def engine(*, quick: bool) -> list[Figure]:
    """P1, P2, P3: the 0.6B shape on a GPU, a tiny one on a CPU."""
    if quick or not has_gpu():
        size = ["--batch", "8", "--steps", "10"] if quick else ["--batch", "64", "--steps", "100"]
        return step_figures("tiny", "--dtype", "float32", *size)
    return step_figures("0.6b", "--batch", "64,8,1", "--steps", "100")


def engine_8b(*, quick: bool) -> list[Figure]:
    """P1, P2, P3 of the 8B shape, which needs a GPU of 40 GB."""
    if quick or not has_gpu():
        return []
    return step_figures("8b", "--batch", "64,1", "--steps", "50")


def step_figures(shape: str, *arguments: str) -> list[Figure]:
    """Run `benchmarks.contract.engine`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "engine.json"
        run_module("contract.engine", "--shape", shape, *arguments, "--output", str(output))
        report: dict[str, Any] = json.loads(output.read_text())
    goals = ENGINE_GOALS if shape == "0.6b" else {}
    return [
        Figure(f"{name} {shape}", value, _unit(name), goals.get(name))
        for name, value in report.items()
        if isinstance(value, float)
    ]


def structured(*, quick: bool) -> list[Figure]:
    """A step of constrained rows over one of free rows, on the shape that `engine` takes."""
    shape = "0.6b" if has_gpu() and not quick else "tiny"
    size = ["--batch", "8", "--steps", "10"] if quick else ["--batch", "64", "--steps", "100"]
    dtype = "bfloat16" if shape == "0.6b" else "float32"
    report = module_report("studies.structured", "--shape", shape, "--dtype", dtype, *size)
    goals = {"all_over_free": Goal("≤", 1.2)}
    return [
        Figure(f"{name} [{shape}]", value, _unit(name), goals.get(name))
        for name, value in report.items()
        if isinstance(value, float)
    ]


def _unit(name: str) -> str:
    if "GB_s" in name:
        return "GB/s"
    return "ms" if "_ms" in name else "×"


def churn(*, quick: bool) -> list[Figure]:
    """Jobs that come and go, against BatchGenerator."""
    if quick:
        return module_figures("peers.churn", "--batch", "8", "--steps", "10", "--rounds", "1")
    return module_figures("peers.churn", "--shape", "0.6b" if has_gpu() else "tiny")


def ragged(*, quick: bool) -> list[Figure]:
    """One long row among short ones."""
    if quick:
        size = ("--batch", "4", "--long", "600", "--steps", "5", "--rounds", "1")
        return module_figures("studies.ragged", *size)
    return module_figures("studies.ragged", "--shape", "0.6b" if has_gpu() else "tiny")


def peer_server(*, quick: bool) -> list[Figure]:
    """Streams through Redis against `mlx_lm.server`."""
    if quick:
        return streams.measure(streaming.Load("tiny", streams=4, tokens=20), (0,), rounds=1)
    return streams.measure(streaming.Load("0.6b" if has_gpu() else "tiny", tokens=192))


def timeline(*, quick: bool) -> list[Figure]:
    """Parts of a step on the host."""
    if quick or not has_gpu():
        size = ("--streams", "8", "--steps", "10") if quick else ()
        return module_figures("studies.timeline", "--model", "tiny", "--dtype", "float32", *size)
    return module_figures("studies.timeline", "--model", "0.6b")


def stream(*, quick: bool) -> list[Figure]:
    """P4: on the model that gates where there is a GPU, else simulated."""
    if quick:
        return streaming.measure(streaming.Load(streams=8, tokens=30), rounds=1)
    model = "0.6b" if has_gpu() else "simulated"
    return streaming.measure(streaming.Load(model))


def dispatch_no_ops(*, quick: bool) -> list[Figure]:
    """P6."""
    return dispatch.measure(500, 60, 1) if quick else dispatch.measure()


def wake_up(*, quick: bool) -> list[Figure]:
    """P7."""
    return latency.measure(20, 1) if quick else latency.measure()


def scale_out(*, quick: bool) -> list[Figure]:
    """P8: all of it where there are cores, a little of it elsewhere; Linux only, for its /proc."""
    if sys.platform != "linux":
        return []
    return scale.measure(QUICK if quick else SMALL if scale.cores() < 16 else Plan())


def prefixes(*, quick: bool) -> list[Figure]:
    """P5: prompt tokens computed over unique ones."""
    report = module_report("studies.prefix", *(("--rounds", "1") if quick else ()))
    goals = {"with_cache_1024_computed_over_unique": Goal("≤", 1.1)}
    return [
        Figure(name, value, _unit(name), goals.get(name))
        for name, value in report.items()
        if isinstance(value, float)
    ]


def lane_load(*, quick: bool) -> list[Figure]:
    """Interactive jobs beside bulk: simulated, and on a model that fits the device."""
    if quick:
        return lanes.measure(lanes.Load(rows=8, bulk_tokens=24, seconds=2.0))
    gpu = has_gpu()
    real = lanes.Load("0.6b", bulk_tokens=256) if gpu else lanes.Load("tally", rows=16)
    return [
        replace(figure, name=f"{figure.name} [{load.model}]")
        for load in (lanes.Load(), real)
        for figure in lanes.measure(load)
    ]


def chats(*, quick: bool) -> list[Figure]:
    """Chats over two workers."""
    if quick:
        return affinity.measure(affinity.Bench(talks=2, turns=2, rate=2, think=0.1), rounds=1)
    return affinity.measure()


def detokenizer(*, quick: bool) -> list[Figure]:
    """Native and twin."""
    del quick
    report = json.loads(run_module("studies.detokenizer"))
    return [Figure(n, v, "µs/step") for n, v in report.items() if isinstance(v, float)]


def sampler(*, quick: bool) -> list[Figure]:
    """The reference and the native piece: a whole batch on a GPU, a small one on a CPU."""
    size = ["--rows", "4", "--vocabulary", "1000", "--calls", "2", "--rounds", "1"]
    if not quick:
        size = [] if has_gpu() else ["--rows", "8", "--vocabulary", "32000", "--dtype", "float32"]
    return [
        Figure(name, value, "×" if name.endswith("over native") else "ms")
        for name, value in module_report("studies.sampler", *size).items()
        if isinstance(value, float)
    ]


def grouped(*, quick: bool) -> list[Figure]:
    """Bulk lines by prefix and in the file's order: a big shape on a GPU, Tally elsewhere."""
    if quick:
        return grouping.measure(grouping.Bench("tiny", 60, 64, 8), grouping.CASES[2:3])
    if has_gpu():
        return grouping.measure(grouping.Bench("0.6b", prefix=1024, rows=64))
    return grouping.measure()


def tenants_in_the_lane(*, quick: bool) -> list[Figure]:
    """Redis's time of a claim."""
    return tenants.measure(500, 3) if quick else tenants.measure()


BENCHMARKS: Final[dict[str, tuple[str, Callable[..., list[Figure]]]]] = {
    "engine": ("P1 P2 P3 decode step over a bare loop", engine),
    "8b": ("P1 P2 P3 of the 8B shape, on a GPU", engine_8b),
    "churn": ("Jobs that come and go, over mlx-lm's BatchGenerator", churn),
    "ragged": ("One long row among short ones", ragged),
    "server": ("64 live streams through Redis, over mlx_lm.server", peer_server),
    "timeline": ("A decode step of 64 rows on the host", timeline),
    "p4": ("P4 64 live streams through Redis over the in-process engine", stream),
    "p6": ("P6 dispatch of no-op jobs", dispatch_no_ops),
    "p7": ("P7 idle enqueue → started", wake_up),
    "p8": ("P8 simulated workers on one Redis, throughput over linear", scale_out),
    "lanes": ("Interactive jobs beside a full bulk load", lane_load),
    "detokenizer": ("Detokenizer, 64 rows", detokenizer),
    "sampler": ("Sampler alone", sampler),
    "p5": ("P5 64 jobs that share a prefix, and the index of prefixes", prefixes),
    "grouping": ("2,000 bulk lines with 20 beginnings, by prefix and as they stand", grouped),
    "affinity": ("Chats over two workers, prefix affinity off and on", chats),
    "tenants": ("Claims of 32 with tenants in the lane", tenants_in_the_lane),
    "structured": ("Structured output: 64 rows by schemas over 64 free ones", structured),
}
ALIASES: Final = {"p1": "engine", "p2": "engine", "p3": "engine"}


def chosen(only: str) -> list[str]:
    """Names of the benchmarks to run. Raises ValueError for one that there isn't."""
    if not only:
        return list(BENCHMARKS)
    names = dict.fromkeys(ALIASES.get(n.strip().lower(), n.strip().lower())
                          for n in only.split(","))  # fmt: skip
    if unknown := names.keys() - BENCHMARKS.keys():
        known = ", ".join([*ALIASES, *BENCHMARKS])
        raise ValueError(f"no benchmark {', '.join(sorted(unknown))}; there are {known}")
    return list(names)


def run(names: Sequence[str], *, quick: bool) -> dict[str, list[Figure]]:
    """Figures by title; each benchmark says when it starts."""
    reports = {}
    for name in names:
        title, measure = BENCHMARKS[name]
        print(f"{name} …", file=sys.stderr, flush=True)
        started = time.perf_counter()
        reports[title] = measure(quick=quick)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return reports


def save(path: Path, reports: dict[str, list[Figure]], facts: dict[str, Any]) -> None:
    """Write the JSON file."""
    data = facts | {"benchmarks": {t: [f.as_json() for f in fs] for t, fs in reports.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="small runs; their figures say little")
    parser.add_argument("--only", default="", help=f"of {', '.join([*ALIASES, *BENCHMARKS])}")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/<time>")
    options = parser.parse_args()
    try:
        names = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    now = datetime.now(UTC)
    facts = {"at": now.isoformat(timespec="seconds"), "quick": options.quick, "machine": machine()}
    reports = run(names, quick=options.quick)
    print(table(reports))
    path = options.output or RESULTS / f"{now:%Y%m%dT%H%M%SZ}.json"
    save(path, reports, facts)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
