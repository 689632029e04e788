"""Handlers of the page's events."""

import base64
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache, wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch

from ..attributes.schema import parse_schema_text
from ..captioning.inspection import inspect_checkpoint
from ..errors_pdlm import CheckpointError, ServerError, SettingError
from ..shapes.scenes import draw_scene
from .backend import Backend, Draft, follow, settings_of
from .limits import read_uploads
from .parts import Lane, attributes_html, compare_html, fault_html, inspection_html, note_html
from .session import Session

EXAMPLES = (29, 8, 45, 4)  # seeds of drawn images
REPEATS = 3  # runs of each of the two ways that are compared
Opener = Callable[[str], tuple[Backend, float | None]]


def show_errors(handler: Callable) -> Callable:
    """Decorate a handler so that errors a user can mend are shown on the page, in one line."""

    @wraps(handler)
    def wrapped(*args: Any) -> Any:
        try:
            return handler(*args)
        except (ValueError, ServerError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None
        except torch.OutOfMemoryError:
            raise gr.Error("Not enough memory for so many regions at once.", print_exception=False) from None

    return wrapped


def show_errors_live(handler: Callable) -> Callable:
    """Like [`show_errors`], for a generator."""

    @wraps(handler)
    def wrapped(*args: Any) -> Iterator[Any]:
        news = handler(*args)
        step = show_errors(lambda: next(news, None))
        try:
            while (item := step()) is not None:
                yield item
        finally:
            news.close()

    return wrapped


@cache
def example(number: int) -> tuple[Any, list[np.ndarray]]:
    """Draw an image (PIL, RGB) that the embedded checkpoint can describe; return it with its masks."""
    drawn = draw_scene(np.random.default_rng(EXAMPLES[number]))
    return drawn.image, drawn.masks


class Handlers:
    """Handlers of the page's events. The state of a user is their [`~session.Session`], which is changed in place.

    Args:
        backend ([`~backend.Backend`]): writes the captions.
        segmenter ([`~pdlm_hf.regions.Segmenter`], *optional*): turns a click into a region.
        finder ([`~pdlm_hf.regions.RegionFinder`], *optional*): finds all regions.
        opener (*optional*): loads a checkpoint; returns its backend and its acceptance threshold, or None.
        stand_in (`bool`): the finder knows what the first checkpoint knows, drawn shapes, and goes with it.
    """

    def __init__(
        self,
        backend: Backend,
        segmenter: Any = None,
        finder: Any = None,
        opener: Opener | None = None,
        stand_in: bool = False,
    ):
        self.backend, self.segmenter, self.finder, self.opener = backend, segmenter, finder, opener
        self.stand_in = stand_in

    def act(self, session: Session, event: gr.EventData) -> tuple[Session, Any, Any, Any]:
        """Handle an action of the page's script: files, a mark, undo, clear, delete, an example."""
        with session.lock:
            before = session.version
            question = self._act(session, event._data if isinstance(event._data, dict) else {})
            # the session is returned so that gradio knows when it was last used
            if question is not None:
                return session, gr.update(question=question | {"again": secrets.token_hex(4)}), gr.skip(), gr.skip()
            old = gr.skip() if session.version == before else ""  # comparison and attributes of other regions
            return session, gr.update(value=session.view(), captions=None, file=None), old, old

    def _act(self, session: Session, what: dict[str, Any]) -> dict[str, Any] | None:
        """Change the session, or return what to ask before."""
        kind = what.get("kind")
        if kind in ("everything", "click") and self.stand_in and self.finder is None:
            raise SettingError("The finder of drawn shapes knows no photographs. Start `pdlm demo` with --sam.")
        if kind == "drop":
            return session.drop(read_uploads(what.get("files")))
        if kind == "image":
            session.open(*read_uploads([what])[0])
        elif kind == "masks":
            session.load_masks(read_uploads(what.get("files")))
        elif kind == "example" and what.get("number") in range(len(EXAMPLES)):
            image, masks = example(what["number"])
            session.start(image, f"example_{what['number'] + 1}.png", masks)
        elif kind == "everything" and self.finder is not None:
            session.find(self.finder)
        elif kind in ("undo", "clear"):
            getattr(session, kind)()
        elif kind == "delete":
            session.delete(what.get("id"))
        elif kind == "nudge":
            session.nudge(what.get("id"), what.get("right"), what.get("down"), what.get("resize") is True)
        else:
            session.mark(what, self.segmenter)
        return None

    def describe(self, session: Session, mode: str, steps: int, threshold: float) -> Iterator[tuple[Session, Any]]:
        """Caption all regions together and stream the drafts."""
        with session.lock:
            image, regions, version = session.current_image(), session.parsed(), session.version
        drafts: list[list[str]] = []
        for news in follow(self.backend, image, regions, settings_of(mode, steps, threshold)):
            if isinstance(news, Draft):
                drafts.append(news.texts)
                yield session, gr.update(captions={"version": version, "texts": news.texts, "step": news.step})
                continue
            with session.lock:
                if session.version == version:  # nothing else was marked meanwhile
                    session.captions = news.captions
            texts = [caption.text for caption in news.captions]
            end = {"version": version, "texts": texts, "scores": [c.score for c in news.captions], "drafts": drafts}
            yield session, gr.update(captions=end | {"passes": news.forwards, "seconds": news.seconds})

    def compare(self, session: Session, mode: str, steps: int, threshold: float) -> Iterator[str]:
        """Caption all regions together, then each one alone, several times; stop once image or regions change."""
        with session.lock:
            image, regions, version = session.current_image(), session.parsed(), session.version
        settings = settings_of(mode, steps, threshold)
        together = Lane("All regions together", [regions])
        alone = Lane("One region at a time", [[region] for region in regions])
        for _ in range(REPEATS):
            for lane in (together, alone):
                with closing(lane.follow(self.backend, image, settings)) as news:
                    for _ in news:
                        if session.version != version:
                            yield ""
                            return
                        yield compare_html(together, alone, REPEATS)

    def read_attributes(self, session: Session, text: str) -> str:
        """Read the attributes that a person has typed, of all regions, and render them as a table."""
        try:
            schema = parse_schema_text(text)
            with session.lock:
                image, regions, version = session.current_image(), session.parsed(), session.version
            rows, forwards = self.backend.attributes(image, regions, schema)
        except (ValueError, ServerError) as error:
            return fault_html(error)
        with session.lock:
            if session.version != version:  # something else was marked meanwhile
                return ""
            session.attributes = rows
        return attributes_html(rows, forwards)

    def check(self, name: str) -> tuple[str, Any]:
        """Say what a checkpoint is and needs; the second value says whether it can be loaded."""
        try:
            found = inspect_checkpoint(_named(name))
        except ValueError as error:
            return fault_html(error), gr.update(interactive=False)
        return inspection_html(found), gr.update(interactive=not found.faults and found.kind == "regions")

    def load(self, name: str) -> tuple[Any, str, Any, Any]:
        """Load a checkpoint, which writes the captions of everyone at this page from now on."""
        try:
            if self.opener is None:
                raise SettingError("No checkpoint can be chosen on this page.")
            self.backend, threshold = self.opener(_named(name))
            if self.stand_in:
                self.segmenter = self.finder = None
        except (ValueError, OSError) as error:
            return gr.skip(), fault_html(error), gr.skip(), gr.skip()
        mode = "fixed" if threshold is None else "adaptive"
        return note_html(self.backend), "", mode, gr.update(value=threshold or 0.8)

    def export_coco(self, session: Session) -> Any:
        """Return the COCO file; the page's script downloads it."""
        with session.lock:
            return _file(f"{_stem(session)}_captions.json", "application/json", session.coco())

    def export_image(self, session: Session) -> Any:
        """Return a PNG of the image with its captions."""
        with session.lock:
            return _file(f"{_stem(session)}_captions.png", "image/png", session.drawing())

    def export_table(self, session: Session) -> Any:
        """Return the attributes as CSV."""
        with session.lock:
            return _file(f"{_stem(session)}_attributes.csv", "text/csv", session.table())


def _named(name: str) -> str:
    """The name of a checkpoint that was typed. Raises: CheckpointError: there is none."""
    if not name.strip():
        raise CheckpointError("Type a checkpoint's folder or hub id first.")
    return name.strip()


def _stem(session: Session) -> str:
    return Path(session.name).stem or "image"


def _file(name: str, kind: str, data: bytes) -> Any:
    again = secrets.token_hex(4)  # gradio sends changes only, and a second press must download a second file
    return gr.update(file={"name": name, "kind": kind, "data": base64.b64encode(data).decode(), "again": again})
