"""The demo page and its server."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.staticfiles import StaticFiles

from ..regions.region import parse_regions
from ..render.drawing import draw_regions
from ..render.html import jpeg_url
from .backend import Backend
from .gestures import ClickFinder
from .handlers import EXAMPLES, Handlers, Opener, example, show_errors, show_errors_live
from .limits import IDLE, MAX_BYTES, MODULES, SESSIONS, Guard
from .parts import effect_html, note_html
from .session import Session

_HERE = Path(__file__).parent
_MODES = {"adaptive": "Adaptive", "fast": "Fast", "fixed": "Fixed steps"}
_STEPS, _BOUND = (1, 32), (0.5, 0.99)  # least and most
_TITLE = "PerceptionDLM"
_START = f"""import(new URL(".{MODULES}/board.js", document.baseURI)).then(
  board => board.start(element, what => trigger("act", what), props, watch));"""
_SCHEMA = "colour: red, green, blue, yellow, purple, orange, white, black\nsize: small, large"
_QUICK: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def build_page(
    backend: Backend,
    segmenter: Any = None,
    threshold: float | None = 0.8,
    note: str | None = None,
    finder: Any = None,
    opener: Opener | None = None,
    stand_in: bool = False,
) -> gr.Blocks:
    """Build the page.

    Args:
        backend ([`~backend.Backend`]): writes the captions.
        segmenter ([`~pdlm_hf.regions.Segmenter`], *optional*): turns a click into a region; None: the finder does, or
            there is no tool for clicks.
        threshold (`float`, *optional*): acceptance threshold of the checkpoint; None: it decodes by a fixed schedule.
        note (`str`, *optional*): text above the upload; default: the name of the model.
        finder ([`~pdlm_hf.regions.RegionFinder`], *optional*): finds all regions; None: no button for that.
        opener (*optional*): loads a checkpoint that is chosen on the page, see [`~handlers.Handlers`]; None: none can
            be chosen.
        stand_in (`bool`): the finder finds drawn shapes only, and goes once another checkpoint is loaded.
    """
    if segmenter is None and finder is not None:
        segmenter = ClickFinder(finder)
    handlers = Handlers(backend, segmenter, finder, opener, stand_in)
    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True) as page:
        session = gr.State(Session(), time_to_live=IDLE)
        gr.HTML(
            f"<h1>{_TITLE}</h1><p>Mark regions of an image. One press describes all of them together.</p>",
            elem_id="head",
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                noted = gr.HTML(note_html(backend, note), elem_id="note")
                board = _board(segmenter is not None, finder is not None)
            with gr.Column(scale=2, min_width=300):
                press = gr.Button("Describe all regions", variant="primary", size="lg", elem_id="describe")
                said = gr.HTML(
                    html_template=(_HERE / "captions.html").read_text(encoding="utf-8"),
                    apply_default_css=False,
                    elem_id="captions",
                )
                with gr.Row(elem_id="save"):
                    coco = gr.Button("Save as COCO json", size="sm", elem_id="save-coco")
                    save = gr.Button("Save as image", size="sm", elem_id="save-image")
                race = gr.Button("Compare with one region at a time", size="sm", elem_id="compare-button")
                table = _attributes(handlers, session, board)
                with gr.Accordion("Speed", open=False, elem_id="speed"):
                    controls = _controls(backend, threshold)
                if opener is not None:
                    _chooser(handlers, noted, controls)
        lanes = gr.HTML(elem_id="compare", apply_default_css=False)
        acting = board.act(
            show_errors(handlers.act), session, [session, board, lanes, table], trigger_mode="multiple", **_QUICK
        )
        acting.failure(None, js="() => window.dispatchEvent(new Event('pdlm-refused'))")
        acting.success(None, js="() => window.dispatchEvent(new Event('pdlm-answered'))")  # changed or not
        slow = _slow(backend)
        writing = press.click(
            show_errors_live(handlers.describe), [session, *controls], [session, board], show_progress_on=said, **slow
        )
        writing.failure(None, js="() => window.dispatchEvent(new Event('pdlm-failed'))")
        race.click(show_errors_live(handlers.compare), [session, *controls], lanes, **slow)
        coco.click(show_errors(handlers.export_coco), session, board, **_QUICK)
        save.click(show_errors(handlers.export_image), session, board, **_QUICK)
    return page.queue(default_concurrency_limit=4, max_size=64, api_open=False)


def _slow(backend: Backend) -> dict[str, Any]:
    """Options of events for which the model works; the page shows their position in the queue."""
    limit: dict[str, Any] = {"concurrency_limit": backend.at_a_time, "concurrency_id": "backend"}
    return limit | {"show_progress": "minimal", "api_visibility": "private"}


def _board(clicks: bool, everything: bool) -> Any:
    """The image, with the tools above and the examples below it."""
    drawn = [
        draw_regions(image, parse_regions(masks, *image.size)) for image, masks in map(example, range(len(EXAMPLES)))
    ]
    return gr.HTML(
        html_template=(_HERE / "board.html").read_text(encoding="utf-8"),
        js_on_load=_START,
        apply_default_css=False,
        elem_id="board",
        captions=None,
        file=None,
        question=None,
        clicks=clicks,
        everything=everything,
        examples=[jpeg_url(image) for image in drawn],
        most=MAX_BYTES,
    )


def _attributes(handlers: Handlers, session: Any, board: Any) -> Any:
    """A panel in which attributes are typed and read; returns where their table is shown."""
    with gr.Accordion("Attributes", open=False, elem_id="attributes"):
        text = gr.Textbox(
            lines=3,
            max_lines=12,
            value=_SCHEMA,
            label="Attributes and their choices",
            info="One per line; without choices it is a free text. A JSON schema is read too.",
            elem_id="schema",
        )
        with gr.Row():
            read = gr.Button("Read attributes", size="sm", elem_id="read-attributes")
            save = gr.Button("Save as CSV", size="sm", elem_id="save-csv")
        table = gr.HTML(elem_id="attribute-table", apply_default_css=False)
    read.click(show_errors(handlers.read_attributes), [session, text], table, **_slow(handlers.backend))
    save.click(show_errors(handlers.export_table), session, board, **_QUICK)
    return table


def _chooser(handlers: Handlers, noted: Any, controls: list[Any]) -> None:
    """A panel in which a checkpoint is named, checked, and loaded."""
    with gr.Accordion("Checkpoint", open=False, elem_id="checkpoint"):
        name = gr.Textbox(
            label="Folder or hub id",
            placeholder="MSALab/PerceptionDLM",
            info="Check says what it is and needs; no weights are loaded for that.",
            elem_id="checkpoint-name",
        )
        with gr.Row():
            check = gr.Button("Check", size="sm", elem_id="check")
            load = gr.Button("Load", size="sm", interactive=False, elem_id="load")
        found = gr.HTML(elem_id="inspection", apply_default_css=False)
    told: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
    for event in (check.click, name.submit):
        event(show_errors(handlers.check), name, [found, load], **told)
    name.input(lambda: gr.update(interactive=False), None, load, **_QUICK)
    mode, _, bound = controls
    load.click(show_errors(handlers.load), name, [noted, found, mode, bound], **_slow(handlers.backend))


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
    # Without gradio's own check: a number may be out of bounds while it is being typed.
    gr.on(changes, show, controls, [bound, effect], preprocess=False, **_QUICK)
    return controls


def page_app(page: gr.Blocks) -> FastAPI:
    """Mount the page in an ASGI application with the limits of [`~limits.Guard`]."""
    page.state_session_capacity = SESSIONS
    app = FastAPI(middleware=[Middleware(Guard)], docs_url=None, redoc_url=None, openapi_url=None)
    app.mount(MODULES, StaticFiles(directory=_HERE / "static"))
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
        theme=_theme(),
        css_paths=_HERE / "page.css",
    )


def _theme() -> Any:
    """gradio's own theme, with text that has a contrast of at least 4.5."""
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
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
