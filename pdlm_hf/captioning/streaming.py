"""Follow the captions while they are denoised."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers.generation.streamers import BaseStreamer


class RegionStreamer(BaseStreamer):
    """Decodes the draft of every step, for any number of images and regions.

    Args:
        processor (`PdlmProcessor`): decodes the tokens.
        on_step (*optional*): called after each step with its number (from 1) and for each image the list of its
            drafts, one per region.
    """

    def __init__(self, processor: Any, on_step: Callable[[int, list[list[str]]], None] | None = None):
        self.processor = processor
        self.on_step = on_step
        self.steps: list[list[list[str]]] = []
        self.latest: list[list[str]] = []
        self.captions: list[list[str]] | None = None

    def put_draft(self, value: torch.LongTensor, **kwargs: Any) -> None:
        """Receive the draft of a step, `(batch_size, num_regions, max_new_tokens)`; -1: the draft is unchanged."""
        present = value[..., 0] >= 0
        texts = self.processor.decode_captions(value)
        self.latest += [[] for _ in range(len(texts) - len(self.latest))]
        for known, drafts, regions in zip(self.latest, texts, present.tolist(), strict=True):
            places = [k for k, is_present in enumerate(regions) if is_present]
            known += [""] * (max(places, default=-1) + 1 - len(known))
            for k, draft in zip(places, drafts, strict=True):
                known[k] = draft
        self.steps.append([list(drafts) for drafts in self.latest])
        if self.on_step:
            self.on_step(len(self.steps), self.steps[-1])

    def put(self, value: torch.LongTensor) -> None:
        """Take the final captions."""
        self.captions = self.processor.decode_captions(value)

    def end(self) -> None:
        """Forget the drafts: the next call has other images."""
        self.latest = []


class LiveView:
    """A table in the terminal with the draft of every region of one image, updated after every step.

    Args:
        names (`list[str]`): names of the regions.
        console (`rich.console.Console`, *optional*): default: stderr.
    """

    def __init__(self, names: list[str], console: Console | None = None):
        self.names = names
        self.live = Live(console=console or Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> "LiveView":
        self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.live.stop()

    def show(self, step: int, drafts: list[list[str]]) -> None:
        """Show the drafts of a step; the `on_step` of [`RegionStreamer`]."""
        table = Table(title=f"denoising step {step}", title_justify="left", expand=True)
        table.add_column("region", no_wrap=True)
        table.add_column("draft", ratio=1)
        for name, draft in zip_longest(self.names, drafts[0], fillvalue=""):
            table.add_row(name, draft)
        self.live.update(table, refresh=True)
