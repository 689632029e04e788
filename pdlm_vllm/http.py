"""HTTP routes of the server: `/v1/region_captions`, and `/v1/chat/completions` with regions.

A vLLM endpoint plugin. The chat route takes the place of vLLM's own: with `mm_processor_kwargs.regions` it answers
with a JSON list of captions, without them it hands over to vLLM after checking what diffusion cannot do.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

from pdlm_hf.errors_pdlm import SettingError

from .attribute_service import read_attributes
from .bodies import AsideRoute, BoundedBodies, refuse_unreadable
from .doors import answer_schema, check_chat, refuse_for_attributes, refuse_for_captions
from .limits import read_limits
from .plan import chat_room
from .protocol import CaptionEvent, CaptionProgress, RegionCaptionsRequest, RegionCaptionsResponse
from .requests import Pass, Reading
from .service import Service, Tally

_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be served; the message says why."},
    "5XX": {"model": ErrorResponse, "description": "The server failed, or is too busy."},
}

router = APIRouter(route_class=AsideRoute)


def _name(prefix: str, raw_request: Request) -> str:
    """The id of an answer: the request's `X-Request-Id`, as with vLLM's routes, or else a new one."""
    return f"{prefix}-{raw_request.headers.get('X-Request-Id') or uuid.uuid4().hex}"


def _events(service: Service, events: AsyncIterator[str]) -> StreamingResponse:
    """A response of server-sent events, kept alive as the server was told to."""
    interval = float(getattr(service.args, "sse_keep_alive_interval", 0))
    return StreamingResponse(with_sse_keep_alive(events, interval), media_type="text/event-stream")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


@router.post(
    "/v1/region_captions",
    dependencies=[Depends(validate_json_request)],
    response_model=None,  # nothing is sent to a client that has gone
    responses={200: {"model": RegionCaptionsResponse, "content": _EVENTS}, **_ERRORS},
)
@with_cancellation
async def region_captions(request: RegionCaptionsRequest, raw_request: Request):
    """Captions for the regions of an image, or by a schema their attributes."""
    service: Service = raw_request.app.state.pdlm
    if not service.ours:
        raise SettingError("This server's model is not a PerceptionDLM.")
    if (missing := service.check_model(request.model)) is not None:
        return missing
    name = _name("regions", raw_request)
    options = {"priority": request.priority, "lora_request": service.adapter(request.model)}
    head = {"id": name, "created": int(time.time()), "model": request.model or service.served[0]}
    if (schema := request.attribute_schema) is not None:
        refuse_for_attributes(stream=request.stream, max_tokens=request.max_tokens)
        settings = request.settings()
        works = await service.attribute_works(request.image, request.regions, schema, request.question, settings)
        captions, usage = await read_attributes(service, works, schema, name, **options)
        return await service.aside(lambda: JSONResponse(_response(head, captions, usage)))  # many probabilities
    passes = await service.passes(
        request.image,
        request.regions,
        request.question,
        bool(request.stream),
        request.settings(),
        request.max_tokens,
    )
    if request.stream:
        return _events(service, stream_captions(service, passes, head, options))
    captions, usage = await service.captions(passes, name, **options)
    return JSONResponse(_response(head, captions, usage))


def _response(head: dict[str, Any], captions: list, usage: dict[str, Any]) -> dict[str, Any]:
    body = head | {"regions": [caption.to_row() for caption in captions], "usage": usage}
    return RegionCaptionsResponse(**body).to_json()


async def stream_captions(
    service: Service, passes: list[Pass], head: dict[str, Any], options: dict[str, Any]
) -> AsyncIterator[str]:
    """Server-sent events: the captions after every denoising step, then all of them with the usage."""
    tally, found = Tally(service.labels), {}
    try:
        async for number, reading, prompt, finished in service.steps(passes, head["id"], **options):
            found.update(reading.captions)
            rows = [_progress(reading, position, finished) for position in sorted(reading.captions)]
            yield _event(CaptionEvent(number=number, step=reading.steps, regions=rows).to_json())
            if finished:
                tally.add(reading, prompt)
        captions = [found[k] for k in sorted(found)]
        service.log_captions(head["id"], captions, stream=True)
        yield _event(_response(head, captions, tally.usage()))
    except Exception as error:
        yield _event(create_error_response(error).model_dump())
    yield "data: [DONE]\n\n"


def _progress(reading: Reading, position: int, finished: bool) -> CaptionProgress:
    """A caption after a step. Only a finished one can be cut: a draft ends nowhere yet."""
    finished = finished or reading.closed[position]
    row = CaptionProgress(**reading.captions[position].to_row(), finished=finished)
    row.truncated = row.truncated and finished
    return row


@router.post(
    "/v1/chat/completions",
    dependencies=[Depends(validate_json_request)],
    response_model=None,
    responses={200: {"model": ChatCompletionResponse, "content": _EVENTS}, **_ERRORS},
)
async def chat_completions(request: ChatCompletionRequest, raw_request: Request):
    """Chat; with `mm_processor_kwargs` {"regions": [...]} captions of the regions of the image, as a JSON list."""
    service: Service = raw_request.app.state.pdlm
    if service.ours and "regions" in (request.mm_processor_kwargs or {}):
        return await region_chat(request, raw_request=raw_request)
    if service.ours:
        check_chat(request, chat_room(service.config, service.room))
    return await create_chat_completion(request, raw_request)


@with_cancellation
async def region_chat(request: ChatCompletionRequest, raw_request: Request):
    """Captions as a chat answer: a JSON list of strings, in input order; of objects with a `response_format`."""
    service: Service = raw_request.app.state.pdlm
    if (missing := service.check_model(request.model)) is not None:
        return missing
    options = dict(request.mm_processor_kwargs or {})
    regions = options.pop("regions")
    if options:
        raise SettingError(f"Unknown mm_processor_kwargs {sorted(options)!r:.200}; PerceptionDLM takes `regions`.")
    refuse_for_captions(request)
    settings = {**(request.model_extra or {}), **(request.vllm_xargs or {}), "temperature": request.temperature}
    settings["seed"] = request.seed
    url, question = region_message(request)
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    name = _name("chatcmpl", raw_request)
    engine_options = {"priority": request.priority, "lora_request": service.adapter(request.model)}
    if (schema := answer_schema(request)) is not None:
        refuse_for_attributes(max_tokens=limit)
        works = await service.attribute_works(url, regions, schema, question, settings)
        captions, usage = await read_attributes(service, works, schema, name, **engine_options)
        content: list[Any] = [{key: one.value for key, one in caption.attributes.items()} for caption in captions]
    else:
        passes = await service.passes(url, regions, question, False, settings, limit)
        captions, usage = await service.captions(passes, name, **engine_options)
        content = [caption.text for caption in captions]
    message = {"role": "assistant", "content": json.dumps(content)}
    reason = "length" if any(caption.truncated for caption in captions) else "stop"
    head = {"id": name, "created": int(time.time()), "model": request.model or service.served[0]}
    if not request.stream:
        choices = [{"index": 0, "message": message, "finish_reason": reason}]
        return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage})

    async def chunks() -> AsyncIterator[str]:
        chunk = head | {"object": "chat.completion.chunk"}
        yield _event(chunk | {"choices": [{"index": 0, "delta": message, "finish_reason": reason}]})
        if request.stream_options and request.stream_options.include_usage:
            yield _event(chunk | {"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    return _events(service, chunks())


def region_message(request: ChatCompletionRequest) -> tuple[str, str | None]:
    """Image URL and question of a chat request with regions. Raises: SettingError if it is anything else."""
    wanted = (
        "With `mm_processor_kwargs.regions` the conversation is one user message with one image and, if you like, "
        "the question as text"
    )
    messages = [dict(message) for message in request.messages]
    if len(messages) != 1 or messages[0].get("role") != "user":
        raise SettingError(f"{wanted}; got {[message.get('role') for message in messages][:5]!r:.200}.")
    content = messages[0].get("content")
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    found: dict[str, list[str]] = {"image_url": [], "text": []}
    for part in given:
        part = {"type": "text", "text": part} if isinstance(part, str) else dict(part)
        kind = part.get("type")
        value = part.get(str(kind))
        if kind == "image_url" and isinstance(value, dict):
            value = value.get("url")
        if kind not in found or not isinstance(value, str):
            raise SettingError(
                f'{wanted}: {{"type": "image_url", "image_url": {{"url": "..."}}}} and {{"type": "text", "text": '
                f'"..."}}; got a part with {sorted(map(str, part))[:5]!r:.200}.'
            )
        found[kind].append(value)
    if len(found["image_url"]) != 1:
        raise SettingError(f"{wanted}; got {len(found['image_url'])} images.")
    return found["image_url"][0], "\n".join(found["text"]) if found["text"] else None


class RegionCaptionEndpoint:
    """Entry point `vllm.endpoint_plugins`."""

    name = "pdlm_http"
    required_tasks = ("generate",)

    async def init_state(self, engine_client, state, args) -> None:
        """Called by vLLM once the engine is there."""
        state.pdlm = Service(engine_client, state, args, self.limits)

    def attach_router(self, app: FastAPI) -> None:
        """Called by vLLM to add the routes."""
        self.limits = read_limits(app.state.args.additional_config)
        app.add_middleware(BoundedBodies, limits=self.limits)
        app.include_router(router)
        for kind in (AttributeError, LookupError, RecursionError):
            app.add_exception_handler(kind, refuse_unreadable)
