"""`pdlm demo`: the web page."""

import os
import socket
from functools import partial
from typing import Annotated, Any

import typer

from ..errors_pdlm import MissingPackageError
from .options import (
    RELEASED,
    KeyEnv,
    Length,
    Model,
    Server,
    caption_client,
    check_positive,
    check_served,
    exit_on_error,
    load,
    load_captioner,
    note_embedded,
)


@exit_on_error
def demo(
    context: typer.Context,
    model: Model = None,
    server: Server = None,
    key_env: KeyEnv = None,
    sam: Annotated[
        str | None,
        typer.Option("--sam", "--segmenter", help="SAM, folder or hub id, for clicks and to find everything."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any free one.")] = 7860,
    max_new_tokens: Length = 32,
) -> None:
    """Serve a web page on which you mark regions and watch their captions emerge."""
    check_positive({"--max-new-tokens": max_new_tokens})
    check_served(context, server)
    try:
        from ..demo.page import build_page, serve
    except ImportError as error:
        raise MissingPackageError(f"Gradio ({error})", "demo") from error
    _check_address(host, port)
    embedded = model is None and server is None
    segmenter, finder = _segmenter(sam, embedded)
    backend, threshold = _backend(server, model, key_env, max_new_tokens)
    opener = partial(_backend, None, key_env=None, length=max_new_tokens) if _is_private(host, server) else None
    how = f"choose another checkpoint on the right, such as {RELEASED}" if opener else f"start with --model {RELEASED}"
    note = f"The embedded checkpoint knows drawn shapes only; for photographs {how}."
    page = build_page(backend, segmenter, threshold, note if embedded else None, finder, opener, sam is None)

    def started(url: str) -> None:
        if server is None:
            note_embedded(model)
        typer.echo(f"Open {url} (Ctrl-C ends)")

    try:
        serve(page, host, port, started)
    except KeyboardInterrupt:  # the way to stop it
        pass


def _check_address(host: str, port: int) -> None:
    """Raises: OSError: the address is in use, or none of this machine; here, before a model is loaded."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            if os.name != "nt":  # as a server has it: the port of one that has just ended is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: cannot be listened on ({error}).") from error


def _is_private(host: str, server: str | None) -> bool:
    """Whether only this machine sees the page, so that whoever does may load its files."""
    return server is None and host in ("127.0.0.1", "localhost", "::1")


def _backend(server, model, key_env, length):
    """The backend of the page, and the acceptance threshold it starts with, if any."""
    from ..demo.backend import LocalBackend, ServerBackend

    if server is not None:
        return ServerBackend(caption_client(server, model, key_env, 8, {}), length), None
    captioner = load_captioner(model)
    backend = LocalBackend(captioner, model or "shapes (embedded)", length)
    return backend, captioner.model.generation_config.acceptance_threshold


def _segmenter(path: str | None, embedded: bool) -> tuple[Any, Any]:
    """The segmenter for clicks, and what finds everything: the same, or the stand-in of the embedded checkpoint."""
    from ..regions.finding.finder import RegionFinder
    from ..regions.finding.loading import STAND_IN, load_segmenter

    if path not in (None, STAND_IN):
        segmenter = load(load_segmenter, path)
        return segmenter, RegionFinder(segmenter)
    return None, RegionFinder(load_segmenter(STAND_IN)) if embedded or path else None
