"""Denoising of chat answers: block after block from left to right, any order within a block."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import create_bidirectional_mask

from .batching_pdlm import pad_embeds
from .denoising_pdlm import DenoisingStep, GenerationTask
from .diffusion_pdlm import lowest_mask, transfer_schedule


class ChatCanvas:
    """Prompt, answer and suffix of every row of a chat batch, and the forward passes that fill the answer.

    Args:
        task (`GenerationTask`)
        prompt (`torch.FloatTensor` of shape `(rows, prompt_length, hidden_size)`)
        num_slots (`int`): length of the answer.
        suffix (`list[int]`): fixed tokens behind it.
    """

    def __init__(self, task: GenerationTask, prompt: torch.Tensor, num_slots: int, suffix: list[int]):
        self.task, self.num_slots = task, num_slots
        self.lookup = task.model.get_input_embeddings()
        mask_id, real = task.config.mask_token_id, task.attention_mask
        self.tail = torch.tensor([mask_id] * num_slots + suffix, device=task.device)
        tail = self.lookup(self.tail).to(prompt.dtype)
        self.embeds = pad_embeds([torch.cat([row[keep], tail]) for row, keep in zip(prompt, real, strict=True)])
        self.first = self.embeds.shape[1] - len(self.tail)
        lengths = real.sum(1, keepdim=True) + len(self.tail)
        columns = torch.arange(self.embeds.shape[1], device=task.device)
        real = (columns >= self.embeds.shape[1] - lengths).long()
        self.positions = (real.cumsum(1) - 1).clamp_min(0)
        self.language_model = task.model.model.language_model
        # once, not at every step: it is the same for all
        self.mask = create_bidirectional_mask(
            config=self.language_model.config, inputs_embeds=self.embeds, attention_mask=real
        )
        self.blank = None
        if (task.settings.guidance_scale or 1.0) != 1:  # the same without the prompt, for guidance
            self.blank = self.embeds.clone()
            self.blank[:, : self.first] = tail[0]
        self.tokens = torch.full((len(real), num_slots), mask_id, device=task.device)
        self.end = torch.full((len(real),), num_slots, device=task.device)  # where each answer stops, as known so far
        self.position = torch.arange(num_slots, device=task.device)

    def forward(self, inside: slice, banned: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafts and log odds of the slots `inside`."""
        window = slice(self.first + inside.start, self.first + inside.stop)
        hidden, plain = self._pass(self.embeds, window), None
        if self.blank is not None:
            plain = self._pass(self.blank, window)
        rows = len(self.tokens)
        return self.task.score(hidden, list(range(rows)), [hidden.shape[1]] * rows, banned, plain)[:2]

    def _pass(self, embeds: torch.Tensor, window: slice) -> torch.Tensor:
        self.task.num_forwards += 1
        outputs = self.language_model(inputs_embeds=embeds, attention_mask=self.mask, position_ids=self.positions)
        return outputs.last_hidden_state[:, window]

    def write(self, inside: slice, draft: torch.Tensor, chosen: torch.Tensor) -> None:
        """Write the chosen drafts of the slots `inside`."""
        self.tokens[:, inside] = torch.where(chosen, draft, self.tokens[:, inside])
        window = slice(self.first + inside.start, self.first + inside.stop)
        for embeds in (self.embeds, self.blank):
            if embeds is not None:
                embeds[:, window] = self.lookup(self.tokens[:, inside]).to(embeds.dtype)

    def answers(self) -> torch.Tensor:
        """Answers up to their stop, with the suffix, padded on the right with end-of-turn."""
        suffix = self.tail[self.num_slots :]
        rows = [torch.cat([row[:n], suffix]) for row, n in zip(self.tokens, self.end.tolist(), strict=True)]
        return pad_sequence(rows, batch_first=True, padding_value=self.task.config.eot_token_id)


def denoise_blocks(
    task: GenerationTask, prompt: torch.Tensor, num_slots: int, block_length: int, num_steps: int, suffix: list[int]
) -> torch.Tensor:
    """Chat answers: block after block from left to right, any order within a block; a written token is final.

    Args:
        task (`GenerationTask`)
        prompt (`torch.FloatTensor` of shape `(rows, prompt_length, hidden_size)`)
        num_slots, block_length, num_steps (`int`): length of the answer, of a block, and steps in all; block_length
            divides num_slots and the number of blocks divides num_steps.
        suffix (`list[int]`): fixed tokens behind the answer.

    Returns:
        `torch.LongTensor` of shape `(rows, length)`: answers and suffix, padded on the right.
    """
    config = task.config
    num_blocks = num_slots // block_length
    schedule = [k for k in transfer_schedule(block_length, num_steps // num_blocks) if k]
    stops = task.stops()
    canvas = ChatCanvas(task, prompt, num_slots, suffix)
    rows = len(canvas.tokens)
    for block in range(num_blocks):
        inside = slice(block * block_length, (block + 1) * block_length)
        for count in schedule:
            masked = canvas.tokens == config.mask_token_id
            wanted = (masked & (canvas.position < canvas.end[:, None]))[:, inside]
            if not wanted.any():
                break
            draft, log_odds = canvas.forward(inside, config.banned_token_ids)
            if task.history is not None:
                task.history.append(_chat_step(canvas.tokens, masked, draft, log_odds, inside))
            ranking = task.ranking(log_odds, list(range(rows)), [block_length] * rows)
            score = ranking.masked_fill(~wanted, -torch.inf)
            chosen = lowest_mask(-score, torch.full((rows,), count, device=task.device)) & wanted
            canvas.write(inside, draft, chosen)
            for i in range(rows if stops else 0):
                canvas.end[i] = min(int(canvas.end[i]), stops.position(canvas.tokens[i].tolist()))
            if task.streamer is not None:
                shown = canvas.tokens.clone()
                shown[:, inside] = torch.where(wanted, draft, shown[:, inside])
                task.stream(torch.where(canvas.position < canvas.end[:, None], shown, config.eot_token_id))
    return canvas.answers()


def _chat_step(tokens, masked, draft, log_odds, inside) -> DenoisingStep:
    full_draft = torch.full_like(tokens, -1)
    full_draft[:, inside] = draft
    probability = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    probability[:, inside] = log_odds.double().sigmoid()
    return DenoisingStep(tokens.clone(), masked, full_draft, probability)
