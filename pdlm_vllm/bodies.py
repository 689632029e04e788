"""Bodies of requests, bounded and parsed away from the event loop, which goes on answering others meanwhile."""

import asyncio
import json
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pydantic_core
from fastapi import HTTPException, Request
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler

from .limits import Limits

_JSON = ThreadPoolExecutor(1, "pdlm-json")  # one at a time: parsing keeps the interpreter to itself
_WITH_REGIONS = ("/v1/region_captions", "/v1/chat/completions")  # routes, and where their bodies have them
_REGIONS = ("regions", "mm_processor_kwargs", "schema")  # the schema has limits of its own
_RESPONSES, _LONGEST = "/v1/responses", 32  # of its lists: an item may have hundreds of forms, all of which are tried
_DRAINED = 8  # times the limit: read and dropped, so that a client that writes before it reads gets the answer
_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")
_NO_EXPERTS = {"/scale_elastic_ep": "PerceptionDLM has no experts to be scaled."}  # vLLM would try, and fail


class BoundedBodies:
    """ASGI middleware: refuses a body that is too large before any route reads it, and counts requests under way.

    vLLM's own counter, for `/load`, keeps a request whose client goes away before its answer.

    Args:
        app: the next application.
        limits (`Limits`)
    """

    def __init__(self, app, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope, receive, send) -> None:
        """Called by the server for each request."""
        service = getattr(scope["app"].state, "pdlm", None) if scope["type"] == "http" else None
        if service is None or not service.ours or scope["method"] in _WITHOUT_BODY:
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        name = "body_values" if path.endswith(_WITH_REGIONS) else "other_values"
        body, problem = await self._read(receive, name)
        problem = problem or _NO_EXPERTS.get(path)
        if body and not problem and path.endswith(_RESPONSES):
            problem = await asyncio.get_running_loop().run_in_executor(_JSON, _long_list, body)
        if problem:
            await JSONResponse(create_error_response(problem).model_dump(), 400)(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        del body  # or it would be in memory until the answer is written

        async def replay():
            return messages.pop() if messages else await receive()

        state = scope["app"].state
        if state.enable_server_load_tracking:
            service.counts_load, state.enable_server_load_tracking = True, False
        state.server_load_metrics += service.counts_load
        try:
            await self.app(scope, replay, send)
        finally:
            state.server_load_metrics -= service.counts_load

    async def _read(self, receive, name: str) -> tuple[bytes | None, str | None]:
        """The body, or None if the client hangs up before its end; and what is wrong with it. `name` is that of the
        limit on its values.
        """
        most = getattr(self.limits, name)
        chunks: list[bytes] = []
        size, values, escapes, problem = 0, 0, 0, None
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None, None
            chunk = message.get("body", b"")
            size, values, escapes = size + len(chunk), values + chunk.count(b","), escapes + chunk.count(b"\\")
            if size > self.limits.body_bytes:
                problem = (
                    f"The body has more than {self.limits.body_bytes} bytes (body_bytes). Send a smaller or "
                    "more compressed image, or its URL."
                )
            elif values > most:
                advice = "regions as compressed RLE, or fewer" if name == "body_values" else "less at a time"
                problem = f"The body has more than {most} values ({name}). Send {advice}."
            elif escapes > self.limits.body_escapes:
                problem = (
                    f"The body has more than {self.limits.body_escapes} backslashes (body_escapes). Write characters "
                    "as themselves, in UTF-8."
                )
            if problem:
                chunks.clear()
            else:
                chunks.append(chunk)
            if not message.get("more_body") or size > _DRAINED * self.limits.body_bytes:
                return await asyncio.to_thread(b"".join, chunks), problem  # tens of megabytes take a while


async def refuse_unreadable(request: Request, error: Exception) -> JSONResponse:
    """Handler of exceptions that vLLM's models of bodies raise for values of other types than they expect."""
    frames = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    if "validate_python" not in frames:
        return await exception_handler(request, error)
    problem = f"The body is not what this route takes ({type(error).__name__}: {error})."
    return JSONResponse(create_error_response(problem[:300]).model_dump(), 400)


class ParsedAside(Request):
    """A request with regions, whose JSON is parsed in a thread."""

    async def json(self) -> Any:
        """The body as JSON. Raises: JSONDecodeError; HTTPException if it has too many values beside its regions."""
        limits = self.app.state.pdlm.limits
        return await asyncio.get_running_loop().run_in_executor(_JSON, _parsed, await self.body(), limits)


def _parsed(body: bytes, limits: Limits) -> Any:
    try:
        found = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None
    most = limits.other_values
    if isinstance(found, dict):
        others = [value for name, value in found.items() if name not in _REGIONS]
        if count_values(others, most) > most:
            raise HTTPException(400, f"The body has more than {most} values beside its regions (other_values).")
    return found


def count_values(value: Any, most: int) -> int:
    """Items of all lists and dicts within, as soon as they are more than `most`."""
    count, left = 0, [value]
    while left and count <= most:
        items = left.pop()
        if isinstance(items, (list, dict)):
            count += len(items)
            left.extend(items.values() if isinstance(items, dict) else items)
    return count


def _long_list(body: bytes) -> str | None:
    """What is wrong with a body of `/v1/responses`, if it has a long list anywhere."""
    try:
        left = [pydantic_core.from_json(body)]
    except ValueError:
        return None  # for the route to say
    while left:
        items = left.pop()
        if isinstance(items, list) and len(items) > _LONGEST:
            return f"A list of this body has {len(items)} items; {_RESPONSES} takes at most {_LONGEST}."
        if isinstance(items, (list, dict)):
            left.extend(items.values() if isinstance(items, dict) else items)
    return None


class AsideRoute(APIRoute):
    """A route with [`ParsedAside`] requests."""

    def get_route_handler(self):
        """Called by FastAPI."""
        handler = super().get_route_handler()

        async def handle(request: Request):
            return await handler(ParsedAside(request.scope, request.receive))

        return handle
