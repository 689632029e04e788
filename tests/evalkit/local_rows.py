"""Small tables in the form of VLMEvalKit."""

import base64
import csv
import io
from pathlib import Path

from PIL import Image

from pdlm_hf.shapes.evaluate_base import held_out_question


def image_bytes(kind: str = "PNG") -> bytes:
    """An image that does not compress well, the same at every call."""
    image, buffer = Image.new("L", (48, 40)), io.BytesIO()
    image.putdata([(k * k * 7919) % 251 for k in range(48 * 40)])
    image.convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def cell(data: bytes) -> str:
    return base64.b64encode(data).decode()


def rows() -> list[dict[str, str]]:
    """One image, the same image again, a JPEG, and two images."""
    png, jpeg = cell(image_bytes()), cell(image_bytes("JPEG"))
    return [
        {"index": str(k), "image": image, "question": '"How\nmany?"', "A": "7", "B": "8", "answer": "A"}
        for k, image in enumerate((png, "0", jpeg, str([png, jpeg])))
    ]


def table(content: list[dict[str, str]]) -> str:
    lines = ["\t".join(content[0]), *("\t".join(row.values()) for row in content)]
    return "\n".join(lines) + "\n"


def put_data(folder: Path, name: str, text: str | None = None) -> Path:
    """Write a table; default: [`rows`]."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.tsv"
    path.write_text(table(rows()) if text is None else text)
    return path


def write_shapes_table(folder: Path, rows: int) -> None:
    """Write a multiple-choice data set of drawn shapes, in VLMEvalKit's form, under a name of the paper's."""
    with (folder / "MMStar_shapes.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["index", "image", "question", *"ABCD", "answer", "category"], delimiter="\t")
        writer.writeheader()
        for index in range(rows):
            image, question = held_out_question(11, index, "choice")
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            text, *options, _ = question.text.split("\n")
            row = {"index": index, "question": text, "answer": question.answer, "category": "shapes"}
            writer.writerow(row | {"image": cell(buffer.getvalue())} | {option[0]: option[3:] for option in options})
