"""Write constraints/*.txt: the exact version of every package in the environments that `make test` has tested.

python tools/constraints.py           # all five; `make constraints` tests new environments first
python tools/constraints.py core      # one of them
"""

import json
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("core", "formats", "lmms", "oldest", "vllm")
ENVIRONMENTS = {name: ".venv" if name == "core" else f".venv-{name}" for name in NAMES}
# The project itself, the installer, and packages that only a torch built for GPUs installs.
LEFT_OUT = re.compile("perceptiondlm|pip|triton|nvidia-.*|cuda-.*", re.IGNORECASE)


def constraints(packages: list[dict], today: str) -> str:
    """Make the text of a constraints file.

    Args:
        packages: the parsed output of `pip list --format json`.
        today: the date in the first line.
    """
    kept = [package for package in packages if not LEFT_OUT.fullmatch(package["name"])]
    # without the local part: ==2.13.0 takes 2.13.0+cpu too
    lines = [f"{package['name']}=={package['version'].partition('+')[0]}" for package in kept]
    head = f"# {today}, Python {platform.python_version()}: the tests passed with these; made by `make constraints`"
    return "\n".join([head, *sorted(lines, key=str.lower), ""])


def installed(environment: Path) -> list[dict]:
    """List the packages of a virtual environment.

    Raises:
        FileNotFoundError: the environment does not exist.
    """
    listed = [str(environment / "bin" / "python"), "-m", "pip", "list", "--format", "json"]
    return json.loads(subprocess.run(listed, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    for name in sys.argv[1:] or ENVIRONMENTS:
        text = constraints(installed(ROOT / ENVIRONMENTS[name]), datetime.now(timezone.utc).date().isoformat())
        (ROOT / "constraints" / f"{name}.txt").write_text(text)
        print(f"constraints/{name}.txt: {text.count('==')} packages")
