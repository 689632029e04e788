"""Replies of servers, and a file that keeps them."""

import hashlib
import json
import sqlite3
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors_pdlm import SettingError


@dataclass(frozen=True)
class Reply:
    """The outcome of a request.

    Args:
        text (`str`, *optional*): the reply, possibly empty; None if the request failed after all retries.
        error (`str`, *optional*): why the request failed.
        cached (`bool`): the reply comes from the cache.
        usage (`dict`): the server's `usage`.
        refused (`bool`): the request failed because of its content; the server itself works.
    """

    text: str | None
    error: str | None = None
    cached: bool = False
    usage: dict[str, Any] = field(default_factory=dict, repr=False)
    refused: bool = False

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the request, as the server counted them."""
        return _count(self.usage.get("prompt_tokens"))

    @property
    def completion_tokens(self) -> int | None:
        """Tokens of the reply, as the server counted them."""
        return _count(self.usage.get("completion_tokens"))


def _count(value: Any) -> int | None:
    """A number of tokens; some servers send it as a text. None for anything else."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


class ReplyCache:
    """Replies in a SQLite file, each one committed as it arrives.

    Args:
        path (`Path`, *optional*): the file, created if it does not exist; default: in memory.

    Raises:
        SettingError: the file cannot be opened, or is not a cache.
    """

    def __init__(self, path: Path | None = None):
        self._path, self._lock = path, threading.Lock()
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
        """Return the reply with this key, or None if the cache does not have it."""
        with self._lock:
            row = self._rows.execute("SELECT text, usage FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(row[0], cached=True, usage=json.loads(row[1]))

    def put(self, key: str, model: str, reply: Reply) -> None:
        """Keep a reply; it is on disk when this returns.

        Raises:
            SettingError: the file cannot be written, for example because the disk is full.
        """
        values = (key, model, reply.text, json.dumps(reply.usage))
        try:
            with self._lock, self._rows:
                self._rows.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", values)
        except sqlite3.Error as error:  # a run that continued would pay for replies that are lost
            raise SettingError(f"{self._path}: the cache of replies cannot be written ({error}).") from error

    def __len__(self) -> int:
        with self._lock:
            return self._rows.execute("SELECT count(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._rows.close()


def key_of(body: dict[str, Any]) -> str:
    """Return the key of a request: a hash of its model, settings and messages, but not of the server's address."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
