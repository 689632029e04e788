"""What stands around the packages: constraints, workflows, issue forms, versions, the citation."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

import pdlm_evalkit.cli
import pdlm_hf.cli.main
import pdlm_peft.cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
USED = ["demo", "eval", "peft", "ray", "viz"]
EXTRAS = {"core": USED, "oldest": USED, "vllm": ["vllm", "peft"], "lmms": ["lmms", "eval"]}  # what each installs
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def pins(path: Path) -> dict[str, Version]:
    """Name -> version. Every line but the first must be NAME==VERSION."""
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in path.read_text().splitlines()[1:]]
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


def bounds(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    optional = PROJECT["optional-dependencies"]
    return [Requirement(line) for lines in (PROJECT["dependencies"], *map(optional.get, extras)) for line in lines]


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_are_within_the_bounds(path):
    assert re.match(r"# \d{4}-\d\d-\d\d, Python 3\.11\.\d+: ", path.read_text())
    found = pins(path)
    assert len(found) > 50 and not {"perceptiondlm", "pip", "triton"} & set(found)
    assert not [name for name in found if name.startswith(("nvidia-", "cuda-"))]
    if path.stem == "formats":
        return  # the project is not in that environment
    asked = [requirement for requirement in bounds(*EXTRAS[path.stem]) if requirement.name in found]
    assert {"torch", "transformers", "pillow"} <= {requirement.name for requirement in asked}
    assert not [str(requirement) for requirement in asked if found[requirement.name] not in requirement.specifier]


def test_constraints_are_those_of_the_makefile():
    assert [path.stem for path in CONSTRAINTS] == ["core", "formats", "lmms", "oldest", "vllm"]
    for path in CONSTRAINTS:
        assert f"$(call install,{path.stem})" in MAKEFILE
        assert re.search(rf"^\S+: (pyproject.toml )?constraints/{path.name}", MAKEFILE, re.MULTILINE)
    _, formats, _, oldest, vllm = ([path] for path in CONSTRAINTS)
    for name, files in {"TORCH": CONSTRAINTS, "FORMATS": formats, "OLDEST": oldest, "VLLM": vllm}.items():
        for line in re.search(rf"^{name} \?= (.+)$", MAKEFILE, re.MULTILINE)[1].split():
            requirement = Requirement(line)
            assert all(pins(path)[requirement.name] in requirement.specifier for path in files), line


def test_the_oldest_versions_are_the_lower_bounds():
    asked = {requirement.name: requirement.specifier for requirement in bounds()}
    for line in re.search(r"^OLDEST \?= (.+)$", MAKEFILE, re.MULTILINE)[1].split():
        name, version = line.split("==")
        assert version.startswith(next(s.version for s in asked[name] if s.operator == ">=")), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read_and_call_what_the_makefile_has(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["name"] == path.stem and workflow[True]  # YAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        assert job["runs-on"] == "ubuntu-latest" and job["timeout-minutes"] <= 60
        assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {})
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
                assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
            assert re.fullmatch(r"(actions|pypa)/[\w-]+@[\w/.]+", step.get("uses", "actions/checkout@v6"))


def test_the_workflows_are_there():
    assert [path.stem for path in WORKFLOWS] == ["docs", "newest", "release", "test"]
    newest, release = (yaml.safe_load(WORKFLOWS[k].read_text(encoding="utf-8")) for k in (1, 2))
    assert newest[True]["schedule"][0]["cron"].split()[4] == "1"
    assert release[True] == {"release": {"types": ["published"]}} and release["jobs"]["publish"]["needs"] == "build"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(form) == {"name", "description", "labels", "body"}
    assert len({field["id"] for field in form["body"]}) == len(form["body"]) > 0
    for field in form["body"]:
        assert field["type"] in ("textarea", "input") and field["attributes"]["label"]


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert len(paper["authors"]) == 11 and paper["url"].endswith("2606.19534")


def test_there_is_one_version():
    """Read from `pdlm_hf.__version__` by the build, the citation has none of its own."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert PROJECT["dynamic"] == ["version"] and '[tool.hatch.version]\npath = "pdlm_hf/__init__.py"' in text
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("program", "module"), [("pdlm", pdlm_hf.cli.main), ("pdlm-eval", pdlm_evalkit.cli), ("pdlm-peft", pdlm_peft.cli)]
)
def test_commands_say_their_version(program, module):
    result = CliRunner().invoke(module.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{program} {pdlm_hf.__version__}\n")
