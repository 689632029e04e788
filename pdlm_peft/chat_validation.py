"""Validation of conversations (LLaVA's format) before training."""

from typing import Any

from pdlm_hf.errors_pdlm import DataError

from .data import chat_messages
from .rows import Fault, RowError, open_row_image
from .sources import Source
from .validation import Report, image_fault, readable_rows, spread


def validate_chat(
    source: Source, processor: Any, open_images: bool = True, max_answer_tokens: int | None = 512
) -> Report:
    """Check all conversations: the first fault in the form of each, and all faults of its images and answers.

    Args:
        source ([`~sources.Source`]): where the conversations are.
        processor (`PdlmProcessor`): tokenizes answers.
        open_images (`bool`): decode every image.
        max_answer_tokens (`int`, *optional*): a longer answer is a fault.

    Raises:
        DataError: the source as a whole cannot be read, or is a COCO file.
    """
    if source.kind == "coco":
        raise DataError(f"{source.name}: expected a JSON list or JSONL of conversations.")
    faults: list[Fault] = []
    rows, images, turns, lengths = 0, [], [], []
    for number, raw in readable_rows(source):
        rows += 1
        try:
            paths, messages = chat_messages(number, raw)
        except RowError as error:
            faults.append(error.fault)
            continue
        images.append(len(paths))
        turns.append(len(messages))
        faults += _image_faults(paths, number, source) if open_images else []
        for k, message in enumerate(messages):
            texts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
            for text in (part["text"] for part in texts if "text" in part):
                field = f"messages[{k}]"
                try:
                    processor.refuse_specials(text, "the text")
                except ValueError as error:
                    faults.append(Fault(number, field, "special tokens", str(error), "text"))
            if message["role"] == "assistant":
                lengths.append(len(processor.tokenizer(message["content"], add_special_tokens=False)["input_ids"]))
                if max_answer_tokens is not None and lengths[-1] > max_answer_tokens:
                    got, most = f"{lengths[-1]} tokens", f"at most {max_answer_tokens}"
                    faults.append(Fault(number, field, "long answer", got, most))
    if not rows:
        faults.append(Fault(1, "file", "no rows", "no rows", "at least one"))
    summary = {
        "rows": rows,
        "images": sum(images),
        "images_per_row": spread(images),
        "turns": spread(turns),
        "answer_tokens": spread(lengths),
        "images_opened": open_images,
    }
    return Report(faults, summary)


def _image_faults(paths: list[Any], number: int, source: Source) -> list[Fault]:
    faults = []
    for path in paths:
        try:
            open_row_image(path, source.folder)
        except ValueError as error:
            faults.append(image_fault(number, error))
    return faults
