"""Live streams through Redis against as many from another server over HTTP, in turn.

    python -m benchmarks.peers.streams --model 0.6b --streams 64 --tokens 192 --settings 1,8

Ours is the real worker, a real redis-server and `AsyncClient`; the peer is mlx-lm's own server
(or vllm-mlx, see peers.py), read by server-sent events. Both run the same model folder on the
same device, and the same two processes consume both: each stream is asked for at the same moment,
as a user would (`submit` then `stream`; one POST). The peer gets what serves it best: connections
that are open before the clock starts (mlx_lm.server's listen queue holds five), as many decoding
rows as there are streams, no seed (it serves a request with a seed alone), at most eight settings
(mlx-lm compiles each top_p it has not seen), and a first pass that is not counted: what that pass
took longer than the same again stands in a row of its own, as the cold cost.

Tokens/s: all tokens over the time from the first request to the last token. TTFT: from a
stream's request to its first token. Settings 0 is greedy; n gives the streams n different pairs
of temperature and top_p, in turn.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

from benchmarks.contract.streaming import CONSUMERS, RUN_SECONDS, Load, engine_spec
from benchmarks.lib.harness import (
    MODEL,
    Child,
    Figure,
    Goal,
    bench_settings,
    child_call,
    percentile,
    progress,
    running_worker,
    table,
)
from benchmarks.peers.servers import HOST, PEERS, running_peer
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import Settings

MODELS: Final = ("tiny", "0.6b")
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


def _consume(connection: Connection, settings: Settings, port: int, model: str) -> None:
    connection.send("ready")
    while (order := connection.recv()) is not None:
        kind, asked = order
        if kind == "ours":
            heard = asyncio.run(_through_redis(connection, settings, asked))
        else:
            named = [fields | {"model": model} for fields in asked]
            heard = asyncio.run(_over_http(connection, port, named))
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
        f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            break
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        if any(choice["text"] for choice in event["choices"]):
            times.append(time.monotonic())
    writer.close()
    times = times or [time.monotonic()]
    return Heard(begun, times[0], times[-1], tokens)


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
        ours, theirs = self.run("ours", asked), self.run("peer", asked)
        progress(
            f"settings {settings}, {tokens} tokens: "
            f"ours {ours.seconds:.2f} s, peer {theirs.seconds:.2f} s"
        )
        return ours, theirs

    def bout(self, load: Load, settings: int, rounds: int) -> Bout:
        """Cold, warm, then the rounds that count."""
        first = settings * 100
        cold = self.both(load.streams, WARM_TOKENS, settings, first)
        warm = self.both(load.streams, WARM_TOKENS, settings, first + 1)
        counted = [
            self.both(load.streams, load.tokens, settings, first + 2 + number)
            for number in range(rounds)
        ]
        return Bout(settings, cold, warm, counted)


@contextmanager
def staged(load: Load, peer: str, peer_command: str) -> Iterator[Contest]:
    """Bring all processes up."""
    with ExitStack() as stack:
        server = stack.enter_context(LocalRedis())
        client = stack.enter_context(server.client())
        overrides: Fields = {"batch__max_rows": load.streams}
        if load.flush_ms is not None:
            overrides["worker__flush_interval_ms"] = load.flush_ms
        settings = bench_settings(server.url, **overrides)
        spec = stack.enter_context(engine_spec(load))
        port = stack.enter_context(running_peer(peer, peer_command, spec.model_path, load.streams))
        stack.enter_context(running_worker(settings, spec, client))
        progress("the worker is up")
        consumers = [
            child_call(_consume, settings, port, spec.model_path) for _ in range(CONSUMERS)
        ]
        for consumer in consumers:
            stack.callback(consumer.end)
            stack.callback(consumer.send, None)
            consumer.receive(str)
        yield Contest(consumers)


def measure(
    load: Load,
    settings: Sequence[int] = (1, 8),
    rounds: int = 3,
    peer: str = PEERS[0],
    peer_command: str = "",
) -> list[Figure]:
    """Figures of every number of settings."""
    with staged(load, peer, peer_command) as contest:
        contest.both(load.streams, WARM_TOKENS, 0, 9999)  # loads and first compiles of both
        bouts = []
        for number in settings:
            bouts.append(contest.bout(load, number, rounds))
            print(table({"so far": figures(bouts[-1], peer)}), file=sys.stderr, flush=True)
    return [figure for bout in bouts for figure in figures(bout, peer)]


def figures(bout: Bout, peer: str = PEERS[0]) -> list[Figure]:
    """Medians of the rounds; each ratio within its round."""
    name = {0: "greedy", 1: "1 setting"}.get(bout.settings, f"{bout.settings} settings")
    median = Figure.median
    pairs = bout.rounds
    speed = [ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs]
    wait = [ours.ttft(50) / theirs.ttft(50) for ours, theirs in pairs]
    gated = peer == PEERS[0]
    return [
        median(f"{name}: through Redis", [o.tokens_per_second for o, _ in pairs], "tokens/s"),
        median(f"{name}: {peer}", [p.tokens_per_second for _, p in pairs], "tokens/s"),
        *(
            median(f"{name}: TTFT p{percent}, {who}", [p[side].ttft(percent) * 1e3 for p in pairs],
                   "ms")
            for percent in (50, 99)
            for side, who in enumerate(("through Redis", peer))
        ),
        *_cold(name, bout, peer),
        median(f"{name}: tokens/s over {peer}", speed, "×",
               GOALS.get(bout.settings) if gated else None),
        median(f"{name}: TTFT p50 over {peer}", wait, "×",
               TTFT_GOAL if gated and bout.settings == 1 else None),
    ]  # fmt: skip


def _cold(name: str, bout: Bout, peer: str) -> list[Figure]:
    """What settings never seen before cost: the first pass less the same pass again."""
    return [
        Figure.median(f"{name}: cold cost, {who}", [cold.seconds - warm.seconds], "s")
        for who, cold, warm in zip(("through Redis", peer), bout.cold, bout.warm, strict=True)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="0.6b")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=192, help="of each stream")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--flush-ms", type=float, help="the worker's worker.flush_interval_ms")
    parser.add_argument("--folder", help="keep the synthetic model here, or use the one there")
    parser.add_argument("--settings", default="1,8", help="numbers of settings; 0: greedy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", choices=PEERS, default=PEERS[0])
    parser.add_argument("--peer-command", default="vllm-mlx", help="vllm-mlx of its environment")
    options = vars(parser.parse_args())
    settings = [int(number) for number in options.pop("settings").split(",")]
    rounds, peer, command = (options.pop(n) for n in ("rounds", "peer", "peer_command"))
    load = Load(**options)
    title = f"{load.streams} streams, {load.model}, through Redis against {peer}"
    print(table({title: measure(load, settings, rounds, peer, command)}))


if __name__ == "__main__":
    main()
