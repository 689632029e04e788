"""The samplers of all running requests, batched: no request waits for another, and the host for none of them.

Everything a step decides depends on tensors on the device and on counters of the host that are known beforehand; only
adaptive decoding ends at a time the host does not know, and then the device says so in `num_sampled`.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from pdlm_hf.diffusion_pdlm import accept_confident, lowest_mask, most_probable, token_log_odds

from .blocks import BlockPlan
from .plan import ADAPTIVE, CHAT, FIXED, Plan, token_rows

# Of every request by its place in the batch: token ids (rows, 2), log probabilities (rows, 2), steps (rows,)
Report = dict[int, tuple[torch.Tensor, ...]]

_MAX_LOGITS = 2**27  # token positions x vocabulary scored at a time: bounds the float32 logits to 512 MB


class DenoisingSampler:
    """Takes the place of vLLM's sampler.

    Args:
        base: vLLM's sampler, whose attributes the runner reads.
        state (`PdlmModelState`)
    """

    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, base, state):
        self.sampling_states = base.sampling_states
        self.logprob_token_ids_state = base.logprob_token_ids_state
        self.req_states = base.req_states
        self.compute_nans = False
        self.state, self.model, self.config, self.device = state, state.model, state.config, state.device
        requests, room, regions = state.max_num_reqs, state.room, max(1, state.config.num_region_prompts)
        self.canvas = torch.zeros(requests, room, dtype=torch.int64, device=self.device)
        shape = (requests, regions, room)  # a token position is (request, block, position)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.masked = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.exists = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.written = torch.zeros(shape, device=self.device)  # log odds as of the step that wrote it
        self.steps = torch.zeros(requests, regions, dtype=torch.int32, device=self.device)
        # keys at the end of each block that nobody sees, of all requests; and a 0 for [`rows.Rows`]
        self.hidden = torch.zeros(requests * regions + 1, dtype=torch.int32, device=self.device)
        self.plans: dict[int, Plan] = {}
        self.block_plans: dict[int, BlockPlan] = {}  # of places that read attributes instead
        self.banned = torch.tensor(state.config.banned_token_ids, device=self.device)

    def add_request(self, req_idx: int, sampling_params) -> None:
        """Called by the runner; [`begin`] has done it."""

    def apply_staged_writes(self) -> None:
        """Called by the runner; nothing is staged."""

    def begin(self, index: int, plan: Plan | BlockPlan) -> None:
        """The canvas of a new request in this place; that of captions and answers is empty."""
        self.canvas[index, : plan.width] = self._device(np.array(plan.canvas(self.config)))
        self.block_plans.pop(index, None)
        if isinstance(plan, BlockPlan):
            self.block_plans[index] = plan
            return
        self.plans[index] = plan
        self.tokens[index] = self.config.mask_token_id
        self.exists[index] = False
        self.exists[index, : plan.blocks, : plan.num_tokens] = True
        self.masked[index] = self.exists[index]
        self.written[index] = -torch.inf
        self.steps[index] = 0
        self.hidden[:-1].view(self.steps.shape)[index] = 0

    def __call__(self, logits: torch.Tensor, input_batch, draft_logits=None) -> SamplerOutput:
        """One step of every request that has rows in `logits`, which holds their hidden states.

        Returns:
            canvases of the requests that are finished; with them, as log probabilities, a report of every canvas:
            token ids (the draft, whether it is open), log probabilities, and as rank the steps of its block; of
            requests that read attributes, the tokens and log probabilities that are wanted.
        """
        count = input_batch.num_reqs
        bounds = input_batch.cu_num_logits_np
        places = input_batch.idx_mapping_np
        active = [
            i
            for i in range(count)
            if bounds[i + 1] > bounds[i] and int(places[i]) in self.state.running and i not in self.state.waiting
        ]
        reading = [i for i in active if int(places[i]) in self.block_plans]
        active = [i for i in active if i not in reading]
        sampled = torch.zeros(count, self.state.room, dtype=torch.int32, device=self.device)
        num_sampled = torch.zeros(count, dtype=torch.int32, device=self.device)
        scheduled = np.diff(input_batch.query_start_loc_np)[:count] * (np.diff(bounds) > 0)[:count]
        num_rejected = self._device(scheduled.astype(np.int32))
        report: Report = {}
        if not self.state.running and len(logits):  # vLLM measures the memory: as much as is ever scored at a time
            at_once = max(1, _MAX_LOGITS // self.config.text_config.vocab_size)
            self._score(logits[:1].expand(at_once, -1))
        if active:
            index = self._device(places[active].astype(np.int64))
            draft, odds = self._drafts(logits, active, bounds, places)
            length = self._step(index, [int(places[i]) for i in active], draft, odds)
            rows = self._device(np.array(active))
            width = max(self.plans[int(places[i])].width for i in active)
            sampled[rows, :width] = self.canvas[index, :width].int()
            num_sampled[rows] = length
            report |= self._report(active, index, places, draft, odds)
        for i in reading:
            width = self.block_plans[int(places[i])].width
            sampled[i, :width] = self.canvas[int(places[i]), :width].int()
            num_sampled[i] = width
        if reading:
            report |= self._read(logits, reading, bounds, places)
        num_rejected = num_rejected - num_sampled
        self.req_states.draft_tokens[input_batch.idx_mapping[:count].long(), : self.state.room] = self.canvas[
            input_batch.idx_mapping[:count].long()
        ].to(self.req_states.draft_tokens.dtype)
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=_joined(report, count),
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _device(self, values: np.ndarray) -> torch.Tensor:
        return async_tensor_h2d(values, device=self.device)

    def _drafts(self, hidden: torch.Tensor, active: list[int], bounds, places) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafts and log odds of the token positions of the active requests, `(active, regions, room)`.

        Of all that may be open as far as the host knows; without a draft, -1 and inf.
        """
        shape = (len(active), *self.tokens.shape[1:])
        drafts = torch.full(shape, -1, dtype=torch.int64, device=self.device)
        odds = torch.full(shape, torch.inf, device=self.device)
        for chat in (False, True):
            rows, where = [], []
            for k, i in enumerate(active):
                plan = self.plans[int(places[i])]
                if bool(plan.num_regions) == chat:
                    continue
                wanted = self.state.running[int(places[i])].open
                rows.append(int(bounds[i]) + token_rows(plan).numpy()[wanted])
                block, position = wanted.nonzero()
                where.append((k * shape[1] + block) * shape[2] + position)
            if sum(map(len, rows)):
                scored = self._score(hidden[self._device(np.concatenate(rows))], self.banned if chat else None)
                target = self._device(np.concatenate(where))
                drafts.view(-1)[target], odds.view(-1)[target] = scored
        return drafts, odds

    def _score(self, hidden: torch.Tensor, banned: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Most probable token and its log odds, logits a bounded number of rows at a time."""
        at_once = max(1, _MAX_LOGITS // self.config.text_config.vocab_size)
        tokens, odds = [], []
        for part in hidden.split(at_once):
            logits = self.model.logits(part).float()
            if banned is not None:
                logits.index_fill_(-1, banned, -torch.inf)
            tokens.append(most_probable(logits))
            odds.append(token_log_odds(logits, tokens[-1]))
        return torch.cat(tokens), torch.cat(odds)

    def _step(self, index: torch.Tensor, requests: list[int], draft, odds) -> torch.Tensor:
        """One step of the samplers; length of what each request is finished with, 0 while it is not."""
        plans = [self.plans[request] for request in requests]
        entries = []
        for plan, request in zip(plans, requests, strict=True):
            state = self.state.running[request]
            entries.append(plan.step_plan(state.step))
            state.step += 1
        kinds = {entry.kind for entry in entries}
        kind, last, left, count, start, stop = self._device(np.array(entries, dtype=np.int64)).T[:, :, None, None]
        tokens, masked, written = self.tokens[index], self.masked[index], self.written[index]
        exists = self.exists[index]
        self.steps[index] += masked.any(-1).int()
        accepted = torch.zeros_like(masked)  # final
        if ADAPTIVE in kinds:
            thresholds = np.array([1.0 if plan.threshold is None else plan.threshold for plan in plans], np.float32)
            threshold = self._device(thresholds)[:, None, None]
            confident = accept_confident(odds.sigmoid(), masked, threshold) | ((last > 0) & masked)
            accepted = confident & (kind == ADAPTIVE)
        if CHAT in kinds:
            position = torch.arange(masked.shape[-1], device=self.device)
            wanted = masked & (position >= start) & (position < stop)
            score = torch.where(wanted, -odds, torch.inf).flatten(1)
            accepted = accepted | (lowest_mask(score, count.flatten()).view_as(masked) & wanted & (kind == CHAT))
        changed = accepted | (masked & (kind == FIXED))
        tokens, written = torch.where(changed, draft, tokens), torch.where(changed, odds, written)
        masked = masked & ~accepted
        if FIXED in kinds:  # for all regions together, and what was kept may be opened again
            score = torch.where(exists, odds, torch.inf).flatten(1)
            opened = lowest_mask(score, left.flatten()).view_as(masked) & exists
            masked = torch.where(kind == FIXED, opened, masked)
        if ADAPTIVE in kinds:  # an end of turn closes the token positions behind it
            ends = (tokens == self.config.eot_token_id) & ~masked & exists
            behind = (ends.cumsum(-1) - ends.int() > 0) & exists & (kind == ADAPTIVE)
            closed = behind & masked
            tokens = torch.where(closed, self.config.eot_token_id, tokens)
            written, masked = torch.where(closed, torch.inf, written), masked & ~closed
            self._tell(index, plans, requests, masked, behind)
        self.tokens[index], self.masked[index], self.written[index] = tokens, masked, written
        self._show(index, plans, tokens, masked)
        done = torch.where(kind == ADAPTIVE, ~masked.any(-1).any(-1)[:, None, None], last > 0)
        return done.flatten() * self._lengths(index, plans)

    def _tell(self, index: torch.Tensor, plans: list[Plan], requests: list[int], masked, behind) -> None:
        """Hide the token positions behind ends where that is wanted, and let the host know."""
        behind = behind & self._device(np.array([plan.trim for plan in plans]))[:, None, None]
        self.hidden[:-1].view(self.steps.shape)[index] = behind.sum(-1, dtype=torch.int32)
        chosen = [k for k, plan in enumerate(plans) if plan.threshold is not None]
        news = torch.stack([masked, ~behind])[:, self._device(np.array(chosen))]
        self.state.news.send([self.state.running[requests[k]] for k in chosen], news)

    def _show(self, index: torch.Tensor, plans: list[Plan], tokens: torch.Tensor, masked: torch.Tensor) -> None:
        """Write the tokens into the canvases that run through the model."""
        request, column, source = self._places(plans)
        shown = torch.where(masked, self.config.mask_token_id, tokens)
        self.canvas[index[request], column] = shown.view(-1)[source]

    def _places(self, plans: list[Plan]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For every token position: request, column in the canvas, place in (requests, blocks, positions)."""
        regions, room = self.tokens.shape[1:]
        request, column, source = [], [], []
        for k, plan in enumerate(plans):
            found = token_rows(plan).numpy()
            block, position = np.indices(found.shape)
            request.append(np.full(found.size, k))
            column.append(found.ravel())
            source.append(((k * regions + block) * room + position).ravel())
        return (
            self._device(np.concatenate(request)),
            self._device(np.concatenate(column)),
            self._device(np.concatenate(source)),
        )

    def _lengths(self, index: torch.Tensor, plans: list[Plan]) -> torch.Tensor:
        """Number of tokens of each canvas: all of them, in chat up to the end of the turn."""
        widths = self._device(np.array([plan.width for plan in plans]))
        if all(plan.num_regions for plan in plans):
            return widths.int()
        chat = self._device(np.array([not plan.num_regions for plan in plans]))
        canvas = self.canvas[index]
        column = torch.arange(canvas.shape[1], device=self.device)
        found = (canvas == self.config.eot_token_id) & (column < widths[:, None])
        first = torch.where(found, column, canvas.shape[1]).amin(1) + 1
        return torch.where(chat, torch.minimum(first, widths), widths).int()

    def _report(self, active, index, places, draft, odds) -> Report:
        """Every row of the canvases of some requests."""
        plans = [self.plans[int(places[i])] for i in active]
        request, column, source = self._places(plans)
        ends = np.cumsum([0, *(plan.width for plan in plans)])
        rows = self._device(ends[:-1])[request] + column
        tokens, masked, written = self.tokens[index], self.masked[index], self.written[index]
        # what frames the captions is part of the canvas, certain and closed
        fixed = torch.cat([self.canvas[int(places[i]), : plan.width] for i, plan in zip(active, plans, strict=True)])
        ids = torch.stack([fixed, torch.zeros_like(fixed)], 1)
        ids[rows, 0] = torch.where(masked, draft, tokens).view(-1)[source]
        ids[rows, 1] = masked.view(-1)[source].long()
        logprobs = torch.zeros(len(fixed), 2, device=self.device)
        logprobs[rows, 0] = logsigmoid(torch.where(masked, odds, written)).view(-1)[source]
        steps = torch.zeros(len(fixed), dtype=torch.int64, device=self.device)
        room = self.tokens.shape[2]
        steps[rows] = self.steps[index].view(-1)[source // room].long()
        return _parted(active, ends, ids, logprobs, steps)

    def _read(self, hidden: torch.Tensor, reading: list[int], bounds, places) -> Report:
        """What requests that read attributes want to know."""
        plans = [self.block_plans[int(places[i])] for i in reading]
        rows = [int(bounds[i]) + row for i, plan in zip(reading, plans, strict=True) for row, _ in plan.wanted]
        wanted = [tokens for plan in plans for _, tokens in plan.wanted]
        at_once = max(1, _MAX_LOGITS // (2 * self.config.text_config.vocab_size))  # logits, and their softmax
        found = []
        for first in range(0, len(rows), at_once):
            chosen = self._device(np.array(rows[first : first + at_once]))
            logs = self.model.logits(hidden[chosen]).float().log_softmax(-1)
            found.append(self._wanted(logs, wanted[first : first + at_once]))
        tokens, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        ends = np.cumsum([0, *(plan.num_values for plan in plans)])
        ids = torch.stack([tokens, torch.zeros_like(tokens)], 1)
        logprobs = torch.stack([values, torch.zeros_like(values)], 1)
        return _parted(reading, ends, ids, logprobs, torch.zeros_like(tokens))

    def _wanted(self, logs: torch.Tensor, wanted: list[list[int] | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and log-probabilities, of rows `(rows, vocab_size)` of which some tokens are wanted, or the best."""
        pairs = [(k, token) for k, tokens in enumerate(wanted) for token in (tokens or [-1])]
        row, token = self._device(np.array(pairs)).T
        values, given = logs[row, token], token >= 0
        logs[:, self.config.mask_token_id] = -torch.inf
        best, found = logs.max(-1)
        return torch.where(given, token, found[row]), torch.where(given, values, best[row])


def _parted(requests: list[int], ends: np.ndarray, *tensors: torch.Tensor) -> Report:
    """The rows of every request."""
    pairs = zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    return {
        i: tuple(tensor[first:stop] for tensor in tensors) for i, (first, stop) in zip(requests, pairs, strict=True)
    }


def _joined(report: Report, count: int) -> LogprobsTensors | None:
    """The rows of all requests of a batch as vLLM copies them to the host."""
    if not report:
        return None
    widths = [len(report[i][0]) if i in report else 0 for i in range(count)]
    ids, logprobs, steps = (torch.cat(parts) for parts in zip(*(report[i] for i in sorted(report)), strict=True))
    return LogprobsTensors(ids, logprobs, steps, np.cumsum([0, *widths]).tolist())
