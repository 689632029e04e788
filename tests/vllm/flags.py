"""Every flag of vLLM's engine and what becomes of it with PerceptionDLM; docs/vllm.md has the same as tables, which
`python tests/vllm/flags.py` prints.

Flags of `WORKS` are started with the values here and give the captions of transformers; those of `REFUSED` stop the
start with a reason; those of `UNTESTED` were not tried.
"""

import sys

CHECKPOINT_NAME = "CHECKPOINT"  # stands for the folder of the embedded checkpoint

# In groups that one server starts with.
WORKS = [
    {
        "--seed": ["7"],
        "--dtype": ["float32"],
        "--served-model-name": ["shapes"],
        "--runner": ["generate"],
        "--tokenizer": [CHECKPOINT_NAME],
        "--model-impl": ["vllm"],
        "--trust-remote-code": [],
        "--enforce-eager": [],
        "--max-logprobs": ["0"],
        "--logprobs-mode": ["raw_logits"],
        "--disable-sliding-window": [],
        "--renderer-num-workers": ["2"],
        "--mm-processor-cache-gb": ["0"],
        "--max-model-len": ["1024"],
        "--load-format": ["safetensors"],
        "--safetensors-load-strategy": ["eager"],
        "--block-size": ["64"],
        "--gpu-memory-utilization": ["0.5"],
        "--kv-cache-memory-bytes": ["200M"],
        "--skip-mm-profiling": [],
        "--long-prefill-token-threshold": ["16"],
        "--long-prefill-token-threshold-adaptive": [],
        "--max-num-seqs": ["12"],
        "--max-num-active-seqs": ["10"],
        "--enable-prefix-caching": [],
        "--enable-chunked-prefill": [],
        "--disable-chunked-mm-input": [],
        "--disable-log-stats": [],
        "--log-level": ["INFO"],
        "--disable-hybrid-kv-cache-manager": [],
        "--additional-config": ['{"max_regions": 60}'],
        "--shutdown-timeout": ["20"],
    },
    {
        "--scheduling-policy": ["priority"],
        "--watermark": ["0.3"],
        "--num-gpu-blocks-override": ["400"],
        "--max-num-batched-tokens": ["4096"],
        "--max-num-scheduled-tokens": ["64"],
        "--no-scheduler-reserve-full-isl": [],
        "--stream-interval": ["5"],
        "--prefill-schedule-interval": ["3"],
        "--no-async-scheduling": [],
        "--max-num-queued-reqs": ["500"],
        "--max-num-queued-tokens": ["500000"],
        "--limit-mm-per-prompt": ['{"image": 2}'],
        "--media-io-kwargs": ['{"image": {}}'],
        "--mm-hasher-algorithm": ["sha256"],
        "--mm-processor-cache-type": ["lru"],
        "--allowed-media-domains": ["example.org"],
        "--diffusion-config": ['{"canvas_length": 400}'],
        "--generation-config": ["vllm"],
        "--override-generation-config": ['{"acceptance_threshold": 0.9}'],
        "--kv-cache-metrics": [],
        "--enable-logging-iteration-details": [],
        "--enable-log-requests": [],
        "--optimization-level": ["1"],
        "--performance-mode": ["throughput"],
        "--distributed-executor-backend": ["mp"],
        "--attention-backend": ["TRITON_ATTN"],
    },
]

# flag -> values, and a part of the reason
REFUSED = {
    "--pipeline-parallel-size": (["2"], "every step needs the whole model"),
    "--prefill-context-parallel-size": (["2"], "must all lie on one device"),
    "--decode-context-parallel-size": (["2", "--tensor-parallel-size", "4"], "must all lie on one device"),
    "--enable-dbo": ([], "the two halves of a step"),
    "--enable-batch-sharded-sampling": (["--tensor-parallel-size", "2"], "ranks all drafts"),
    "--logits-processors": (["a:b"], "does not call them"),
    "--watermark-config": (['{"key": 1}'], "no random choice"),
    "--speculative-config": (
        ['{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'],
        "the canvas takes the place",
    ),
    "--spec-method": (["ngram", "--spec-tokens", "3"], "the canvas takes the place"),
    "--spec-tokens": (["3", "--spec-method", "ngram"], "the canvas takes the place"),
    "--kv-transfer-config": (
        ['{"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}'],
        "of no use to another",
    ),
    "--kv-offloading-size": (["1"], "of no use to another"),
    "--kv-sharing-fast-prefill": ([], "no layer of the model shares keys"),
    "--convert": (["embed"], "no pooled output"),
    "--skip-tokenizer-init": ([], "questions and captions are texts"),
    "--enable-prompt-embeds": ([], "found by the ids of their tokens"),
    "--language-model-only": ([], "needs its image"),
    "--mm-encoder-only": ([], "there would be no captions"),
    "--enable-mm-embeds": ([], "together with its regions"),
    "--mm-processor-kwargs": (['{"regions": []}'], "belong to a request"),
    "--scheduler-cls": (["vllm.v1.core.sched.scheduler.Scheduler"], "pdlm_vllm.scheduler.PdlmScheduler"),
    "--worker-cls": (["vllm.v1.worker.gpu_worker.Worker"], "pdlm_vllm.cpu.PdlmCPUWorker"),
    # vLLM's own refusals
    "--return-sampling-mask": ([], "does not support diffusion models"),
    "--enable-expert-parallel": ([], "experts"),
}

# Other values of flags that work
REFUSED_VALUES = {
    "--runner": (["pooling"], "no pooled output"),
    "--tokenizer": ([f"{CHECKPOINT_NAME}_base"], "prompts are written with the tokenizer"),
    "--model-impl": (["transformers"], "PdlmForConditionalGeneration"),
    "--diffusion-config": (['{"canvas_length": 96, "max_denoising_steps": 8}'], "override-generation-config"),
    "--override-generation-config": (['{"temperature": 0.5}'], "`temperature`"),
    "--max-model-len": (["99999"], "greater than the derived max_model_len"),
}

GPU = "needs a GPU, several machines, or both"
OTHER = "concerns models of another kind"
RARE = "not tried"
UNTESTED = {
    GPU: """
    --data-parallel-size --data-parallel-rank --data-parallel-start-rank
    --data-parallel-size-local --data-parallel-address --data-parallel-rpc-port --data-parallel-backend
    --data-parallel-hybrid-lb --data-parallel-external-lb --data-parallel-multi-port-external-lb --dp-sync-interval
    --disable-nccl-for-dp-synchronization --master-addr --master-port --nnodes --node-rank
    --distributed-timeout-seconds --cpu-distributed-timeout-seconds --numa-bind --numa-bind-nodes --numa-bind-cpus
    --device-ids --disable-custom-all-reduce --max-parallel-loading-workers --ray-workers-use-nsight
    --enable-shm-tensor-arena --enable-fault-tolerance --fault-tolerance-config --enable-sleep-mode
    --sleep-mode-offload-cudagraph --sleep-preserve-parameter-names --enable-cumem-allocator
    --enable-nccl-comm-suspend --quantization --quantization-config --allow-deprecated-quantization
    --offload-backend --cpu-offload-gb --cpu-offload-params --offload-group-size --offload-num-in-group
    --offload-prefetch-step --offload-params --mm-encoder-tp-mode --mm-ipc-gpu-memory-gb --mm-processor-device
    --mm-device-do-normalize --cudagraph-capture-sizes --max-cudagraph-capture-size --cudagraph-metrics
    --enable-layerwise-nvtx-tracing --jit-monitor-mode --jit-monitor-verbose --ir-op-priority
    --enable-flashinfer-autotune --linear-backend --kernel-config --async-scheduling --fully-sharded-loras
    --ubatch-size --dbo-decode-token-threshold --dbo-prefill-token-threshold
    """,
    OTHER: """
    --enable-return-routed-experts --mamba-backend --mamba-ssu-algorithm --enable-mamba-cache-stochastic-rounding
    --mamba-cache-philox-rounds --mamba-cache-dtype --mamba-ssm-cache-dtype --mamba-block-size --mamba-cache-mode
    --enable-mamba-shared-prefix-checkpoint --replayssm-buffer-len --use-replayssm --prefix-match-unit
    --swa-bounded-replay --dcp-comm-backend --dcp-q-replicate --dcp-kv-cache-interleave-size
    --cp-kv-cache-interleave-size --enable-hc-sp --enable-ep-weight-filter --all2all-backend --enable-elastic-ep
    --elastic-ep-max-dp-size --enable-eplb --eplb-config --expert-placement-strategy --moe-backend
    --sparse-indexer-topk-backend --gdn-prefill-backend --kda-prefill-backend --kda-decode-backend --engram-config
    --enable-mixed-moe-lora-format --enable-moe-shared-loras --max-lora-cls-labels --video-pruning-rate
    --video-pruning-method --pooler-config --mm-encoder-attn-backend --mm-encoder-attn-dtype
    --mm-encoder-fp8-scale-path --mm-encoder-fp8-scale-save-path --mm-encoder-fp8-scale-save-margin
    --per-request-spec-decode-metrics --spec-model --disable-cascade-attn --prefix-caching-hash-algo
    --prefix-cache-retention-interval --kv-offloading-backend --kv-events-config --use-fp64-gumbel
    --enable-trace-replay --reasoning-parser --reasoning-parser-plugin --reasoning-config
    --structured-outputs-config --enable-mfu-metrics
    """,
    RARE: """
    --tokenizer-mode --hf-config-path --allowed-local-media-path --revision --code-revision --tokenizer-revision
    --config-format --hf-token --model-class-overrides --io-processor-plugin --download-dir
    --safetensors-prefetch-num-threads --safetensors-prefetch-block-size --model-loader-extra-config
    --ignore-patterns --use-tqdm-on-load --pt-load-map-location --worker-extension-cls --kv-cache-dtype-skip-layers
    --interleave-mm-strings --mm-shm-cache-max-object-size-mb --mm-tensor-ipc --logging-config --log-config-file
    --show-hidden-metrics-for-version --otlp-traces-endpoint --collect-detailed-traces --kv-cache-metrics-sample
    --custom-histogram-buckets --ec-transfer-config --ec-manager-config --compilation-config --attention-config
    --aux-output-config --profiler-config --weight-transfer-config --aggregate-engine-logging
    --fail-on-environ-validation --specialize-active-lora --lora-target-modules --default-mm-loras --lora-dtype
    --enable-tower-connector-lora --max-cpu-loras
    """,
}
# Started in tests of their own
ELSEWHERE = [
    "--model",
    "--hf-overrides",
    "--kv-cache-dtype",
    "--tensor-parallel-size",
    "--enable-lora",
    "--max-loras",
    "--max-lora-rank",
]


# Why, where the reason is not one of pdlm_vllm.flags
REASONS = {
    "--scheduler-cls": "the plugin's own scheduler is needed",
    "--worker-cls": "on CPUs the plugin's own worker is needed",
    "--return-sampling-mask": "vLLM: not for diffusion models",
    "--enable-expert-parallel": "vLLM: there are no experts",
    "--attention-backend": "other than FLASH_ATTN and TRITON_ATTN: they take one sequence per request",
    "--tokenizer": "other than the checkpoint's: prompts are written with that one",
    "--runner": "other than generate: the model writes captions, it has no pooled output",
    "--model-impl": "transformers: its models know nothing of several sequences a request",
    "--override-generation-config": "of settings that greedy decoding has no use for, `temperature` for example",
}
NOTES = {
    "--enable-prefix-caching": "switched off",
    "--enable-chunked-prefill": "switched off",
    "--long-prefill-token-threshold": "set to 0, logged: vLLM would cut prompts although chunked prefill is off",
    "--long-prefill-token-threshold-adaptive": "set to 0, logged",
    "--max-num-scheduled-tokens": "set by the plugin, logged: a step has room for all canvases and a whole prompt",
    "--max-num-active-seqs": "at most the requests that are taken at a time, logged",
    "--max-num-seqs": "at most 32, or 8 where steps compute prompts again, logged",
    "--override-generation-config": "defaults of requests: max_new_tokens, max_denoising_steps, acceptance_threshold, "
    "prefix_refresh_interval, block_length",
    "--generation-config": "where these defaults come from; `vllm`: none",
    "--stream-interval": "of the tokens of chat; region streams have one event a step all the same",
    "--kv-cache-dtype": "fp8 rounds keys and values: captions may differ",
    "--mm-processor-cache-gb": "0.25 instead of 4, see [memory](#memory)",
    "--async-scheduling": "vLLM has it on GPUs only; untested there",
    "--enable-lora": "see [LoRA](#lora-adapters)",
    "--tensor-parallel-size": "the language model over N devices; the vision tower is on each",
    "--hf-overrides": "of the configuration, `prefix_attention` for example",
}


def tables() -> str:
    """The tables of the page."""
    from pdlm_vllm.flags import REFUSED as RULES

    reasons = {rule.flag: rule.reason for rule in RULES} | REASONS
    reasons |= {"--spec-method": reasons["--speculative-config"], "--spec-tokens": reasons["--speculative-config"]}
    known = {**works(), **dict.fromkeys(ELSEWHERE)}
    lines = ["| works | note |", "|---|---|"]
    lines += [f"| `{flag}` | {NOTES[flag]} |" for flag in sorted(known) if flag in NOTES]
    plain = ", ".join(f"`{flag}`" for flag in sorted(known) if flag not in NOTES)
    lines += [f"| {plain} | |", "", "| refused | why |", "|---|---|"]
    lines += [f"| `{flag}` | {reasons[flag]} |" for flag in sorted({*REFUSED, *REASONS})]
    lines += ["", "| untested | why |", "|---|---|"]
    for why, names in UNTESTED.items():
        lines.append(f"| {', '.join(f'`{flag}`' for flag in sorted(names.split()))} | {why} |")
    return "\n".join(lines)


def untested() -> set[str]:
    """Names of the flags that were not tried."""
    return {flag for names in UNTESTED.values() for flag in names.split()}


def works() -> dict[str, list[str]]:
    """Flags that work, with the values they are started with."""
    return {flag: values for group in WORKS for flag, values in group.items()}


def command(flags: dict[str, list[str]], checkpoint) -> list[str]:
    """As arguments."""
    words = [word for flag, values in flags.items() for word in (flag, *values)]
    return [word.replace(CHECKPOINT_NAME, str(checkpoint)) for word in words]


if __name__ == "__main__":
    sys.stdout.write(tables() + "\n")
