"""Data sets of captioned regions and of conversations, whose rows are decoded on access."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from pdlm_hf.attributes.schema import AttributeSchema
from pdlm_hf.batch.dataset import image_size
from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.region import parse_region

from .rows import (
    Fault,
    RowError,
    is_image,
    is_text,
    known_attributes,
    num_characters,
    open_row_image,
    row_size,
    schema_faults,
    size_fault,
    sound_row,
)
from .sources import Source, find_source, open_table, parse_line, raw_rows

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
IMAGE = "<image>"


class _RowDataset(Dataset):
    """Rows of a source by position, decoded on access."""

    def __init__(self, source: str | Path, images: str | Path | None = None, limit: int | None = None):
        self.source = find_source(source, images)
        self._rows = _Rows(self.source, limit)
        if not len(self._rows):
            raise DataError(f"{self.source.name}: holds no rows.")

    def __len__(self) -> int:
        return len(self._rows)


class RegionDataset(_RowDataset):
    """Images with captioned regions, in the form that [`~pdlm_hf.training.PdlmCollator`] takes.

    Images and masks are decoded on access. Of a JSONL file only the positions of the lines are kept in memory; a JSON
    list and a COCO file are kept as they were read.

    Args:
        source (`str` or `Path`): COCO json, JSONL, the reference's training json, a saved `datasets` folder, or
            `hf:NAME[:CONFIG][@SPLIT]`.
        images (`str` or `Path`, *optional*): folder of the images; default: the folder of the file.
        limit (`int`, *optional*): use only so many of the first rows.

    Raises:
        DataError: the source does not exist, cannot be read or has no rows; on access, the row has a fault: "row N:
            field: got ..., expected ...", with rows counted from 1.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        return decode_row(*self._rows[index], self.source.folder)

    def sizes(self) -> list[tuple[int, int, int, int]]:
        """Width, height, number of regions and of characters of their captions or attributes of every row.

        An image is opened only if neither the row nor an RLE has its size.

        Raises:
            DataError: a row has a fault.
        """
        sizes = []
        for index in range(len(self)):
            number, raw = self._rows[index]
            row = sound_row(raw, number)
            size = row_size(row) or _open(row, number, self.source.folder).size
            sizes.append((*size, len(row["regions"]), sum(map(num_characters, row["regions"]))))
        return sizes

    def attributes(self, schema: AttributeSchema | None = None) -> dict[str, list[str]]:
        """Every attribute of the rows with its values as texts, in the order in which they occur first.

        Args:
            schema (`AttributeSchema`, *optional*): the choices that they may have; attributes that it lacks are left
                out.

        Raises:
            DataError: a row has a fault, or a value that is none of the choices.
        """
        found: dict[str, dict[str, None]] = {}
        for index in range(len(self)):
            number, raw = self._rows[index]
            for k, region in enumerate(sound_row(raw, number)["regions"]):
                for fault in schema_faults(region, f"regions[{k}]", number, schema) if schema else ():
                    if fault.kind == "attribute value":
                        raise RowError(fault)
                for name, value in known_attributes(region).items():
                    if schema is None or name in schema.attributes:
                        found.setdefault(name, {})[value] = None
        return {name: list(values) for name, values in found.items()}


class ChatDataset(_RowDataset):
    """Conversations about images, in the form that [`~pdlm_hf.training.PdlmCollator`] takes.

    Rows are LLaVA's `{"image": path or list (optional), "conversations": [{"from": "human" | "gpt", "value"}]}`, with
    `<image>` where an image belongs, or `{"images", "messages": [{"role", "content"}]}`.

    Args:
        source, images, limit: as in [`RegionDataset`], except COCO files.

    Raises:
        DataError: as in [`RegionDataset`].
    """

    def __init__(self, source: str | Path, images: str | Path | None = None, limit: int | None = None):
        if find_source(source, images).kind == "coco":
            raise DataError(f"{source}: expected a JSON list or JSONL of conversations.")
        super().__init__(source, images, limit)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, raw = self._rows[index]
        return decode_chat(number, raw, self.source.folder)

    def conversations(self) -> Iterator[tuple[list[tuple[int, int]], list[dict[str, Any]]]]:
        """Widths and heights of the images, and the messages, of every row; images are not decoded.

        Raises:
            DataError: a row has a fault.
        """
        for index in range(len(self)):
            number, raw = self._rows[index]
            paths, messages = chat_messages(number, raw)
            yield [_size_of(path, number, self.source.folder) for path in paths], messages


def stream_rows(source: str | Path, images: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """Read the rows of [`RegionDataset`] one after the other; only a COCO file is kept in memory.

    `datasets.IterableDataset.from_generator(stream_rows, gen_kwargs={"source": ...})` makes a table of them.

    Args:
        source, images: as in [`RegionDataset`].

    Raises:
        DataError: as in [`RegionDataset`], when the faulty row is reached.
    """
    found = find_source(source, images)
    for number, raw in raw_rows(found):
        yield decode_row(number, raw, found.folder)


def decode_row(number: int, raw: Any, folder: Path | None, captions: bool = True) -> dict[str, Any]:
    """Open the image and decode the masks of a row.

    Args:
        number (`int`): number of the row, from 1.
        raw: the row as it was read.
        folder (`Path`, *optional*): folder that relative paths start from.
        captions (`bool`): whether every region needs a caption or attributes.

    Returns:
        dict: `{"image": PIL.Image (RGB), "regions": [{"id", "mask": bool (H, W), "caption", "attributes"?}],
        "question"?}`, the caption None where there is none, the attributes as texts by name.

    Raises:
        RowError: the row has a fault: "row N: field: got ..., expected ...".
    """
    row = sound_row(raw, number, captions)
    image = _open(row, number, folder)
    if fault := size_fault(row, number, image.size):  # polygons and boxes would be in the wrong place
        raise RowError(fault)
    regions = []
    for k, region in enumerate(row["regions"]):
        try:
            parsed = parse_region(region, *image.size, k)
        except ValueError as error:
            fault = Fault(number, f"regions[{k}]", "mask", str(error).rstrip("."), "a mask inside the image")
            raise RowError(fault) from None
        own = {"attributes": values} if (values := known_attributes(region)) else {}
        regions.append({"id": parsed.id, "mask": parsed.mask, "caption": region.get("caption"), **own})
    return {"image": image, "regions": regions, **({"question": row["question"]} if "question" in row else {})}


def decode_chat(number: int, raw: Any, folder: Path | None) -> dict[str, Any]:
    """Open the images of a conversation and convert it into the form of messages.

    Args:
        number, raw, folder: as in [`decode_row`].

    Returns:
        dict: `{"images": [PIL.Image], "messages": [{"role", "content"}]}`

    Raises:
        RowError: as in [`decode_row`].
    """
    paths, messages = chat_messages(number, raw)
    return {"images": [_open({"image": path}, number, folder) for path in paths], "messages": messages}


def chat_messages(number: int, raw: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """Convert a conversation into paths of images and messages, without opening the images.

    Args:
        number, raw: as in [`decode_row`].

    Raises:
        RowError: as in [`decode_row`].
    """
    if isinstance(raw, RowError):
        raise raw

    def fail(field: str, got: Any, expected: str) -> RowError:
        return RowError(Fault(number, field, "conversation", f"{got!r:.60}", expected))

    if not isinstance(raw, dict):
        raise fail("row", raw, "an object with `conversations` or `messages`")
    name, role, text = ("messages", "role", "content") if raw.get("messages") else ("conversations", "from", "value")
    turns = raw.get(name)
    if not isinstance(turns, list) or not turns:
        raise fail(name, turns, "a list of turns")
    paths = raw.get("images") or raw.get("image") or []
    paths = paths if isinstance(paths, list) else [paths]
    for k, path in enumerate(paths):
        if not is_image(path):
            raise fail(f"{'images' if raw.get('images') else 'image'}[{k}]", path, "the path of an image")
    messages = []
    for k, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get(role), str) or turn[role] not in ROLES:
            raise fail(f"{name}[{k}]", turn, f"`{role}`, one of {', '.join(ROLES)}, and `{text}`")
        content = _content(turn.get(text), ROLES[turn[role]])
        if content is None:
            expected = "a text of whole characters, or a list of parts with `type`"
            raise fail(f"{name}[{k}].{text}", turn.get(text), expected)
        messages.append({"role": ROLES[turn[role]], "content": content})
    if messages[-1]["role"] != "assistant":
        raise fail(name, messages[-1]["role"], "an answer as the last turn")
    found = sum(part["type"] == "image" for message in messages for part in _parts(message))
    if not found and paths:  # without <image> the images come first, as is usual
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise fail(name, "no question", "a turn of the user")
        first["content"] = [{"type": "image"}] * len(paths) + first["content"]
    elif found != len(paths):
        raise fail(name, f"{found} times {IMAGE}", f"one for each of {len(paths)} images")
    return paths, messages


def _content(value: Any, role: str) -> Any:
    """Content of a message: a text for assistant and system, a list of parts for the user; None if it has a fault."""
    parts: list[dict[str, str] | None]
    if isinstance(value, list):
        parts = [_part(part) for part in value]
    elif is_text(value) and role == "user":
        parts = []
        for k, piece in enumerate(value.split(IMAGE)):
            parts += [{"type": "image"}] * (k > 0)
            parts += [{"type": "text", "text": piece.strip()}] * bool(piece.strip())
    else:
        parts = [_part(value)]
    sound = [part for part in parts if part is not None]
    if len(sound) < len(parts):
        return None
    if role == "user":
        return sound or None
    return "".join(part.get("text", "") for part in sound).strip() or None


def _part(value: Any) -> dict[str, str] | None:
    """A part of a message, text or image; None if it has a fault."""
    text = value.get("text") if isinstance(value, dict) else value
    if isinstance(value, dict) and value.get("type") == "image":
        return {"type": "image"}
    # a part without `type` is a text, if it has one
    is_part = not isinstance(value, dict) or value.get("type", "text") == "text"
    return {"type": "text", "text": str(text)} if is_part and is_text(text) else None


def _parts(message: dict) -> list[dict]:
    return message["content"] if isinstance(message["content"], list) else []


def _size_of(image: Any, number: int, folder: Path | None) -> tuple[int, int]:
    """Width and height of an image, of a file from its header."""
    if isinstance(image, str) and not image.startswith("data:"):
        try:
            return image_size(Path(folder or "", image))
        except ValueError as error:
            fault = Fault(number, "image", "image", str(error).rstrip("."), "an image that can be decoded")
            raise RowError(fault) from None
    return _open({"image": image}, number, folder).size


def _open(row: dict, number: int, folder: Path | None) -> Image.Image:
    try:
        return open_row_image(row["image"], folder)
    except ValueError as error:
        fault = Fault(number, "image", "image", str(error).rstrip("."), "an image that can be decoded")
        raise RowError(fault) from None


class _Rows:
    """Rows as they were read, with their numbers, by position."""

    def __init__(self, source: Source, limit: int | None):
        self.source = source
        self.table: Any = None
        self.places: list[tuple[int, int]] | None = None
        self.rows: list[tuple[int, Any]] | None = None
        if source.kind == "jsonl":
            self.places = self._find_lines(limit)
        elif source.kind in ("table", "hub"):
            self.table = open_table(source)
            if limit is not None:
                self.table = self.table.select(range(min(limit, len(self.table))))
        else:
            self.rows = []
            for number, row in raw_rows(source):
                if isinstance(row, RowError):
                    raise row
                if limit is not None and len(self.rows) == limit:
                    break
                self.rows.append((number, row))

    def _find_lines(self, limit: int | None) -> list[tuple[int, int]]:
        """Number of every row and its position in the file."""
        places: list[tuple[int, int]] = []
        position = 0
        with open(self.source.file, "rb") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(places) == limit:
                    break
                if line.strip():
                    places.append((number, position))
                position += len(line)
        return places

    def __len__(self) -> int:
        return len(self.rows if self.rows is not None else self.places if self.places is not None else self.table)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        if self.rows is not None:
            return self.rows[index]
        if self.places is None:
            return index % len(self) + 1, self.table[index]
        number, position = self.places[index]
        with open(
            self.source.file, "rb"
        ) as file:  # opened every time: workers of a data loader must not share a position
            file.seek(position)
            return number, parse_line(file.readline(), number)
