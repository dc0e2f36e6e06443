"""The service behind OpenAI's completions API: an ASGI application (Starlette), any server can run it.

  POST /v1/completions   also streamed, as server-sent events
  GET  /v1/models        GET /health        GET /metrics (Prometheus' text format, version 0.0.4)

Too many requests are answered with 429 before anything is accepted. A client that hangs up frees its blocks.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from labs.serving.completion_request import Completion, Refused, parse
from labs.serving.completion_text import Text
from labs.serving.dispatch import Overloaded
from labs.serving.prometheus import exposition
from labs.serving.request import Request
from labs.serving.service import Closing, Service, Stream, Unfinished

MOST_BYTES = 4 * 2**20  # of a request's body


class Endpoint:
    """model: its name. api_key: what /v1 asks for, or "". wall: seconds since 1970."""

    def __init__(self, service: Service, model: str, wall: Callable[[], float], api_key: str = "") -> None:
        self.service, self.model, self.wall, self.api_key = service, model, wall, api_key
        self._numbers = itertools.count(1)
        self._started = int(wall())

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ]
        )

    async def health(self, request: HttpRequest) -> Response:
        alive, all_of_them = sum(self.service.dispatcher.alive), len(self.service.workers)
        failure = self.service.failure
        status = str(failure) if failure else "ok" if alive == all_of_them else "degraded"
        content = {"status": status, "workers": all_of_them, "alive": alive}
        return JSONResponse(content, 503 if failure else 200)

    async def metrics(self, request: HttpRequest) -> Response:
        return PlainTextResponse(
            exposition(self.service), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def models(self, request: HttpRequest) -> Response:
        if not self._allowed(request):
            return _unauthorized()
        one = {"id": self.model, "object": "model", "created": self._started, "owned_by": "perflab"}
        return JSONResponse({"object": "list", "data": [one]})

    async def completions(self, request: HttpRequest) -> Response:
        if not self._allowed(request):
            return _unauthorized()
        try:
            asked = parse(await _body(request), self.model)
            streams = self._submit(asked)
        except Refused as error:
            return _error(error.status, str(error), "invalid_request_error", error.parameter)
        except Overloaded as error:
            return _error(429, str(error), "rate_limit_error", headers={"Retry-After": "1"})
        except Closing as error:
            return _error(503, str(error), "server_error")
        except ClientDisconnect:
            return Response(status_code=499)
        head = {"id": f"cmpl-{streams[0].number}", "created": int(self.wall()), "model": self.model}
        head["object"] = "text_completion"
        if asked.stream:
            events = _events(asked, streams, head)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        return await self._whole(request, asked, streams, head)

    def _allowed(self, request: HttpRequest) -> bool:
        if not self.api_key:
            return True
        given = request.headers.get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self.api_key}".encode())

    def _submit(self, asked: Completion) -> list[Stream]:
        """All prompts, or none where one is refused."""
        if len(asked.prompts) > self.service.limit:  # it is no use to come again
            raise Refused(
                f"{len(asked.prompts)} prompts in one request; {self.service.limit} are served at a time",
                "prompt",
            )
        streams: list[Stream] = []
        try:
            for index, prompt in enumerate(asked.prompts):
                request = Request(
                    next(self._numbers),
                    prompt,
                    asked.most,
                    temperature=asked.temperature,
                    seed=asked.seed + index,
                )
                streams.append(self.service.submit(request))
        except (ValueError, Overloaded, Closing) as error:
            for stream in streams:
                stream.cancel()
            if isinstance(error, ValueError):
                raise Refused(str(error), "prompt") from None
            raise
        return streams

    async def _whole(
        self, request: HttpRequest, asked: Completion, streams: Sequence[Stream], head: dict[str, Any]
    ) -> Response:
        gathering: asyncio.Future[Any] = asyncio.gather(*(_text(stream, asked) for stream in streams))
        hung_up: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([gathering, hung_up], return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():
                return Response(status_code=499)  # nobody reads it
            found = gathering.result()
        except (Closing, Unfinished) as error:
            return _error(503, str(error), "server_error")
        finally:
            hung_up.cancel()
            gathering.cancel()
            for stream in streams:
                stream.cancel()
        choices = [_choice(index, text, reason) for index, (text, reason, _) in enumerate(found)]
        usage = _usage(asked, sum(count for _, _, count in found))
        return JSONResponse({**head, "choices": choices, "usage": usage})


async def _body(request: HttpRequest) -> bytes:
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > MOST_BYTES:
            raise Refused(f"the body has more than {MOST_BYTES} bytes", status=413)
    return bytes(found)


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _pieces(stream: Stream, asked: Completion) -> AsyncIterator[tuple[str, str | None]]:
    """(text, why it ended or None) for each token."""
    text = Text(asked.stops)
    try:
        async for token, _ in stream:
            piece = text.feed(token.token)
            if text.stopped:
                yield piece, "stop"
                return
            if token.finished:
                yield piece + text.end(), token.finished
                return
            yield piece, None
    finally:
        stream.cancel()


async def _text(stream: Stream, asked: Completion) -> tuple[str, str, int]:
    """(text, why it ended, tokens written)."""
    found, reason, count = [], "length", 0
    async for piece, ended in _pieces(stream, asked):
        found.append(piece)
        count += 1
        reason = ended or reason
    return "".join(found), reason, count


async def _events(asked: Completion, streams: Sequence[Stream], head: dict[str, Any]) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each token that gave text, all prompts mixed as they come."""
    pieces: asyncio.Queue[tuple[int, str, str | None] | Exception] = asyncio.Queue()
    written = 0

    async def follow(index: int, stream: Stream) -> None:
        try:
            async for piece, ended in _pieces(stream, asked):
                await pieces.put((index, piece, ended))
        except Exception as error:
            await pieces.put(error)

    tasks = [asyncio.ensure_future(follow(index, stream)) for index, stream in enumerate(streams)]
    try:
        open_ones = len(streams)
        while open_ones:
            item = await pieces.get()
            if isinstance(item, Exception):
                yield _event({"error": {"message": str(item), "type": "server_error"}})
                return
            index, piece, ended = item
            written += 1
            open_ones -= ended is not None
            if piece or ended:
                yield _event({**head, "choices": [_choice(index, piece, ended)]})
        if asked.with_usage:
            yield _event({**head, "choices": [], "usage": _usage(asked, written)})
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        for stream in streams:
            stream.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}


def _usage(asked: Completion, written: int) -> dict[str, int]:
    read = sum(len(prompt) for prompt in asked.prompts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _error(
    status: int,
    message: str,
    kind: str,
    parameter: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    content = {"error": {"message": message, "type": kind, "param": parameter, "code": None}}
    return JSONResponse(content, status, headers=headers)


def _unauthorized() -> Response:
    return _error(401, "the API key is missing or wrong (Authorization: Bearer KEY)", "authentication_error")
