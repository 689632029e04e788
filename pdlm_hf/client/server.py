"""Many requests to an OpenAI-compatible server: several at a time, retries, limits.

With a cache replies are on disk the moment they arrive, so that a run can be stopped at any point, also by kill -9,
and is resumed there: only requests that were in flight are sent again.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ..errors_pdlm import MissingPackageError, RefusedError, ServerError, SettingError
from .cache import Reply, ReplyCache, key_of

LONGEST_WAIT = 120.0  # seconds; a server that asks for more has run out of quota
GRACE = 10.0  # seconds for requests in flight when a run is stopped; they are paid for, so their replies are kept
_BACKOFF = 0.5  # seconds before the first retry, doubled with each

_Task = tuple[str, dict[str, Any]]  # key and body of a request
_Done = tuple[str, Reply | BaseException]


class NoReplyError(Exception):
    """The server answered with success, but without a reply; `final`: asking again would not help."""

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final


class ServerClient:
    """A client for an OpenAI-compatible server.

    Args:
        model (`str`): name of the model at the server.
        base_url (`str`): address of the API, including `/v1` or whatever its last part is.
        api_key (`str`, *optional*): never written anywhere. Environment variables are not read, so that no key goes
            to another server than its own.
        settings (`dict`, *optional*): further fields of every request: `temperature`, `max_tokens`, ...
        send: sends one request, given the `openai.OpenAI` client and the body, and returns the [`Reply`]; raises
            [`NoReplyError`] for an answer that is no reply.
        trial (`dict`): fields of a small request, sent before the first one to see whether the server works.
        cache ([`ReplyCache`], *optional*): keeps the replies; default: replies are not kept.
        concurrency (`int`): number of requests at a time.
        retries (`int`): further attempts for a request that failed for a passing reason: no connection, timeout, rate
            limit, server error, an answer that is no reply.
        timeout (`float`): seconds to wait for an answer.
        max_calls (`int`, *optional*): stop before sending more requests than this, retries included.
        give_up_after (`int`): stop after this many failed calls in a row. With a cache, requests that are refused for
            their content do not count once any request was answered: all questions about an image that the server's
            filter rejects come in a row, and the next run has no others.

    Raises:
        MissingPackageError: the `openai` package is not installed.
        SettingError: a number is out of range, or the address is not one of HTTP.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None = None,
        settings: dict[str, Any] | None = None,
        *,
        send: Callable[[Any, dict[str, Any]], Reply],
        trial: dict[str, Any],
        cache: ReplyCache | None = None,
        concurrency: int = 10,
        retries: int = 4,
        timeout: float = 120.0,
        max_calls: int | None = None,
        give_up_after: int = 10,
    ):
        try:
            import openai
        except ImportError:
            raise MissingPackageError("the openai package", "eval") from None
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if value < least:
                raise SettingError(f"`{name}` must be at least {least}, got {value}.")
        if timeout <= 0 or (max_calls is not None and max_calls < 0):
            raise SettingError(f"`timeout` must be positive and `max_calls` not negative, got {timeout}, {max_calls}.")
        if not str(base_url).startswith(("http://", "https://")):
            raise SettingError(f"The server's address must start with http:// or https://, got {base_url!r}.")
        self.model, self.base_url, self.settings = model, str(base_url), dict(settings or {})
        self.concurrency, self.retries, self.give_up_after = concurrency, retries, give_up_after
        self.max_calls, self.calls, self.cache = max_calls, 0, cache
        self.name = f"The server at {public_url(self.base_url)}"
        self._send, self._trial, self._key, self._api = send, trial, api_key or "", openai
        # openai's own retries are off: they cannot be counted against `max_calls`, nor stopped with the run
        self.connection = openai.OpenAI(api_key=api_key or "none", base_url=base_url, timeout=timeout, max_retries=0)
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self._works = self._answered = False

    def ask_many(
        self, requests: Iterable[dict[str, Any]], progress: Callable[[int, Reply], None] | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """Send requests, several at a time. Equal ones in flight are sent once, those with a cached reply not at all.

        Args:
            requests: the fields of each request besides model and settings; read as needed.
            progress (*optional*): called with the number of replies so far and the newest reply.

        Yields:
            (position of the request, [`Reply`]), in the order of arrival.

        Raises:
            ServerError: the server cannot be used, or a limit is reached; replies so far are in the cache.
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
                    if not self._works:
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
            for thread in threads:  # daemons: a thread that hangs does not keep the process alive
                thread.join(max(0.0, deadline - time.monotonic()))

    def probe(self) -> None:
        """Send one small request, to see whether the server works with this key, model and settings.

        Raises:
            ServerError: it does not; the message says why.
        """
        reply = self._attempt(self._body(self._trial), threading.Event(), min(self.retries, 2))
        if reply.text is None:
            if reply.refused:
                raise RefusedError(f"{self.name} refuses even a small request: {reply.error}")
            raise ServerError(f"{self.name} does not answer: {reply.error}")
        self._works = True

    def check_model(self) -> None:
        """Look the model up in the server's list of models; without a name, take the first one.

        Raises:
            ServerError: the server does not answer, or has no such model.
        """
        try:
            known = [model.id for model in self.connection.models.list()]
        except self._api.NotFoundError:
            known = []  # the server has no such list: the first request will tell
        except self._api.OpenAIError as error:
            raise self.error("does not answer", error) from error
        self.model = self.model or next(iter(known), "")
        if not self.model or (known and self.model not in known):
            raise RefusedError(
                f"{self.name} has no model {self.model!r}, but {', '.join(known[:9]) or 'none at all'}."
            )

    def error(self, what: str, error: Exception) -> ServerError:
        """Make a ServerError from an exception of `openai`, without the key.

        Args:
            what (`str`): what the server does or does not, the part of the message after its address.
            error: the exception.
        """
        return ServerError(f"{self.name} {what}: {self._reason(error)}")

    def close(self) -> None:
        """Close connections and the cache."""
        self.connection.close()
        if self.cache is not None:
            self.cache.close()

    # ---------------------------------------------------------------- one request

    def _body(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.model, **self.settings, **request}

    def _work(self, tasks: SimpleQueue[_Task | None], done: SimpleQueue[_Done], stop: threading.Event) -> None:
        """Answer tasks, in a thread, until told to stop."""
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
        """Count failures in a row.

        Raises:
            ServerError: there are too many.
        """
        with self._lock:
            self._answered = self._answered or reply.text is not None
            if reply.text is not None:
                self._failed_in_a_row = 0
            elif not (reply.refused and self._answered and self.cache is not None):
                self._failed_in_a_row += 1
            if self._failed_in_a_row >= self.give_up_after:
                raise ServerError(
                    f"The last {self._failed_in_a_row} calls to {self.model} failed; stopped. The last one: "
                    f"{reply.error} Replies so far are kept; run again to resume."
                )

    def _attempt(self, body: dict[str, Any], stop: threading.Event, retries: int) -> Reply:
        """Send a request until there is a reply, `retries` + 1 times at most.

        Raises:
            ServerError: the server refuses all requests, or `max_calls` is reached.
        """
        error, refused = "stopped.", False
        for attempt in range(retries + 1):
            with self._lock:
                if self.max_calls is not None and self.calls >= self.max_calls:
                    raise ServerError(f"Stopped at {self.max_calls} calls, the limit. Run again to resume.")
                self.calls += 1
            try:
                return self._send(self.connection, body)
            except (self._api.OpenAIError, NoReplyError) as problem:
                error, wait = self._reason(problem), self._wait(problem, attempt)
            refused = wait is None
            if wait is None or wait > LONGEST_WAIT or attempt == retries or stop.wait(wait):
                break
        return Reply(None, error, refused=refused)

    def _wait(self, error: Exception, attempt: int) -> float | None:
        """Seconds until the next attempt; None if another attempt would be refused as well.

        Raises:
            ServerError: any request would be refused.
        """
        status = getattr(error, "status_code", None)
        if status in (401, 404) or (status == 403 and not self._works):
            what = {
                401: "refuses the key" if self._key else "wants a key, and none was given",
                403: "refuses access",
                404: f"does not know {self.model!r} or the address",
            }
            kind = ServerError if self._works or self._answered else RefusedError  # or: it was right before
            raise kind(f"{self.name} {what[status]}: {self._reason(error)}") from error
        if getattr(error, "code", None) == "insufficient_quota":
            raise ServerError(f"The account behind the key has no quota left: {self._reason(error)}") from error
        if isinstance(error, NoReplyError):
            passing = not error.final
        else:
            passing = (
                isinstance(error, self._api.APIConnectionError) or status in (408, 409, 429) or (status or 0) >= 500
            )
        if not passing:
            return None
        asked = _retry_after(error)
        return min(_BACKOFF * 2**attempt, 30.0) * random.uniform(0.75, 1.0) if asked is None else asked

    def _reason(self, error: Exception) -> str:
        """One line about an exception, without the key."""
        if isinstance(error, self._api.APITimeoutError):
            text = "no answer in time."
        elif isinstance(error, self._api.APIConnectionError):
            text = f"no connection ({error.__cause__ or error})."
        else:
            text = str(error)
        return shorten(text.replace(self._key, "***") if len(self._key) > 3 else text, 300)


def key_in(variable: str | None) -> str | None:
    """Read a server's key from an environment variable.

    Args:
        variable (`str`, *optional*): its name; None gives no key.

    Raises:
        SettingError: the variable is not set.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise SettingError(f"The environment variable {variable} is not set; it must hold the key of the server.")
    return os.environ[variable]


def public_url(url: str) -> str:
    """Remove user, password and query from an address, which may hold secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def shorten(text: str, length: int = 80) -> str:
    """Put a text on one line and cut it after `length` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= length else f"{text[:length]}..."


def _retry_after(error: Exception) -> float | None:
    """Seconds that the server asks to wait, if its header holds a number."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return max(0.0, float(headers["retry-after"]))
    except (AttributeError, KeyError, ValueError):
        return None
