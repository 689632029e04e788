"""What a transformers `Trainer` needs to train this model."""

import time
from collections.abc import Sized

from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback


class InOrderTrainer(Trainer):
    """Keeps the order of the data set, which is drawn at random or planned already."""

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset) if isinstance(dataset, Sized) else None


class Clock(TrainerCallback):
    """Seconds of training so far, kept with the state so that they add up over restarts."""

    def __init__(self):
        self.start = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        """Continue from the seconds of the last run."""
        before = [entry["elapsed"] for entry in state.log_history if "elapsed" in entry]
        self.start = time.perf_counter() - (before[-1] if before else 0)

    def on_log(self, args, state, control, **kwargs):
        """Note the seconds beside the loss."""
        state.log_history[-1]["elapsed"] = round(time.perf_counter() - self.start, 1)
