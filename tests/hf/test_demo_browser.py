"""The page of `pdlm demo` in a real browser, as a person uses it.

`PDLM_SCREENSHOTS=DIR pytest tests/hf/test_demo_browser.py` writes what is seen; docs/demo_page.png is one of them.
"""

import io
import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from axe_playwright_python.base import AXE_SCRIPT
from demo_server import DemoServer
from PIL import Image, ImageDraw
from playwright.sync_api import expect, sync_playwright
from region_server import RegionCaptionServer

from pdlm_hf import CHECKPOINT, RegionCaption, RegionCaptioner
from pdlm_hf.client.captions import CaptionClient
from pdlm_hf.demo.backend import LocalBackend, ServerBackend
from pdlm_hf.errors_pdlm import CheckpointError
from pdlm_hf.regions import RegionFinder
from pdlm_hf.regions.readers import read_region_file
from pdlm_hf.regions.region import parse_regions
from pdlm_hf.shapes import ShapesSegmenter
from pdlm_hf.shapes.evaluate import held_out_scene

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = os.environ.get("PDLM_SCREENSHOTS")
WAIT = 120_000  # milliseconds; for busy machines
# Keeps what every row of the list has said, each time that any of them changes.
WATCH = """() => {
  window.seen = [];
  const rows = document.querySelector("#captions .rows");
  new MutationObserver(() => {
    window.seen.push([...rows.querySelectorAll("span")].map(row => row.textContent));
  }).observe(rows, { childList: true, subtree: true, characterData: true });
}"""
# Drops files, of these bytes or of so many, on the image.
DROP = """files => {
  const data = new DataTransfer();
  for (const [name, content] of files) {
    data.items.add(new File([new Uint8Array(content)], name, { type: "image/png" }));
  }
  const dropped = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
  document.querySelector("#board .stage").dispatchEvent(dropped);
}"""


class HalfSegmenter:
    """Says that everything left of a click belongs to it."""

    def mask(self, image, x, y):
        mask = np.zeros((image.height, image.width), bool)
        mask[:, : x + 1] = True
        return mask


def opener(name):
    """Loads nothing: says how a checkpoint that was chosen is refused."""
    raise CheckpointError(f"{name}: the memory is full.")


@pytest.fixture(scope="module")
def served():
    options = {"segmenter": HalfSegmenter(), "finder": RegionFinder(ShapesSegmenter()), "opener": opener}
    backend = LocalBackend(RegionCaptioner.from_pretrained(), "shapes")
    with DemoServer(backend, **options) as server:
        server.backend = backend
        yield server


@pytest.fixture(scope="module")
def browser():
    """One browser; whatever its tabs asked for is looked at in the end."""
    assert CHROMIUM, "These tests need chromium; on Debian: apt-get install chromium"
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        browser.asked, browser.complaints = set(), []
        yield browser
        browser.close()
    assert {urlsplit(url).hostname for url in browser.asked if url.startswith(("http", "ws"))} == {"127.0.0.1"}
    assert browser.complaints == []


class Tab:
    """One person at the page."""

    def __init__(self, browser, url):
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.page.on("request", lambda request: browser.asked.add(request.url))
        self.page.on("console", lambda said: said.type == "error" and browser.complaints.append(said.text))
        self.page.on("pageerror", lambda error: browser.complaints.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#board .examples img")
        self.status = self.page.locator("#captions .status span").first

    def regions(self, count):
        """Waits until the list has so many rows."""
        expect(self.page.locator("#captions .rows li")).to_have_count(count, timeout=WAIT)

    def open(self, path, size):
        """Chooses an image; waits until it is there."""
        self.page.set_input_files("#board .image-file", path)
        ratio = f"{size[0]} / {size[1]}"
        self.page.wait_for_function(f"document.querySelector('#board .stage').style.aspectRatio === '{ratio}'")
        self.page.wait_for_function("document.querySelector('#board .image').complete")

    def example(self, number, count):
        self.page.click(f"#board .examples button >> nth={number}")
        self.regions(count)

    def drag(self, *points):
        """With the mouse over the image, by fractions of it."""
        mouse = self.page.mouse
        mouse.move(*self.at(*points[0]))
        mouse.down()
        for point in points[1:]:
            mouse.move(*self.at(*point), steps=4)
        mouse.up()

    def at(self, x, y):
        self.page.locator("#board .pen").scroll_into_view_if_needed()
        frame = self.page.locator("#board .pen").bounding_box()
        return frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]

    def panel(self, name):
        """Opens a panel that is closed at first."""
        self.page.click(f"#{name} > button")

    def labels(self):
        """Rectangles of the captions on the image and the ends of their lines, by fractions of the image."""
        return self.page.evaluate("""() => {
          const frame = document.querySelector("#board .pen").getBoundingClientRect();
          const share = (x, y) => [(x - frame.left) / frame.width, (y - frame.top) / frame.height];
          const found = [...document.querySelectorAll("#board .labels div")].map(node => node.getBoundingClientRect());
          const lines = [...document.querySelectorAll("#board .labels line")].filter((line, k) => k % 2);
          const end = line => [line.x2.baseVal.value / frame.width, line.y2.baseVal.value / frame.height];
          return [found.map(box => [...share(box.left, box.top), ...share(box.right, box.bottom)]), lines.map(end)];
        }""")

    def describe(self):
        """Presses, and waits for the end; what the list says then."""
        self.page.click("#describe")
        self.page.wait_for_function("/ pass(es)?, /.test(document.querySelector('#captions .status').textContent)")
        return self.said()

    def said(self):
        return self.page.locator("#captions .rows span").all_text_contents()

    def masks(self):
        """Masks of the regions, from the COCO file."""
        data = json.loads(self.save("#save-coco")[0].read_text())
        size = data["images"][0]["width"], data["images"][0]["height"]
        return [region.mask for region in parse_regions(data["annotations"], *size)]

    def serious(self):
        """What axe-core finds on the page that is serious or critical: rule and element."""
        if not self.page.evaluate("Boolean(window.axe)"):
            self.page.evaluate(AXE_SCRIPT)
        still = (
            "!document.querySelector('.pending') && document.getAnimations().every(one => one.playState != 'running')"
        )
        self.page.wait_for_function(still)  # while gradio waits for an answer, what it replaces is pale
        found = self.page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
        grave = [rule for rule in found if rule["impact"] in ("serious", "critical")]
        return [(rule["id"], node["target"], node["html"][:200]) for rule in grave for node in rule["nodes"]]

    def save(self, button):
        with self.page.expect_download() as found:
            self.page.click(button)
        return Path(found.value.path()), found.value.suggested_filename

    def shoot(self, name, **options):
        if SCREENSHOTS:
            image = Image.open(io.BytesIO(self.page.screenshot(**options))).convert("RGB")
            small = image.quantize(256, Image.Quantize.MAXCOVERAGE, 1, dither=Image.Dither.NONE)
            small.save(Path(SCREENSHOTS) / name, optimize=True)


@pytest.fixture
def tab(browser, served):
    tab = Tab(browser, served.url)
    yield tab
    tab.context.close()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A file: a red square and a blue one on grey, 200 x 100 pixels."""
    image = Image.new("RGB", (200, 100), (130, 130, 130))
    draw = ImageDraw.Draw(image)
    draw.rectangle([20, 30, 59, 69], fill=(220, 30, 30))
    draw.rectangle([120, 30, 159, 69], fill=(30, 60, 220))
    path = tmp_path_factory.mktemp("images") / "two squares.png"
    image.save(path)
    return path


def test_upload_draw_describe_hover_and_save(tab, image):
    tab.open(image, (1000, 500))
    tab.drag((0.09, 0.28), (0.31, 0.71))
    tab.regions(1)
    tab.page.click("[data-tool=brush]")
    tab.drag((0.64, 0.4), (0.76, 0.4))
    tab.regions(2)
    tab.drag((0.7, 0.4), (0.7, 0.65))  # goes on with the same region
    tab.page.wait_for_function("document.querySelector('#board [data-version]').dataset.version === '4'")
    tab.regions(2)
    captions = tab.describe()
    assert "red" in captions[0] and "blue" in captions[1]
    status = tab.status.text_content()
    assert status.startswith("2 captions in ") and status.endswith(" s")
    assert tab.page.locator("#board .labels div").all_text_contents() == captions
    scores = tab.page.locator("#captions .rows small").all_text_contents()
    tab.page.mouse.move(*tab.at(0.2, 0.5))
    tip = tab.page.locator("#board .tip")
    expect(tip).to_be_visible()
    assert tip.text_content() == f"1{captions[0]}score {scores[0]}"
    tab.page.mouse.move(*tab.at(0.5, 0.9))
    expect(tip).to_be_hidden()
    path, name = tab.save("#save-coco")
    assert name == "two squares_captions.json"
    shutil.copy(path, image.with_suffix(".json"))
    rows = read_region_file(image.with_suffix(".json"), image.name, 200, 100)
    assert [(row["caption"], f"{row['score']:.2f}") for row in rows] == list(zip(captions, scores, strict=True))
    box, brushed = (
        region.mask for region in parse_regions([{"segmentation": r["segmentation"]} for r in rows], 200, 100)
    )
    assert box[30:70, 20:60].all() and box.sum() <= 46 * 45
    assert brushed[40, 130:152].all() and brushed[42:65, 140].all() and not brushed[:, :115].any()
    assert tab.save("#save-coco")[0].read_bytes() == path.read_bytes()
    path, name = tab.save("#save-image")
    with Image.open(path) as drawn:
        assert (drawn.format, name, drawn.width) == ("PNG", "two squares_captions.png", 480)


def test_find_everything_and_describe_it(tab, tmp_path):
    """A drawing, no masks: one press finds its figures, one describes them."""
    drawn = held_out_scene(3, 4)
    drawn.image.save(tmp_path / "scene.png")
    status = tab.status
    expect(tab.page.locator("[data-do=everything]")).to_be_disabled()
    tab.page.set_input_files("#board .image-file", tmp_path / "scene.png")
    expect(status).to_have_text("Mark regions with a box or the brush, or find everything.", timeout=WAIT)
    tab.page.click("text=Find everything")
    expected = RegionCaptioner.from_pretrained().everything(drawn.image)
    tab.regions(len(expected))
    assert len(expected) >= len(drawn.masks)
    assert tab.describe() == [caption.text for caption in expected]
    tab.shoot("demo_everything.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    tab.page.set_input_files("#board .image-file", tmp_path / "noise.png")
    tab.regions(0)
    tab.page.click("text=Find everything")
    expect(tab.page.locator(".toast-wrap")).to_contain_text("figures drawn on a plain background", timeout=WAIT)
    expect(status).to_have_text("Mark regions with a box or the brush, or find everything.")


def test_all_captions_emerge_together_step_by_step(tab):
    tab.example(0, 6)
    tab.panel("speed")
    tab.page.click("text=Fixed steps")
    expect(tab.page.locator("#effect th").first).to_have_text("steps")
    tab.page.evaluate(WATCH)
    final = tab.describe()
    assert tab.status.text_content().startswith("6 captions in 32 forward passes, ")
    seen = tab.page.evaluate("window.seen")
    drafts = [texts for texts in seen if len(texts) == 6 and any(texts)]
    assert any(all(texts) for texts in drafts)  # all six at the same time
    assert len({tuple(texts) for texts in drafts}) > 1
    # and again, from the start
    tab.page.locator("#captions .replay input").fill("0")
    expect(tab.page.locator("#captions .replay span")).to_have_text("step 1 of 32")
    tab.page.click("#captions .replay button")
    expect(tab.page.locator("#captions .replay span")).to_have_text("result", timeout=WAIT)
    assert tab.said() == final


def test_a_broken_file_is_told_and_the_work_goes_on(tab, tmp_path):
    tab.example(1, 5)
    before = tab.describe()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    tab.page.set_input_files("#board .image-file", tmp_path / "broken.png")
    expect(tab.page.locator(".toast-wrap")).to_contain_text("broken.png: cannot be opened as an image", timeout=WAIT)
    (tmp_path / "broken.json").write_text("{")
    tab.page.set_input_files("#board .mask-file", tmp_path / "broken.json")
    expect(tab.page.locator(".toast-wrap")).to_contain_text("broken.json: not valid JSON", timeout=WAIT)
    tab.page.evaluate(DROP, [["large.png", 21 * 2**20]])
    expect(tab.status).to_have_text("Too large: at most 20 MB at a time.", timeout=WAIT)
    tab.shoot("broken_file.png")
    assert tab.said() == before
    assert tab.describe() == before


def test_two_tabs_at_once(browser, served, tab):
    other = Tab(browser, served.url)
    tab.example(0, 6)
    other.example(2, 6)
    for person in (tab, other):
        person.panel("speed")
        person.page.click("text=Fixed steps")
        expect(person.page.locator("#effect th").first).to_have_text("steps")
    tab.page.click("#describe")
    other.page.click("#describe")
    done = "document.querySelector('#captions .status').textContent.includes(' forward passes, ')"
    for person in (tab, other):
        person.page.wait_for_function(done)
    both = tab.said(), other.said()
    for person, number, said in ((tab, 1, both[0]), (other, 3, both[1])):
        path, name = person.save("#save-coco")
        assert name == f"example_{number}_captions.json"
        assert [row["caption"] for row in json.loads(path.read_text())["annotations"]] == said
    assert both[0] != both[1]
    other.context.close()


def test_masks_click_undo_and_clear(tab, image, tmp_path):
    labels = np.zeros((100, 200), np.uint8)
    labels[30:70, 20:60], labels[30:70, 120:160] = 1, 2
    Image.fromarray(labels).save(tmp_path / "labels.png")
    tab.open(image, (1000, 500))
    tab.page.set_input_files("#board .mask-file", tmp_path / "labels.png")
    tab.regions(2)
    tab.page.click("[data-tool=click]")
    tab.page.mouse.click(*tab.at(0.25, 0.1))
    tab.regions(3)
    tab.page.mouse.move(*tab.at(0.2, 0.9))
    expect(tab.page.locator("#board .tip")).to_have_text("3not described yet")
    tab.page.mouse.move(*tab.at(0.2, 0.5))  # the small one lies on the large one
    expect(tab.page.locator("#board .tip")).to_have_text("1not described yet")
    tab.page.click("[data-do=undo]")
    tab.regions(2)
    captions = tab.describe()
    assert "red" in captions[0] and "blue" in captions[1]
    tab.page.click("[data-do=clear]")
    tab.regions(0)
    expect(tab.page.locator("#describe")).to_be_disabled()


def test_an_image_can_be_dropped(tab, image):
    tab.page.evaluate(DROP, [[image.name, list(image.read_bytes())]])
    tab.page.wait_for_function("document.querySelector('#board .stage').style.aspectRatio === '1000 / 500'")


def test_several_images_dropped_on_a_image_are_masks(tab, image):
    tab.open(image, (1000, 500))
    masks = []
    for left in (20, 120):
        mask = np.zeros((100, 200), np.uint8)
        mask[30:70, left : left + 40] = 255
        Image.fromarray(mask).save(buffer := io.BytesIO(), "PNG")
        masks.append([f"mask_{left}.png", list(buffer.getvalue())])
    tab.page.evaluate(DROP, masks)
    tab.regions(2)
    captions = tab.describe()
    assert "red" in captions[0] and "blue" in captions[1]
    tab.page.evaluate(DROP, masks[:1])  # one alone too
    tab.regions(3)


def test_another_image_asks_before_it_replaces_the_marks(tab, image):
    tab.example(1, 5)
    dialog = tab.page.locator("#board .ask")
    files = [[image.name, list(image.read_bytes())]]
    for button, count in (("Cancel", 5), ("Replace the image", 0)):
        tab.page.evaluate(DROP, files)
        expect(dialog).to_contain_text("two squares.png would replace the image and its 5 regions.", timeout=WAIT)
        expect(dialog.locator("[value=masks]")).to_be_hidden()  # it has another size
        assert tab.serious() == []
        dialog.get_by_role("button", name=button).click()
        tab.regions(count)
    tab.page.keyboard.press("Control+z")
    tab.regions(5)
    coco = {"images": [{"id": 1, "file_name": "example_2.png"}]}
    coco["annotations"] = [{"id": 9, "image_id": 1, "bbox": [1, 1, 9, 9]}]
    labelme = {"shapes": [{"label": "x", "shape_type": "rectangle", "points": [[1, 1], [5, 5]]}]}
    for count, data in ((6, coco), (7, labelme)):
        tab.page.evaluate(DROP, [["regions.json", list(json.dumps(data).encode())]])
        tab.regions(count)


def test_a_region_is_deleted_and_undo_is_off_when_there_is_nothing_to_undo(tab):
    undo = tab.page.locator("[data-do=undo]")
    expect(undo).to_be_disabled()
    tab.example(1, 5)
    expect(undo).to_be_disabled()
    tab.page.click("#captions .rows .delete >> nth=1")
    tab.regions(4)
    expect(undo).to_be_enabled()
    undo.click()
    tab.regions(5)
    expect(undo).to_be_disabled()


def test_only_what_has_an_effect_can_be_pressed(tab):
    button = tab.page.locator
    enabled = "[...document.querySelectorAll('#board .tools button, #describe, #save button, #compare-button')]"
    enabled = f"() => {enabled}.filter(one => !one.disabled && !one.hidden).map(one => one.textContent.trim())"
    assert tab.page.evaluate(enabled) == ["New image", "?"]
    tab.example(1, 5)
    for name, pressed in (("box", "true"), ("brush", "false"), ("click", "false")):
        expect(button(f"[data-tool={name}]")).to_have_attribute("aria-pressed", pressed)
    expect(button("#describe")).to_be_enabled()
    for name in ("#save-coco", "#save-image"):
        expect(button(name)).to_be_disabled()
    tab.describe()
    expect(button("#save-coco")).to_be_enabled()


def overhang(tab, selector):
    """By how many pixels the furthest of these sticks out of the image, left or right."""
    return tab.page.evaluate(
        """selector => {
          const frame = document.querySelector("#board .pen").getBoundingClientRect();
          const found = [...document.querySelectorAll(selector)].map(node => node.getBoundingClientRect());
          return Math.max(...found.map(own => Math.max(frame.left - own.left, own.right - frame.right)));
        }""",
        selector,
    )


def test_captions_stand_beside_the_objects_with_lines_to_them(tab):
    tab.example(2, 6)
    captions = tab.describe()
    shown = tab.page.locator("#board .labels div")
    assert set(shown.all_text_contents()) <= set(captions) and shown.count() >= 4
    boxes, ends = tab.labels()
    masks = tab.masks()
    height, width = masks[0].shape
    for k, (x0, y0, x1, y1) in enumerate(boxes):
        part = slice(round(y0 * height), round(y1 * height)), slice(round(x0 * width), round(x1 * width))
        assert min(x0, y0) >= 0 and max(x1, y1) <= 1 and not any(mask[part].any() for mask in masks)
        assert all(x1 <= a[0] or a[2] <= x0 or y1 <= a[1] or a[3] <= y0 for n, a in enumerate(boxes) if n != k)
    texts = shown.all_text_contents()
    for text, (x, y) in zip(texts, ends, strict=True):  # a line ends at the object that its caption is of
        row, column = round(y * height), round(x * width)
        near = slice(max(0, row - 2), row + 3), slice(max(0, column - 2), column + 3)
        assert any(mask[near].any() for mask, caption in zip(masks, captions, strict=True) if caption == text)
    tab.page.hover("#captions .rows li >> nth=1")  # one alone
    assert shown.all_text_contents() == [
        f"2{captions[1]}score {tab.page.locator('.rows li small >> nth=1').text_content()}"
    ]
    ((x0, y0, x1, y1),), _ = tab.labels()
    assert not masks[1][round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)].any()


def test_long_captions_stay_within_the_image(tab, image, served, monkeypatch):
    long = "captions, a few words longer than those of the shapes ever are, of a region at the edge"
    whole = [RegionCaption(long, 0.5)] * 3
    monkeypatch.setattr(served.backend, "write", lambda image, regions, settings, on_step: (whole, 1))
    tab.open(image, (1000, 500))
    for left, right in ((0.0, 0.04), (0.5, 0.62), (0.96, 1.0)):
        tab.drag((left + 0.002, 0.1), (right - 0.002, 0.9))
    tab.regions(3)
    assert tab.describe() == [long] * 3
    assert overhang(tab, "#board .labels div") <= 0
    for x in (0.02, 0.52, 0.6, 0.98):
        tab.page.mouse.move(*tab.at(x, 0.5))
        expect(tab.page.locator("#board .tip")).to_be_visible()
        assert overhang(tab, "#board .tip") <= 0


def test_keys(tab, image):
    """From an image to a box that is moved, resized, deleted and brought back, without the mouse."""
    keys, focused = tab.page.keyboard, "document.activeElement.ariaLabel"
    tab.open(image, (1000, 500))

    keys.press("b")
    tab.regions(1)
    tab.page.wait_for_function(f"{focused} === 'Region 1 of 1: not described yet'")
    keys.press("b")
    tab.regions(2)
    tab.page.wait_for_function(f"{focused} === 'Region 2 of 2: not described yet'")
    for key, times in (("ArrowRight", 3), ("ArrowUp", 2), ("Shift+ArrowLeft", 4), ("Shift+ArrowDown", 1)):
        for _ in range(times):
            keys.press(key)
    spot = "document.querySelector('#board .spots button:last-child').style"
    sides = f"['left', 'top', 'width', 'height'].map(side => Math.round(2 * parseFloat({spot}[side])))"  # in pixels
    moved = [75 + 3, 2 * (37 - 2), 50 - 4, 2 * (26 + 1)]
    tab.page.wait_for_function(f"{sides}.join() === '{','.join(map(str, moved))}'")
    assert tab.page.evaluate(focused) == "Region 2 of 2: not described yet"
    expect(tab.page.locator("#captions .rows li >> nth=1")).to_have_class("on")
    keys.press("Shift+Tab")
    assert tab.page.evaluate(focused) == "Region 1 of 2: not described yet"
    keys.press("Tab")
    keys.press("Delete")
    tab.regions(1)
    version = "Number(document.querySelector('#board [data-version]').dataset.version)"
    for count in (2, 2, 1, 0):  # deletion, moves, two boxes
        before = tab.page.evaluate(version)
        keys.press("Control+z")
        tab.page.wait_for_function(f"{version} > {before}")
        tab.regions(count)
    pressed = ("b", "b", "b", "Control+z", "b", "Control+z")  # faster than answers come: none is lost
    for key in pressed:
        keys.press(key)
    tab.page.wait_for_function(f"{version} >= {before + 1 + len(pressed)}")
    tab.regions(2)
    keys.press("?")
    dialog = tab.page.locator("#board .keys")
    expect(dialog).to_be_visible()
    assert tab.serious() == []
    keys.press("Escape")
    expect(dialog).to_be_hidden()
    tab.panel("attributes")
    tab.page.fill("#schema textarea", "")
    tab.page.type("#schema textarea", "b?")  # no keys where one types
    assert tab.page.input_value("#schema textarea") == "b?"
    expect(dialog).to_be_hidden()


def test_nothing_serious_for_axe_and_the_layouts_of_desktop_and_phone(tab):
    assert tab.serious() == []
    tab.example(0, 6)
    tab.describe()
    tab.page.click("[data-tool=brush]")  # its size is chosen beside it
    row = (
        "new Set([...document.querySelectorAll('#board .tools button:not([hidden])')].map(one => one.offsetTop)).size"
    )
    assert tab.page.evaluate(row) == 1  # the tools stand in one row
    for name in ("attributes", "speed", "checkpoint"):
        tab.panel(name)
    tab.page.fill("#schema textarea", "colour: red, green, blue\nsize: small, large\nsize: 1")
    tab.page.click("#read-attributes")
    fault = tab.page.locator("#attribute-table .fault")
    expect(fault).to_have_text("Line 3: there is an attribute 'size' already.", timeout=WAIT)
    tab.page.fill("#schema textarea", "colour: red, green, blue\nsize: small, large")
    tab.page.click("#read-attributes")
    expect(tab.page.locator("#attribute-table tbody tr")).to_have_count(6, timeout=WAIT)
    assert tab.page.locator("#attribute-table thead").inner_text().split() == ["region", "colour", "size"]
    path, name = tab.save("#save-csv")
    assert name == "example_1_attributes.csv" and len(path.read_text().splitlines()) == 7
    tab.page.fill("#checkpoint-name input, #checkpoint-name textarea", str(CHECKPOINT))
    expect(tab.page.locator("#load")).to_be_disabled()
    tab.page.click("#check")
    expect(tab.page.locator("#inspection tr").last).to_have_text("whole yes", timeout=WAIT)
    tab.page.click("#load")
    expect(tab.page.locator("#inspection .fault")).to_contain_text("the memory is full", timeout=WAIT)
    expect(tab.page.locator("#note")).to_have_text("Captions are written by shapes.")
    assert tab.serious() == []
    for theme, width in (("dark", 1280), ("dark", 390), ("light", 390)):
        tab.page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
        tab.page.set_viewport_size({"width": width, "height": 844})
        tab.page.wait_for_timeout(400)  # colours and layout change slowly
        assert tab.serious() == []
    tab.shoot("demo_phone.png")
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 390
    for tool in tab.page.locator("#board .tools button:not([hidden]), #describe, #save button").all():
        box = tool.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    thumbnail = tab.page.evaluate(
        "(({ width, height, naturalWidth: w, naturalHeight: h }) => width / height - w / h)"
        "(document.querySelector('#board .examples img'))"
    )
    assert abs(thumbnail) < 0.05
    assert tab.page.locator("#effect table").bounding_box()["width"] < 390


def test_a_very_wide_image_is_high_enough_to_mark(tab, tmp_path):
    wide = np.full((60, 3000, 3), 130, np.uint8)
    wide[15:45, 2700:2760] = (220, 30, 30)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    tab.open(tmp_path / "wide.png", (1000, 20))
    assert tab.page.locator("#board .pen").bounding_box()["height"] >= 59
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # the image scrolls, not the page
    tab.page.evaluate("document.querySelector('#board .scroll').scrollLeft = 1e6")
    tab.drag((0.9, 0.25), (0.92, 0.75))
    tab.regions(1)
    tab.describe()
    (row,) = json.loads(tab.save("#save-coco")[0].read_text())["annotations"]
    assert np.abs(np.subtract(row["bbox"], [2700, 15, 60, 30])).max() <= 2


def test_numbers_out_of_bounds_are_harmless(tab, capfd):
    tab.example(1, 5)
    tab.panel("speed")
    chosen = tab.page.locator("#effect .chosen th")
    for mode, label, value, row in (
        ("Adaptive", "Threshold", "7", "0.99"),
        ("Adaptive", "Threshold", "0", "0.5"),
        ("Fixed steps", "Steps at most", "0", "1"),
        ("Fixed steps", "Steps at most", "99", "32"),
        ("Fixed steps", "Steps at most", "0", "1"),
    ):
        tab.page.click(f"text={mode}")
        tab.page.get_by_label(f"number input for {label}").fill(value)
        expect(chosen).to_have_text(row, timeout=WAIT)
    tab.describe()
    assert tab.status.text_content().startswith("5 captions in 1 forward pass, ")
    tab.page.get_by_label("number input for Steps at most").fill("")
    tab.page.wait_for_timeout(500)
    assert "Traceback" not in "".join(capfd.readouterr())
    expect(tab.page.locator(".toast-body")).to_have_count(0)


def test_comparison_and_settings(tab):
    tab.shoot("demo_start.png")
    tab.example(0, 6)
    captions = tab.describe()
    tab.page.mouse.move(0, 0)
    tab.shoot("demo_page.png")
    tab.page.click("#compare-button")
    lanes = tab.page.locator("#compare")
    expect(lanes.locator("h2").first).to_be_in_viewport(timeout=WAIT)
    expect(lanes).to_contain_text("times as long", timeout=WAIT)
    assert tab.page.locator("#compare .lane >> nth=0 >> li span").all_text_contents() == captions
    for lane in tab.page.locator("#compare .lane").all():  # forward passes first
        assert re.search(r"\d+ forward passes\s+\d+\.\d\d s, the median of 3 runs", lane.text_content())
        assert lane.locator("li").count() == 6
    assert tab.serious() == []
    tab.shoot("demo_compare.png", full_page=True)
    tab.panel("speed")
    expect(tab.page.locator("#effect .chosen th")).to_have_text("0.8")
    tab.example(1, 5)  # what was compared is gone
    expect(lanes).to_have_text("", timeout=WAIT)
    tab.page.click("text=Fixed steps")
    # gradio's script can lose an event that is sent in the moment in which another one ends
    expect(tab.page.locator("#effect .chosen th")).to_have_text("32", timeout=WAIT)
    tab.page.click("#compare-button")
    expect(lanes).to_contain_text("One region at a time", timeout=WAIT)
    tab.page.click("#captions .rows .delete >> nth=0")  # while they are being written
    tab.regions(4)
    expect(lanes).to_have_text("", timeout=WAIT)
    expect(tab.page.locator("#compare-button")).to_be_enabled()
    tab.page.wait_for_timeout(500)
    expect(lanes).to_have_text("")
    tab.page.click("text=Fast")
    expect(tab.page.locator("#effect .chosen th")).to_have_text("0.1")
    expect(tab.page.get_by_label("number input for Threshold")).to_be_hidden()


def test_with_a_server(browser, image, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with RegionCaptionServer() as server, DemoServer(ServerBackend(CaptionClient(server.url)), threshold=None) as page:
        tab = Tab(browser, page.url)
        expect(tab.page.locator("[data-tool=click]")).to_be_hidden()
        expect(tab.page.locator("#checkpoint")).to_have_count(0)
        tab.open(image, (1000, 500))
        tab.drag((0.1, 0.3), (0.5, 0.7))
        tab.regions(1)
        tab.page.evaluate("""() => {
          window.told = [];
          const status = document.querySelector("#captions .status span");
          new MutationObserver(() => window.told.push(status.textContent)).observe(status, { childList: true });
        }""")
        (caption,) = tab.describe()
        assert tab.page.evaluate("window.told[0]") == "Waiting for the model"
        assert abs(int(caption.removesuffix(" pixels")) - 80 * 40) < 400
        assert tab.status.text_content().startswith("1 caption in 2 forward passes")
        server.fault = lambda number, body: 500
        tab.page.click("#describe")
        expect(tab.page.locator(".toast-wrap")).to_contain_text("writes no captions: ", timeout=WAIT)
        expect(tab.status).to_have_text("No captions. Press to try again.", timeout=WAIT)
        tab.page.click("#compare-button")
        for area in ("#captions", "#compare"):
            expect(tab.page.locator(f"{area} .error")).to_have_count(1, timeout=WAIT)  # gradio's, which stays
            for part in (".error", ".clear-status"):
                expect(tab.page.locator(f"{area} {part}")).to_be_hidden()
        server.fault = lambda number, body: None
        assert tab.describe() == [caption]
        tab.context.close()
