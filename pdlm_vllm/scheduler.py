"""vLLM's diffusion scheduler with room for the private areas, and with a way back for scores and drafts.

The worker hands every step's drafts, their log probabilities and steps to the scheduler in the arrays that vLLM copies
to the host anyway for log probabilities, asynchronously. From here they travel with the engine's outputs to the front
end, in the field a connector would use (`kv_transfer_params`), for requests that asked for a report.
"""

from typing import Any

from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from .blocks import BlockPlan
from .config import block_room, lookahead_tokens
from .plan import REPORT, STREAM, Plan, make_plan, served_defaults


class _PdlmScheduling(Scheduler):
    """What both schedulers add to vLLM's."""

    def __init__(self, vllm_config, *args, **kwargs):
        super().__init__(vllm_config, *args, **kwargs)
        self.pdlm_config = vllm_config.model_config.hf_config
        self.pdlm_room = vllm_config.diffusion_config.canvas_length
        self.pdlm_defaults = served_defaults(vllm_config.model_config)
        self.pdlm_block_room = block_room(vllm_config)
        self.pdlm_plans: dict[str, Plan | BlockPlan] = {}
        self.pdlm_sent: dict[str, int] = {}  # tokens of a chat answer that have left already
        self.num_lookahead_tokens = lookahead_tokens(vllm_config)

    def add_request(self, request) -> None:
        """Fit the engine's settings to the canvas, so that plain `SamplingParams` work as well."""
        params = request.sampling_params
        if request.request_id not in self.requests and params is not None:
            prompt = request.prompt_token_ids or []
            room = min(self.pdlm_room, self.max_model_len - len(prompt))
            plan = make_plan(
                self.pdlm_config,
                self.pdlm_defaults,
                prompt,
                params.extra_args,
                params.max_tokens,
                room,
                self.pdlm_block_room,
            )
            self.pdlm_plans[request.request_id] = plan
            params.extra_args = {
                **(params.extra_args or {}),
                "diffusion_canvas_length": plan.width,
                "diffusion_read_only": True,
                "diffusion_max_steps": plan.steps,
            }
            params.max_tokens = request.max_tokens = plan.width
            # refused at our doors; other routes of vLLM would let them through to an engine that cannot serve them
            params.logprobs = params.prompt_logprobs = None
            if getattr(params, "prompt_logprob_token_ids", None):
                params.prompt_logprob_token_ids = None
            if plan.num_regions:
                params._eos_token_id, params.stop_token_ids = None, []  # the canvas is taken whole
            else:
                params.stop_token_ids = [*(params.stop_token_ids or []), self.pdlm_config.eot_token_id]
        super().add_request(request)

    def _try_schedule_encoder_inputs(self, request, num_computed_tokens, num_new_tokens, *args, **kwargs):
        """A prompt is computed in one piece: if its image does not fit into this step, none of it is scheduled.

        vLLM would go ahead with the text before the image, also with chunked prefill switched off.
        """
        budget = args[0] if args else kwargs["encoder_compute_budget"]
        found = super()._try_schedule_encoder_inputs(request, num_computed_tokens, num_new_tokens, *args, **kwargs)
        return found if found[1] == num_new_tokens else ([], 0, budget, [], [])

    def update_from_output(self, scheduler_output, model_runner_output) -> dict[int, EngineCoreOutputs]:
        """The outputs of a step, with the blocks of chat answers as they are finished, and with the reports for
        requests that asked for them.
        """
        alive = dict(self.requests)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        finished = {item.request_id: item for found in outputs.values() for item in found.outputs}
        for request_id, index in model_runner_output.req_id_to_index.items():
            request = alive.get(request_id)
            if request is None or request.sampling_params is None:
                continue
            extra, plan = request.sampling_params.extra_args or {}, self.pdlm_plans[request_id]
            if isinstance(plan, Plan) and plan.num_regions and request_id in finished and not extra.get(REPORT):
                item = finished[request_id]  # by a door of vLLM's: captions line by line, as the regions were given
                item.new_token_ids = in_given_order(item.new_token_ids, plan, _given_order(request))
            if not (plan.in_blocks or extra.get(REPORT) or extra.get(STREAM)):
                continue
            report = _report(model_runner_output.logprobs, index, plan)
            if report is None:  # a step over the prompt
                continue
            item = finished.get(request_id)
            if item is None and request_id in self.requests:
                item = EngineCoreOutput(request_id=request_id, new_token_ids=[])
                if self._send_blocks(plan, report, item) or extra.get(STREAM):
                    item.prefill_stats = self._prefill_stats(request)
                    outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(item)
            elif item is not None and plan.in_blocks:
                item.new_token_ids = item.new_token_ids[self.pdlm_sent.get(request_id, 0) :]
            if item is not None and (extra.get(REPORT) or extra.get(STREAM)):
                item.kv_transfer_params = {"pdlm": report}
        for request_id in [name for name in self.pdlm_plans if name not in self.requests]:
            del self.pdlm_plans[request_id]
            self.pdlm_sent.pop(request_id, None)
        return outputs

    def _send_blocks(self, plan: Plan | BlockPlan, report: dict[str, Any], item: EngineCoreOutput) -> bool:
        """Put the blocks that are finished into the output, if any has not left yet. An answer that ends in one of
        them is finished: vLLM's own test comes with the whole canvas only.
        """
        if isinstance(plan, BlockPlan) or not plan.in_blocks:
            return False
        sent = self.pdlm_sent.get(item.request_id, 0)  # also of before a request lost its place in the cache
        still = report["open"].index(1) if 1 in report["open"] else plan.num_tokens
        item.new_token_ids = report["tokens"][sent : still // plan.block_length * plan.block_length]
        if self.pdlm_config.eot_token_id in item.new_token_ids:
            item.new_token_ids = item.new_token_ids[: item.new_token_ids.index(self.pdlm_config.eot_token_id) + 1]
            item.finish_reason, item.stop_reason = FinishReason.STOP, self.pdlm_config.eot_token_id
            self.finish_requests(item.request_id, RequestStatus.FINISHED_STOPPED)
        self.pdlm_sent[item.request_id] = sent + len(item.new_token_ids)
        return bool(item.new_token_ids)

    def _prefill_stats(self, request):
        """What vLLM's metrics want with the first output of a request."""
        stats = request.take_prefill_stats()
        if stats is not None:
            stats.finalize(self.kv_cache_manager.estimate_cached_tokens(request))
        return stats


def _given_order(request) -> list[int]:
    """For every caption block the place of its region in the request."""
    for feature in request.mm_features or ():
        if feature.data is not None and "region_order" in feature.data:
            return feature.data["region_order"].data.flatten().tolist()
    return []


def in_given_order(tokens: list[int], plan: Plan, order: list[int]) -> list[int]:
    """A finished canvas, with the captions in the order of the request instead of by area; what frames them stays."""
    if len(tokens) != plan.width or sorted(order[: plan.blocks]) != list(range(plan.blocks)):
        return tokens
    found = list(tokens)
    for block, place in enumerate(order[: plan.blocks]):
        first, last = block * plan.rows + 1, (block + 1) * plan.rows - 1
        start = place * plan.rows + 1
        found[start : start + plan.num_tokens] = tokens[first:last]
    return found


def _report(logprobs, index: int, plan: Plan | BlockPlan) -> dict[str, Any] | None:
    """Drafts, log probabilities and steps of one request after a step.

    Returns:
        "tokens" and "logprobs": of every canvas row; "open": whether it may still change; "steps": of every block.
        Where attributes are read, only "tokens" and "logprobs", those that are wanted.
    """
    if logprobs is None:
        return None
    ends = logprobs.cu_num_generated_tokens
    rows = slice(ends[index], ends[index + 1])
    if rows.stop - rows.start != plan.num_values:
        return None
    if isinstance(plan, BlockPlan):
        tokens = logprobs.logprob_token_ids[rows, 0].tolist()
        return {"tokens": tokens, "logprobs": logprobs.logprobs[rows, 0].tolist()}
    steps = logprobs.sampled_token_ranks[rows].reshape(plan.blocks, plan.rows)[:, plan.rows // 2]
    return {
        "tokens": logprobs.logprob_token_ids[rows, 0].tolist(),
        "logprobs": logprobs.logprobs[rows, 0].tolist(),
        "open": logprobs.logprob_token_ids[rows, 1].tolist(),
        "steps": steps.tolist(),
    }


class PdlmSyncScheduler(_PdlmScheduling, DiffusionScheduler):
    """For hosts that wait for every step (CPU)."""


class PdlmAsyncScheduler(_PdlmScheduling, DiffusionAsyncScheduler):
    """For hosts that run ahead of the device."""


class PdlmScheduler:
    """The one or the other: vLLM decides on asynchronous scheduling after it has asked for the class."""

    def __new__(cls, vllm_config, *args, **kwargs):
        """Called by vLLM like the class itself."""
        asynchronous = vllm_config.scheduler_config.async_scheduling
        return (PdlmAsyncScheduler if asynchronous else PdlmSyncScheduler)(vllm_config, *args, **kwargs)
