"""The text of a prompt: special tokens, the chat template, and what stands in for images and regions."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .errors_pdlm import SettingError

DEFAULT_QUESTION = "Describe each masked region in detail."
IMAGE, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
REGION, CAPTION = "<|reserved_token_{}|>", "<|Mask_Cap_{}|>"
HEADER, HEADER_END, END_OF_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
MASK = "<|mdm_mask|>"

# The reference formats a conversation in two ways: for training and region captions (`training=True`: a system turn, a
# newline after every turn of user and system, nothing behind the image) and for chat (docs/quirks.md#q23).
# `generation` marks what the model writes, an answer with its end of turn, for `return_assistant_tokens_mask`.
CHAT_TEMPLATE = """\
{%- set training = training | default(false) -%}
{%- if training and messages[0]['role'] != 'system' -%}
{{- '<|start_header_id|>system<|end_header_id|>\\nYou are a helpful assistant.<|eot_id|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' -}}
{%- set turn -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<img><IMG_CONTEXT></img>' + ('' if training else '\\n') -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endset -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- turn -}}{%- endgeneration -%}
{%- else -%}
{{- turn + ('\\n' if training else '') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n' -}}
{%- endif -%}
"""


RENDERING_SECONDS = 5.0
RENDERED_LENGTH = 1_000_000  # characters of a text that a template makes
_TOO_LARGE = re.compile(r"\*|\d{7}")


@contextmanager
def bounded_rendering(template: Any) -> Iterator[None]:
    """Bound the work of a chat template, which is a program that a checkpoint brings along.

    transformers renders it without access to the machine, and without limits. Here every line of it is followed by a
    look at the clock and at the lengths of its texts. A single line cannot be interrupted, so that multiplication and
    large numbers are refused; a filter that is written to exhaust the memory is not recognised. Our own template,
    which only loops over the conversation, is rendered as it is. While another one is rendered, a debugger of the same
    thread is paused.

    Raises:
        SettingError: the template takes longer than `RENDERING_SECONDS`, makes a text longer than `RENDERED_LENGTH`,
            calls itself without end, or has an expression with a multiplication or a number of seven digits.
    """
    if template in (None, CHAT_TEMPLATE):
        yield
        return
    for part in re.findall(r"\{[{%].*?[}%]\}", str(template), re.DOTALL):
        if _TOO_LARGE.search(part):
            raise SettingError(f"The chat template may not multiply or hold large numbers: {part:.60}")
    end = time.monotonic() + RENDERING_SECONDS

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None
        if time.monotonic() > end or any(map(_is_long, frame.f_locals.values())):
            raise SettingError(
                f"The chat template was stopped: it takes more than {RENDERING_SECONDS:.0f} seconds, or makes a text "
                f"of more than {RENDERED_LENGTH} characters."
            )
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    except RecursionError:
        raise SettingError("The chat template calls itself without end.") from None
    finally:
        sys.settrace(before)


def _is_long(value: Any) -> bool:
    """Whether a variable of a template, or an attribute of its `namespace`, is a long text."""
    if type(value).__name__.endswith("Namespace"):
        return any(map(_is_long, value._Namespace__attrs.values()))
    return isinstance(value, str) and len(value) > RENDERED_LENGTH


def repeat_image_tokens(prompt: str, tiles: list[int], tokens_per_tile: int) -> tuple[str, list[dict[str, Any]]]:
    """Repeat every image placeholder for its tiles.

    Args:
        prompt (`str`): with one placeholder per image.
        tiles (`list[int]`): of every image.
        tokens_per_tile (`int`)

    Returns:
        the text, and for every placeholder the characters it takes before ("span") and after ("new_span").
    """
    first, *parts = prompt.split(IMAGE)
    text, start, replaced = first, len(first), []
    for count, part in zip(tiles, parts, strict=True):
        new = IMAGE * (tokens_per_tile * count)
        spans = {"span": (start, start + len(IMAGE)), "new_span": (len(text), len(text) + len(new))}
        replaced.append({"type": "image", "replacement": new} | spans)
        text, start = text + new + part, start + len(IMAGE) + len(part)
    return text, replaced


def question_of(prompt: str) -> str | None:
    """The question in a prompt that `apply_chat_template` made; None if it has none.

    Raises:
        SettingError: not one turn of the user about one image, which is all that regions can be described in.
    """
    user = f"{HEADER}user{HEADER_END}\n"
    if prompt.count(HEADER) != 1 + prompt.endswith(f"{HEADER}assistant{HEADER_END}\n") or not prompt.startswith(user):
        raise SettingError(
            "Regions are described in one turn: with `segmentation_maps` give one message of the user, with one image "
            "and the question, and no system message."
        )
    image = f"{IMAGE_START}{IMAGE}{IMAGE_END}"
    return prompt.removeprefix(user).partition(END_OF_TURN)[0].replace(image, "", 1).strip("\n") or None
