"""Counts what the judges of lmms-eval's tasks do.

A request that failed counts there as a wrong answer, or as the reply to the question before it; of an answer that
cannot be read, an option is drawn at random.
"""

import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.files import load_json

JUDGED = "_judged.json"  # beside *_results.json


class TaskJudges:
    """Observes requests to judges, and draws, of lmms-eval's own tasks, by the folder of the task ("mathvista")."""

    def __init__(self) -> None:
        self._useful: dict[str, dict[str, bool]] = defaultdict(dict)  # folder: prompt: whether a reply came
        self._draws: Counter[str] = Counter()

    def install(self) -> None:
        """Replace `requests.post`, the chat of the openai package, `random.choice` and `random.randint`."""
        import requests
        from openai.resources.chat.completions import Completions

        requests.post = self._request(
            requests.post, lambda kwargs: (kwargs.get("json") or {}).get("messages"), _text_of
        )
        Completions.create = self._request(  # type: ignore[method-assign]
            Completions.create, lambda kwargs: kwargs.get("messages"), lambda reply: reply.choices[0].message.content
        )
        random.choice, random.randint = self._draw(random.choice), self._draw(random.randint)

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each task folder: requests that the `judge` answered, that `failed`, and options drawn at `random`."""
        found = {}
        for folder in sorted({*self._useful, *self._draws}):
            useful = list(self._useful[folder].values())
            found[folder] = {"judge": sum(useful), "failed": len(useful) - sum(useful), "random": self._draws[folder]}
        return found

    def _request(self, original: Callable, messages_in: Callable, text_in: Callable) -> Callable:
        def send(*args: Any, **kwargs: Any) -> Any:
            folder, messages = _task_folder(), messages_in(kwargs)
            if folder is None or not messages:
                return original(*args, **kwargs)
            key = json.dumps(messages, sort_keys=True, default=str)
            seen = self._useful[folder]
            seen.setdefault(key, False)
            reply = original(*args, **kwargs)
            try:
                seen[key] = seen[key] or bool(str(text_in(reply) or "").strip())
            except (ValueError, LookupError, TypeError, AttributeError):
                pass  # no reply
            return reply

        return send

    def _draw(self, original: Callable) -> Callable:
        def draw(*args: Any) -> Any:
            if (folder := _task_folder(direct=True)) is not None:
                self._draws[folder] += 1
            return original(*args)

        return draw


def _text_of(response: Any) -> str:
    return response.json()["choices"][0]["message"]["content"] if response.ok else ""


def _folder_of(frame: Any) -> str | None:
    """The folder below `lmms_eval/tasks` of the code of a frame; None for other code."""
    parts = Path(frame.f_code.co_filename).parts
    place = parts.index("tasks") if "tasks" in parts else 0
    # a file in a folder: tasks/__init__.py itself loads all tasks, ours too
    return parts[place + 1] if place and parts[place - 1] == "lmms_eval" and len(parts) > place + 2 else None


def _task_folder(direct: bool = False) -> str | None:
    """The folder of the task whose code called; None if there is none, or (`direct`) if other code was in between."""
    frame = sys._getframe(2)
    if direct and _folder_of(frame) is None:
        return None
    while frame is not None:
        folder = _folder_of(frame)
        if folder is not None and not folder.startswith("_"):  # _task_utils serves several tasks
            return folder
        frame = frame.f_back  # type: ignore[assignment]
    return None


def judged_beside(results: Path, task: str) -> dict[str, int] | None:
    """What was counted for a task, from the file beside its results; None if nothing was."""
    file = results.with_name(results.name.replace("_results.json", JUDGED))
    if not file.is_file():
        return None
    counts = load_json(file)
    if not isinstance(counts, dict):
        raise DataError(f"{file}: expected an object {{task: counts}}.")
    return next((found for folder, found in counts.items() if task.startswith(folder)), None)
