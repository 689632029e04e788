"""pdlm batch --engine ray: what the local engine writes, from any storage, also when a machine is lost half way."""

import json
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from local_server import LocalServer
from test_batch import change, faults_of, write_coco
from typer.testing import CliRunner

from pdlm_hf.batch.dataset import open_data
from pdlm_hf.batch.run import BatchFiles, run_batch
from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import ServerError
from pdlm_hf.regions.files import read_rows

# Before Ray is imported: everything on 127.0.0.1, nothing told to anybody, no log of what is killed on purpose.
os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal")
ray = pytest.importorskip("ray")
pa, fs = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.fs")

ROOT = Path(__file__).parents[2]
SETTINGS = {"max_new_tokens": 6, "max_denoising_steps": 4}
OPTIONS = ["--batch-size", "2", "--max-new-tokens", "6", "--steps", "4"]


@contextmanager
def cluster(monkeypatch, nodes=2, gpus=0):
    """So many machines of one CPU each, and GPUs that Ray believes in, all on this one; gives what ends one."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # what the workers import
    size = {"num_cpus": 1, "num_gpus": gpus, "object_store_memory": 100_000_000, "include_dashboard": False}
    notice = {"health_check_period_ms": 1000, "health_check_failure_threshold": 4}  # that a machine is lost
    head = {**size, "node_ip_address": "127.0.0.1", "_system_config": notice}
    machines = Cluster(initialize_head=True, head_node_args=head)
    try:
        added = [machines.add_node(**size) for _ in range(nodes - 1)]
        monkeypatch.setenv("RAY_ADDRESS", machines.address)
        yield SimpleNamespace(kill=lambda: machines.remove_node(added.pop(), allow_graceful=False))
    finally:
        ray.shutdown()
        machines.shutdown()


def batch(folder, out, *options, images=None, data="coco.json", code=0):
    where = [str(folder / data), "--images", str(images or folder / "images"), "--out", str(folder / out)]
    settings = OPTIONS[:2] if "--schema" in options else OPTIONS  # the others are for captions
    result = CliRunner().invoke(app, ["batch", *where, *settings, *options])
    assert code in (None, result.exit_code), (result.output, result.stderr, result.exception)
    return {(row["image_id"], row["annotation_id"]): row for row in read_rows(folder / out)}, result


def assert_the_same(rows, expected):
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        assert row["score"] == pytest.approx(expected[key]["score"], abs=2e-4)  # other images share the batch
        assert {**row, "score": 0} == {**expected[key], "score": 0}


def damage(folder):
    """An image that is none, one that is not there, a damaged mask."""
    (folder / "images" / "1.png").write_bytes(b"no image")
    (folder / "images" / "3.png").unlink()
    change(folder, lambda data: data["annotations"][0]["segmentation"].update(counts="x"))


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_as_the_local_engine(tmp_path, monkeypatch, nodes):
    """With one captioner on the GPU of every machine, images by URL, bad files, and half of the rows there before."""
    write_coco(tmp_path, 9)
    damage(tmp_path)
    expected, result = batch(tmp_path, "local.jsonl", code=1)
    assert len(expected) == 9 * 3 - 2 * 3 - 1
    lines = (tmp_path / "local.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:7]))  # two images and a region of a third
    (tmp_path / "out.run.json").write_bytes((tmp_path / "local.run.json").read_bytes())
    with cluster(monkeypatch, nodes, gpus=1):
        url = f"file://{tmp_path / 'images'}/"
        rows, told = batch(tmp_path, "out.jsonl", "--engine", "ray", images=url, code=1)
        assert not ray.is_initialized()
        _, refused = batch(tmp_path, "more.jsonl", "--engine", "ray", "--workers", "3", code=2)
    assert f"--workers 3: each captioner needs a GPU, and the cluster has {nodes}." in refused.stderr
    assert_the_same(rows, expected)
    assert len(list(read_rows(tmp_path / "out.jsonl"))) == len(expected)
    assert "2 images cannot be read; 1 region cannot be read" in told.stderr
    assert f"{len(expected) - 7} regions of 5 images captioned" in told.stderr

    def reasons(name):
        found = {(f["image_id"], f["annotation_id"]): f["reason"] for f in faults_of(tmp_path, name)}
        return {key: reason.replace(str(tmp_path / "images"), "") for key, reason in found.items()}

    found = reasons("out.faults.jsonl")
    assert found[3, None].endswith("3.png: no such file.") and "is damaged" in found[0, 0]
    assert found.keys() == reasons("local.faults.jsonl").keys()
    assert (tmp_path / "out.coco.json").exists()
    annotations = json.loads((tmp_path / "out.coco.json").read_text())["annotations"]
    assert sum("caption" in annotation for annotation in annotations) == len(expected)


@pytest.mark.slow
def test_attributes_are_those_of_the_local_engine(tmp_path, monkeypatch):
    write_coco(tmp_path, 5)
    attributes = {"colour": ["red", "dark red"], "small": [True, False], "name": {"max_tokens": 3}}
    (tmp_path / "schema.json").write_text(json.dumps({"attributes": attributes, "jointly": True}))
    schema = ["--schema", str(tmp_path / "schema.json")]
    expected, _ = batch(tmp_path, "local.jsonl", *schema)
    lines = (tmp_path / "local.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:4]))
    (tmp_path / "out.run.json").write_bytes((tmp_path / "local.run.json").read_bytes())
    with cluster(monkeypatch, nodes=1):
        rows, _ = batch(tmp_path, "out.jsonl", *schema, "--engine", "ray")
    read = {key: (row.pop("attributes"), expected[key].pop("attributes")) for key, row in rows.items()}
    assert_the_same(rows, expected)
    assert len(read) == 15
    for found, local in read.values():
        for name, value in local.items():
            assert found[name]["value"] == value["value"]
            assert found[name]["probability"] == pytest.approx(value["probability"], abs=2e-4)
            assert found[name].get("probabilities") == pytest.approx(value.get("probabilities"), abs=2e-4)
    assert (tmp_path / "out.csv").read_text().count("\n") == 16


def lose_a_machine(folder, monkeypatch, images):
    """Kill one of two machines, with its captioner, when a third of the answers is there. Gives rows and warnings."""
    write_coco(folder, images, 2)
    data = open_data(folder / "coco.json", folder / "images")
    with cluster(monkeypatch) as machines:
        from pdlm_hf.batch import ray_engine

        monkeypatch.setattr(ray_engine, "_LOOK", 1.0)
        engine = ray_engine.RayEngine(ray_engine.CaptionerSettings(None, "default", 2, None, SETTINGS), workers=2)
        told, killed = [], []
        monkeypatch.setattr(ray_engine.logger, "warning", lambda text, *values: told.append(text % values))

        def progress(done, counts):
            if counts.images >= images // 3 and not killed:
                killed.append(done)
                machines.kill()

        files = BatchFiles(folder / "out.jsonl", {"model": "shapes"})
        counts = run_batch(data, lambda: engine, files, progress=progress)
    assert killed and (counts.images, counts.regions) == (images, 2 * images)
    assert counts.failed == counts.bad_images == counts.bad_regions == 0
    rows = list(read_rows(folder / "out.jsonl"))
    keys = [(row["image_id"], row["annotation_id"]) for row in rows]
    assert len(keys) == len(set(keys)) == 2 * images
    return {key: row for key, row in zip(keys, rows, strict=True)}, told


@pytest.mark.slow
def test_a_machine_is_lost(tmp_path, monkeypatch):
    rows, told = lose_a_machine(tmp_path, monkeypatch, 45)
    assert len(told) >= 1 and "continuing with the remaining" in told[0]
    expected, _ = batch(tmp_path, "local.jsonl", code=None)
    assert_the_same(rows, expected)


@pytest.mark.slow
def test_a_machine_is_lost_of_many_images(tmp_path, monkeypatch):
    rows, told = lose_a_machine(tmp_path, monkeypatch, 600)
    assert len(told) >= 1
    expected, _ = batch(tmp_path, "local.jsonl", code=None)
    assert_the_same(rows, expected)


@pytest.mark.slow
def test_an_image_that_ends_every_captioner(tmp_path, monkeypatch):
    write_coco(tmp_path, 8, 1)
    data = open_data(tmp_path / "coco.json", tmp_path / "images")
    data.entries[4] = replace(data.entries[4], read=os.abort)
    with cluster(monkeypatch, nodes=1):
        from pdlm_hf.batch import ray_engine

        monkeypatch.setattr(ray_engine, "_PAUSE", 0.0)
        monkeypatch.setattr(ray_engine, "_BARREN_ROUNDS", 3)
        engine = ray_engine.RayEngine(ray_engine.CaptionerSettings(None, "default", 1, None, SETTINGS))
        files = BatchFiles(tmp_path / "out.jsonl", {"model": "shapes"})
        with pytest.raises(ServerError, match=r"3 times without an answer .* Images left: 1, for example 4\.png"):
            run_batch(data, lambda: engine, files)
    rows = list(read_rows(tmp_path / "out.jsonl"))
    assert {row["image_id"] for row in rows} == set(range(8)) - {4} and len(rows) == 7


# ---------------------------------------------------------------- without a cluster


class ObjectStorage(LocalServer):
    """S3 as far as reading needs it, on 127.0.0.1: objects of one bucket by key."""

    def __init__(self, objects):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                place = urlsplit(self.path)
                key = unquote(place.path).removeprefix("/bucket").removeprefix("/")
                prefix = parse_qs(place.query).get("prefix", [None])[0]
                status, data = (200, objects[key]) if key in objects else (404, b"")
                if prefix is not None:
                    found = "".join(f"<Contents><Key>{k}</Key></Contents>" for k in objects if k.startswith(prefix))
                    data = f"<ListBucketResult><KeyCount>{found.count('<Key>')}</KeyCount>{found}</ListBucketResult>"
                    status, data = 200, data.encode()
                if status == 200 and (part := self.headers["Range"]):
                    first, last = part.removeprefix("bytes=").split("-")
                    status, whole = 206, len(data)
                    data = data[int(first) : int(last) + 1]
                self.send_response(status)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{whole}")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            do_GET = do_HEAD = answer

        super().__init__(Handler)
        self.query = f"scheme=http&region=none&endpoint_override=127.0.0.1:{self.port}"


def test_images_in_object_storage(monkeypatch):
    from pdlm_hf.batch.ray_engine import open_storage, reader

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    objects = {"photos/a/1.jpg": b"one", "photos/2 ü.jpg": b"two", "photos/3.gz": b"\x1f\x8b three"}
    with ObjectStorage(objects) as server:
        storage, folder = open_storage(f"s3://bucket/photos/?{server.query}")
        assert folder == "bucket/photos"
        with pytest.raises(ValueError, match=r"--images s3://bucket/nowhere: there is no such folder"):
            open_storage(f"s3://user:secret@bucket/nowhere?{server.query}")
        read = pickle.loads(ray.cloudpickle.dumps(reader(storage)))  # as Ray sends it
        names = [*(key.removeprefix("photos/") for key in objects), "missing.jpg"]
        found = read(pa.table({"path": [f"{folder}/{name}".encode() for name in names]}))
    assert found["data"].to_pylist() == [*objects.values(), None]
    assert found["reason"].to_pylist() == [None, None, None, "bucket/photos/missing.jpg: no such file."]


def test_readers_do_not_import_the_model():
    from pdlm_hf.batch.ray_engine import reader, watch

    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read()); sys.exit('torch' in sys.modules)"
    sent = ray.cloudpickle.dumps((reader(fs.LocalFileSystem()), watch()))
    assert subprocess.run([sys.executable, "-c", code], input=sent, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "dask"], "--engine dask: expected local or ray"),
        (["--engine", "ray", "--workers", "0"], "--workers must be a positive integer, got 0"),
        (["--workers", "2"], "--workers is for --engine ray"),
        (["--engine", "ray", "--server", "http://127.0.0.1:1"], "--engine ray and --server exclude each other"),
        (["--engine", "ray", "--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--images", "s3://user:secret@bucket/images"], "--images s3://bucket/images: object storage is read by"),
        (["--images", "nope://bucket/images", "--engine", "ray"], "--images nope://bucket/images: cannot be opened"),
        (["--images", "file:///nowhere/images", "--engine", "ray"], "there is no such folder of images"),
    ],
)
def test_wrong_calls_are_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("started"))
    write_coco(tmp_path, 1)
    _, result = batch(tmp_path, "out.jsonl", *options, code=2)
    said = result.stderr.strip().splitlines()[-1]
    assert said.startswith("pdlm: ") and message in said and "Traceback" not in result.output
    assert "secret" not in result.stderr and not (tmp_path / "out.jsonl").exists()


def test_masks_in_a_folder_need_images_in_one(tmp_path):
    (tmp_path / "masks").mkdir()
    _, result = batch(tmp_path, "out.jsonl", "--engine", "ray", images="s3://bucket/images", data="masks", code=2)
    assert "the data must be a COCO file, not a folder" in result.stderr


def test_without_ray(tmp_path, monkeypatch):
    write_coco(tmp_path, 1)
    monkeypatch.setattr("pdlm_hf.cli.batch.find_spec", lambda name: None)
    _, result = batch(tmp_path, "out.jsonl", "--engine", "ray", code=2)
    assert 'pip install "perceptiondlm[ray]", or ".[ray]" in a clone' in result.stderr
