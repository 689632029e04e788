"""The captions that a checkpoint learns to commit to: its own careful ones, or those that its data has.

Every row goes into `NAME.all.jsonl` as soon as it is captioned, so that a stopped run is resumed; when all are there,
the usable ones go into `NAME.jsonl`, a training file like any other.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pdlm_hf import RegionCaptioner
from pdlm_hf.captioning.loading import load_checkpoint
from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.files import FileLock, append_rows, check_same_settings, load_json, read_rows, write_json
from pdlm_hf.regions.region import parse_regions
from pdlm_hf.shapes.dataset import HELD_OUT, TRAINING
from pdlm_hf.shapes.scenes import describe, draw_scene

from .adapters import fingerprint
from .conversion import relocated, write_row, writing
from .data import chat_messages, decode_chat, decode_row
from .plan import file_of
from .recipe import Recipe
from .rows import sound_row
from .sources import content_of, find_source, raw_rows
from .splitting import image_key
from .training import CAPTIONS

BATCH = 8  # images captioned together

Row = dict[str, Any]


def write_captions(recipe: Recipe, folder: Path, held_out: bool = False, show: Callable[[int], None] = print) -> Path:
    """Write the training file (or the held-out file) of a commit recipe, or go on with it.

    Args:
        recipe ([`~recipe.Recipe`]): with `commit`.
        folder (`Path`): folder of the two files.
        held_out (`bool`): the held-out rows. Drawn ones keep their true captions, to count right ones by.
        show: called with the number of rows, after every batch.

    Returns:
        the JSONL file.

    Raises:
        SettingError: the folder has captions of other settings, or another process writes them.
        DataError: a row cannot be used, or no caption is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = "held_out" if held_out else "train"
    out, counts_file = folder / f"{name}.jsonl", folder / f"{name}.json"
    settings = _settings(recipe, name)
    found = load_json(counts_file) if counts_file.is_file() else {"settings": settings}
    content = {"content": settings["content"]}  # of which earlier versions kept no record
    check_same_settings(content | found["settings"], settings, counts_file, "give another `output`")
    if "counts" in found:  # written last
        return out
    with FileLock(folder / "lock", folder.parent, "give another `output`"):
        write_json(counts_file, {"settings": settings})
        every = _caption_all(recipe, folder, name, show)
        counts = _select(every, out, settings["drop"], recipe.data.kind == "chat")
        if not counts["rows"]:
            out.unlink()
            raise DataError(f"{every}: no caption can be used, all are empty or cut short; see commit.careful.")
        write_json(counts_file, {"settings": settings, "counts": dict(counts)})
    return out


def _caption_all(recipe: Recipe, folder: Path, name: str, show: Callable[[int], None]) -> Path:
    """Write the captions of all rows, behind those that a stopped run has written."""
    every = folder / f"{name}.all.jsonl"
    done = sum(1 for _ in read_rows(every, repair=True))
    rows = islice(_source_rows(recipe, folder, name), done, None)
    caption = _captioner(recipe, folder, name)
    while batch := list(islice(rows, BATCH)):
        append_rows(every, caption(batch))
        done += len(batch)
        show(done)
    return every


def on_own_captions(recipe: Recipe) -> Recipe:
    """The recipe that trains on the files of [`write_captions`], which are in the folder of the run."""
    kind = "chat" if recipe.data.kind == "chat" else "regions"
    files = {name: str(Path(recipe.output) / CAPTIONS / f"{name}.jsonl") for name in ("train", "held_out")}
    data = recipe.data.model_copy(update={"kind": kind, "images": None, "limit": None, **files})
    return recipe.model_copy(update={"data": data})


def _settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """What the captions depend on."""
    data, commit = recipe.data, recipe.committing
    source = data.train if name == "train" else data.held_out
    limit = data.limit if name == "train" else data.held_out_limit
    drawn = {"scenes": commit.scenes, "seed": recipe.seed} if data.kind == "drawn" else {}
    own = {"model": fingerprint(recipe.base), "careful": commit.careful} if commit.captions == "own" else {}
    drop = {"drop": 0.0 if name == "held_out" else commit.drop}
    fixed = {"kind": data.kind, "source": source, "content": content_of(source), "limit": limit}
    return fixed | drop | {"captions": commit.captions} | drawn | own


# ---------------------------------------------------------------------------------------------------- rows


def _source_rows(recipe: Recipe, folder: Path, name: str) -> Iterator[Row]:
    """The rows without own captions, with paths that start from `folder`."""
    data, held_out = recipe.data, name == "held_out"
    if data.kind == "drawn":
        count = data.held_out_limit or 64 if held_out else recipe.committing.scenes
        yield from (drawn_row(recipe.seed, index, folder, held_out) for index in range(count))
        return
    found = find_source(file_of(data, "held_out" if held_out else "train"), data.images)
    limit = data.held_out_limit if held_out else data.limit
    for number, raw in islice(raw_rows(found), limit):
        if data.kind == "chat":
            chat_messages(number, raw)
            yield relocated(raw, found.folder, folder)
        else:
            row = sound_row(raw, number, recipe.committing.captions == "given", attributes=False)
            yield relocated(row, found.folder, folder)


def drawn_row(seed: int, index: int, folder: Path, held_out: bool = False) -> Row:
    """Draw a scene with true captions, and write its image beside the file of its row.

    Args:
        seed, index (`int`): which scene.
        folder (`Path`): gets `images/`.
        held_out (`bool`): a scene that training never draws.
    """
    rng = np.random.default_rng((HELD_OUT if held_out else TRAINING, seed, index))
    scene = draw_scene(rng)
    path = folder / "images" / f"{'held_out' if held_out else 'train'}_{index:06d}.png"
    path.parent.mkdir(exist_ok=True)
    scene.image.save(path)
    regions = [
        {"id": region.id, "segmentation": region.segmentation, "caption": describe(figure, rng)}
        for region, figure in zip(parse_regions(scene.masks, *scene.image.size), scene.figures, strict=True)
    ]
    width, height = scene.image.size
    return {"image": path.relative_to(folder).as_posix(), "regions": regions, "width": width, "height": height}


# ---------------------------------------------------------------------------------------------------- captions


def _captioner(recipe: Recipe, folder: Path, name: str) -> Callable[[list[Row]], list[Row]]:
    """A function that puts the own captions into rows."""
    commit, data = recipe.committing, recipe.data
    if commit.captions == "given" or name == "held_out" and data.kind == "drawn":
        return list
    model, processor = load_checkpoint(recipe.base, getattr(torch, recipe.dtype))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if data.kind == "chat":
        return lambda rows: [_answered(row, model, processor, folder, commit.careful) for row in rows]
    captioner = RegionCaptioner(model, processor)

    def caption(rows: list[Row]) -> list[Row]:
        decoded = [decode_row(number, row, folder, captions=False) for number, row in enumerate(rows, 1)]
        pairs = [(row["image"], [region["mask"] for region in row["regions"]]) for row in decoded]
        found = []
        for question in dict.fromkeys(row.get("question") for row in rows):
            places = [k for k, row in enumerate(rows) if row.get("question") == question]
            with torch.inference_mode():
                texts, _ = captioner.generate([pairs[k] for k in places], question, **commit.careful)
            found += [(k, _captioned(rows[k], said)) for k, said in zip(places, texts, strict=True)]
        return [row for _, row in sorted(found, key=lambda pair: pair[0])]

    return caption


def _captioned(row: Row, captions: list) -> Row:
    """The row with these captions and their scores."""
    regions = [
        region
        | {
            "caption": caption.text.strip(),
            "meta": {"score": round(caption.score, 4)} | ({"truncated": True} if caption.truncated else {}),
        }
        for region, caption in zip(row["regions"], captions, strict=True)
    ]
    return row | {"regions": regions}


def _answered(row: Row, model, processor, folder: Path, careful: dict[str, Any]) -> Row:
    """The conversation with the model's own last answer."""
    decoded = decode_chat(1, row, folder)
    said, _ = answer(model, processor, decoded, **careful)
    name, text = ("messages", "content") if row.get("messages") else ("conversations", "value")
    return row | {name: [*row[name][:-1], row[name][-1] | {text: said}]}


def answer(model, processor, row: Row, **generation: Any) -> tuple[str, int]:
    """Write the last answer of a conversation.

    Args:
        model, processor: a base checkpoint.
        row (`dict`): `{"images", "messages"}`, see [`~pdlm_hf.training.PdlmCollator`]; its last answer is not read.
        **generation: settings of `generate`.

    Returns:
        the answer, and the number of forward passes.
    """
    prompt = processor.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    images: list[Image.Image] | None = row["images"] or None
    inputs = processor(images=images, text=prompt).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, return_dict_in_generate=True, **generation)
    return processor.post_process_answers(output.sequences)[0].strip(), output.num_forwards


# ---------------------------------------------------------------------------------------------------- selection


def _select(every: Path, out: Path, drop: float, chat: bool) -> Counter:
    """Write the rows that training can use: no captions that are empty, cut short or of low score, no region twice."""
    counts: Counter[str] = Counter()
    scores = [] if chat else sorted(_score(region) for row in read_rows(every) for region in row["regions"])
    min_score = scores[int(drop * len(scores))] if scores else 0.0
    seen: set[tuple[str, str]] = set()
    with writing(out) as file:
        for row in read_rows(every):
            kept = _usable_chat(row, seen, counts) if chat else _usable_regions(row, seen, min_score, counts)
            if kept is not None:
                write_row(file, kept)
                counts["rows"] += 1
    return counts


def _usable_regions(row: Row, seen: set, min_score: float, counts: Counter) -> Row | None:
    image, regions = image_key(row, None), []
    for region in row["regions"]:
        place = json.dumps([region.get("segmentation"), region.get("bbox")], sort_keys=True)
        faults = {
            "empty": not region["caption"].strip(),
            "cut short": _meta(region).get("truncated", False),
            "low score": _score(region) < min_score,
            "duplicate": (image, place) in seen,
        }
        fault = next((name for name, found in faults.items() if found), None)
        counts[fault or "regions"] += 1
        if fault is None:
            seen.add((image, place))
            regions.append(region)
    return row | {"regions": regions} if regions else None


def _meta(region: Row) -> Row:
    return region["meta"] if isinstance(region.get("meta"), dict) else {}


def _score(region: Row) -> float:
    """Score of a caption; given ones may have none."""
    return float(_meta(region).get("score", 1.0))


def _usable_chat(row: Row, seen: set, counts: Counter) -> Row | None:
    turns = row.get("messages") or row["conversations"]
    last = turns[-1].get("content", turns[-1].get("value"))
    key = (json.dumps([row.get("image"), row.get("images")]), json.dumps(turns[:-1]))
    fault = "empty" if not last else "duplicate" if key in seen else None
    seen.add(key)
    if fault is not None:
        counts[fault] += 1
    return row if fault is None else None
