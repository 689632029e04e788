"""The page itself, and its server."""

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
    """Decorator of a handler: what its user can do something about is shown on the page, in one line."""

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
    """As [`show_errors`], for a generator."""

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
    """A drawn image (PIL, RGB) the embedded checkpoint can describe, and its masks."""
    drawn = draw_scene(np.random.default_rng(_EXAMPLES[number]))
    return drawn.image, drawn.masks


class Handlers:
    """What the page's events do. Everything of a person is in their [`~sheet.Session`], which is changed in place.

    Args:
        writer ([`~writing.Backend`])
        segmenter ([`~sam.Segmenter`], *optional*): for clicks.
    """

    def __init__(self, writer: Backend, segmenter: Any = None):
        self.writer, self.segmenter = writer, segmenter

    def act(self, sheet: Session, event: gr.EventData) -> tuple[Session, Any, str]:
        """An image, masks, a mark, undo, clear, or an example, as the page's script says; empties the comparison."""
        with sheet.lock:
            self._act(sheet, event._data if isinstance(event._data, dict) else {})
            # the sheet goes back so that gradio knows when it was used last; what was of the old one is forgotten
            return sheet, gr.update(value=sheet.view(), captions=None, file=None), ""

    def _act(self, sheet: Session, what: dict[str, Any]) -> None:
        kind = what.get("kind")
        if kind == "image":
            sheet.open(*read_uploads([what])[0])
        elif kind == "masks":
            sheet.load_masks(read_uploads(what.get("files")))
        elif kind == "example" and what.get("number") in range(len(_EXAMPLES)):
            image, masks = example(what["number"])
            sheet.start(image, f"example_{what['number'] + 1}.png", masks)
        elif kind in ("undo", "clear"):
            getattr(sheet, kind)()
        elif kind == "delete":
            sheet.delete(what.get("id"))
        else:
            sheet.mark(what, self.segmenter)

    def describe(self, sheet: Session, mode: str, steps: int, threshold: float) -> Iterator[tuple[Session, Any]]:
        """All regions together, live."""
        with sheet.lock:
            image, regions, version = sheet.current_image(), sheet.parsed(), sheet.version
        drafts: list[list[str]] = []
        for news in follow(self.writer, image, regions, settings_of(mode, steps, threshold)):
            if isinstance(news, Draft):
                drafts.append(news.texts)
                yield sheet, gr.update(captions={"version": version, "texts": news.texts, "step": news.step})
                continue
            with sheet.lock:
                if sheet.version == version:  # nothing else was marked meanwhile
                    sheet.captions = news.captions
            texts = [caption.text for caption in news.captions]
            end = {"version": version, "texts": texts, "scores": [c.score for c in news.captions], "drafts": drafts}
            yield sheet, gr.update(captions=end | {"passes": news.forwards, "seconds": news.seconds})

    def compare(self, sheet: Session, mode: str, steps: int, threshold: float) -> Iterator[str]:
        """All regions together, then each one alone; ends, and leaves nothing, once image or regions change."""
        with sheet.lock:
            image, regions, version = sheet.current_image(), sheet.parsed(), sheet.version
        with closing(self._compare(image, regions, settings_of(mode, steps, threshold))) as lanes:
            for shown in lanes:
                if sheet.version != version:
                    yield ""
                    return
                yield shown

    def _compare(
        self, image: Image.Image, regions: list[Region], settings: dict[str, Any]
    ) -> Generator[str, None, None]:
        together = Lane("All regions together", [""] * len(regions))
        alone = Lane("One region at a time", [""] * len(regions))
        for news in follow(self.writer, image, regions, settings):
            together.seconds = news.seconds
            if isinstance(news, Draft):
                together.texts = news.texts
            else:
                together.texts, together.forwards = [caption.text for caption in news.captions], news.forwards
                together.done = True
            yield compare_html(together, alone)
        for k, region in enumerate(regions):
            before = sum(alone.times)
            for news in follow(self.writer, image, [region], settings):
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

    def export_coco(self, sheet: Session) -> Any:
        """The COCO file, for the page's script to hand over."""
        with sheet.lock:
            return _file(f"{_stem(sheet)}_captions.json", "application/json", sheet.coco())

    def export_image(self, sheet: Session) -> Any:
        """The image with its captions."""
        with sheet.lock:
            return _file(f"{_stem(sheet)}_captions.png", "image/png", sheet.drawing())


def _stem(sheet: Session) -> str:
    return Path(sheet.name).stem or "image"


def _file(name: str, kind: str, data: bytes) -> Any:
    again = secrets.token_hex(4)  # the script is told of changes only, and who presses twice wants two files
    return gr.update(file={"name": name, "kind": kind, "data": base64.b64encode(data).decode(), "again": again})


def build_page(
    writer: Backend, segmenter: Any = None, threshold: float | None = 0.8, note: str | None = None
) -> gr.Blocks:
    """The page as gradio has it.

    Args:
        writer ([`~writing.Backend`])
        segmenter ([`~sam.Segmenter`], *optional*): for clicks.
        threshold (`float`, *optional*): the checkpoint's own; None: it decodes by a fixed schedule.
        note (`str`, *optional*): text above the upload.
    """
    does = Handlers(writer, segmenter)
    images = [
        draw_regions(image, parse_regions(masks, *image.size)) for image, masks in map(example, range(len(_EXAMPLES)))
    ]
    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True) as page:
        sheet = gr.State(Session(), time_to_live=IDLE)
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
                    controls = _controls(writer, threshold)
        with gr.Row():
            race = gr.Button("Compare with one region at a time", elem_id="compare-button")
        lanes = gr.HTML(elem_id="compare", apply_default_css=False)
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        slow: dict[str, Any] = {"concurrency_limit": writer.at_a_time, "concurrency_id": "writer"}
        slow |= {"show_progress": "minimal", "api_visibility": "private"}  # the place in the line, for who waits
        board.act(show_errors(does.act), sheet, [sheet, board, lanes], trigger_mode="multiple", **quick)
        told = show_errors_live(does.describe)
        writing = press.click(told, [sheet, *controls], [sheet, board], show_progress_on=said, **slow)
        writing.failure(None, js="() => window.dispatchEvent(new Event('pdlm-failed'))")
        race.click(show_errors_live(does.compare), [sheet, *controls], lanes, **slow)
        coco.click(show_errors(does.export_coco), sheet, board, **quick)
        save.click(show_errors(does.export_image), sheet, board, **quick)
    return page.queue(default_concurrency_limit=4, max_size=64, api_open=False)


def _controls(writer: Backend, threshold: float | None) -> list[Any]:
    """Speed mode, steps and threshold, with what they were measured to do."""
    start = "fixed" if threshold is None else "adaptive"
    with gr.Row():
        with gr.Column(min_width=160):
            mode = gr.Radio([(_MODES[mode], mode) for mode in writer.modes], value=start, label="Speed mode")
            steps = gr.Slider(*_STEPS, 32, step=1, label="Steps at most")
            bound = gr.Slider(*_BOUND, threshold or 0.8, step=0.01, label="Threshold", visible=start == "adaptive")
        effect = gr.HTML(effect_html(start, 32, threshold or 0.8), elem_id="effect", apply_default_css=False)
    controls = [mode, steps, bound]

    def show(mode: Any, steps: Any, threshold: Any) -> tuple[Any, Any]:
        if mode not in writer.modes or not all(isinstance(number, int | float) for number in (steps, threshold)):
            return gr.skip(), gr.skip()  # an empty field, say
        steps, threshold = np.clip(steps, *_STEPS), np.clip(threshold, *_BOUND)
        return gr.update(visible=mode == "adaptive"), effect_html(mode, steps, threshold)

    changes = [mode.change, steps.change, bound.change]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    # Without gradio's own check: a number may be out of bounds while it is being typed, which is no fault.
    gr.on(changes, show, controls, [bound, effect], preprocess=False, **quiet)
    return controls


def page_app(page: gr.Blocks) -> FastAPI:
    """The page as an application that can be served, with its limits."""
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
    """What serves the page; it says nothing, also not that people were still there when it ended."""
    return uvicorn.Server(uvicorn.Config(page_app(page), log_level="critical", timeout_graceful_shutdown=1))


def serve(page: gr.Blocks, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until stopped.

    Args:
        page: see [`build_page`].
        host (`str`), port (`int`): to listen on; port 0 is any free one.
        ready: called with the address once people can open it.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: cannot be listened on ({error}).") from error
    name = f"[{host}]" if ":" in host else host
    ready(f"http://{name}:{listening.getsockname()[1]}")
    page_server(page).run(sockets=[listening])
