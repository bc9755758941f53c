"""Live streams through Redis against as many from `mlx_lm.server` over HTTP, in turn.

    python -m benchmarks.server --model 0.6b --streams 64 --tokens 192 --settings 1,8 --rounds 3

Ours is the real worker, a real redis-server and `AsyncClient`; the peer is mlx-lm's own server,
read by server-sent events. Both run the same model folder on the same device, and the same two
processes consume both: each stream is asked for at the same moment, as a user would (`submit`
then `stream`; one POST). The peer gets what serves it best: connections that are open before the
clock starts (its listen queue holds five), as many decoding rows as there are streams, no seed
(it serves a request with a seed alone), at most eight settings (it compiles each top_p it has
not seen), and a first pass that is not counted. That pass's time is a row of its own.

Tokens/s: all tokens over the time from the first request to the last token. TTFT: from a
stream's request to its first token. Settings 0 is greedy; n gives the streams n different pairs
of temperature and top_p, in turn.
"""

import argparse
import asyncio
import json
import logging
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

from benchmarks.harness import (
    MODEL,
    START_SECONDS,
    Child,
    Figure,
    Goal,
    bench_settings,
    child_call,
    percentile,
    progress,
    running_worker,
    table,
    wait_until,
)
from benchmarks.streaming import CONSUMERS, RUN_SECONDS, Load, engine_spec
from mlx_serving.common.local_redis import LocalRedis
from mlx_serving.common.settings import Settings

MODELS: Final = ("tiny", "0.6b")
HOST: Final = "127.0.0.1"
WARM_TOKENS: Final = 16
GOALS: Final = {1: Goal("≥", 1.3), 8: Goal("≥", 1.5)}  # tokens/s over the peer's, by settings
TTFT_GOAL: Final = Goal("≤", 0.7)

Fields = dict[str, Any]  # of one request, in the OpenAI API's words, which both sides take


@dataclass(frozen=True)
class Heard:
    """One stream as its consumer saw it; times are seconds of CLOCK_MONOTONIC."""

    asked: float
    first: float
    last: float
    tokens: int


@dataclass(frozen=True)
class Pass:
    """All streams of one contestant in one round."""

    streams: Sequence[Heard]

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(s.last for s in self.streams) - min(s.asked for s in self.streams)

    @property
    def tokens_per_second(self) -> float:
        """All tokens over that time."""
        return sum(s.tokens for s in self.streams) / self.seconds

    def ttft(self, percent: int) -> float:
        """Percentile of the seconds to a stream's first token."""
        return percentile([s.first - s.asked for s in self.streams], percent)


@dataclass(frozen=True)
class Bout:
    """One number of settings: a first, uncounted pass of each side, then rounds of both."""

    settings: int
    cold: tuple[Pass, Pass]  # ours, theirs: nothing of these settings was run before
    warm: tuple[Pass, Pass]  # the same number of tokens again
    rounds: Sequence[tuple[Pass, Pass]]


def requests(streams: int, tokens: int, settings: int, number: int) -> list[Fields]:
    """Return every stream's request; `number` makes the prompts new to any prefix cache."""
    return [
        {"prompt": f"{stream:04d} {number:04d} {'abcdefgh ' * 3}", "max_tokens": tokens}
        | sampling(stream, settings)
        for stream in range(streams)
    ]


def sampling(stream: int, settings: int) -> Fields:
    """One of `settings` pairs; 0: greedy."""
    if not settings:
        return {"temperature": 0.0}
    turn = stream % settings
    return {"temperature": 0.8 + 0.05 * turn, "top_p": 0.95 - 0.02 * turn}


# A consumer's process


def _consume(connection: Connection, settings: Settings, port: int) -> None:
    connection.send("ready")
    while (order := connection.recv()) is not None:
        kind, asked = order
        if kind == "ours":
            heard = asyncio.run(_through_redis(connection, settings, asked))
        else:
            heard = asyncio.run(_over_http(connection, port, asked))
        connection.send(heard)


async def _started(connection: Connection) -> None:
    """Say that everything is ready, and wait for the start."""
    connection.send("ready")
    await asyncio.to_thread(connection.recv)


async def _through_redis(
    connection: Connection, settings: Settings, asked: Sequence[Fields]
) -> list[Heard]:
    from mlx_serving.producer.async_client import AsyncClient

    async with AsyncClient(settings=settings) as client:

        async def follow(fields: Fields) -> Heard:
            begun, times, tokens = time.monotonic(), [], 0
            handle = await client.submit({"model": MODEL, **fields})
            async for event in client.stream(handle.id):
                if count := sum(len(choice.token_ids) for choice in event.choices):
                    times.append(time.monotonic())
                    tokens += count
            return Heard(begun, times[0], times[-1], tokens)

        await client.submit({"model": MODEL, "prompt": "connect", "max_tokens": 1})
        await _started(connection)
        return await asyncio.gather(*map(follow, asked))


async def _over_http(connection: Connection, port: int, asked: Sequence[Fields]) -> list[Heard]:
    opened = [await asyncio.open_connection(HOST, port) for _ in asked]
    await _started(connection)
    return await asyncio.gather(
        *(_post(*streams, fields) for streams, fields in zip(opened, asked, strict=True))
    )


async def _post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fields: Fields
) -> Heard:
    """Ask for one completion and read its server-sent events."""
    body = json.dumps(fields | {"stream": True, "stream_options": {"include_usage": True}})
    begun, times, tokens = time.monotonic(), [], 0
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if usage := event.get("usage"):
            tokens = usage["completion_tokens"]
        else:
            times.append(time.monotonic())
    writer.close()
    return Heard(begun, times[0], times[-1], tokens)


# The peer's process


def _serve_peer(connection: Connection, folder: str, port: int, streams: int) -> None:
    connection.send("starting")
    from mlx_lm.server import APIHandler, main

    setattr(APIHandler, "log_message", lambda *_: None)  # noqa: B010 - a line a request costs it
    logging.disable(logging.INFO)
    sys.argv = [
        "mlx_lm.server", "--model", folder, "--host", HOST, "--port", str(port),
        "--decode-concurrency", str(streams), "--log-level", "WARNING",
    ]  # fmt: skip
    main()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@contextmanager
def running_peer(folder: str, streams: int) -> Iterator[int]:
    """Run `mlx_lm.server`; yields its port."""
    port = _free_port()
    peer = child_call(_serve_peer, folder, port, streams)
    try:
        peer.receive(str)
        wait_until(
            lambda: _listens(port) or not peer.process.is_alive(),
            every=0.1, timeout=START_SECONDS, what="mlx_lm.server listens",
        )  # fmt: skip
        if not peer.process.is_alive():
            raise RuntimeError(f"mlx_lm.server ended with status {peer.process.exitcode}")
        yield port
    finally:
        peer.process.terminate()
        peer.end()


# The contest


@dataclass(frozen=True)
class Contest:
    """Both contestants, up, and the processes that listen to them."""

    consumers: Sequence[Child]

    def run(self, kind: str, asked: Sequence[Fields]) -> Pass:
        """Let one contestant answer all requests."""
        for number, consumer in enumerate(self.consumers):
            consumer.send((kind, asked[number :: len(self.consumers)]))
        for consumer in self.consumers:
            consumer.receive(str)
        for consumer in self.consumers:
            consumer.send("go")
        heard = [h for consumer in self.consumers for h in consumer.receive(list, RUN_SECONDS)]
        if any(stream.tokens == 0 for stream in heard):
            raise RuntimeError(f"{kind}: a stream ended without a token")
        return Pass(heard)

    def both(self, streams: int, tokens: int, settings: int, number: int) -> tuple[Pass, Pass]:
        """Ours, then the peer's, on the same requests."""
        asked = requests(streams, tokens, settings, number)
        return self.run("ours", asked), self.run("peer", asked)

    def bout(self, load: Load, settings: int, rounds: int) -> Bout:
        """Cold, warm, then the rounds that count."""
        first = settings * 100
        cold = self.both(load.streams, WARM_TOKENS, settings, first)
        warm = self.both(load.streams, WARM_TOKENS, settings, first + 1)
        progress(f"settings {settings}: warm")
        counted = []
        for number in range(rounds):
            counted.append(self.both(load.streams, load.tokens, settings, first + 2 + number))
            progress(f"settings {settings}: round {number + 1} of {rounds}")
        return Bout(settings, cold, warm, counted)


@contextmanager
def staged(load: Load) -> Iterator[Contest]:
    """Bring all processes up."""
    with ExitStack() as stack:
        server = stack.enter_context(LocalRedis())
        client = stack.enter_context(server.client())
        overrides: Fields = {"max_batch_rows": load.streams}
        if load.flush_ms is not None:
            overrides["flush_interval_ms"] = load.flush_ms
        settings = bench_settings(server.url, **overrides)
        spec = stack.enter_context(engine_spec(load))
        port = stack.enter_context(running_peer(spec.model_path, load.streams))
        stack.enter_context(running_worker(settings, spec, client))
        progress("the worker is up")
        consumers = [child_call(_consume, settings, port) for _ in range(CONSUMERS)]
        for consumer in consumers:
            stack.callback(consumer.end)
            stack.callback(consumer.send, None)
            consumer.receive(str)
        yield Contest(consumers)


def measure(load: Load, settings: Sequence[int] = (1, 8), rounds: int = 3) -> list[Figure]:
    """Figures of every number of settings."""
    with staged(load) as contest:
        contest.both(load.streams, WARM_TOKENS, 0, 9999)  # loads and first compiles of both
        progress("both have answered")
        bouts = []
        for number in settings:
            bouts.append(contest.bout(load, number, rounds))
            print(table({f"settings {number}": figures(bouts[-1])}), file=sys.stderr, flush=True)
    return [figure for bout in bouts for figure in figures(bout)]


def figures(bout: Bout) -> list[Figure]:
    """Medians of the rounds; each ratio within its round."""
    name = {0: "greedy", 1: "1 setting"}.get(bout.settings, f"{bout.settings} settings")
    median = Figure.median
    pairs = bout.rounds
    speed = [ours.tokens_per_second / peer.tokens_per_second for ours, peer in pairs]
    wait = [ours.ttft(50) / peer.ttft(50) for ours, peer in pairs]
    return [
        median(f"{name}: through Redis", [o.tokens_per_second for o, _ in pairs], "tokens/s"),
        median(f"{name}: mlx_lm.server", [p.tokens_per_second for _, p in pairs], "tokens/s"),
        median(f"{name}: TTFT p50, through Redis", [o.ttft(50) * 1e3 for o, _ in pairs], "ms"),
        median(f"{name}: TTFT p50, mlx_lm.server", [p.ttft(50) * 1e3 for _, p in pairs], "ms"),
        median(f"{name}: TTFT p99, through Redis", [o.ttft(99) * 1e3 for o, _ in pairs], "ms"),
        median(f"{name}: TTFT p99, mlx_lm.server", [p.ttft(99) * 1e3 for _, p in pairs], "ms"),
        *_cold(name, bout),
        median(f"{name}: tokens/s over mlx_lm.server", speed, "×", GOALS.get(bout.settings)),
        median(f"{name}: TTFT p50 over mlx_lm.server", wait, "×",
               TTFT_GOAL if bout.settings == 1 else None),
    ]  # fmt: skip


def _cold(name: str, bout: Bout) -> list[Figure]:
    """What settings never seen before cost: the first pass less the same pass again."""
    return [
        Figure.median(f"{name}: cold cost, {who}", [cold.seconds - warm.seconds], "s")
        for who, cold, warm in zip(
            ("through Redis", "mlx_lm.server"), bout.cold, bout.warm, strict=True
        )
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="0.6b")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=192, help="of each stream")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--flush-ms", type=float, help="the worker's flush_interval_ms")
    parser.add_argument("--folder", help="keep the synthetic model here, or use the one there")
    parser.add_argument("--settings", default="1,8", help="numbers of settings; 0: greedy")
    parser.add_argument("--rounds", type=int, default=3)
    options = vars(parser.parse_args())
    settings = [int(number) for number in options.pop("settings").split(",")]
    rounds = options.pop("rounds")
    load = Load(**options)
    title = f"{load.streams} streams, {load.model}, through Redis against mlx_lm.server"
    print(table({title: measure(load, settings, rounds)}))


if __name__ == "__main__":
    main()
