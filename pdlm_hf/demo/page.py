"""The demo page, its event handlers and its server."""

import base64
import html
import secrets
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import cache, wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.middleware import Middleware

from ..errors_pdlm import ServerError
from ..regions.region import Region, parse_regions
from ..render.drawing import draw_regions
from ..render.html import jpeg_url
from ..shapes.scenes import draw_scene
from .backend import Backend, Draft, follow, settings_of
from .limits import IDLE, MAX_BYTES, SESSIONS, Guard, read_uploads
from .parts import Lane, compare_html, effect_html
from .session import Session

_HERE = Path(__file__).parent
_EXAMPLES = (29, 8, 45, 4)  # seeds of drawn images
_MODES = {"adaptive": "Adaptive", "fast": "Fast", "fixed": "Fixed steps"}
_STEPS, _BOUND = (1, 32), (0.5, 0.99)  # least and most
_TITLE = "PerceptionDLM"


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
    drawn = draw_scene(np.random.default_rng(_EXAMPLES[number]))
    return drawn.image, drawn.masks


class Handlers:
    """Handlers of the page's events. The state of a user is their [`~session.Session`], which is changed in place.

    Args:
        backend ([`~backend.Backend`]): writes the captions.
        segmenter ([`~pdlm_hf.regions.Segmenter`], *optional*): turns a click into a region.
        finder ([`~pdlm_hf.regions.RegionFinder`], *optional*): finds all regions.
    """

    def __init__(self, backend: Backend, segmenter: Any = None, finder: Any = None):
        self.backend, self.segmenter, self.finder = backend, segmenter, finder

    def act(self, session: Session, event: gr.EventData) -> tuple[Session, Any, str]:
        """Handle an action of the page's script: an image, masks, a mark, undo, clear, delete, or an example."""
        with session.lock:
            self._act(session, event._data if isinstance(event._data, dict) else {})
            # the session is returned so that gradio knows when it was last used; the comparison is cleared
            return session, gr.update(value=session.view(), captions=None, file=None), ""

    def _act(self, session: Session, what: dict[str, Any]) -> None:
        kind = what.get("kind")
        if kind == "image":
            session.open(*read_uploads([what])[0])
        elif kind == "masks":
            session.load_masks(read_uploads(what.get("files")))
        elif kind == "example" and what.get("number") in range(len(_EXAMPLES)):
            image, masks = example(what["number"])
            session.start(image, f"example_{what['number'] + 1}.png", masks)
        elif kind == "everything" and self.finder is not None:
            session.find(self.finder)
        elif kind in ("undo", "clear"):
            getattr(session, kind)()
        elif kind == "delete":
            session.delete(what.get("id"))
        else:
            session.mark(what, self.segmenter)

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
        """Caption all regions together, then each one alone; stop once image or regions change."""
        with session.lock:
            image, regions, version = session.current_image(), session.parsed(), session.version
        with closing(self._compare(image, regions, settings_of(mode, steps, threshold))) as lanes:
            for shown in lanes:
                if session.version != version:
                    yield ""
                    return
                yield shown

    def _compare(
        self, image: Image.Image, regions: list[Region], settings: dict[str, Any]
    ) -> Generator[str, None, None]:
        together = Lane("All regions together", [""] * len(regions))
        alone = Lane("One region at a time", [""] * len(regions))
        for news in follow(self.backend, image, regions, settings):
            together.seconds = news.seconds
            if isinstance(news, Draft):
                together.texts = news.texts
            else:
                together.texts, together.forwards = [caption.text for caption in news.captions], news.forwards
                together.done = True
            yield compare_html(together, alone)
        for k, region in enumerate(regions):
            before = sum(alone.times)
            for news in follow(self.backend, image, [region], settings):
                alone.seconds = before + news.seconds
                if isinstance(news, Draft):
                    alone.texts[k] = news.texts[0]
                else:
                    alone.texts[k] = news.captions[0].text
                    alone.times.append(news.seconds)
                    if news.forwards is not None:
                        alone.forwards = (alone.forwards or 0) + news.forwards
                    alone.done = k + 1 == len(regions)
                yield compare_html(together, alone)

    def export_coco(self, session: Session) -> Any:
        """Return the COCO file; the page's script downloads it."""
        with session.lock:
            return _file(f"{_stem(session)}_captions.json", "application/json", session.coco())

    def export_image(self, session: Session) -> Any:
        """Return a PNG of the image with its captions."""
        with session.lock:
            return _file(f"{_stem(session)}_captions.png", "image/png", session.drawing())


def _stem(session: Session) -> str:
    return Path(session.name).stem or "image"


def _file(name: str, kind: str, data: bytes) -> Any:
    again = secrets.token_hex(4)  # gradio sends changes only, and a second press must download a second file
    return gr.update(file={"name": name, "kind": kind, "data": base64.b64encode(data).decode(), "again": again})


def build_page(
    backend: Backend,
    segmenter: Any = None,
    threshold: float | None = 0.8,
    note: str | None = None,
    finder: Any = None,
) -> gr.Blocks:
    """Build the page.

    Args:
        backend ([`~backend.Backend`]): writes the captions.
        segmenter ([`~pdlm_hf.regions.Segmenter`], *optional*): turns a click into a region; None: no tool for clicks.
        threshold (`float`, *optional*): acceptance threshold of the checkpoint; None: it decodes by a fixed schedule.
        note (`str`, *optional*): text above the upload.
        finder ([`~pdlm_hf.regions.RegionFinder`], *optional*): finds all regions; None: no button for that.
    """
    handlers = Handlers(backend, segmenter, finder)
    images = [
        draw_regions(image, parse_regions(masks, *image.size)) for image, masks in map(example, range(len(_EXAMPLES)))
    ]
    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True) as page:
        session = gr.State(Session(), time_to_live=IDLE)
        gr.HTML(
            f"<h1>{_TITLE}</h1><p>Mark regions of an image. One press describes all of them together.</p>",
            elem_id="head",
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=420):
                if note is not None:
                    gr.HTML(html.escape(note), elem_id="note")
                board = gr.HTML(
                    html_template=(_HERE / "board.html").read_text(encoding="utf-8"),
                    js_on_load=(_HERE / "page.js").read_text(encoding="utf-8"),
                    apply_default_css=False,
                    elem_id="board",
                    captions=None,
                    file=None,
                    clicks=segmenter is not None,
                    everything=finder is not None,
                    examples=[jpeg_url(drawn) for drawn in images],
                    most=MAX_BYTES,
                )
            with gr.Column(scale=2, min_width=320):
                press = gr.Button("Describe all regions", variant="primary", size="lg", elem_id="describe")
                said = gr.HTML(
                    html_template=(_HERE / "captions.html").read_text(encoding="utf-8"),
                    apply_default_css=False,
                    elem_id="captions",
                )
                with gr.Row():
                    coco = gr.Button("Save as COCO json", size="sm", elem_id="save-coco")
                    save = gr.Button("Save as image", size="sm", elem_id="save-image")
                with gr.Accordion("Speed", open=True):
                    controls = _controls(backend, threshold)
        with gr.Row():
            race = gr.Button("Compare with one region at a time", elem_id="compare-button")
        lanes = gr.HTML(elem_id="compare", apply_default_css=False)
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        slow: dict[str, Any] = {"concurrency_limit": backend.at_a_time, "concurrency_id": "backend"}
        slow |= {"show_progress": "minimal", "api_visibility": "private"}  # shows the position in the queue
        acting = board.act(
            show_errors(handlers.act), session, [session, board, lanes], trigger_mode="multiple", **quick
        )
        acting.failure(None, js="() => window.dispatchEvent(new Event('pdlm-refused'))")
        told = show_errors_live(handlers.describe)
        writing = press.click(told, [session, *controls], [session, board], show_progress_on=said, **slow)
        writing.failure(None, js="() => window.dispatchEvent(new Event('pdlm-failed'))")
        race.click(show_errors_live(handlers.compare), [session, *controls], lanes, **slow)
        coco.click(show_errors(handlers.export_coco), session, board, **quick)
        save.click(show_errors(handlers.export_image), session, board, **quick)
    return page.queue(default_concurrency_limit=4, max_size=64, api_open=False)


def _controls(backend: Backend, threshold: float | None) -> list[Any]:
    """Speed mode, steps and threshold, beside the measured effect of each."""
    start = "fixed" if threshold is None else "adaptive"
    with gr.Row():
        with gr.Column(min_width=160):
            mode = gr.Radio([(_MODES[mode], mode) for mode in backend.modes], value=start, label="Speed mode")
            steps = gr.Slider(*_STEPS, 32, step=1, label="Steps at most")
            bound = gr.Slider(*_BOUND, threshold or 0.8, step=0.01, label="Threshold", visible=start == "adaptive")
        effect = gr.HTML(effect_html(start, 32, threshold or 0.8), elem_id="effect", apply_default_css=False)
    controls = [mode, steps, bound]

    def show(mode: Any, steps: Any, threshold: Any) -> tuple[Any, Any]:
        if mode not in backend.modes or not all(isinstance(number, int | float) for number in (steps, threshold)):
            return gr.skip(), gr.skip()  # for example an empty field
        steps, threshold = np.clip(steps, *_STEPS), np.clip(threshold, *_BOUND)
        return gr.update(visible=mode == "adaptive"), effect_html(mode, steps, threshold)

    changes = [mode.change, steps.change, bound.change]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    # Without gradio's own check: a number may be out of bounds while it is being typed.
    gr.on(changes, show, controls, [bound, effect], preprocess=False, **quiet)
    return controls


def page_app(page: gr.Blocks) -> FastAPI:
    """Mount the page in an ASGI application with the limits of [`~limits.Guard`]."""
    page.state_session_capacity = SESSIONS
    app = FastAPI(middleware=[Middleware(Guard)], docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        allowed_paths=[],
        max_file_size=MAX_BYTES,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css_paths=_HERE / "page.css",
    )


def page_server(page: gr.Blocks) -> uvicorn.Server:
    """Make the server of the page. It logs nothing, not even connections that were open when it stopped."""
    return uvicorn.Server(uvicorn.Config(page_app(page), log_level="critical", timeout_graceful_shutdown=1))


def serve(page: gr.Blocks, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until stopped.

    Args:
        page: see [`build_page`].
        host (`str`), port (`int`): to listen on; port 0 is any free one.
        ready: called with the address once the page can be opened.

    Raises:
        OSError: the address is in use, or is not one of this machine.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: cannot be listened on ({error}).") from error
    name = f"[{host}]" if ":" in host else host
    ready(f"http://{name}:{listening.getsockname()[1]}")
    page_server(page).run(sockets=[listening])
