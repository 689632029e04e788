"""What `import pdlm_peft` gives, and when its libraries are imported."""

import importlib
import os
import subprocess
import sys

import pytest

import pdlm_peft


@pytest.mark.parametrize("name", pdlm_peft.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(pdlm_peft, name)
    assert isinstance(value, str) or value.__doc__


def test_names_of_the_face_are_not_names_of_files():
    """Python would put the module in the place of the function as soon as somebody imports it."""
    for name in pdlm_peft.__all__:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"pdlm_peft.{name}")


@pytest.mark.parametrize("code", ["import pdlm_peft", "import pdlm_peft.cli; pdlm_peft.cli.app(['--help'])"])
def test_libraries_are_imported_on_first_use(code):
    check = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert not {"torch", "transformers", "peft", "numpy", "pydantic"} & set(result.stdout.split())
