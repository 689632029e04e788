"""Counts what the judges of lmms-eval's tasks do, and keeps their useful replies.

A request that failed counts there as a wrong answer, or as the reply to the question before it; of an answer that
cannot be read, an option is drawn at random. Of the replies lmms-eval keeps none but HallusionBench's, and those by
position, whatever the answer was. [`TaskJudges`] keeps each useful reply under its request, so that a second run asks
for the others only.
"""

import json
import random
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pdlm_hf.client import Reply, ReplyCache
from pdlm_hf.client.cache import key_of
from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.files import load_json

JUDGED = "_judged.json"  # beside *_results.json


class TaskJudges:
    """Observes requests to judges, and draws, of lmms-eval's own tasks, by the folder of the task ("mathvista").

    Args:
        path (`Path`, *optional*): file of useful replies, of this and earlier runs; default: in memory. The key of a
            reply is the whole request (prompt, judge, settings), not the address of the judge.

    Raises:
        SettingError: the file cannot be used.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._kept = ReplyCache(path)
        self._lock, self._local = threading.Lock(), threading.local()
        self._useful: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))  # replies by folder, request
        self._draws: Counter[str] = Counter()

    def install(self) -> None:
        """Replace `requests.post`, the chat of the openai package, `random.choice` and `random.randint`."""
        import requests
        from openai.resources.chat.completions import AsyncCompletions, Completions
        from openai.types.chat import ChatCompletion

        posted = response_maker(requests.Response)
        requests.post = self._ask(requests.post, _body_of, lambda response: response.text * response.ok, posted)
        said = partial(_completion, ChatCompletion.construct)  # of a server that leaves out fields, too
        Completions.create = self._ask(Completions.create, dict, _dump, said)
        AsyncCompletions.create = self._ask_later(AsyncCompletions.create, said)
        random.choice, random.randint = self._draw(random.choice), self._draw(random.randint)

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each task folder: requests that the `judge` answered, that `failed`, and options drawn at `random`."""
        found = {}
        for folder in sorted({*self._useful, *self._draws}):
            replies = list(self._useful[folder].values())
            judged = sum(count > 0 for count in replies)
            found[folder] = {"judge": judged, "failed": len(replies) - judged, "random": self._draws[folder]}
        return found

    def _ask(self, original: Callable, body_in: Callable, text_of: Callable, rebuild: Callable) -> Callable:
        def send(*args: Any, **kwargs: Any) -> Any:
            folder, body = _task_folder(), body_in(kwargs)
            if folder is None or not body.get("messages"):
                return original(*args, **kwargs)
            key, kept = self._begin(folder, body)
            if kept is not None:
                return rebuild(kept)
            reply = original(*args, **kwargs)
            self._end(folder, key, text_of(reply))
            return reply

        return send

    def _ask_later(self, original: Callable, rebuild: Callable) -> Callable:
        def send(*args: Any, **kwargs: Any) -> Any:
            folder = _task_folder()  # now: a coroutine has no callers

            async def reply() -> Any:
                if folder is None or not kwargs.get("messages"):
                    return await original(*args, **kwargs)
                key, kept = self._begin(folder, kwargs)
                if kept is not None:
                    return rebuild(kept)
                found = await original(*args, **kwargs)
                self._end(folder, key, _dump(found))
                return found

            return reply()

        return send

    def _begin(self, folder: str, body: dict[str, Any]) -> tuple[str, str | None]:
        """The key of a request, and its next kept reply: several rows may ask the same, or one row again."""
        key = key_of(json.loads(json.dumps(body, default=str)))
        self._local.last = folder, key
        with self._lock:
            kept = self._kept.get(f"{key} {self._useful[folder][key]}")
            if kept is None or not kept.text:
                return key, None
            self._useful[folder][key] += 1
        return key, kept.text

    def _end(self, folder: str, key: str, text: str) -> None:
        if _said(text):
            with self._lock:
                self._kept.put(f"{key} {self._useful[folder][key]}", folder, Reply(text))
                self._useful[folder][key] += 1

    def _draw(self, original: Callable) -> Callable:
        def draw(*args: Any) -> Any:
            if (folder := _task_folder(direct=True)) is not None:
                self._draws[folder] += 1
                asked, key = getattr(self._local, "last", (None, ""))
                if asked == folder:  # none of its replies named an option
                    for number in range(self._useful[folder][key]):
                        self._kept.put(f"{key} {number}", folder, Reply(""))
            return original(*args)

        return draw


def response_maker(kind: type) -> Callable[[str], Any]:
    """A function that makes a response of `requests` from the text of its body."""

    def rebuild(text: str) -> Any:
        response = kind()
        response.status_code, response.encoding = 200, "utf-8"
        response._content = text.encode()
        return response

    return rebuild


def _completion(construct: Callable, text: str) -> Any:
    return construct(**json.loads(text))


def _body_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    body = kwargs.get("json")
    return body if isinstance(body, dict) else {}


def _dump(reply: Any) -> str:
    return reply.model_dump_json() if hasattr(reply, "model_dump_json") else ""


def _said(text: str | None) -> bool:
    """Whether the body of a reply has a text."""
    try:
        return bool(json.loads(text or "")["choices"][0]["message"]["content"].strip())
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


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
