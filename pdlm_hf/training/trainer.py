"""Additions to transformers' `Trainer`."""

import time
from collections.abc import Sized

from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback


class InOrderTrainer(Trainer):
    """A Trainer that keeps the order of the data set, for data sets that are drawn at random or planned."""

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset) if isinstance(dataset, Sized) else None


class Clock(TrainerCallback):
    """Logs the seconds of training as `elapsed`, which add up over restarts.

    Args:
        limit (`float`, *optional*): seconds after which training ends.
    """

    def __init__(self, limit: float | None = None):
        self.limit = limit
        self.start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return time.perf_counter() - self.start

    def on_train_begin(self, args, state, control, **kwargs):
        """Continue from the seconds of the last run."""
        before = [entry["elapsed"] for entry in state.log_history if "elapsed" in entry]
        self.start = time.perf_counter() - (before[-1] if before else 0)

    def on_step_end(self, args, state, control, **kwargs):
        """End a training whose time is over, with a checkpoint."""
        if self.limit is not None and self.elapsed >= self.limit:
            control.should_training_stop = control.should_save = True

    def on_log(self, args, state, control, **kwargs):
        """Add the seconds to the log entry."""
        state.log_history[-1]["elapsed"] = round(self.elapsed, 1)
