"""What of OpenAI's and vLLM's settings denoising can do: the rest is refused by name, whatever route it came by."""

from typing import Any

from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from pdlm_hf.attributes import AttributeSchema, parse_schema
from pdlm_hf.errors_pdlm import SettingError

from .plan import DEFAULT_ANSWER, count_regions
from .requests import REGION_SETTINGS, check_settings

CHAT_SETTINGS = ("block_length", "max_denoising_steps", "prefix_refresh_interval")
_NEUTRAL: dict[str, tuple] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
_NOT_SERVED = (
    "logprobs",
    "prompt_logprobs",
    "logprob_token_ids",
    "prompt_logprob_token_ids",
    "stop_token_ids",
    "logit_bias",
    "repetition_detection",
    "use_beam_search",
    "echo",
)
_NOT_FOR_CAPTIONS = ("stop", "tools", "structured_outputs", "min_tokens", "bad_words", "allowed_token_ids")
_ONE_ANSWER = "`n` must be 1: decoding is greedy, all answers would be the same."


def refuse_sampling(params: Any, not_served: tuple[str, ...] = _NOT_SERVED) -> None:
    """Refuse what greedy denoising cannot do.

    Args:
        params: a request, or vLLM's `SamplingParams`; has attributes of OpenAI's names.
        not_served: names of which no value is served.

    Raises:
        SettingError: the first such setting, by name.
    """
    if (params.n or 1) != 1:
        raise SettingError(_ONE_ANSWER)
    for name, neutral in _NEUTRAL.items():
        if getattr(params, name, None) not in (None, *neutral):
            raise SettingError(f"`{name}` has no meaning here: decoding is greedy. Leave it out.")
    for name in not_served:
        value = getattr(params, name, None)
        if value is not None and value is not False and value != [] and value != {}:
            raise SettingError(f"`{name}` is not served: an answer is written as a whole. Leave it out.")


def refuse_for_captions(request: ChatCompletionRequest) -> None:
    """Refuse what has no meaning in a chat request with regions. Raises: SettingError, by name."""
    refuse_sampling(request)
    for name in _NOT_FOR_CAPTIONS:
        if getattr(request, name, None):
            raise SettingError(f"`{name}` has no meaning with regions. Leave it out.")


def refuse_for_attributes(**values: Any) -> None:
    """Refuse what has no meaning with a schema. Raises: SettingError, by name."""
    for name, value in values.items():
        if value:
            raise SettingError(f"`{name}` has no meaning with a schema: attributes are read at once. Leave it out.")


def answer_schema(request: ChatCompletionRequest) -> AttributeSchema | None:
    """The schema of a chat answer about regions, from `response_format`: one object a region, or a list of such.

    Raises:
        SettingError: another format, or a JSON Schema that cannot be read.
    """
    given = request.response_format
    if given is None or given.type == "text":
        return None
    schema = given.json_schema.json_schema if given.type == "json_schema" and given.json_schema else None
    if schema is None:
        raise SettingError(
            "`response_format` with regions must be of type json_schema, with the attributes of a region as "
            "`properties` of its `schema`; or be left out for captions."
        )
    items = schema.get("items") if schema.get("type") == "array" else schema
    if not isinstance(items, dict) or not isinstance(items.get("properties"), dict):
        raise SettingError(
            "`response_format`: the schema must be of an object with `properties`, the attributes of a region, or of "
            "an array with such `items`."
        )
    try:
        return parse_schema(items)
    except SettingError as error:
        raise SettingError(f"`response_format`: {error}") from None


def check_chat(request: ChatCompletionRequest, room: int) -> None:
    """Fit a chat request to diffusion.

    Args:
        request (`ChatCompletionRequest`): changed in place.
        room (`int`): tokens of the longest answer served, see [`plan.chat_room`].

    Raises:
        SettingError: settings that mean nothing here, by name, or an answer that does not fit.
    """
    if request.temperature not in (None, 0):
        raise SettingError("`temperature` must be 0 or left out: the server decodes greedily.")
    if request.seed is not None:
        raise SettingError("`seed` has no meaning here: decoding is greedy, there is nothing to seed. Leave it out.")
    refuse_sampling(request)
    extra = request.model_extra or {}
    settings = {name: extra[name] for name in CHAT_SETTINGS if extra.get(name) is not None}
    settings = check_settings({**settings, **(request.vllm_xargs or {})}, CHAT_SETTINGS)
    given = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    count = min(DEFAULT_ANSWER, room) if given is None else given
    if count < 1:
        raise SettingError(f"`max_tokens` must be a positive integer, got {count}.")
    if count > room:
        raise SettingError(f"`max_tokens` {count} is more than the served canvas has room for: {room} tokens.")
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


def check_engine_request(config, prompt: Any, params: Any) -> None:
    """Check what any route hands to the engine.

    Args:
        config (`PdlmConfig`)
        prompt: of vLLM's `AsyncLLM.generate`.
        params (`SamplingParams`): changed in place where temperature 0 asks for what is done anyway.

    Raises:
        SettingError: a setting that is not served, or a region request by a route that would not sort its captions.
    """
    if not isinstance(params, SamplingParams):
        return
    refuse_sampling(params)
    if params.temperature == 0:
        params.temperature = 1.0
    extra = {name: value for name, value in (params.extra_args or {}).items() if value is not None}
    params.extra_args = check_settings(extra, tuple({*CHAT_SETTINGS, *REGION_SETTINGS})) or None
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if ids and count_regions(config, ids):
        raise SettingError("Regions are captioned by /v1/region_captions and /v1/chat/completions, not by this route.")
