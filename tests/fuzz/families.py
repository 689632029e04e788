"""The families of inputs: what is made of them, and what must come of it."""

import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from files import ANNOTATIONS, COCO, FORMATS, HEIGHT, IMAGE, LIST, POLYGONS, WIDTH, images
from hypothesis import strategies as st
from PIL import Image
from runner import Family
from strategies import changed, damaged, json_bytes, json_values

import pdlm_evalkit.paradlc as paradlc
from pdlm_evalkit.paradlc.data import area_shares, check_images, load_benchmark
from pdlm_evalkit.paradlc.parsing import parse_reference, parse_robust
from pdlm_evalkit.paradlc.scoring import read_answers, score_answers, totals
from pdlm_hf import CHECKPOINT, RegionCaptioner
from pdlm_hf.batch.dataset import open_data
from pdlm_hf.batch.run import BatchFiles
from pdlm_hf.errors_pdlm import PdlmError, RegionError
from pdlm_hf.regions import load_image, parse_regions, read_region_file
from pdlm_hf.regions.readers import FORMATS as READERS
from pdlm_hf.regions.region import region_areas
from pdlm_hf.render.report import write_report
from pdlm_peft.chat_validation import validate_chat
from pdlm_peft.conversion import category_captions, convert
from pdlm_peft.rows import check_row
from pdlm_peft.sources import find_source
from pdlm_peft.splitting import split
from pdlm_peft.validation import Validator

PIXELS = Image.fromarray(np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3))


def check_regions(regions: Any) -> None:
    """Assert that these are regions of the image."""
    assert regions
    for region in regions:
        assert region.mask.shape == (HEIGHT, WIDTH) and region.mask.dtype == bool and region.mask.any()
        x, y, w, h = region.bbox
        assert 0 <= x < x + w <= WIDTH and 0 <= y < y + h <= HEIGHT


# ------------------------------------------------------------------------------------------- values of regions


def _arrays() -> st.SearchStrategy[Any]:
    kinds = ["bool", "uint8", "int64", "float32", "float64", "complex64", "object", "S3", "uint16", "datetime64[s]"]
    shapes = [
        (HEIGHT, WIDTH),
        (1, HEIGHT, WIDTH),
        (HEIGHT, WIDTH, 1),
        (WIDTH, HEIGHT),
        (2, HEIGHT, WIDTH),
        (),
        (0,),
        (4,),
    ]
    fills = [0, 1, 2, 127, 200, 255, -1, 70000, 0.5, float("nan"), float("inf")]

    def build(kind: str, shape: tuple, fill: Any, form: str) -> Any:
        with np.errstate(all="ignore"):
            try:
                array = np.full(shape, fill).astype(kind)
            except (ValueError, TypeError, OverflowError):
                array = np.zeros(shape)
        if array.size > 10:
            array.reshape(-1)[3:40] = np.ones(1).astype(kind)[0]
        if form == "array" or array.dtype.kind not in "biuf" or array.dtype == np.uint16:
            return array
        tensor = torch.from_numpy(array)
        return {
            "tensor": tensor,
            "half": tensor.half(),
            "meta": tensor.to("meta"),
            "sparse": tensor.float().to_sparse(),
        }[form]

    forms = st.sampled_from(["array", "array", "tensor", "half", "meta", "sparse"])
    return st.builds(build, st.sampled_from(kinds), st.sampled_from(shapes), st.sampled_from(fills), forms)


def _pil() -> st.SearchStrategy[Any]:
    modes = st.sampled_from(
        ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "PA", "La"]
    )
    sizes = st.sampled_from([(WIDTH, HEIGHT), (HEIGHT, WIDTH), (1, 1)])
    return st.builds(lambda mode, size, fill: Image.new(mode, size, fill), modes, sizes, st.sampled_from([0, 1, 255]))


def run_region(value: Any, work: Path) -> None:
    """A value as a region; areas without masks are those of the masks."""
    areas = region_areas([value], [(WIDTH, HEIGHT)]) if isinstance(value, dict) and "counts" not in value else None
    try:
        (region,) = parse_regions([value], WIDTH, HEIGHT)
    except RegionError:
        assert areas is None or isinstance(areas[0], RegionError) or areas[0] == 0
        raise
    check_regions([region])
    assert areas is None or areas[0] == region.mask.sum()


GOOD_REGIONS = [
    *ANNOTATIONS,
    *LIST,
    {"id": 1, "segmentation": POLYGONS},
    [4, 6, 20, 10],
    POLYGONS,
    LIST[0]["segmentation"],
]
region_values = st.sampled_from(GOOD_REGIONS).flatmap(changed) | json_values() | _arrays() | _pil()


# ------------------------------------------------------------------------------------------------------- files


def run_region_file(value: tuple[str, bytes, str | None], work: Path) -> None:
    """A file of regions of the image, read as what it shows to be, or as a format that is named."""
    path = work / FORMATS[value[0]][0]
    path.write_bytes(value[1])
    PIXELS.save(work / IMAGE)
    try:
        found = read_region_file(path, IMAGE, WIDTH, HEIGHT, value[2])
    except PdlmError as error:
        assert path.name in str(error), f"the message does not name the file: {error}"
        raise
    check_regions(parse_regions(found, WIDTH, HEIGHT))


NAMED = st.none() | st.none() | st.sampled_from([name for name in READERS if name != "masks"])  # that is a folder
region_files = st.sampled_from(list(FORMATS)).flatmap(lambda name: st.tuples(st.just(name), FORMATS[name][2](), NAMED))


def run_image(value: bytes, work: Path) -> None:
    """An image file."""
    path = work / "photo.img"
    path.write_bytes(value)
    image = load_image(path)
    assert image.mode == "RGB" and min(image.size) > 0 and np.asarray(image).shape == (image.height, image.width, 3)


image_files = st.deferred(lambda: st.sampled_from(list(images().values())).flatmap(damaged) | st.binary(max_size=64))


# --------------------------------------------------------------------------------------------------- data sets

ROWS = [
    {"image": IMAGE, **{"width": WIDTH, "height": HEIGHT}, "regions": [{**LIST[0], "caption": "a red square"}]},
    {"image": "second.png", "regions": [{"id": 1, "bbox": [4, 6, 20, 10], "caption": "a box"}]},
]
CHATS = [
    {
        "image": IMAGE,
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "!"},
        ]
    },
]
GAR = [
    {
        "image": IMAGE,
        "mask_rle": LIST[0]["segmentation"],
        "conversations": [{"from": "human", "value": "<Prompt0>?"}, {"from": "gpt", "value": "A."}],
    }
]
DAM = {IMAGE: [{"image": IMAGE, "mask_rle": LIST[0]["segmentation"], "caption": "a thing"}]}
CAPTIONED = {**COCO, "annotations": [{**annotation, "caption": "a thing"} for annotation in ANNOTATIONS]}
RESULTS = [
    {
        **{"image_id": 1, "annotation_id": k, "file_name": IMAGE, "caption": "a thing", "score": 0.5},
        **{"bbox": [4, 6, 20, 10], "segmentation": LIST[0]["segmentation"]},
    }
    for k in (5, 6)
]
DATA: dict[str, tuple[str, Any]] = {
    **{"rows": ("data.jsonl", ROWS), "list": ("data.json", ROWS), "coco": ("data.json", CAPTIONED)},
    **{"chat": ("data.json", CHATS), "chat lines": ("data.jsonl", CHATS), "instances": ("data.json", COCO)},
    **{"gar": ("data.json", GAR), "dam": ("data.json", DAM), "reference": ("data.json", ROWS)},
    **{"split": ("data.jsonl", ROWS), "batch": ("data.json", COCO), "results": ("data.jsonl", RESULTS)},
}


@cache
def _processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(str(CHECKPOINT))


@st.composite
def _data(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(list(DATA)))
    file, good = DATA[name]
    if file.endswith(".jsonl"):
        return name, b"\n".join([draw(json_bytes(row)) for row in good]) + b"\n"
    return name, draw(json_bytes(good))


def run_data(value: tuple[str, bytes], work: Path) -> None:
    """A file of training data or of `pdlm batch`."""
    kind, content = value
    path, out = work / DATA[kind][0], work / "out.jsonl"
    path.write_bytes(content)
    PIXELS.save(work / IMAGE)
    PIXELS.save(work / "second.png")
    if kind.startswith("chat"):
        report = validate_chat(find_source(path), _processor())
        assert report.summary["rows"] >= 1 or report.faults
    elif kind in ("rows", "list", "coco"):
        report = Validator(_processor()).validate(find_source(path))
        assert report.summary["rows"] >= 1 or report.faults
        assert all(str(fault) for fault in report.faults)
    elif kind == "batch":
        found = open_data(path, None)
        assert found.entries or found.faults
    elif kind == "results":
        (work / "data.run.json").write_text("{}")
        files = BatchFiles(path, {})
        files.close()
        assert all(isinstance(key, (int, str)) for key in files.rows)
        shown = write_report(path, work, work / "page.html", damaged=lambda line, fault: None)[1]
        assert shown >= len(files.rows)  # a damaged row may give an image a second name
    elif kind == "split":
        counts = split(path, work / "train.jsonl", work / "held.jsonl", 0.5)
        assert all(part["rows"] for part in counts)
    else:
        form = "coco-instances" if kind == "instances" else kind
        counts = convert(path, out, form, captions=category_captions() if kind == "instances" else None)
        rows = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert len(rows) == counts["rows"] and not any(list(check_row(row, 1)) for row in rows)


# ------------------------------------------------------------------------------------------------------ judges

EXAMPLE = Path(paradlc.__file__).parent / "example"
PARTS = {name: json.loads((EXAMPLE / f"{name}.json").read_text()) for name in ("annotations", "qa", "class_names")}
WORDS = [
    *(
        "A",
        "b",
        "(C)",
        "[D",
        "E)",
        "yes",
        "No",
        "the red dog",
        "dog",
        "no way",
        "answer",
        "Answer:",
        "is",
        "option",
        "not",
    ),
    *(
        "choice",
        "or",
        "and",
        ",",
        ".",
        ":",
        "\n",
        " ",
        "\t",
        "*",
        "_",
        "__",
        "'",
        '"',
        "\\boxed{",
        "}",
        "<think>",
        "</think>",
    ),
    *("```", "\ud800", "\u0301", "\uff21", "\u2019", "I do not know", "N/A", "a" * 50, "<b>"),
]


@st.composite
def _replies(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from(["reply", "reply", "reply", "answers", *PARTS]))
    if kind == "reply":
        piece = draw(st.lists(st.sampled_from(WORDS), max_size=6).map("".join))
        times = draw(st.sampled_from([1, 1, 1, 1, 2, 3, 5, 8, 20_000]))
        tail = draw(st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join)) + draw(st.text(max_size=10))
        return kind, (piece * times)[:50_000] + tail
    good = {key: ["Yes", *["A"] * len(asked)] for key, asked in PARTS["qa"].items()}
    return kind, draw(json_bytes(good if kind == "answers" else PARTS[kind]))


CHOICES = (("Yes", "No"), ("the red dog", "dog", "no way", "no", "a"), ("\ud800", "...", "A", "B."))


def run_reply(value: tuple[str, Any], work: Path) -> None:
    """A reply of a judge, a file of replies, or a file of a benchmark."""
    kind, content = value
    if kind == "reply":
        for choices in CHOICES:
            for found in (parse_robust(content, choices), parse_reference(content, choices)):
                assert found is None or 0 <= found < len(choices)
            assert parse_robust(f"\n  {content}  \n", choices) == parse_robust(content, choices)
        return
    for name, part in PARTS.items():
        (work / f"{name}.json").write_bytes(content if name == kind else json.dumps(part).encode())
    benchmark = load_benchmark(work, EXAMPLE / "images")
    questions = {key: mask.questions for key, mask in benchmark.masks.items()}
    if kind == "annotations":
        check_images(benchmark)
        assert all(0 < share <= 1 for share in area_shares(benchmark).values())
    (work / "answers.json").write_bytes(content if kind == "answers" else b"{}")
    scores = totals(score_answers(questions, read_answers(work / "answers.json", questions)))
    assert scores["n_masks"] == len(questions) and math.isfinite(scores["avg"])


# ------------------------------------------------------------------------------------------------- checkpoints

SETTINGS = {
    name: json.loads((CHECKPOINT / name).read_text())
    for name in (
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
    )
}
TEMPLATE = (CHECKPOINT / "chat_template.jinja").read_bytes()


@st.composite
def _checkpoints(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from([*SETTINGS, "config.json", "chat_template.jinja"]))
    return name, draw(damaged(TEMPLATE) if name.endswith("jinja") else json_bytes(SETTINGS[name]))


def run_checkpoint(value: tuple[str, bytes], work: Path) -> None:
    """A checkpoint with another file of settings."""
    name, content = value
    for path in CHECKPOINT.iterdir():
        if path.name in (*SETTINGS, "chat_template.jinja"):
            shutil.copy(path, work / path.name)
    (work / "model.safetensors").symlink_to(CHECKPOINT / "model.safetensors")
    (work / name).write_bytes(content)
    captioner = RegionCaptioner.from_pretrained(work, device="cpu")
    (caption,) = captioner.caption(PIXELS, [[4, 6, 20, 10]], max_new_tokens=2, max_denoising_steps=1)
    assert isinstance(caption.text, str) and 0 <= caption.score <= 1 and caption.bbox == [4, 6, 20, 10]


def _names_of_region(value: Any) -> tuple[str, ...]:
    return ("region", "Region", value) if isinstance(value, str) else ("region", "Region")  # a text is a path


def _names_of_data(value: Any) -> tuple[str, ...]:
    return DATA[value[0]][0], "row ", "has none of the"  # images, in the folder of the message


FAMILIES = [
    Family("regions", region_values, run_region, _names_of_region, 0.30),
    Family("region files", region_files, run_region_file, lambda value: (FORMATS[value[0]][0], "region"), 0.25),
    Family("images", image_files, run_image, lambda value: ("photo.img",), 0.20),
    Family("data sets", _data(), run_data, _names_of_data, 0.12),
    Family("replies", _replies(), run_reply, lambda value: (f"{value[0]}.json",), 0.10),
    Family("checkpoints", _checkpoints(), run_checkpoint, lambda value: (value[0], "config.json", "tokenizer"), 0.03),
]
