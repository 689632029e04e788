"""Which of vLLM's attention back ends can carry several sequences a request."""

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from pdlm_hf.errors_pdlm import SettingError

logger = init_logger("vllm.plugins.pdlm")  # below vLLM's own, so that it is shown

# Their metadata are per sequence and they take any number of them. FlashInfer plans one page table a request, and
# FlexAttention's buffers have one row a request.
CARRIES = (AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN)


def choose_attention(vllm_config) -> None:
    """Choose the first of [`CARRIES`] that this device, data type and cache can have, unless the user has chosen.

    vLLM would prefer FlashInfer to TRITON_ATTN, for float32 and for --kv-cache-dtype fp8 on some devices.

    Raises:
        SettingError: the user has chosen another, or none of them can run here; with vLLM's reasons.
    """
    attention = vllm_config.attention_config
    attention.use_non_causal = True
    known = ", ".join(backend.name for backend in CARRIES)
    chosen = {attention.backend, *(attention.backend_per_kind or {}).values()} - {None}
    for backend in chosen:
        if getattr(backend, "name", backend) not in [one.name for one in CARRIES]:
            raise SettingError(
                f"PerceptionDLM does not run with --attention-backend {getattr(backend, 'name', backend)}: it takes "
                f"one sequence per request, the regions of an image need one each. Leave it out, or choose one of "
                f"{known}."
            )
    if chosen:
        return
    reasons = {}
    for backend in CARRIES:
        reasons[backend.name] = _problems(backend, vllm_config)
        if not reasons[backend.name]:
            attention.backend = backend
            logger.info("PerceptionDLM: attention back end %s.", backend.name)
            return
    raise SettingError(
        f"PerceptionDLM needs one of vLLM's attention back ends {known}, and none can run with these settings: "
        f"{reasons}."
    )


def _problems(backend: AttentionBackendEnum, vllm_config) -> list[str]:
    """vLLM's reasons why this back end cannot be used."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    try:
        return backend.get_class().validate_configuration(
            head_size=model.get_head_size(),
            dtype=model.dtype,
            kv_cache_dtype=cache.cache_dtype,
            block_size=cache.block_size if cache.user_specified_block_size else None,
            use_mla=False,
            has_sink=False,
            use_sparse=False,
            use_mm_prefix=False,
            use_per_head_quant_scales=False,
            device_capability=current_platform.get_device_capability(),
            attn_type="decoder",
            use_non_causal=True,
        )
    except (ImportError, OSError) as error:
        return [f"{type(error).__name__}: {error}"]
