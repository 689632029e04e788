"""The parts of `make test-newest` that are not pip or pytest. Run by the Python of its environment.

python tools/newest.py requirements              # what the installed wheel asks for, without upper bounds
python tools/newest.py record REPORT.xml OUT     # the result in pytest's JUnit report, as JSON
"""

import json
import platform
import re
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

NAME = "perceptiondlm"
LINE = re.compile(r"(?P<name>[\w.-]+)(\[(?P<extras>[\w,.-]+)\])?(?P<bounds>[^;]*)(; (?P<marker>.*))?")


def without_upper_bounds(lines: list[str], extra: str) -> dict[str, str]:
    """Map the packages that a distribution needs with one of its extras to requirements with lower bounds only.

    Args:
        lines: the distribution's `Requires-Dist`; its own extras in them are resolved.
        extra: name of the extra.
    """
    found = {}
    for line in lines:
        parts = LINE.fullmatch(line)
        of_extra = re.search(r"extra == ['\"](\w+)['\"]", parts["marker"] or "")
        if of_extra and of_extra[1] != extra:
            continue
        if parts["name"] == NAME:
            for other in parts["extras"].split(","):
                found |= without_upper_bounds(lines, other)
        else:
            bounds = [bound for bound in parts["bounds"].strip().split(",") if bound.startswith(">")]
            extras = f"[{parts['extras']}]" if parts["extras"] else ""
            found[parts["name"]] = f"{parts['name']}{extras}{','.join(bounds)}"
    return found


def result(report: Path, packages: list[str], version_of: Callable[[str], str] = metadata.version) -> dict:
    """Summarise the results of the tests.

    Args:
        report: JUnit XML of pytest.
        packages: names of the packages whose versions are recorded.
        version_of: returns the version of a package.
    """
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in sorted(packages)},
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


if __name__ == "__main__":
    wanted = without_upper_bounds(metadata.requires(NAME), "test")
    if sys.argv[1] == "requirements":
        print("\n".join(wanted.values()))
    else:
        found = result(Path(sys.argv[2]), list(wanted))
        Path(sys.argv[3]).write_text(json.dumps(found, indent=1) + "\n")
