"""docs/fine-tuning.md: its walk, in miniature; its recipes and keys exist."""

import json
import re
import shutil

import pytest
from drawn import as_coco, drawn_rows
from pages import DOCS, Page
from small import SMALL

from pdlm_hf import CHECKPOINT
from pdlm_peft.recipe import known_keys, load_recipe, recipe_names

TEXT = (DOCS / "fine-tuning.md").read_text(encoding="utf-8")
ELSEWHERE = {
    "vllm serve": "tests/vllm/test_offline.py::test_a_merged_adapter_is_a_checkpoint_like_any_other: needs vLLM",
    "curl": "tests/vllm/test_server.py::test_requests_of_the_pages: needs vLLM",
    "torchrun": "tests/peft/test_ranks.py::test_two_processes_are_one_with_twice_the_batch: two processes",
    "mkdir careful": "tests/peft/test_commit.py::test_commit_in_miniature: the history of the repository",
    "accelerate": "tests/peft/test_recipe.py::test_accelerate_reads_its_configuration: four GPUs",
}


def test_the_walk(here):
    shutil.copytree(CHECKPOINT, here / "careful")
    rows, images = drawn_rows(here / "photos", 3)
    (here / "regions.json").write_text(json.dumps(as_coco(rows, images)))
    for name in ("unlabelled", "unlabelled_held_out"):
        found = [{**row, "regions": [{**r, "caption": None} for r in row["regions"]]} for row in rows]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))

    def change(text):
        text = text.replace("MODEL", str(CHECKPOINT))
        if text.startswith("pdlm-peft commit"):
            text += " commit.scenes=2 commit.rules='[{acceptance_threshold: 0.9}]'"
            text += "" if "shapes" in text else " training.bf16=false"
        return " ".join([text, *SMALL]) if re.match("pdlm-peft (train (?!--list)|commit)", text) else text

    ran = Page("fine-tuning.md", ELSEWHERE).run(change)
    gains = [r.stdout for r in ran if re.match("pdlm-peft commit (?!.*--dry-run)", r.command)]
    assert len(gains) == 2 and all(
        re.search(r"forward passes [\d.]+ -> [\d.]+, right captions", text) for text in gains
    )
    assert "lora_8b_80gb" in next(r.stdout for r in ran if "--list" in r.command)
    assert [r.command.split("\n")[0] for r in ran if r.command.startswith(("import", "from"))] == [
        "import pdlm_hf",
        "from peft import PeftModel",
        "from pdlm_peft import estimate_recipe, load_recipe",
    ]


def test_every_command_names_a_recipe_and_known_keys():
    commands = re.findall(r"(?:pdlm-peft|pdlm_peft\.cli) (?:train|commit) (\w+)((?: [\w.]+=\S+)*)", TEXT)
    assert len(commands) >= 5
    for name, overrides in commands:
        load_recipe(name, overrides.split())


def test_the_table_has_every_recipe():
    table = TEXT.split("## Recipes")[1].split("## Before")[0]
    assert set(recipe_names()) <= set(re.findall(r"`(\w+)`", table))


@pytest.mark.parametrize("key", re.findall(r"`((?:data|adapter|commit|samples|hardware|switches)\.\w+)`", TEXT))
def test_keys_exist(key):
    assert key in known_keys()
