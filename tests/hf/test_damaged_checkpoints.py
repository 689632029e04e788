"""A damaged checkpoint is one line that names the file, wherever it is loaded."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import pdlm_hf
from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import CheckpointError, SettingError
from pdlm_hf.prompts_pdlm import CHAT_TEMPLATE

SLOW_TEMPLATE = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TWICE = "{% set ns = namespace(x='ab') %}{% for i in range(90) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
DAMAGED = {
    "a text as a size": ("config.json", lambda c: c["text_config"].update(hidden_size="128")),
    "a list as a token": ("config.json", lambda c: c.update(bos_token_id=[])),
    "a token beyond the vocabulary": ("config.json", lambda c: c.update(eot_token_id=512)),
    "another size than the weights": ("config.json", lambda c: c["text_config"].update(hidden_size=256)),
    "more layers than the weights": ("config.json", lambda c: c["text_config"].update(num_hidden_layers=5)),
    "a million layers": ("config.json", lambda c: c["text_config"].update(num_hidden_layers=10**6)),
    "another model": ("config.json", '{"model_type": "llama"}'),
    "no model": ("config.json", "[]"),
    "config cut short": ("config.json", '{"model_type": "pdm'),
    "config nested deeply": ("config.json", "[" * 100_000),
    "no config": ("config.json", None),
    "no weights": ("model.safetensors", None),
    "weights cut short": ("model.safetensors", "cut"),
    "no tokenizer": ("tokenizer.json", None),
    "tokenizer cut short": ("tokenizer.json", '{"version": "1.0", "trunc'),
    "a wrong tokenizer": ("tokenizer.json", lambda c: c.update(model={"type": "BPE", "vocab": {}, "merges": []})),
    "special tokens as numbers": ("tokenizer_config.json", lambda c: c.update(bos_token=5)),
    "a setting that is not possible": ("generation_config.json", lambda c: c.update(max_new_tokens=[])),
    "settings cut short": ("generation_config.json", "{"),
    "settings as a list": ("generation_config.json", "[]"),
    "a mean of two": ("processor_config.json", lambda c: c["image_processor"].update(image_mean=[0.5, 0.5])),
    "a deviation of null": (
        "processor_config.json",
        lambda c: c["image_processor"].update(image_std=[0.5, None, 0.5]),
    ),
    "no settings of images": ("processor_config.json", "{}"),
    "patches of no size": ("processor_config.json", lambda c: c["image_processor"].update(patch_size=0)),
    "tokens of another model": ("processor_config.json", lambda c: c.update(tokens_per_tile=256)),
    "tokens as text": ("processor_config.json", lambda c: c.update(tokens_per_region="16")),
    "a template that does not end": ("chat_template.jinja", SLOW_TEMPLATE),
    "a template of a gigabyte": ("chat_template.jinja", "{{ 'x' * 10**9 }}"),
    "a template that doubles": ("chat_template.jinja", TWICE),
    "a template that calls itself": ("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "a template that is none": ("chat_template.jinja", "{% for %}"),
}


def damaged_copy(tmp_path, file, change, checkpoint=pdlm_hf.CHECKPOINT):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    if change is None:
        (folder / file).unlink()
    elif isinstance(change, str):
        (folder / file).write_text(change)
    else:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("file, change", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_checkpoint_is_one_line_with_the_name_of_the_file(tmp_path, file, change):
    folder = damaged_copy(tmp_path, file, change)
    with pytest.raises(CheckpointError) as caught:
        pdlm_hf.RegionCaptioner.from_pretrained(folder)
    message = str(caught.value)
    named = "weights" if file == "model.safetensors" else file
    assert str(folder) in message and named in message and "\n" not in message, message


@pytest.mark.parametrize("name", ["a list as a token", "settings as a list", "tokenizer cut short"])
def test_the_commands_say_the_same_in_one_line(tmp_path, name):
    file, change = DAMAGED[name]
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    folder = str(damaged_copy(tmp_path, file, change, pdlm_hf.BASE_CHECKPOINT))
    for command in (["chat", str(image), "What?"], ["caption", str(image), "--box", "1,1,4,4"]):
        done = CliRunner().invoke(app, [*command, "--model", folder])
        assert done.exit_code == 2 and file in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_transformers_says_nothing_beside_it(tmp_path):
    """In a process of its own: transformers' log has the stream of the first moment."""
    folder = damaged_copy(tmp_path, *DAMAGED["more layers than the weights"])
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    command = [sys.executable, "-m", "pdlm_hf.cli.main", "caption", tmp_path / "image.png", "--box", "1,1,4,4"]
    done = subprocess.run([*command, "--model", folder], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "9 weights that config.json asks for are missing" in done.stderr


@pytest.mark.parametrize(
    "name", ["a text as a size", "settings cut short", "tokenizer cut short", "a list as a token"]
)
def test_transformers_auto_classes_name_the_file_too(tmp_path, name):
    file, change = DAMAGED[name]
    folder = damaged_copy(tmp_path, file, change)
    with pytest.raises(CheckpointError, match=re.escape(file)):
        AutoProcessor.from_pretrained(folder)
        AutoModelForImageTextToText.from_pretrained(folder)


def test_another_template_of_the_same_kind_works(tmp_path):
    folder = damaged_copy(tmp_path, "chat_template.jinja", CHAT_TEMPLATE + "{# ours, with a comment #}")
    pair = Image.new("RGB", (64, 64)), [[8, 8, 40, 40]]
    found, expected = (
        pdlm_hf.RegionCaptioner.from_pretrained(source).caption(*pair)[0] for source in (folder, pdlm_hf.CHECKPOINT)
    )
    assert found.token_ids == expected.token_ids and found.text == expected.text


def test_a_template_of_a_call_is_bounded_and_debuggers_go_on():
    processor = AutoProcessor.from_pretrained(pdlm_hf.CHECKPOINT)
    seen = []
    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: seen.append(event))
    try:
        ours = sys.gettrace()
        with pytest.raises(SettingError, match="more than 5 seconds"):
            processor.apply_chat_template([{"role": "user", "content": "x"}], chat_template=SLOW_TEMPLATE)
        assert sys.gettrace() is ours and seen
    finally:
        sys.settrace(before)
