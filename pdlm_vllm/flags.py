"""Flags of vLLM that PerceptionDLM cannot run with, with the reason, and those it sets for itself.

docs/vllm.md has the table for people; tests/vllm/flags.py knows every flag of vLLM's engine and what becomes of it.
"""

from functools import reduce
from typing import Any, NamedTuple

from vllm.logger import init_logger

from pdlm_hf.errors_pdlm import SettingError

from .plan import DEFAULTS

logger = init_logger("vllm.plugins.pdlm")  # below vLLM's own, so that it is shown

CACHE_GIB = 0.25  # of processed images, unless the user says otherwise; vLLM's default is 4
_KEYS = "keys depend on the whole prompt and on the regions, so that those of one request are of no use to another"
_WRITES = "the model writes captions, it has no pooled output"
_PAGES = "every region reads pages of its own choice, which must all lie on one device"


class Refused(NamedTuple):
    """A flag that would stop the engine later, change captions, or be ignored without a word.

    Args:
        flag (`str`): as users write it.
        path (`str`): of the setting in vLLM's configuration.
        harmless (`tuple`): its values that change nothing.
        reason (`str`)
    """

    flag: str
    path: str
    harmless: tuple
    reason: str


REFUSED = (
    Refused(
        "--pipeline-parallel-size",
        "parallel_config.pipeline_parallel_size",
        (1,),
        "every step needs the whole model. Use --tensor-parallel-size, or --data-parallel-size for throughput",
    ),
    Refused("--prefill-context-parallel-size", "parallel_config.prefill_context_parallel_size", (1,), _PAGES),
    Refused("--decode-context-parallel-size", "parallel_config.decode_context_parallel_size", (1,), _PAGES),
    Refused(
        "--enable-dbo",
        "parallel_config.enable_dbo",
        (False,),
        "the two halves of a step would share the pages of a prompt",
    ),
    Refused(
        "--enable-batch-sharded-sampling",
        "parallel_config.enable_batch_sharded_sampling",
        (None, False),
        "the denoising has its own sampler, which ranks all drafts of an image together",
    ),
    Refused(
        "--logits-processors",
        "model_config.logits_processors",
        (None, []),
        "the denoising has its own sampler, which does not call them",
    ),
    Refused(
        "--watermark-config",
        "watermark_config",
        (None,),
        "decoding is greedy, there is no random choice that could carry a mark",
    ),
    Refused(
        "--speculative-config", "speculative_config", (None,), "the canvas takes the place that drafts of tokens have"
    ),
    Refused("--kv-transfer-config", "kv_transfer_config", (None,), _KEYS),
    Refused("--kv-offloading-size", "cache_config.kv_offloading_size", (None, 0), _KEYS),
    Refused(
        "--kv-sharing-fast-prefill",
        "cache_config.kv_sharing_fast_prefill",
        (False,),
        "no layer of the model shares keys with another",
    ),
    Refused("--runner", "model_config.runner_type", ("generate",), _WRITES),
    Refused("--convert", "model_config.convert_type", ("none",), _WRITES),
    Refused("--skip-tokenizer-init", "model_config.skip_tokenizer_init", (False,), "questions and captions are texts"),
    Refused(
        "--enable-prompt-embeds",
        "model_config.enable_prompt_embeds",
        (False,),
        "regions are found by the ids of their tokens in the prompt",
    ),
    Refused(
        "--language-model-only",
        "model_config.multimodal_config.language_model_only",
        (False,),
        "a request with regions needs its image",
    ),
    Refused(
        "--mm-encoder-only", "model_config.multimodal_config.mm_encoder_only", (False,), "there would be no captions"
    ),
    Refused(
        "--enable-mm-embeds",
        "model_config.multimodal_config.enable_mm_embeds",
        (False,),
        "an image is encoded together with its regions",
    ),
    Refused(
        "--mm-processor-kwargs",
        "model_config.multimodal_config.mm_processor_kwargs",
        (None, {}),
        "`regions` belong to a request, and there is no other setting of the processor",
    ),
)


def setting(vllm_config, path: str) -> Any:
    """A setting by its path; None where vLLM has no such section."""
    return reduce(lambda owner, name: getattr(owner, name, None), path.split("."), vllm_config)


def refuse_flags(vllm_config) -> None:
    """Raises: SettingError for the first flag that cannot be honoured, by name and with the reason."""
    for flag, path, harmless, reason in REFUSED:
        value = setting(vllm_config, path)
        if value is not None and value not in harmless:
            raise SettingError(f"PerceptionDLM does not run with {flag} (it is {value!r}): {reason}. Leave it out.")
    model = vllm_config.model_config
    if model.tokenizer != model.model:
        raise SettingError(
            f"PerceptionDLM does not run with --tokenizer {model.tokenizer}: prompts are written with the tokenizer "
            f"in {model.model}. Leave it out, or put the other one there."
        )
    if unknown := sorted(set(model.override_generation_config) - set(DEFAULTS)):
        raise SettingError(
            f"PerceptionDLM cannot take `{unknown[0]}` from --override-generation-config: decoding is greedy, its "
            f"settings are {', '.join(DEFAULTS)}. Leave it out."
        )
    steps = getattr(vllm_config.diffusion_config, "max_denoising_steps", None)
    if steps is not None:
        raise SettingError(
            "PerceptionDLM takes no `max_denoising_steps` in --diffusion-config: it is a setting of a request, its "
            f"default one of --override-generation-config '{{\"max_denoising_steps\": {steps}}}'."
        )


def set_multimodal_cache(multimodal) -> None:
    """A small cache of processed images. The regions are part of its keys, so that two requests seldom share an entry,
    and an entry is larger than its file: all tiles in float32, in the engine's memory.

    Args:
        multimodal (`MultiModalConfig`)
    """
    if multimodal.mm_processor_cache_gb == type(multimodal).mm_processor_cache_gb:  # vLLM's default
        multimodal.mm_processor_cache_gb = CACHE_GIB
        logger.info("PerceptionDLM: --mm-processor-cache-gb is %s: no two requests share regions.", CACHE_GIB)


def set_scheduling(scheduler) -> None:
    """Scheduling in whole prompts, also where vLLM cuts them although chunked prefill is off.

    Args:
        scheduler (`SchedulerConfig`): with `max_num_seqs` as it will be.
    """
    scheduler.enable_chunked_prefill = False
    if scheduler.long_prefill_token_threshold or scheduler.long_prefill_token_threshold_adaptive:
        logger.warning(
            "PerceptionDLM: --long-prefill-token-threshold %d is ignored. Prompt rows attend in both directions, a "
            "prompt cannot be computed in parts.",
            scheduler.long_prefill_token_threshold,
        )
        scheduler.long_prefill_token_threshold, scheduler.long_prefill_token_threshold_adaptive = 0, False
    active = scheduler.max_num_active_seqs
    if active is not None and active > scheduler.max_num_seqs:
        logger.warning(
            "PerceptionDLM: --max-num-active-seqs is %d instead of %d, as many as requests are taken at a time.",
            scheduler.max_num_seqs,
            active,
        )
        scheduler.max_num_active_seqs = scheduler.max_num_seqs
    if scheduler.max_num_scheduled_tokens is not None:
        logger.warning(
            "PerceptionDLM: --max-num-scheduled-tokens %d is ignored. A step has room for all canvases and a whole "
            "prompt; lower --max-num-seqs or --max-model-len for smaller steps.",
            scheduler.max_num_scheduled_tokens,
        )
