"""A client for chat completions. No stored reply is asked for again, and no failure passes for a reply."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .cache import Reply, ReplyCache
from .server import NoReplyError, ServerClient, shorten

# A question: messages, or `{"messages": [...], **settings of this request alone}`.
Request = list[dict[str, Any]] | dict[str, Any]


class ChatClient(ServerClient):
    """A client for a chat model behind an OpenAI-compatible server.

    Args:
        model (`str`): name of the model at the server.
        base_url (`str`): address of the API, including `/v1` or whatever its last part is.
        api_key (`str`, *optional*): never written anywhere.
        settings (`dict`, *optional*): further fields of every request: `temperature`, `max_tokens`, ...
        cache (`Path`, *optional*): file of replies, see [`ReplyCache`]; default: in memory.
        **options: see [`~pdlm_hf.client.server.ServerClient`].

    Raises:
        MissingPackageError: the `openai` package is not installed.
        SettingError: a number is out of range, or the cache file cannot be used.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None = None,
        settings: dict[str, Any] | None = None,
        *,
        cache: Path | None = None,
        **options: Any,
    ):
        trial = {"messages": [{"role": "user", "content": "Answer with the letter A."}]}
        super().__init__(model, base_url, api_key, settings, send=_send, trial=trial, **options)
        self.cache = ReplyCache(cache)

    def ask_many(
        self, requests: Iterable[Request], progress: Callable[[int, Reply], None] | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """Ask questions, several at a time; see [`~pdlm_hf.client.server.ServerClient.ask_many`].

        Args:
            requests: messages, or dicts of messages and further settings; read as needed.
            progress (*optional*): called with the number of replies so far and the newest reply.

        Yields:
            (position of the question, [`Reply`]), in the order of arrival.

        Raises:
            ServerError: the server cannot be used, or a limit is reached; replies so far are in the cache.
        """
        fields = (request if isinstance(request, dict) else {"messages": request} for request in requests)
        return super().ask_many(fields, progress)

    def ask(self, request: Request) -> Reply:
        """Ask one question; see [`ask_many`]."""
        return next(reply for _, reply in self.ask_many([request]))

    def probe(self, chat: bool = True) -> None:
        """Check that the server can be used.

        Args:
            chat (`bool`): ask a small question; otherwise only look the model up in the server's list.

        Raises:
            ServerError: the server cannot be used; the message says why.
        """
        if chat:
            return super().probe()
        self.check_model()
        self._works = True


def _send(connection: Any, body: dict[str, Any]) -> Reply:
    fields = {name: value for name, value in body.items() if name not in ("model", "messages")}
    raw = connection.chat.completions.with_raw_response.create(
        model=body["model"], messages=body["messages"], extra_body=fields
    )
    try:
        data = json.loads(text := raw.http_response.text)
        choice = data["choices"][0]
        content = choice["message"].get("content")
        if not content and choice.get("finish_reason") == "content_filter":
            raise NoReplyError("the server's content filter kept the reply back.", final=True)
        if content is None:
            content = choice["message"].get("refusal") or ""  # a reply without content is empty, and paid for
        if not isinstance(content, str):
            raise TypeError
        # JSON can hold half of a surrogate pair, a file cannot
        return Reply(content.encode("utf-8", "replace").decode(), usage=data.get("usage") or {})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise NoReplyError(f"the server's answer is no reply: {shorten(text)!r}.") from None
