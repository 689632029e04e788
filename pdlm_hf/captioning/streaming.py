"""Streamers: follow the captions while they sharpen."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers.generation.streamers import BaseStreamer


class RegionStreamer(BaseStreamer):
    """Turns every step's draft into texts: several images, several regions.

    Args:
        processor (`PdlmProcessor`): decodes.
        on_step (*optional*): called after each step with the step number (from 1) and the texts, a list per image of
            one draft per region.
    """

    def __init__(self, processor: Any, on_step: Callable[[int, list[list[str]]], None] | None = None):
        self.processor = processor
        self.on_step = on_step
        self.steps: list[list[list[str]]] = []
        self.latest: list[list[str]] = []
        self.captions: list[list[str]] | None = None

    def put_draft(self, value: torch.LongTensor, **kwargs: Any) -> None:
        """A step's draft, `(batch_size, num_regions, max_new_tokens)`; regions that are not in it, -1, keep theirs."""
        present = value[..., 0] >= 0
        texts = self.processor.decode_captions(value)
        self.latest += [[] for _ in range(len(texts) - len(self.latest))]
        for known, drafts, regions in zip(self.latest, texts, present.tolist(), strict=True):
            places = [k for k, there in enumerate(regions) if there]
            known += [""] * (max(places, default=-1) + 1 - len(known))
            for k, draft in zip(places, drafts, strict=True):
                known[k] = draft
        self.steps.append([list(drafts) for drafts in self.latest])
        if self.on_step:
            self.on_step(len(self.steps), self.steps[-1])

    def put(self, value: torch.LongTensor) -> None:
        """The final captions."""
        self.captions = self.processor.decode_captions(value)

    def end(self) -> None:
        """The next call has other images."""
        self.latest = []


class LiveView:
    """A table in the terminal that shows the draft of every region of one image, step by step.

    Args:
        names (`list[str]`): of the regions.
        console (`rich.console.Console`, *optional*): where to show it; default stderr.
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
        """Callback for [`RegionStreamer`]."""
        table = Table(title=f"denoising step {step}", title_justify="left", expand=True)
        table.add_column("region", no_wrap=True)
        table.add_column("draft", ratio=1)
        for name, draft in zip_longest(self.names, drafts[0], fillvalue=""):
            table.add_row(name, draft)
        self.live.update(table, refresh=True)
