"""Requests in flight, and what the host knows of their canvases.

In adaptive decoding the device decides what is accepted. What follows from it for later steps is computed there too;
the host learns it from copies that travel behind the device's work, so that it waits for nothing. Positions close and
do not open again, and what is hidden stays hidden: old news costs rows, but changes no caption.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from .blocks import BlockPlan
from .layout import CanvasLayout
from .plan import Plan


@dataclass
class Running:
    """One request in flight.

    Args:
        plan (`Plan` or `BlockPlan`), layout (`CanvasLayout`)
        place (`int`): its number among the requests of the runner.
        lora (`int`): number of its adapter, 0 for none.
        step (`int`): denoising steps done.
        prompt (`torch.FloatTensor`, *optional*): embedded prompt, where steps compute it again.

    Attributes:
        open, shown (`np.ndarray` of shape `(blocks, num_tokens)`): which token positions may be open, and which may be
            seen, as far as the host knows.
    """

    plan: Plan | BlockPlan
    layout: CanvasLayout
    place: int
    lora: int = 0
    step: int = 0
    prompt: torch.Tensor | None = None
    open: np.ndarray = field(init=False)
    shown: np.ndarray = field(init=False)

    def __post_init__(self):
        self.open = self.shown = np.ones((self.plan.blocks, self.plan.num_tokens), dtype=bool)

    def rows_needed(self, block: int) -> np.ndarray:
        """Which rows of a block `(rows,)` can still change a caption: none once it is complete."""
        frame = int(self.plan.num_regions > 0)  # a row before the token positions, and one behind them
        if not self.open[block].any():
            return np.zeros(self.plan.num_tokens + 2 * frame, dtype=bool)
        return np.pad(self.shown[block], frame, constant_values=True)


class News:
    """Copies on their way from the device to the host.

    Args:
        behind (`int`): how many of them are left on their way when the host reads; 0 where it waits for every step
            anyway. A fixed number, not whatever has arrived: the ranks of tensor parallelism need equal rows.
    """

    def __init__(self, behind: int):
        self.behind = behind
        self.sent: deque[tuple[list[Running], torch.Tensor, torch.Event | None]] = deque()

    def send(self, requests: list[Running], canvases: torch.Tensor) -> None:
        """What the host is to know after a step.

        Args:
            requests (`list[Running]`)
            canvases (`torch.BoolTensor` of shape `(2, requests, regions, room)`): positions that are open, and seen.
        """
        event = None
        copy = canvases.to("cpu", non_blocking=True)
        if canvases.device.type != "cpu":
            event = torch.Event(canvases.device)
            event.record()
        self.sent.append((requests, copy, event))

    def read(self) -> None:
        """Tell the requests; those that have lost their place meanwhile start anew, as others."""
        while len(self.sent) > self.behind:
            requests, canvases, event = self.sent.popleft()
            if event is not None:
                event.synchronize()  # of a step whose result the scheduler has already seen
            for request, now in zip(requests, canvases.numpy().swapaxes(0, 1), strict=True):
                request.open, request.shown = now[:, : request.plan.blocks, : request.plan.num_tokens]
