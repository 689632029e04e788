"""Train the tiny base checkpoint to look words up in a list, before the questions with letters.

    python -m tools.shapes.train_lookup --init runs/easy --out runs/lookup

To answer by letter, the model looks a word up among the options. Questions train this too slowly: they give one letter
per answer, and training stays at chance. Here a row is a list of pairs, followed by the same pairs in another order
with one of each pair hidden, so that a quarter of the tokens train it. The model learns it late and suddenly, after
some 2300 steps; therefore the learning rate does not decay. Other words, the form of options, and a question that
names the word then take a few hundred steps more. With questions about images alone the model forgets it again;
therefore their training adds [`lookup_loss`].
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn.functional import cross_entropy

from pdlm_hf.modeling_pdlm import PdlmBaseForConditionalGeneration
from pdlm_hf.processing_pdlm import PdlmProcessor
from pdlm_hf.shapes.questions import LETTER_PROMPT, SHAPES, SIZES, TEXTURES
from pdlm_hf.shapes.scenes import COLOURS

from .train import record_of, save

PAIRS = 6
LETTERS = "ABCDEFGH"
STAGES = ["words", "own words", "options", "asked"]
Batch = Callable[[np.random.Generator, int], tuple[torch.Tensor, torch.Tensor]]
WARMUP = 100  # steps of each stage
ENOUGH = 0.92  # share of right answers in the last 100 steps that ends a stage


def lookup_batch(
    rng: np.random.Generator,
    rows: int,
    letters: list[int],
    words: list[int],
    between: tuple[list[int], list[int]] = ([], []),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw lists with hidden words and letters.

    Args:
        rng (`np.random.Generator`): decides the lists; torch's own generator decides which tokens are hidden.
        rows (`int`): number of lists.
        letters, words (`list[int]`): ids of letters and words.
        between: ids between letter and word of a pair, and ids after a pair.

    Returns:
        ids, and which of them are hidden, `(rows, 2 * PAIRS * length of a pair)`.
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
    """Ids of the letters and words of the questions, and of what stands between them in a list (of options)."""

    def ids(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    words = [ids(f" {word}") for word in (*COLOURS, *SHAPES, *TEXTURES, *SIZES)]
    return {
        "letters": [ids(letter)[0] for letter in LETTERS],
        "words": [tokens[0] for tokens in words if len(tokens) == 1],
        "between": (ids("."), ids("\n")) if options else ([], []),
    }


def asked_batch(
    rng: np.random.Generator, rows: int, processor: PdlmProcessor, words: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw questions without image: which letter has this word among some options?

    Args:
        rng (`np.random.Generator`), rows (`int`): decides everything; number of questions.
        processor (`PdlmProcessor`): makes the prompts.
        words (`list[str]`): words of one token.

    Returns:
        see [`lookup_batch`]; the letter is hidden.
    """
    tokenizer, number = processor.tokenizer, int(rng.integers(2, 7))
    texts, letters = [], []
    for _ in range(rows):
        shown = [words[k] for k in rng.permutation(len(words))[:number]]
        right = int(rng.integers(number))
        lines = "\n".join(f"{letter}. {word}" for letter, word in zip(LETTERS, shown, strict=False))
        turn = {"role": "user", "content": f"Which is {shown[right]}?\n{lines}\n{LETTER_PROMPT}"}
        texts.append(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
        letters.append(LETTERS[right])
    end = tokenizer.eos_token
    batch = tokenizer([a + b + end for a, b in zip(texts, letters, strict=True)], add_special_tokens=False)
    ids = torch.tensor(batch["input_ids"])  # every word is one token: all rows are equally long
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, -2] = True
    return ids, hidden


def lookup_loss(model: PdlmBaseForConditionalGeneration, ids: torch.Tensor, hidden: torch.Tensor):
    """Compute the cross entropy of the hidden tokens, and the share of right predictions."""
    shown = torch.where(hidden, model.config.mask_token_id, ids)
    logits = model(input_ids=shown, attention_mask=torch.ones_like(shown)).logits[hidden]
    return cross_entropy(logits, ids[hidden]), (logits.argmax(-1) == ids[hidden]).float().mean().item()


def train_stage(
    model: PdlmBaseForConditionalGeneration,
    batch: Batch,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> int:
    """Train on lists until the share of right answers is high enough.

    Returns:
        the number of steps taken, at most `steps`.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    rng, right = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, step / WARMUP)
        loss, share = lookup_loss(model, *batch(rng, batch_size))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right.append(share)
        if step % WARMUP == 0:
            typer.echo(f"step {step}  right {np.mean(right[-WARMUP:]):.3f}")
            if np.mean(right[-WARMUP:]) >= ENOUGH:
                return step
    return steps


def stages(processor: PdlmProcessor) -> dict[str, Batch]:
    """Make the functions that draw the lists of each stage."""
    options = tokens_of(processor, options=True)
    words = [processor.tokenizer.decode(token).strip() for token in options["words"]]
    return {
        "words": partial(lookup_batch, letters=list(range(33, 41)), words=list(range(300, 320))),  # any ids
        "own words": partial(lookup_batch, **tokens_of(processor, options=False)),
        "options": partial(lookup_batch, **options),
        "asked": partial(asked_batch, processor=processor, words=words),
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    init: Annotated[Path, typer.Option(help="Base checkpoint to start from.")],
    stage: Annotated[list[str], typer.Option(help="Stages to train: words, own words, options, asked.")] = STAGES,
    steps: Annotated[int, typer.Option(help="Optimiser steps per stage at most.")] = 3000,
    batch_size: Annotated[int, typer.Option(help="Lists per step.")] = 48,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of the lists and of the hidden tokens.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train, and save."""
    torch.set_num_threads(threads)
    model = PdlmBaseForConditionalGeneration.from_pretrained(init).train()
    processor = PdlmProcessor.from_pretrained(init)
    start, taken = time.perf_counter(), 0
    for name, batch in stages(processor).items():
        if name in stage:
            typer.echo(name)
            taken += train_stage(model, batch, steps, batch_size, learning_rate, seed)
    command = (
        f"python -m tools.shapes.train_lookup --steps {steps} --batch-size {batch_size} "
        f"--learning-rate {learning_rate} --seed {seed} --threads {threads}"
        + "".join(f" --stage '{name}'" for name in stage)
    )
    seconds = round(time.perf_counter() - start, 1)
    save(model, processor, out, record_of(model, command, init, taken, seed, seconds))


if __name__ == "__main__":
    typer.run(main)
