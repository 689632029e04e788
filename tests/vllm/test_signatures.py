"""What we call and override in vLLM is there, with these parameters: read from its source, so that a version can be
checked that cannot run here.

    python tests/vllm/test_signatures.py WHEEL    # of any vLLM; `make vllm-signatures` downloads one
"""

import ast
import sys
import zipfile
from pathlib import Path

# file -> (class or "", function) -> parameters that must exist
EXPECTED = {
    "v1/worker/gpu/model_states/interface.py": {
        ("ModelState", "__init__"): ["vllm_config", "model", "encoder_cache", "device"],
        ("ModelState", "add_request"): ["req_index", "new_req_data"],
        ("ModelState", "remove_request"): ["req_id"],
        ("ModelState", "initialize_kv_cache"): ["kv_cache_config", "block_tables"],
        ("ModelState", "prepare_inputs_embeds"): ["scheduled_encoder_inputs", "input_batch", "req_states"],
        ("ModelState", "prepare_inputs"): ["input_batch", "req_states"],
        ("ModelState", "prepare_dummy_inputs"): ["num_reqs", "num_tokens"],
        ("ModelState", "dummy_inputs_embeds"): ["num_tokens"],
        ("ModelState", "custom_sampler"): ["sampler"],
        ("ModelState", "execute_mm_encoder"): ["scheduled_encoder_inputs"],
        ("ModelState", "gather_mm_embeddings"): ["input_batch"],
        ("ModelState", "get_additional_cg_support"): [],
        ("ModelState", "prepare_attn"): [
            "input_batch",
            "cudagraph_mode",
            "block_tables",
            "slot_mappings",
            "attn_groups",
            "kv_cache_config",
            "for_capture",
            "ubatch_idx",
        ],
    },
    "v1/worker/gpu/attn_utils.py": {
        ("", "build_attn_metadata"): [
            "attn_groups",
            "num_reqs",
            "num_tokens",
            "query_start_loc_gpu",
            "query_start_loc_cpu",
            "max_query_len",
            "seq_lens",
            "max_seq_len",
            "block_tables",
            "slot_mappings",
            "kv_cache_config",
            "causal",
        ],
    },
    "utils/torch_utils.py": {("", "async_tensor_h2d"): ["data", "device", "dtype", "out"]},
    "lora/model_manager.py": {("LoRAModelManager", "set_adapter_mapping"): ["mapping"]},
    "lora/ops/torch_ops/lora_ops.py": {
        ("", "bgmv_shrink"): ["inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "scaling"]
    },
    "model_executor/models/utils.py": {("WeightsMapper", "map_name"): ["key"]},
    "v1/attention/backend.py": {
        ("AttentionBackend", "validate_configuration"): [
            "head_size",
            "dtype",
            "kv_cache_dtype",
            "block_size",
            "use_mla",
            "has_sink",
            "use_sparse",
            "use_mm_prefix",
            "use_per_head_quant_scales",
            "device_capability",
            "attn_type",
            "use_non_causal",
        ]
    },
    "v1/core/sched/diffusion_scheduler.py": {
        ("DiffusionScheduler", "update_draft_token_ids"): ["draft_token_ids"],
        ("DiffusionAsyncScheduler", "schedule"): [],
    },
    "v1/core/sched/scheduler.py": {
        ("Scheduler", "add_request"): ["request"],
        ("Scheduler", "_try_schedule_encoder_inputs"): [
            "request",
            "num_computed_tokens",
            "num_new_tokens",
            "encoder_compute_budget",
        ],
        ("Scheduler", "update_from_output"): ["scheduler_output", "model_runner_output"],
        ("Scheduler", "finish_requests"): ["request_ids", "finished_status"],
    },
    "v1/core/kv_cache_manager.py": {("KVCacheManager", "estimate_cached_tokens"): ["request"]},
    "v1/request.py": {("Request", "take_prefill_stats"): []},
    "forward_context.py": {("", "get_forward_context"): [], ("", "set_forward_context"): ["slot_mapping"]},
    "plugins/endpoint_plugins/interface.py": {
        ("EndpointPlugin", "attach_router"): ["app"],
        ("EndpointPlugin", "init_state"): ["engine_client", "state", "args"],
    },
    "multimodal/processing/processor.py": {("BaseMultiModalProcessor", "apply"): ["inputs", "timing_ctx"]},
    "multimodal/processing/inputs.py": {("ProcessorInputs", "get_mm_hashes"): ["model_id", "hash_algorithm"]},
    "multimodal/parse.py": {("ProcessorBatchItems", "get_item_for_hash"): ["index"]},
    "multimodal/media/base.py": {("MediaIO", "get_max_bytes"): [], ("MediaIO", "load_base64"): ["media_type", "data"]},
    "multimodal/media/connector.py": {
        ("MediaConnector", "fetch_image"): ["image_url"],
        ("MediaConnector", "fetch_image_async"): ["image_url"],
        ("MediaConnector", "load_from_url"): ["url", "media_io", "fetch_timeout"],
        ("MediaConnector", "load_from_url_async"): ["url", "media_io", "fetch_timeout"],
    },
    "inputs/engine.py": {
        ("", "mm_input"): ["prompt_token_ids", "mm_kwargs", "mm_hashes", "mm_placeholders"],
    },
    "renderers/base.py": {("BaseRenderer", "get_mm_processor"): []},
    "entrypoints/serve/exception_handling/error_response.py": {
        ("", "create_error_response"): ["message", "err_type", "status_code", "param"]
    },
    "entrypoints/serve/utils/request_logger.py": {
        ("RequestLogger", "__init__"): ["max_log_len"],
        ("RequestLogger", "log_inputs"): [
            "request_id",
            "prompt",
            "prompt_token_ids",
            "prompt_embeds",
            "params",
            "lora_request",
        ],
        ("RequestLogger", "log_outputs"): ["request_id", "outputs", "output_token_ids", "finish_reason"],
    },
    "entrypoints/serve/utils/sse_keep_alive.py": {("", "with_sse_keep_alive"): ["generator", "interval"]},
    "entrypoints/serve/utils/api_utils.py": {("", "with_cancellation"): []},
    "entrypoints/openai/chat_completion/api_router.py": {("", "create_chat_completion"): ["request", "raw_request"]},
    "model_executor/models/config.py": {("VerifyAndUpdateConfig", "verify_and_update_config"): ["vllm_config"]},
    "v1/engine/async_llm.py": {
        ("AsyncLLM", "generate"): ["prompt", "sampling_params", "request_id", "lora_request", "priority"],
        ("AsyncLLM", "shutdown"): ["timeout"],
    },
    "v1/engine/output_processor.py": {("OutputProcessor", "propagate_error"): ["e"]},
    "exceptions.py": {("GracefulHTTPError", "__init__"): ["message", "http_status"]},
}
FIELDS = {
    "v1/worker/gpu/sample/output.py": {
        "SamplerOutput": ["sampled_token_ids", "logprobs_tensors", "num_nans", "num_sampled", "num_rejected"]
    },
    "v1/outputs.py": {
        "LogprobsTensors": ["logprob_token_ids", "logprobs", "selected_token_ranks", "cu_num_generated_tokens"]
    },
    "v1/engine/__init__.py": {
        "EngineCoreOutput": [
            "request_id",
            "new_token_ids",
            "finish_reason",
            "stop_reason",
            "kv_transfer_params",
            "prefill_stats",
        ]
    },
    "config/model.py": {"ModelConfig": ["generation_config", "override_generation_config", "logits_processors"]},
    "config/multimodal.py": {"MultiModalConfig": ["mm_processor_cache_gb", "mm_processor_kwargs", "enable_mm_embeds"]},
    "config/attention.py": {"AttentionConfig": ["backend", "backend_per_kind", "use_non_causal"]},
    "lora/layers/utils.py": {"LoRAMapping": ["index_mapping", "prompt_mapping", "is_prefill"]},
    "config/diffusion.py": {"DiffusionConfig": ["canvas_length", "max_denoising_steps"]},
    "config/scheduler.py": {
        "SchedulerConfig": [
            "scheduler_cls",
            "max_num_seqs",
            "max_num_active_seqs",
            "max_num_batched_tokens",
            "max_num_scheduled_tokens",
            "long_prefill_token_threshold",
            "long_prefill_token_threshold_adaptive",
        ]
    },
}


def missing(folder: Path | zipfile.Path) -> list[str]:
    """What the vLLM in this folder, of a disk or of a wheel, lacks."""
    found = []
    for name, functions in EXPECTED.items():
        tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        for (owner, function), parameters in functions.items():
            node = _find(tree, owner, function)
            if node is None:
                found.append(f"{name}: no {owner}.{function}")
                continue
            arguments = node.args
            known = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            found += [f"{name}: {owner}.{function} has no {p}" for p in parameters if p not in known]
    for name, classes in FIELDS.items():
        tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        for owner, fields in classes.items():
            node = _class(tree, owner)
            known = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)] if node else []
            found += [f"{name}: {owner} has no {field}" for field in fields if field not in known]
    return found


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name), None)


def _find(tree: ast.Module, owner: str, function: str):
    place = _class(tree, owner) if owner else tree
    nodes = (ast.FunctionDef, ast.AsyncFunctionDef)
    return next((n for n in place.body if isinstance(n, nodes) and n.name == function), None) if place else None


def test_the_installed_vllm_has_what_we_need():
    import vllm

    assert missing(Path(vllm.__file__).parent) == []


def test_a_wheel_is_read_like_a_folder(tmp_path):
    import vllm

    with zipfile.ZipFile(tmp_path / "vllm.whl", "w") as wheel:
        for name in {*EXPECTED, *FIELDS}:
            text = (Path(vllm.__file__).parent / name).read_text(encoding="utf-8")
            wheel.writestr(f"vllm/{name}", text.replace("def take_prefill_stats", "def give_prefill_stats"))
    assert missing(zipfile.Path(tmp_path / "vllm.whl", "vllm/")) == ["v1/request.py: no Request.take_prefill_stats"]


def test_another_version_is_named_and_left_alone(monkeypatch):
    import vllm
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import pdlm_vllm

    assert pdlm_vllm.version_problem("0.32.0") is None and pdlm_vllm.version_problem("0.33.1+cu130") is None
    assert "0.40.1 is installed" in pdlm_vllm.version_problem("0.40.1")
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    monkeypatch.delitem(MODELS_CONFIG_MAP, "PDMLLM", raising=False)
    pdlm_vllm.register()
    assert "PDMLLM" not in MODELS_CONFIG_MAP
    monkeypatch.undo()
    pdlm_vllm.register()
    assert "PDMLLM" in MODELS_CONFIG_MAP


if __name__ == "__main__":
    problems = missing(zipfile.Path(sys.argv[1], "vllm/"))
    sys.stdout.write("\n".join(problems or ["nothing is missing"]) + "\n")
    sys.exit(bool(problems))
