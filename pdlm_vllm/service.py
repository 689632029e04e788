"""From HTTP requests to engine requests and back to captions, beside everything else the server does."""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import Counter, Histogram
from vllm import envs
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.request_logger import RequestLogger
from vllm.exceptions import GracefulHTTPError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from pdlm_hf import PdlmConfig
from pdlm_hf.attributes import AttributeSchema
from pdlm_hf.errors_pdlm import ImageError, SettingError
from pdlm_hf.regions.limits import check_image_pixels

from .adapters import check_adapter
from .attributes import AttributeWork, attribute_works, check_attribute_settings
from .config import block_room, fit_length
from .doors import check_engine_request
from .limits import Limits
from .media import CONNECTOR, EncodedImage, PdlmConnector, read_image
from .plan import DEFAULT_TOKENS, served_defaults
from .processing import load_processor, refuse_paths
from .requests import Pass, Reading, check_settings, read_report, region_passes, usage_of

_T = TypeVar("_T")
_LABELS = ["model_name", "engine"]  # vLLM's
REGIONS = Counter("pdlm:regions", "Regions captioned, or whose attributes were read.", _LABELS)
STEPS = Histogram(
    "pdlm:denoising_steps", "Denoising steps of an engine request.", _LABELS, buckets=[1, 2, 4, 8, 16, 32, 64]
)
PER_FORWARD = Histogram(
    "pdlm:tokens_per_forward",
    "Caption tokens per forward pass of a request.",
    _LABELS,
    buckets=[1, 2, 4, 8, 16, 32, 64, 128],
)


class Service:
    """The engine of a server, with the processor and settings of its requests.

    Args:
        engine: vLLM's engine client. Other routes' requests to it are checked from now on.
        app_state: of the FastAPI application.
        args: the server's command line.
        limits (`Limits`)
    """

    counts_load = False  # whether requests under way are counted, see `BoundedBodies`

    def __init__(self, engine, app_state, args, limits: Limits):
        self.engine, self.app_state, self.args, self.limits = engine, app_state, args, limits
        self.model_config = engine.vllm_config.model_config
        self.config = self.model_config.hf_config
        self.ours = isinstance(self.config, PdlmConfig)
        if not self.ours:
            return
        # this process's copy: vLLM then refuses prompts by the length that is served, not by the engine's
        self.model_config.max_model_len = fit_length(engine.vllm_config)
        self.room = engine.vllm_config.diffusion_config.canvas_length
        self.processor = load_processor(self.model_config.model, self.model_config.revision)
        self.defaults, self.block_room = served_defaults(self.model_config), block_room(engine.vllm_config)
        self.inputs = engine.renderer.get_mm_processor()
        self.parsers = ThreadPoolExecutor(limits.parsers, "pdlm-parser")
        self.log = RequestLogger(max_log_len=args.max_log_len) if args.enable_log_requests else None
        rank = engine.vllm_config.parallel_config.data_parallel_rank
        self.labels = {"model_name": self.served[0], "engine": str(rank or 0)}
        limits.apply()
        PdlmConnector.limits = limits
        os.environ.setdefault("VLLM_MEDIA_CONNECTOR", CONNECTOR)  # read by vLLM at every request
        self.engine_generate, self.engine_shutdown = engine.generate, engine.shutdown
        engine.generate, engine.shutdown = self._generate_checked, self._shut_down
        self.loop, self.over = asyncio.get_running_loop(), False

    def generate(self, *args: Any, **kwargs: Any):
        """vLLM's `AsyncLLM.generate`. Raises: GracefulHTTPError, of status 503, once the server shuts down."""
        if self.over:
            raise _shutting_down()
        return self.engine_generate(*args, **kwargs)

    def _generate_checked(self, prompt, sampling_params, *args: Any, **kwargs: Any):
        """What vLLM's own routes call. Raises before there is a stream, so that its status is 400."""
        check_engine_request(self.config, prompt, sampling_params)
        if kwargs.get("lora_request") is not None:
            check_adapter(kwargs["lora_request"].lora_path)
        return self.generate(prompt, sampling_params, *args, **kwargs)

    def _shut_down(self, *args: Any, **kwargs: Any) -> None:
        """What vLLM calls at its end, in a thread. By itself it leaves requests under way waiting for an engine that
        is gone, and their clients with them.
        """
        self.engine_shutdown(*args, **kwargs)
        self.over = True
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.engine.output_processor.propagate_error, _shutting_down())

    @property
    def served(self) -> list[str]:
        """Names of the model, the first of which answers carry."""
        return [model.name for model in self.app_state.openai_serving_models.base_model_paths]

    def check_model(self, name: str | None) -> JSONResponse | None:
        """An answer if there is no such model."""
        if not name or name in self.served or self.adapter(name) is not None:
            return None
        message = f"The model `{name:.60}` does not exist. This server has {', '.join(self.served)}."
        error = create_error_response(message, "NotFoundError", HTTPStatus.NOT_FOUND, "model")
        return JSONResponse(error.model_dump(), error.error.code)

    def adapter(self, name: str | None):
        """vLLM's LoRA request for a model name, or None. Raises: CheckpointError: the adapter has to be merged."""
        found = self.app_state.openai_serving_models.lora_requests.get(name)
        if found is not None:
            check_adapter(found.lora_path)
        return found

    async def fetch(self, url: str) -> bytes:
        """Bytes of an image through vLLM's media loading, with its limits. Raises: SettingError."""
        connector = MEDIA_CONNECTOR_REGISTRY.load(
            envs.VLLM_MEDIA_CONNECTOR,
            allowed_local_media_path=self.model_config.allowed_local_media_path,
            allowed_media_domains=self.model_config.allowed_media_domains,
        )
        try:
            return await connector.load_from_url_async(
                url, EncodedImage(self.limits), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
            )
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise SettingError(f"The image cannot be read: {reason:.300}") from error

    async def passes(
        self,
        url: str,
        regions: Any,
        question: str | None,
        stream: bool,
        settings: dict[str, Any],
        max_tokens: int | None = None,
    ) -> list[Pass]:
        """Make the engine requests of an HTTP request.

        Args:
            url, regions, question, stream, settings: of the request.
            max_tokens (`int`, *optional*): of all captions together.

        Raises:
            PdlmError: before the engine gets any of them.
        """
        check_settings(settings)
        self._check_regions(regions)
        settings = settings | self._shortened(settings, len(regions), max_tokens)
        prepare = partial(self._prepare, await self.fetch(url), regions, question, stream, settings)
        return await self.aside(prepare)

    async def attribute_works(
        self, url: str, regions: Any, schema: AttributeSchema, question: str | None, settings: dict[str, Any]
    ) -> list[AttributeWork]:
        """What has to be asked for the attributes of the regions of an HTTP request.

        Args:
            url, regions, schema, question, settings: of the request.

        Raises:
            PdlmError: before the engine gets any of it.
        """
        check_attribute_settings(settings)
        self._check_regions(regions)
        prepare = partial(self._prepare_works, await self.fetch(url), regions, schema, question, settings)
        return await self.aside(prepare)

    async def aside(self, function: Callable[[], _T]) -> _T:
        """What a function returns, in a thread of the parsers."""
        return await asyncio.get_running_loop().run_in_executor(self.parsers, function)

    def _check_regions(self, regions: Any) -> None:
        self.limits.check_count(len(regions))  # before anything looks at each of them
        refuse_paths(regions)
        self.limits.check_ids(regions)
        self.limits.check_run_lengths(regions)

    def _shortened(self, settings: dict[str, Any], regions: int, max_tokens: int | None) -> dict[str, int]:
        if max_tokens is None or not regions or settings.get("max_new_tokens") is not None:
            return {}
        share = max_tokens // regions
        if share < 1:
            raise SettingError(f"`max_tokens` {max_tokens} is less than a token for each of the {regions} regions.")
        return {"max_new_tokens": share} if share < (self.defaults.max_new_tokens or DEFAULT_TOKENS) else {}

    def _prepare(self, data: bytes, regions: list, question: str | None, stream: bool, settings: dict) -> list[Pass]:
        """In a thread of the parsers: decode, and keep only what the engine gets."""

        made, image = [], self._image(data, len(regions))
        arguments = (self.processor, self.config, self.defaults, image, regions, question, self.room, stream)
        for work in region_passes(*arguments, **settings):
            work.prompt = self._input(image, work.prompt, question)
            made.append(work)
        return made

    def _prepare_works(
        self, data: bytes, regions: list, schema: AttributeSchema, question: str | None, settings: dict
    ) -> list[AttributeWork]:
        """The same for the attributes of regions."""
        made, image = [], self._image(data, len(regions))
        arguments = (self.processor, self.config, self.defaults, self.block_room, image, regions, schema, question)
        for work in attribute_works(*arguments, self.limits, **settings):
            work.prompt.prompt = self._input(image, work.prompt.prompt, question)
            made.append(work)
        return made

    def _image(self, data: bytes, regions: int) -> Image.Image:
        def check(opened) -> None:
            width, height = opened.size
            check_image_pixels(width, height, "the image")
            self.limits.check_pixels(width, height, regions)

        try:
            return read_image(data, check)
        except ImageError as error:
            raise ImageError(f"The image cannot be read: {error}") from error

    def _input(self, image: Image.Image, prompt: dict[str, Any], question: str | None):
        """What the engine gets of a prompt: tensors, without image and masks."""
        masks = prompt["mm_processor_kwargs"]["regions"]
        return self.inputs.region_input(image, masks, question, {"image": [uuid.uuid4().hex]})

    async def steps(
        self, passes: list[Pass], name: str, **options: Any
    ) -> AsyncIterator[tuple[int, Reading, int, bool]]:
        """Readings of all engine requests as they come: number, reading, tokens of the prompt, whether finished.

        Args:
            passes (`list[Pass]`)
            name (`str`): of the HTTP request.
            **options: of vLLM's `AsyncLLM.generate`.
        """
        queue: asyncio.Queue = asyncio.Queue()

        async def follow(number: int, work: Pass) -> None:
            try:
                async for output in self.generate(work.prompt, work.params, f"{name}-{number}", **options):
                    report = (output.kv_transfer_params or {}).get("pdlm")
                    if output.finished and report is None:
                        raise gave_up(output)
                    if report is not None:
                        reading = read_report(report, work, self.processor, self.config)
                        await queue.put((number, reading, len(output.prompt_token_ids), output.finished))
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        for number, work in enumerate(passes):
            self.log_input(f"{name}-{number}", work.prompt, work.params, **options)
        tasks: list[asyncio.Task] = []
        try:
            for number, work in enumerate(passes):
                tasks.append(asyncio.create_task(follow(number, work)))
                await asyncio.sleep(0)  # handing one to the engine takes milliseconds; others are answered in between
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

    async def captions(self, passes: list[Pass], name: str, **options: Any) -> tuple[list, dict[str, Any]]:
        """Captions in input order, and the usage; arguments as of [`steps`]."""
        found, tally = {}, Tally(self.labels)
        async for _, reading, prompt, finished in self.steps(passes, name, **options):
            if finished:
                found.update(reading.captions)
                tally.add(reading, prompt)
        captions = [found[k] for k in sorted(found)]
        self.log_captions(name, captions, stream=False)
        return captions, tally.usage()

    def log_input(self, name: str, prompt: dict[str, Any], params, lora_request=None, **unused: Any) -> None:
        """An engine request into vLLM's request log, if it is on (--enable-log-requests)."""
        if self.log:
            self.log.log_inputs(name, None, prompt["prompt_token_ids"], None, params, lora_request)

    def log_captions(self, name: str, captions: list, stream: bool) -> None:
        """Into vLLM's request log, if it is on (--enable-log-requests with --enable-log-outputs)."""
        if self.log and self.args.enable_log_outputs:
            texts = "\n".join(caption.text for caption in captions)
            self.log.log_outputs(name, texts, None, "stop", is_streaming=stream)


def gave_up(output) -> RuntimeError:
    """The error for an engine request that ended without its report."""
    reason = output.outputs[0].finish_reason if output.outputs else "no output"
    return RuntimeError(f"The engine gave up on this request ({reason}); see the server's log.")


def _shutting_down() -> GracefulHTTPError:
    return GracefulHTTPError("The server is shutting down. Try another one.", HTTPStatus.SERVICE_UNAVAILABLE)


class Tally:
    """Counts steps and tokens of a request, for its `usage` and for the metrics.

    Args:
        labels (`dict`): of the metrics.
    """

    def __init__(self, labels: dict[str, str]):
        self.labels = labels
        self.steps = self.written = self.prompt = self.passes = self.regions = 0

    def add(self, reading: Reading, prompt: int) -> None:
        """Count a finished engine request."""
        self.steps += reading.steps
        self.written += reading.text_tokens
        self.prompt += prompt
        self.passes += 1
        self.regions += len(reading.captions)
        STEPS.labels(**self.labels).observe(reading.steps)

    def add_attributes(self, work: AttributeWork) -> None:
        """Count what was read of the regions of a prompt: every engine request computed it, and its blocks."""
        self.steps += work.requests
        self.passes += work.requests
        self.written += work.num_tokens
        self.prompt += len(work.prompt.ids)
        self.regions += len(work.prompt.regions)

    def usage(self) -> dict[str, Any]:
        """The `usage` of the response."""
        usage = usage_of(self.prompt, self.written, self.steps, self.passes)
        REGIONS.labels(**self.labels).inc(self.regions)
        PER_FORWARD.labels(**self.labels).observe(usage["tokens_per_forward"])
        return usage
