"""A web backend that relays jobs to browsers as server-sent events.

    pip install fastapi uvicorn
    uvicorn --app-dir examples fastapi_app:app

    POST   /jobs               submit; answers {"id": …}
    GET    /jobs/{id}/events   the job's events; a browser's EventSource reconnects with
                               Last-Event-ID and goes on where it was, on any server. An event
                               `reset` takes back what came before it: Redis has lost it
    DELETE /jobs/{id}          cancel

A client that goes away stops only the reading. The job itself goes on, unless it was
submitted with `abandon_after`.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from mlx_serving import AsyncClient, Event, MlxServingError, StreamGap
from mlx_serving.common.events import encode
from mlx_serving.common.states import TERMINAL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KEEP_ALIVE_S = 15.0  # proxies close what is silent longer; also notices who has gone

STATUS = {
    "job_not_found": 404,
    "events_gone": 410, "invalid_job": 422, "idempotency_key_reused": 422,
    "payload_too_large": 413,
}  # fmt: skip


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client a process: all its streams share one pub/sub connection."""
    async with AsyncClient() as app.state.client:
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(MlxServingError)
async def refuse(_: Request, error: MlxServingError) -> JSONResponse:
    """Answer with the error's code; 503 where the same request may succeed later."""
    status = STATUS.get(error.code, 503 if error.retryable else 500)
    return JSONResponse({"code": error.code, "message": error.message}, status)


@app.post("/jobs", status_code=202)
async def submit(request: Request, job: dict[str, Any]) -> dict[str, str]:
    """Enqueue a job, given as `GenerationJob` has it; with an `idempotency_key`, once.

    A public service would take a prompt only, and set model, lane and limits itself.
    """
    handle = await client_of(request).submit(job)
    return {"id": handle.id, "state": handle.state}


@app.get("/jobs/{job_id}/events")
async def follow(
    request: Request, job_id: str, last_event_id: Annotated[str, Header()] = ""
) -> Response:
    """Stream the job's events after `Last-Event-ID`; 204 tells EventSource that it is over."""
    try:
        events = client_of(request).stream(job_id, last_event_id)
    except ValueError as error:
        return JSONResponse({"code": "invalid_cursor", "message": str(error)}, 422)
    record = await client_of(request).status(job_id)
    if record.state in TERMINAL:  # events that are gone are the answer's status
        async with aclosing(events):
            with suppress(StreamGap):  # which the relay tells
                if await anext(events, None) is None:
                    return Response(status_code=204)
    return StreamingResponse(
        relay(client_of(request), job_id, last_event_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


@app.delete("/jobs/{job_id}")
async def cancel(request: Request, job_id: str) -> dict[str, str]:
    """Cancel the job; its stream then ends with an `end` event."""
    return {"id": job_id, "state": await client_of(request).cancel(job_id)}


def client_of(request: Request) -> AsyncClient:
    """Client of this process."""
    client: AsyncClient = request.app.state.client
    return client


async def relay(client: AsyncClient, job_id: str, after: str) -> AsyncIterator[str]:
    """Write each event as it comes, and a comment where none came for a while."""
    try:
        async with aclosing(client.stream(job_id, after)) as events:
            async for event in with_pauses(events):
                yield ": still here\n\n" if event is None else as_sse(event)
    except MlxServingError as error:
        yield f'event: error\ndata: {{"code":"{error.code}"}}\n\n'


async def with_pauses(events: AsyncIterator[Event]) -> AsyncIterator[Event | None]:
    """Give the events, and None for each pause; waiting is not cancelled, so none is lost."""
    coming = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE_S)
            if not done:
                yield None
            elif (event := coming.result()) is None:
                return
            else:
                yield event
                coming = asyncio.ensure_future(anext(events, None))
    finally:
        coming.cancel()
        await asyncio.wait({coming})


def as_sse(event: Event) -> str:
    """One server-sent event; its id is the cursor that Last-Event-ID will say."""
    return f"id: {event.cursor}\nevent: {event.type}\ndata: {encode(event).decode()}\n\n"
