"""PerceptionDLM as a model of lmms-eval: `lmms-eval --model pdlm --model_args pretrained=DIR`.

lmms-eval finds the model through the entry point `lmms_eval.models`; it has a chat and a simple interface
(`--force_simple`). Tasks of the paper's benchmarks get the paper's settings and prompts, unless `model_args` replace
them. Only lmms-eval imports this module.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages

from pdlm_hf.errors_pdlm import SettingError

from .answering import Answer, Answerer, Question
from .benchmarks import Benchmark, ask_like_paper, place_images
from .lmms_manifests import MODELS
from .lmms_resume import keep_costs
from .manifests import note_model
from .settings import REFERENCE_NAMES, SETTINGS

logger = logging.getLogger(__name__)

WINDOW = 16  # batches; within them questions with the same settings are put together

_DIFFUSION = {*SETTINGS, *REFERENCE_NAMES, "cfg_scale"} - {"max_new_tokens", "temperature"}
# Settings of autoregressive models, which denoising does not have.
_WITHOUT_MEANING = {"until", "top_p", "top_k", "num_beams", "do_sample", "image_aspect_ratio", "use_cache"}


Made = tuple[GenerationResult, Answer, float]  # a result, its answer, and the seconds it took


class Answers(Sequence):
    """Results that are computed batch by batch, when they are first read.

    lmms-eval passes all requests of a run at once, and writes each answer into its response cache when it reads it. So
    only the images of one window are in memory, and after a kill all answers but those of the last batches are in the
    cache.

    Args:
        requests (`list[Instance]`): all requests of the run.
        make: function from a window of requests to its results, a batch at a time: {position in the window: (result,
            answer, seconds)}.
        window (`int`): number of requests in a window.
        finished: function that is called after the last window, with all answers and the seconds they took.
    """

    def __init__(
        self,
        requests: list[Instance],
        make: Callable[[list[Instance]], Iterator[dict[int, Made]]],
        window: int,
        finished: Callable[[list[Answer], float], None],
    ):
        self.requests, self._make, self._window, self._finished = requests, make, window, finished
        self._made: dict[int, Made] = {}
        self._batches = self._all_batches()

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        while index not in self._made:
            self._made |= next(self._batches)
            if len(self._made) == len(self):
                _, answers, seconds = zip(*self._made.values(), strict=True)
                self._finished(list(answers), sum(seconds))
        return self._made[index][0]

    def _all_batches(self) -> Iterator[dict[int, Made]]:
        for start in range(0, len(self), self._window):
            for batch in self._make(self.requests[start : start + self._window]):
                yield {start + position: made for position, made in batch.items()}


@dataclass
class DenoisingCounts(TokenCounts):
    """Token counts and cost of an answer, for the samples file.

    Args:
        num_forwards (`int`): forward passes of the language model.
        slots (`int`): token positions that were denoised, padding included.
        seconds (`float`): time of the batch, divided by the number of its answers.
        settings (`dict`): every effective setting.
        prompt (`str`): hash of the prompt.
    """

    num_forwards: int | None = None
    slots: int | None = None
    seconds: float | None = None
    settings: dict[str, Any] | None = None
    prompt: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All counts as a dict."""
        own = ("num_forwards", "slots", "seconds", "settings", "prompt")
        return super().to_dict() | {name: getattr(self, name) for name in own}


class _Pdlm(lmms):
    """The part that both interfaces share.

    Args:
        pretrained (`str`): folder, hub id, "shapes" or "shapes_base".
        batch_size (`int`): questions in a batch.
        device (`str`, *optional*): default: the device of this rank.
        dtype (`str`): as in `from_pretrained`.
        presets (`str`): "paper", or "none" to leave settings and prompts to the task.
        **settings: settings of `generate`, and arguments of [`Answerer.from_pretrained`].
    """

    def __init__(
        self,
        pretrained: str = "MSALab/PerceptionDLM-Base",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        presets: str = "paper",
        max_batch_size: Any = None,
        **settings: Any,
    ):
        super().__init__()
        keep_costs(DenoisingCounts)
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            device = str(self.accelerator.device)
        self.answerer = Answerer.from_pretrained(
            pretrained, device=device, dtype=dtype, batch_size=int(batch_size), presets=presets, **settings
        )
        self.device = self.answerer.model.device  # lmms-eval gathers the counts of all ranks on it
        self._said: set[str] = set()
        if not self.rank and (models := os.environ.get(MODELS)):
            note_model(Path(models), self.answerer.model, pretrained)

    def generate_until(self, requests: list[Instance]) -> Sequence[GenerationResult]:
        """Answer requests; the results, in the same order, are computed when they are read, see [`Answers`]."""
        return Answers(requests, self._results, WINDOW * self.answerer.batch_size, self._log)

    def _results(self, requests: list[Instance]) -> Iterator[dict[int, Made]]:
        """Results of some requests by position, a batch at a time, with their answers and seconds."""
        questions = [self._question(*self._read(request)) for request in requests]
        for batch in self.answerer.batches(questions):
            yield {
                i: (GenerationResult(answer.text, self._counts(questions[i], answer)), answer, answer.seconds)
                for i, answer in self.answerer.answer_batch(questions, batch)
            }

    def loglikelihood(self, requests: list[Instance]) -> list:
        """Raises: NotImplementedError: a masked diffusion model has no token-by-token likelihood."""
        raise NotImplementedError(
            "PerceptionDLM writes answers by denoising and has no token-by-token likelihood; choose the generative "
            "variant of this task."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list:
        """Raises: NotImplementedError: the checkpoints are trained on one round."""
        raise NotImplementedError("PerceptionDLM answers single questions; tasks of several rounds are not supported.")

    def _read(self, request: Instance) -> tuple[str, dict[str, Any], list[Any], str]:
        """Text, settings, images and task of a request."""
        raise NotImplementedError

    def _question(self, text: str, asked: dict[str, Any], images: list[Any], task: str) -> Question:
        asked = dict(asked)
        if asked.pop("pdlm_regions", False):  # the first image, and a mask for each region
            settings = self._settings(asked, None, task)
            return Question(images[:1], text, None, settings, masks=list(images[1:]))
        benchmark = self.answerer.benchmark(task)
        if benchmark is not None:
            text = ask_like_paper(benchmark, text)
        return Question(images, text, benchmark, self._settings(asked, benchmark, task))

    def _settings(self, asked: dict[str, Any], benchmark: Benchmark | None, task: str) -> dict[str, Any]:
        """The settings of a task that denoising has; benchmarks of the paper keep the paper's length."""
        settings = {name: value for name, value in asked.items() if name in _DIFFUSION and value is not None}
        if asked.get("temperature"):
            settings["temperature"] = asked["temperature"]
        if benchmark is None:
            settings |= {k: asked[k] for k in ("max_new_tokens",) if asked.get(k)}
        elif asked.get("max_new_tokens") not in (None, benchmark.max_new_tokens):
            self._say(
                f"{task}: the paper's length of {benchmark.max_new_tokens} replaces the task's "
                f"{asked['max_new_tokens']}. `--model_args max_new_tokens=...` or `presets=none` changes this."
            )
        unknown = set(asked) - _DIFFUSION - _WITHOUT_MEANING - {"max_new_tokens", "temperature"}
        if unknown:
            self._say(f"{task}: PerceptionDLM ignores the generation settings {sorted(unknown)}.")
        return settings

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)

    def _counts(self, question: Question, answer: Answer) -> DenoisingCounts:
        return DenoisingCounts(
            answer.input_tokens,
            answer.output_tokens,
            num_forwards=answer.num_forwards,
            slots=answer.slots,
            seconds=answer.seconds,
            settings=self.answerer.effective_settings(question),
            prompt=answer.prompt,
        )

    def _log(self, answers: list[Answer], seconds: float) -> None:
        """Report tokens, forward passes and time to lmms-eval, and to the file PDLM_EVAL_LOG, if that is set."""
        tokens, forwards = (sum(getattr(a, name) for a in answers) for name in ("output_tokens", "num_forwards"))
        totals = {"total_requests": len(answers), "num_forwards": forwards, "slots": sum(a.slots for a in answers)}
        log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), totals)
        if path := os.environ.get("PDLM_EVAL_LOG"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"rank": self.rank, **totals, **self.answerer.describe()}, default=str) + "\n")


class PdlmChat(_Pdlm):
    """Reads the messages of a task."""

    is_simple = False

    def _read(self, request: Instance) -> tuple[str, dict[str, Any], list[Any], str]:
        context, to_messages, asked, doc_id, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise SettingError(f"{task} asks about videos or sound, and PerceptionDLM reads images only.")
        if self.answerer.benchmark(task) is not None and isinstance(context, str) and context:
            # as the simple interface: MMMU's messages replace `<image 2>` by images, in the order of the images
            return context, asked, images, task
        parts = [part for message in messages.messages for part in message.content]
        return place_images([part.text if part.type == "text" else None for part in parts]), asked, images, task


class PdlmSimple(_Pdlm):
    """Reads the text and the images of a task."""

    is_simple = True

    def _read(self, request: Instance) -> tuple[str, dict[str, Any], list[Any], str]:
        text, asked, to_images, doc_id, task, split = request.args
        return text, asked, list(to_images(self.task_dict[task][split][doc_id])), task
