"""The attention back end is one that takes several sequences a request, whatever vLLM would prefer."""

import json
from types import SimpleNamespace

import pytest
from test_flags import engine_config
from vllm.platforms.interface import DeviceCapability

from pdlm_vllm import attention


@pytest.fixture(params=[(8, 0), (9, 0), (10, 0)], ids=str)
def gpu(request, monkeypatch):
    """Only its capability; FlashAttention's own checks find no GPU and so no float8."""
    found = SimpleNamespace(get_device_capability=lambda: DeviceCapability(*request.param))
    monkeypatch.setattr(attention, "current_platform", found)


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--dtype", "bfloat16"], "FLASH_ATTN"),
        (["--dtype", "float16"], "FLASH_ATTN"),
        (["--dtype", "float32"], "TRITON_ATTN"),
        (["--dtype", "bfloat16", "--kv-cache-dtype", "fp8"], "TRITON_ATTN"),
        (["--dtype", "bfloat16", "--attention-backend", "TRITON_ATTN"], "TRITON_ATTN"),
    ],
    ids=str,
)
def test_it_is_set(gpu, flags, name):
    config = engine_config(*flags)
    attention.choose_attention(config)
    assert config.attention_config.backend.name == name and config.attention_config.use_non_causal


@pytest.mark.parametrize("name", ["FLASHINFER", "FLEX_ATTENTION"])
def test_others_are_refused_with_the_reason(gpu, name):
    config = engine_config("--attention-backend", name)
    with pytest.raises(ValueError, match="one sequence per request.*FLASH_ATTN, TRITON_ATTN"):
        attention.choose_attention(config)
    config = engine_config("--attention-config", json.dumps({"backend_per_kind": {"full_attention": name}}))
    with pytest.raises(ValueError, match="one sequence per request"):
        attention.choose_attention(config)


def test_where_none_can_run_the_reasons_are_named(monkeypatch):
    found = SimpleNamespace(get_device_capability=lambda: DeviceCapability(9, 0))
    monkeypatch.setattr(attention, "current_platform", found)
    config = engine_config("--dtype", "bfloat16")
    config.cache_config.cache_dtype = "nvfp4"
    with pytest.raises(ValueError, match="kv_cache_dtype not supported"):
        attention.choose_attention(config)
