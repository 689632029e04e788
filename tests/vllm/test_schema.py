"""The region routes against their own description: requests that schemathesis makes of openapi.json."""

import subprocess
import sys
from pathlib import Path

import pytest
from hostile import CHAT, REGIONS

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
def test_answers_are_as_described(server):
    """Whatever fits the description, and whatever does not, gets an answer that the description knows."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", server.url + "/openapi.json"]
    command += ["--include-path", REGIONS, "--include-path", CHAT, "--checks", CHECKS, "--mode", "all"]
    command += ["--max-examples", "200", "--seed", "1", "--request-timeout", "120", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
