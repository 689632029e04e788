"""A client for OpenAI-compatible servers. No reply is paid for twice, and no failure passes for a reply.

Replies are kept in a SQLite file the moment they arrive, so that a run can be stopped at any point, also by kill -9,
and goes on where it was. The key of a reply is what was asked (model, settings, messages with their images), not
where: the same model behind another address gives the replies that are there already.
"""

import hashlib
import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ..errors_pdlm import ServerError, SettingError

LONGEST_WAIT = 120.0  # seconds; a server that asks for more has run out of quota, not of breath
GRACE = 10.0  # seconds for requests on their way when a run is stopped; they are paid for, their replies are kept
_BACKOFF = 0.5  # seconds before the first retry, doubled with each

# What is asked: messages, or `{"messages": [...], **settings of this request alone}`.
Request = list[dict[str, Any]] | dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What came of a request.

    Args:
        text (`str`, *optional*): the reply, possibly empty; None if the call failed for good.
        error (`str`, *optional*): why it failed.
        cached (`bool`): it was there already.
        prompt_tokens, completion_tokens (`int`, *optional*): as the server counted.
        usage (`dict`): the server's whole `usage`.
        refused (`bool`): it failed because of what was asked; the server itself works.
    """

    text: str | None
    error: str | None = None
    cached: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usage: dict[str, Any] = field(default_factory=dict, repr=False)
    refused: bool = False


_Task = tuple[str, dict[str, Any]]  # key and body of a request
_Done = tuple[str, Reply | BaseException]


class ReplyCache:
    """Replies on disk, one row each, committed as they arrive.

    Args:
        path (`Path`, *optional*): SQLite file, made if it is not there; None: in memory.

    Raises:
        SettingError: the file cannot be opened or is something else.
    """

    def __init__(self, path: Path | None = None):
        self._lock = threading.Lock()
        try:
            # the default journal, not WAL: that needs shared memory, which network file systems lack
            self._rows = sqlite3.connect(path or ":memory:", timeout=60, check_same_thread=False)
            with self._rows:
                self._rows.execute(
                    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, model TEXT, text TEXT, usage TEXT)"
                )
        except sqlite3.Error as error:
            raise SettingError(f"{path}: cannot be used as a cache of replies ({error}).") from error

    def get(self, key: str) -> Reply | None:
        """The reply of this key, if it is there."""
        with self._lock:
            row = self._rows.execute("SELECT text, usage FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else _reply(row[0], json.loads(row[1]), cached=True)

    def put(self, key: str, model: str, reply: Reply) -> None:
        """Keep a reply; on disk when this returns. Raises: ServerError if it cannot be written, a full disk say."""
        values = (key, model, reply.text, json.dumps(reply.usage))
        try:
            with self._lock, self._rows:
                self._rows.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", values)
        except sqlite3.Error as error:  # going on would mean to pay for replies that are lost
            raise ServerError(f"The cache of replies cannot be written ({error}).") from error

    def __len__(self) -> int:
        with self._lock:
            return self._rows.execute("SELECT count(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._rows.close()


def key_in(variable: str | None) -> str | None:
    """The key in an environment variable; None for none. Raises: SettingError if it is not set."""
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise SettingError(f"The environment variable {variable} is not set; it holds the key of the server.")
    return os.environ[variable]


class ChatClient:
    """A model that answers questions.

    Args:
        model (`str`): its name at the server.
        base_url (`str`): the API's address, with `/v1` or whatever its last part is.
        api_key (`str`, *optional*): never written anywhere. The environment is not looked at, so that no key goes to a
            server it is not for.
        settings (`dict`, *optional*): further fields of every request: `temperature`, `max_tokens`, ...
        cache (`Path`, *optional*): file of replies, see [`ReplyCache`]; default: in memory.
        concurrency (`int`): requests at a time.
        retries (`int`): further attempts for a request that failed by no fault of its own: no connection, timeout,
            rate limit, server error, a body that is no reply.
        timeout (`float`): seconds to wait for the server at a time.
        max_calls (`int`, *optional*): stop before sending more requests than this, retries included.
        give_up_after (`int`): stop after this many failed calls in a row. Where replies are kept, requests that are
            refused for what they ask do not count once anything was answered: all questions about an image that the
            server's filter keeps back come in a row, and in the next run there are no others.

    Raises:
        ImportError: the `openai` package is missing.
        SettingError: a number out of range, or an unusable cache file.
    """

    keeps_replies = True  # in the cache

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None = None,
        settings: dict[str, Any] | None = None,
        *,
        cache: Path | None = None,
        concurrency: int = 10,
        retries: int = 4,
        timeout: float = 120.0,
        max_calls: int | None = None,
        give_up_after: int = 10,
    ):
        try:
            import openai
        except ImportError:
            raise ImportError("Asking a server needs the openai package: pip install openai.") from None
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if value < least:
                raise SettingError(f"`{name}` must be at least {least}, got {value}.")
        if timeout <= 0 or (max_calls is not None and max_calls < 0):
            raise SettingError(f"`timeout` must be positive and `max_calls` not negative, got {timeout}, {max_calls}.")
        if not str(base_url).startswith(("http://", "https://")):
            raise SettingError(f"The server's address must start with http:// or https://, got {base_url!r}.")
        self.model, self.base_url, self.settings = model, str(base_url), dict(settings or {})
        self.concurrency, self.retries, self.give_up_after = concurrency, retries, give_up_after
        self.max_calls, self.calls = max_calls, 0
        self.cache = ReplyCache(cache) if self.keeps_replies else None
        self._key = api_key or ""
        self._api = openai
        self._client = openai.OpenAI(api_key=api_key or "none", base_url=base_url, timeout=timeout, max_retries=0)
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self._probed = self._answered = False

    def ask_many(
        self, requests: Iterable[Request], progress: Callable[[int, Reply], None] | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """Ask all requests, several at a time; what is in the cache is not asked, and equal requests are asked once.

        Args:
            requests: messages, or dicts of messages and further settings; read as needed.
            progress (*optional*): called with the number of replies so far and the newest.

        Yields:
            (position of the request, [`Reply`]), as they come.

        Raises:
            ServerError: see there; replies so far are in the cache.
        """
        tasks: SimpleQueue[_Task | None] = SimpleQueue()
        done: SimpleQueue[_Done] = SimpleQueue()
        stop = threading.Event()
        threads: list[threading.Thread] = []
        waiting: dict[str, list[int]] = {}
        count = 0

        def finished() -> Iterator[tuple[int, Reply]]:
            key, outcome = done.get()
            if isinstance(outcome, BaseException):
                raise outcome
            for position, index in enumerate(waiting.pop(key)):
                yield index, replace(outcome, cached=outcome.cached or (position > 0 and outcome.error is None))

        def replies() -> Iterator[tuple[int, Reply]]:
            for index, request in enumerate(requests):
                body = self._body(request)
                key = key_of(body)
                if self.cache is not None and (reply := self.cache.get(key)) is not None:
                    self._answered = True
                    yield index, reply
                elif key in waiting:
                    waiting[key].append(index)
                else:
                    if not self._probed:
                        self.probe()
                    if len(threads) < self.concurrency:
                        threads.append(threading.Thread(target=self._work, args=(tasks, done, stop), daemon=True))
                        threads[-1].start()
                    if len(waiting) >= self.concurrency:
                        yield from finished()
                    waiting[key] = [index]
                    tasks.put((key, body))
            while waiting:
                yield from finished()

        try:
            for index, reply in replies():
                count += 1
                if progress is not None:
                    progress(count, reply)
                yield index, reply
        finally:
            stop.set()
            for _ in threads:
                tasks.put(None)
            deadline = time.monotonic() + GRACE
            for thread in threads:  # daemons: one that hangs does not keep the process alive
                thread.join(max(0.0, deadline - time.monotonic()))

    def ask(self, request: Request) -> Reply:
        """Ask one thing; see [`ask_many`]."""
        return next(reply for _, reply in self.ask_many([request]))

    def probe(self, chat: bool = True) -> None:
        """One tiny request: is the server there, does it know the key and the model, does it take the settings?

        Args:
            chat (`bool`): ask something; otherwise only look the model up in the server's list, where it has one.

        Raises:
            ServerError: it cannot be used, and why.
        """
        if not chat:
            return self._look_up()
        body = self._body([{"role": "user", "content": "Answer with the letter A."}])
        reply = self._attempt(body, threading.Event(), min(self.retries, 2))
        if reply.text is None:
            raise ServerError(f"The judge {self.model} at {public_url(self.base_url)} does not answer: {reply.error}")
        self._probed = True

    def close(self) -> None:
        """Close connections and the cache."""
        self._client.close()
        if self.cache is not None:
            self.cache.close()

    # ---------------------------------------------------------------- one request

    def _look_up(self) -> None:
        try:
            known = [model.id for model in self._client.models.list()]
        except self._api.NotFoundError:
            known = []  # no such list: the first request will tell
        except self._api.OpenAIError as error:
            raise ServerError(
                f"The server at {public_url(self.base_url)} does not answer: {self._why(error)}"
            ) from error
        if known and self.model not in known:
            raise ServerError(
                f"The server at {public_url(self.base_url)} has no model {self.model!r}, but {', '.join(known[:9])}."
            )
        self._probed = True

    def _body(self, request: Request) -> dict[str, Any]:
        fields = dict(request) if isinstance(request, dict) else {"messages": request}
        return {"model": self.model, **self.settings, **fields}

    def _work(self, tasks: SimpleQueue[_Task | None], done: SimpleQueue[_Done], stop: threading.Event) -> None:
        """A thread: answers tasks until told to stop."""
        while (task := tasks.get()) is not None and not stop.is_set():
            key, body = task
            try:
                reply = self._attempt(body, stop, self.retries)
                if reply.text is not None and self.cache is not None:
                    self.cache.put(key, self.model, reply)
                self._count(reply)
                done.put((key, reply))
            except BaseException as error:
                done.put((key, error))

    def _count(self, reply: Reply) -> None:
        """Raises: ServerError after too many failures in a row."""
        with self._lock:
            self._answered = self._answered or reply.text is not None
            if reply.text is not None:
                self._failed_in_a_row = 0
            elif not (reply.refused and self._answered and self.keeps_replies):
                self._failed_in_a_row += 1
            if self._failed_in_a_row >= self.give_up_after:
                raise ServerError(
                    f"The last {self._failed_in_a_row} calls to {self.model} failed; stopped. The last one: "
                    f"{reply.error} What was received is kept; run again to go on."
                )

    def _attempt(self, body: dict[str, Any], stop: threading.Event, retries: int) -> Reply:
        """Ask until there is a reply; at most `retries` + 1 requests, whatever goes wrong. Raises: ServerError."""
        error, refused = "stopped.", False
        for attempt in range(retries + 1):
            with self._lock:
                if self.max_calls is not None and self.calls >= self.max_calls:
                    raise ServerError(f"Stopped at {self.max_calls} calls, as asked. Run again to go on from there.")
                self.calls += 1
            try:
                return self._send(body)
            except (self._api.OpenAIError, NoReply) as problem:
                error, wait = self._why(problem), self._wait(problem, attempt)
            refused = wait is None
            if wait is None or wait > LONGEST_WAIT or attempt == retries or stop.wait(wait):
                break
        return Reply(None, error, refused=refused)

    def _send(self, body: dict[str, Any]) -> Reply:
        fields = {name: value for name, value in body.items() if name not in ("model", "messages")}
        raw = self._client.chat.completions.with_raw_response.create(
            model=body["model"], messages=body["messages"], extra_body=fields
        )
        try:
            data = json.loads(text := raw.http_response.text)
            choice = data["choices"][0]
            content = choice["message"].get("content")
            if not content and choice.get("finish_reason") == "content_filter":
                raise NoReply("the server's content filter kept the reply back.", final=True)
            if content is None:
                content = choice["message"].get("refusal") or ""  # no content is an empty reply, and paid for
            if not isinstance(content, str):
                raise TypeError
            # half of a surrogate pair, which JSON can hold and a file cannot
            content = content.encode("utf-8", "replace").decode()
            return _reply(content, data.get("usage") or {})
        except (ValueError, LookupError, TypeError, AttributeError):
            raise NoReply(f"the server's answer is no reply: {_short(text)!r}.") from None

    def _wait(self, error: Exception, attempt: int) -> float | None:
        """Seconds until the next attempt; None if the request is refused. Raises: ServerError if any would be."""
        status = getattr(error, "status_code", None)
        if status in (401, 404) or (status == 403 and not self._probed):
            what = {
                401: "refuses the key" if self._key else "wants a key, and none was given",
                403: "refuses access",
                404: f"does not know {self.model!r} or the address",
            }
            raise ServerError(
                f"The server at {public_url(self.base_url)} {what[status]}: {self._why(error)}"
            ) from error
        if getattr(error, "code", None) == "insufficient_quota":
            raise ServerError(f"The account behind the key has no quota left: {self._why(error)}") from error
        passing = (
            not error.final
            if isinstance(error, NoReply)
            else isinstance(error, self._api.APIConnectionError) or status in (408, 409, 429) or (status or 0) >= 500
        )
        if not passing:
            return None
        asked = _retry_after(error)
        if asked is not None:
            return asked
        return min(_BACKOFF * 2**attempt, 30.0) * random.uniform(0.75, 1.0)

    def _why(self, error: Exception) -> str:
        """One line about an error, without the key."""
        if isinstance(error, self._api.APITimeoutError):
            text = "no answer in time."
        elif isinstance(error, self._api.APIConnectionError):
            text = f"no connection ({error.__cause__ or error})."
        else:
            text = str(error)
        text = text.replace(self._key, "***") if len(self._key) > 3 else text
        return _short(text, 300)


class NoReply(Exception):
    """An HTTP success that holds no reply; `final`: asking again would not help."""

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final


def key_of(body: dict[str, Any]) -> str:
    """The key under which the reply to a request is kept."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def public_url(url: str) -> str:
    """An address without user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _reply(text: str, usage: dict[str, Any], cached: bool = False) -> Reply:
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Reply(text, None, cached, *counts, usage=usage)


def _retry_after(error: Exception) -> float | None:
    """Seconds the server asks to wait, if it says so in a number."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return max(0.0, float(headers["retry-after"]))
    except (AttributeError, KeyError, ValueError):
        return None


def _short(text: str, length: int = 80) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else f"{text[:length]}..."
