"""Teach the tiny base checkpoint to look things up in a list, before it is asked for letters.

    python -m pdlm_hf.shapes.lookup --init runs/easy --out runs/lookup

An answer by letter is found by looking a word up among the options. From questions this is learned too slowly: one
letter an answer says little, and training stays at chance. Here a row is a list of pairs, then the same pairs in
another order with one of each pair to fill in, so that a quarter of the tokens teach it. It is learned late and at
once, after some 2300 steps, which is why the learning rate stays up. With it learned, other words and the form of
options take a few hundred steps more.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn.functional import cross_entropy

from ..modeling_pdlm import PdlmBaseForConditionalGeneration
from ..processing_pdlm import PdlmProcessor
from .questions import SHAPES, SIZES, TEXTURES
from .train import record_of, save
from .world import COLOURS

PAIRS = 6
LETTERS = "ABCDEFGH"
FIRST = {"letters": list(range(33, 41)), "words": list(range(300, 320))}  # any will do
WARMUP = 100  # steps of each stage
ENOUGH = 0.92  # right of the last 100 steps; then the next stage begins


def lookup_batch(
    rng: np.random.Generator,
    rows: int,
    letters: list[int],
    words: list[int],
    between: tuple[list[int], list[int]] = ([], []),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists to fill in.

    Args:
        rng (`np.random.Generator`): decides the lists; what is hidden comes from torch's own.
        rows (`int`)
        letters, words (`list[int]`): ids.
        between: ids between the two of a pair, and after a pair.

    Returns:
        ids and what is hidden of them, `(rows, 2 * PAIRS * length of a pair)`.
    """
    middle, end = (np.tile(ids, (PAIRS, 1)).astype(int) for ids in between)
    lists = []
    for _ in range(rows):
        first, second = (np.array(ids)[rng.permutation(len(ids))[:PAIRS], None] for ids in (letters, words))
        pairs = np.concatenate([first, middle, second, end], 1)
        lists.append(np.concatenate([pairs[rng.permutation(PAIRS)].ravel(), pairs[rng.permutation(PAIRS)].ravel()]))
    ids = torch.tensor(np.array(lists))
    hidden = torch.zeros_like(ids, dtype=torch.bool).view(rows, 2, PAIRS, -1)
    letter = torch.rand(rows, PAIRS) < 0.5
    hidden[:, 1, :, 0] = letter
    hidden[:, 1, :, 1 + middle.shape[1]] = ~letter
    return ids, hidden.view(ids.shape)


def tokens_of(processor: PdlmProcessor, options: bool) -> dict:
    """Letters and words of the questions, and what is between them: nothing, or what is in a list of options."""

    def ids(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    words = [ids(f" {word}") for word in (*COLOURS, *SHAPES, *TEXTURES, *SIZES)]
    return {
        "letters": [ids(letter)[0] for letter in LETTERS],
        "words": [tokens[0] for tokens in words if len(tokens) == 1],
        "between": (ids("."), ids("\n")) if options else ([], []),
    }


def lists(
    model: PdlmBaseForConditionalGeneration, tokens: dict, steps: int, batch_size: int, learning_rate: float, seed: int
) -> int:
    """Train on lists until enough is right. Returns: steps taken, at most `steps`."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    rng, right, total = np.random.default_rng(seed), 0.0, 0.0
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, step / WARMUP)
        ids, hidden = lookup_batch(rng, batch_size, **tokens)
        shown = torch.where(hidden, model.config.mask_token_id, ids)
        logits = model(input_ids=shown, attention_mask=torch.ones_like(shown)).logits[hidden]
        loss = cross_entropy(logits, ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() / 100
        right += (logits.argmax(-1) == ids[hidden]).float().mean().item() / 100
        if step % 100 == 0:
            typer.echo(f"step {step}  loss {total:.3f}  right {right:.3f}")
            if right >= ENOUGH:
                return step
            total = right = 0.0
    return steps


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    init: Annotated[Path, typer.Option(help="Base checkpoint to start from.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps of a stage, at most.")] = 3000,
    batch_size: Annotated[int, typer.Option(help="Lists a step.")] = 48,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of lists and gaps.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train, and save."""
    torch.set_num_threads(threads)
    model = PdlmBaseForConditionalGeneration.from_pretrained(init).train()
    processor = PdlmProcessor.from_pretrained(init)
    start, taken = time.perf_counter(), 0
    for name, tokens in {
        "any words": FIRST,
        "words of the questions": tokens_of(processor, options=False),
        "as options": tokens_of(processor, options=True),
    }.items():
        typer.echo(name)
        taken += lists(model, tokens, steps, batch_size, learning_rate, seed)
    command = (
        f"python -m pdlm_hf.shapes.lookup --steps {steps} --batch-size {batch_size} --learning-rate {learning_rate} "
        f"--seed {seed} --threads {threads}"
    )
    seconds = round(time.perf_counter() - start, 1)
    save(model, processor, out, record_of(model, command, init, taken, seed, seconds))


if __name__ == "__main__":
    typer.run(main)
