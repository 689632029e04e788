"""JSON files, files of rows, and the check of a resumed run."""

import json

import pytest

from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.files import append_rows, check_same_settings, read_rows, write_json


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
