"""Every command of the walk that runs on a CPU runs, in miniature; the others parse."""

import os
import re
import shlex

import pytest
from small import ROOT, SMALL, run
from typer.testing import CliRunner

from pdlm_peft.cli import app
from pdlm_peft.recipe import load_recipe, names

TEXT = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
WALK = re.search(r"<!-- run -->\n```\n(.*?)```", TEXT, re.DOTALL)[1].splitlines()


def test_the_walk(tmp_path):
    assert len(WALK) == 4
    for line in WALK:
        program, *arguments = shlex.split(line.replace("runs/", f"{tmp_path}/"))
        if program == "pdlm":
            result = run(["-m", "pdlm_hf.app.cli", *arguments])
            assert result.returncode == 0 and result.stdout.strip(), line + result.stderr
            continue
        small = SMALL if arguments[0] == "train" else []
        found = CliRunner().invoke(app, [*arguments, *small], env=dict(os.environ))
        assert found.exit_code == 0, line + found.stderr


def test_every_command_names_a_recipe_and_known_keys():
    commands = re.findall(r"(?:pdlm-peft|pdlm_peft\.cli) train (\w+)((?: [\w.]+=\S+)*)", TEXT)
    assert len(commands) >= 5
    for name, overrides in commands:
        load_recipe(name, overrides.split())


def test_the_table_has_every_recipe():
    table = TEXT.split("## Recipes")[1].split("## Before")[0]
    assert set(names()) <= set(re.findall(r"`(\w+)`", table))


@pytest.mark.parametrize("key", re.findall(r"`((?:data|adapter|samples|hardware|switches)\.\w+)`", TEXT))
def test_keys_exist(key):
    from pdlm_peft.recipe import known_keys

    assert key in known_keys()
