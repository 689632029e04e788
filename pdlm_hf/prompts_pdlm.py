"""The text of a prompt: special tokens, the chat template, and what stands in for images and regions."""

from typing import Any

from .errors_pdlm import SettingError

DEFAULT_QUESTION = "Describe each masked region in detail."
IMAGE, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
REGION, CAPTION = "<|reserved_token_{}|>", "<|Mask_Cap_{}|>"
HEADER, HEADER_END, END_OF_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"

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
