"""The built wheel, where it is what is installed (`make test-wheel`)."""

from pathlib import Path

import pdlm_hf

if Path(pdlm_hf.__file__).is_relative_to(Path(__file__).parents[2]):
    collect_ignore = ["test_wheel.py"]
