"""JSON files, files of rows, and the check of a resumed run."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.regions.files import (
    FileLock,
    append_rows,
    check_same_settings,
    load_json,
    move_lines,
    read_rows,
    write_json,
    write_json_lists,
)


def test_rows_are_added_all_or_none(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": "ü", "b": "\udcff"}])
    assert list(read_rows(path)) == [{"a": "ü", "b": "\udcff"}] and "ü".encode() in path.read_bytes()
    path.write_bytes(path.read_bytes() + b'{"a": 1')
    assert len(list(read_rows(path))) == 1 and not path.read_bytes().endswith(b"\n")
    assert len(list(read_rows(path, repair=True))) == 1 and path.read_bytes().endswith(b"\n")
    for line, message in ((b"[1]\n", "line 2 is not a JSON object"), (b"{]\n", "line 2 is damaged")):
        damaged = tmp_path / "damaged.jsonl"
        damaged.write_bytes(b'{"a": 1}\n' + line)
        with pytest.raises(ValueError, match=message):
            list(read_rows(damaged))


def test_json_is_written_in_one_piece(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_run_is_resumed_with_the_same_settings_only():
    settings = {"model": "a", "steps": 8, "schema": None}
    check_same_settings({"model": "a", "steps": 8}, settings, "out.jsonl")
    with pytest.raises(SettingError) as error:
        check_same_settings({"model": "a", "steps": 4, "seed": 1}, settings, "out.jsonl")
    assert str(error.value) == (
        "out.jsonl: was begun with other settings (seed was 1, now None, steps was 4, now 8). "
        "Use the same settings, or choose another file."
    )
    with pytest.raises(SettingError, match=r"model was None, now 'a'.* or choose another folder\."):
        check_same_settings([], settings, "run", "choose another folder")


def test_damaged_lines_are_named_and_the_rest_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [b'{"a": 1}', b"{]", b"[1]", b"[" * 100_000, b'{"a": "x"}', b'{"a": 2}', b"\xff", b"9" * 5000, b'{"a": 3}']
    path.write_bytes(b"\n".join(lines) + b"\n")
    damaged = {}
    check = lambda row: None if isinstance(row["a"], int) else f"has {row['a']!r} as `a`"  # noqa: E731
    rows = list(read_rows(path, check=check, damaged=damaged.__setitem__))
    assert rows == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert sorted(damaged) == [2, 3, 4, 5, 7, 8]
    assert damaged[3] == "is not a JSON object" and damaged[5] == "has 'x' as `a`"
    assert damaged[2].startswith("is damaged (Expecting property name") and "recursion" in damaged[4]
    with pytest.raises(DataError, match="rows.jsonl: line 2 is damaged .*; mend or delete this line"):
        list(read_rows(path))
    move_lines(path, damaged, tmp_path / "aside.jsonl")
    assert list(read_rows(path)) == rows
    assert (tmp_path / "aside.jsonl").read_bytes().splitlines() == [lines[k - 1] for k in sorted(damaged)]


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a": '])
def test_json_that_cannot_be_read(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="a.json: not valid JSON, perhaps cut short"):
        load_json(tmp_path / "a.json")


def test_lists_are_written_as_they_come(tmp_path):
    path, seen = tmp_path / "a.json", []

    def entries():
        for k in range(3):
            seen.append((k, (tmp_path / "a.json.part").exists()))
            yield {"k": k, "name": "ü\udcff"}

    write_json_lists(path, {"info": {"a": [1]}, "none": [], "entries": entries(), "after": (k for k, _ in seen)})
    assert json.loads(path.read_text()) == {
        "info": {"a": [1]},
        "none": [],
        "entries": [{"k": k, "name": "ü\udcff"} for k in range(3)],
        "after": [0, 1, 2],
    }
    assert seen == [(0, True), (1, True), (2, True)]
    write_json_lists(path, {})
    assert json.loads(path.read_text()) == {}
    with pytest.raises(TypeError):
        write_json_lists(path, {"a": iter([1, object()])})
    assert json.loads(path.read_text()) == {} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_lock_has_one_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/pdlm-eval", "paradlc", "caption", "--key", "secret"])
    path = tmp_path / "new" / "out.lock"
    lock = FileLock(path, "out.jsonl")
    assert lock.died is None
    with pytest.raises(SettingError) as error:
        FileLock(path, "out.jsonl", "choose another folder")
    holder = f"out.jsonl: process {os.getpid()} on {socket.gethostname()}, since "
    assert str(error.value).startswith(holder)
    end = " (pdlm-eval paradlc caption), is writing it. Wait until that run has ended, or choose another folder."
    assert str(error.value).endswith(end)
    lock.release()
    lock.release()
    assert lock.released and not path.parent.exists()
    FileLock(path, "out.jsonl").release()


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "out.lock"
    code = (
        f"import os, pathlib, time; from pdlm_hf.regions.files import FileLock\n"
        f"lock = FileLock(pathlib.Path({str(path)!r}), 'out'); worker = os.fork()\n"
        f"worker or print('held', flush=True); time.sleep(60 if worker else 10)"  # the worker lives on
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(SettingError, match=f"process {child.pid} on "):
        FileLock(path, "out")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    taken = path.stat().st_mtime
    lock = FileLock(path, "out")
    assert lock.died == taken
    lock.release()
    assert not path.exists()
