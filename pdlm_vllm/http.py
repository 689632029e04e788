"""HTTP routes of the server: `/v1/region_captions`, and `/v1/chat/completions` with regions.

A vLLM endpoint plugin. The chat route takes the place of vLLM's own: with `mm_processor_kwargs.regions` it answers
with a JSON list of captions, without them it hands over to vLLM after checking what diffusion cannot do.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import Counter, Histogram
from pydantic import BaseModel, ConfigDict, Field
from vllm import envs
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from pdlm_hf import PdlmConfig
from pdlm_hf.errors_pdlm import SettingError

from .config import fit_length
from .plan import DEFAULT_ANSWER, defaults_of
from .processing import load_processor, refuse_paths
from .requests import Pass, Reading, check_settings, read_report, region_requests, usage_of

MAX_REGIONS = 64  # a request, unless --additional-config says otherwise; more come in several
CHAT_SETTINGS = ("block_length", "max_denoising_steps", "prefix_refresh_interval")
_NEUTRAL = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}

REGIONS = Counter("pdlm:regions", "Regions captioned.")
STEPS = Histogram("pdlm:denoising_steps", "Denoising steps of an engine request.", buckets=[1, 2, 4, 8, 16, 32, 64])
PER_FORWARD = Histogram(
    "pdlm:tokens_per_forward", "Caption tokens per forward pass of a request.", buckets=[1, 2, 4, 8, 16, 32, 64, 128]
)


class RegionCaptionsRequest(BaseModel):
    """Body of `POST /v1/region_captions`. Other fields are settings of the denoising, or refused by name."""

    model_config = ConfigDict(extra="allow")

    image: str = Field(description="http(s) or data URL of the image")
    regions: list[Any] = Field(description="COCO regions: id, and segmentation (RLE or polygons) or bbox")
    model: str | None = None
    question: str | None = None
    stream: bool = False


class Service:
    """The engine of a server, with the processor and settings of its requests.

    Args:
        engine: vLLM's engine client.
        app_state: of the FastAPI application.
    """

    def __init__(self, engine, app_state):
        self.engine, self.app_state = engine, app_state
        self.model_config = engine.vllm_config.model_config
        self.config = self.model_config.hf_config
        self.ours = isinstance(self.config, PdlmConfig)
        if self.ours:
            # this process's copy: vLLM then refuses prompts by the length that is served, not by the engine's
            self.model_config.max_model_len = fit_length(engine.vllm_config)
            self.room = engine.vllm_config.diffusion_config.canvas_length
            self.max_regions = int((engine.vllm_config.additional_config or {}).get("max_regions", MAX_REGIONS))
            self.processor = load_processor(self.model_config.model, self.model_config.revision)
            self.defaults = defaults_of(self.model_config.model, self.model_config.revision)

    def check_model(self, name: str | None) -> JSONResponse | None:
        """An answer if there is no such model."""
        served = [model.name for model in self.app_state.openai_serving_models.base_model_paths]
        if not name or name in served:
            return None
        message = f"The model `{name}` does not exist. This server has {', '.join(served)}."
        return JSONResponse(
            {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}}, 404
        )

    async def fetch(self, url: str):
        """An image through vLLM's media loading, with its limits. Raises: SettingError if it cannot be read."""
        multimodal = self.model_config.multimodal_config
        connector = MEDIA_CONNECTOR_REGISTRY.load(
            envs.VLLM_MEDIA_CONNECTOR,
            media_io_kwargs=multimodal.media_io_kwargs if multimodal else None,
            allowed_local_media_path=self.model_config.allowed_local_media_path,
            allowed_media_domains=self.model_config.allowed_media_domains,
        )
        try:
            image = await connector.fetch_image_async(url)
        except Exception as error:
            raise SettingError(f"The image cannot be read: {error}") from error
        return getattr(image, "media", image)  # vLLM keeps the file's bytes beside it

    async def passes(self, url: str, regions: Any, question: str | None, stream: bool, settings: dict) -> list[Pass]:
        """Make the engine requests of an HTTP request. Raises: SettingError, before the engine gets any of them."""
        check_settings(settings)
        refuse_paths(regions)
        if len(regions) > self.max_regions:
            raise SettingError(
                f"{len(regions)} regions, but this server takes at most {self.max_regions} a request; send several."
            )
        image = await self.fetch(url)
        return await asyncio.to_thread(
            region_requests,
            self.processor,
            self.config,
            self.defaults,
            image,
            regions,
            question,
            self.room,
            stream,
            **settings,
        )

    async def steps(self, passes: list[Pass]) -> AsyncIterator[tuple[int, Reading, int, bool]]:
        """Readings of all engine requests as they come: number, reading, tokens of the prompt, whether finished."""
        queue: asyncio.Queue = asyncio.Queue()

        async def follow(number: int, work: Pass) -> None:
            try:
                async for output in self.engine.generate(work.prompt, work.params, f"pdlm-{uuid.uuid4().hex}"):
                    report = (output.kv_transfer_params or {}).get("pdlm")
                    if output.finished and report is None:
                        reason = output.outputs[0].finish_reason if output.outputs else "no output"
                        raise RuntimeError(f"The engine gave up on this request ({reason}); see the server's log.")
                    if report is not None:
                        reading = read_report(report, work, self.processor, self.config)
                        await queue.put((number, reading, len(output.prompt_token_ids), output.finished))
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.create_task(follow(number, work)) for number, work in enumerate(passes)]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:  # also when the client has gone: vLLM then frees the requests
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def captions(self, passes: list[Pass]) -> tuple[list, dict[str, Any]]:
        """Captions in input order, and the usage."""
        found, tally = {}, Tally()
        async for _, reading, prompt, finished in self.steps(passes):
            if finished:
                found.update(reading.captions)
                tally.add(reading, prompt)
        return [found[k] for k in sorted(found)], tally.usage()


class Tally:
    """Counts steps and tokens of a request, for its `usage` and for the metrics."""

    def __init__(self):
        self.steps = self.written = self.prompt = self.passes = self.regions = 0

    def add(self, reading: Reading, prompt: int) -> None:
        """Count a finished engine request."""
        self.steps += reading.steps
        self.written += reading.text_tokens
        self.prompt += prompt
        self.passes += 1
        self.regions += len(reading.captions)
        STEPS.observe(reading.steps)

    def usage(self) -> dict[str, Any]:
        """The `usage` of the response."""
        usage = usage_of(self.prompt, self.written, self.steps, self.passes)
        REGIONS.inc(self.regions)
        PER_FORWARD.observe(usage["tokens_per_forward"])
        return usage


async def stream_captions(service: Service, passes: list[Pass], head: dict[str, Any]) -> AsyncIterator[str]:
    """Server-sent events: the captions after every denoising step, then all of them with the usage."""
    tally, found = Tally(), {}
    try:
        async for number, reading, prompt, finished in service.steps(passes):
            found.update(reading.captions)
            rows = [_progress(reading, position, finished) for position in sorted(reading.captions)]
            yield _event({"pass": number, "step": reading.steps, "regions": rows})
            if finished:
                tally.add(reading, prompt)
        yield _event(head | {"regions": [found[k].to_row() for k in sorted(found)], "usage": tally.usage()})
    except Exception as error:
        yield _event({"error": {"message": str(error), "type": type(error).__name__, "code": 500}})
    yield "data: [DONE]\n\n"


def _progress(reading: Reading, position: int, finished: bool) -> dict[str, Any]:
    """A caption after a step. Only a finished one can be cut: a draft ends nowhere yet."""
    row = reading.captions[position].to_row()
    row["finished"] = finished or reading.closed[position]
    if not row["finished"]:
        row.pop("truncated", None)
    return row


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def region_message(request: ChatCompletionRequest) -> tuple[str, str | None]:
    """Image URL and question of a chat request with regions. Raises: SettingError if it is anything else."""
    wanted = (
        "With `mm_processor_kwargs.regions` the conversation is one user message with one image and, if you like, "
        "the question as text"
    )
    messages = [dict(message) for message in request.messages]
    if len(messages) != 1 or messages[0].get("role") != "user":
        raise SettingError(f"{wanted}; got {[message.get('role') for message in messages]}.")
    content = messages[0].get("content")
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    parts: list[dict[str, Any]] = [dict(part) for part in given]
    urls = [part["image_url"]["url"] for part in parts if part.get("type") == "image_url"]
    texts = [part["text"] for part in parts if part.get("type") == "text"]
    if len(urls) != 1:
        raise SettingError(f"{wanted}; got {len(urls)} images.")
    return urls[0], "\n".join(texts).strip() or None


def check_chat(request: ChatCompletionRequest, room: int) -> None:
    """Fit a chat request to diffusion.

    Raises:
        SettingError: settings that mean nothing here, by name, or an answer that does not fit.
    """
    if request.temperature not in (None, 0):
        raise SettingError("`temperature` must be 0 or left out: the server decodes greedily.")
    if request.seed is not None:
        raise SettingError("`seed` has no meaning here: decoding is greedy, there is nothing to seed. Leave it out.")
    if (request.n or 1) != 1:
        raise SettingError("`n` must be 1: decoding is greedy, all answers would be the same.")
    for name, neutral in _NEUTRAL.items():
        if getattr(request, name, None) not in (None, neutral):
            raise SettingError(f"`{name}` has no meaning here: decoding is greedy. Leave it out.")
    for name in ("logprobs", "prompt_logprobs", "echo", "stop_token_ids", "logit_bias"):
        if getattr(request, name, None):
            raise SettingError(f"`{name}` is not served: an answer is written as a whole. Leave it out.")
    extra = request.model_extra or {}
    settings = {name: extra[name] for name in CHAT_SETTINGS if extra.get(name) is not None}
    settings = check_settings({**settings, **(request.vllm_xargs or {})}, CHAT_SETTINGS)
    count = request.max_completion_tokens or request.max_tokens or DEFAULT_ANSWER
    if count > room:
        raise SettingError(f"`max_tokens` {count} is more than the served canvas of {room} tokens.")
    length = settings.get("block_length", count)
    if count % length:
        raise SettingError(f"`max_tokens` ({count}) must be a multiple of `block_length` ({length}).")
    steps = settings.get("max_denoising_steps", count)
    if steps % (count // length):
        raise SettingError(
            f"`max_denoising_steps` ({steps}) must be a multiple of the number of blocks ({count // length})."
        )
    request.temperature = 1.0  # what vLLM's diffusion path insists on; nothing is drawn
    request.max_completion_tokens, request.max_tokens = count, None
    request.vllm_xargs = settings or None


class RegionCaptionEndpoint:
    """Entry point `vllm.endpoint_plugins`."""

    name = "pdlm_http"
    required_tasks = ("generate",)

    async def init_state(self, engine_client, state, args) -> None:
        """Called by vLLM once the engine is there."""
        state.pdlm = Service(engine_client, state)

    def attach_router(self, app: FastAPI) -> None:
        """Called by vLLM to add the routes."""

        @app.post("/v1/region_captions", dependencies=[Depends(validate_json_request)])
        @with_cancellation
        async def region_captions(request: RegionCaptionsRequest, raw_request: Request):
            service: Service = raw_request.app.state.pdlm
            if not service.ours:
                raise SettingError("This server's model is not a PerceptionDLM.")
            if (missing := service.check_model(request.model)) is not None:
                return missing
            settings = dict(request.model_extra or {})
            passes = await service.passes(request.image, request.regions, request.question, request.stream, settings)
            head = {"object": "region_captions", "model": request.model or service.model_config.served_model_name}
            if request.stream:
                return StreamingResponse(stream_captions(service, passes, head), media_type="text/event-stream")
            captions, usage = await service.captions(passes)
            return JSONResponse(head | {"regions": [caption.to_row() for caption in captions], "usage": usage})

        @app.post("/v1/chat/completions", dependencies=[Depends(validate_json_request)])
        async def chat_completions(request: ChatCompletionRequest, raw_request: Request):
            service: Service = raw_request.app.state.pdlm
            if not service.ours:
                return await create_chat_completion(request, raw_request)
            options = dict(request.mm_processor_kwargs or {})
            if "regions" in options:
                return await region_chat(request, raw_request=raw_request)
            check_chat(request, service.room)
            return await create_chat_completion(request, raw_request)


@with_cancellation
async def region_chat(request: ChatCompletionRequest, raw_request: Request):
    """Captions as a chat answer: a JSON list of strings, in input order."""
    service: Service = raw_request.app.state.pdlm
    if (missing := service.check_model(request.model)) is not None:
        return missing
    options = dict(request.mm_processor_kwargs)
    regions = options.pop("regions")
    if options:
        raise SettingError(f"Unknown mm_processor_kwargs {sorted(options)}; PerceptionDLM takes `regions`.")
    settings = {**(request.model_extra or {}), **(request.vllm_xargs or {}), "temperature": request.temperature}
    settings["seed"] = request.seed
    for name in ("max_tokens", "max_completion_tokens", "stop", "logprobs", "prompt_logprobs", "top_p", "tools"):
        if getattr(request, name, None):
            raise SettingError(f"`{name}` has no meaning with regions; the length of a caption is `max_new_tokens`.")
    if (request.n or 1) != 1:
        raise SettingError("`n` must be 1: decoding is greedy, all answers would be the same.")
    url, question = region_message(request)
    passes = await service.passes(url, regions, question, False, settings)
    captions, usage = await service.captions(passes)
    answer = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model or service.model_config.served_model_name,
        "usage": usage,
    }
    message = {"role": "assistant", "content": json.dumps([caption.text for caption in captions])}
    if not request.stream:
        return JSONResponse(answer | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    async def chunks() -> AsyncIterator[str]:
        yield _event(
            answer
            | {
                "object": "chat.completion.chunk",
                "choices": [{"index": 0, "delta": message, "finish_reason": "stop"}],
            }
        )
        yield "data: [DONE]\n\n"

    return StreamingResponse(chunks(), media_type="text/event-stream")
