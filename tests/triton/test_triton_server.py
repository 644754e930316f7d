"""A real tritonserver on loopback: what it answers, how it batches, and what it refuses, beside our checker.

Needs the server of a wheel: ``python3 -m venv .venv-triton && .venv-triton/bin/pip install nvidia-pytriton==0.7.0 'numpy<2'
onnxruntime tokenizers pillow``, then ``pytest -m server``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ensembles
import numpy as np
import pytest
import test_triton_image_ensemble
import test_triton_serving_keys as serving_keys
import tritonclient.grpc as grpc
from ensembles import embed
from test_triton_ensemble import MUTATIONS
from triton_models import tokens_model

from calibrators.data.open import open_data
from calibrators.data.spec import DataSpec
from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.errors import MissingError, PublishError
from pipeline.recipe import TritonConfig
from pipeline.serving import serving
from pipeline.triton.checker import check_repository
from pipeline.triton.repository import write_repository
from pipeline.triton.rollback import rollback
from pipeline.triton.served import onnx_model
from pipeline.triton.server import Installation, Server, find_server
from pipeline.triton.twin import write_twin
from pipeline.types import TensorInfo

pytestmark = [pytest.mark.server, pytest.mark.filterwarnings("default")]
IDS = np.array([[2, 3, 4, 5, 2, 7], [6, 3, 0, 0, 0, 0]], np.int64)
FEEDS = {"input_ids": IDS, "attention_mask": (IDS > 0).astype(np.int64)}


@pytest.fixture(scope="module")
def installation() -> Installation:
    try:
        return find_server()
    except MissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensembles.write(tmp_path_factory.mktemp("served"), "embedding", delay=20_000)


@pytest.fixture(scope="module")
def server(repo: Path, installation: Installation) -> Iterator[Server]:
    with serving(repo, installation=installation) as running:
        yield running


def vectors(kind: str, server: Server) -> np.ndarray:
    if kind == "http":
        inputs = [
            {"name": n, "shape": list(a.shape), "datatype": "INT64", "data": a.tolist()} for n, a in FEEDS.items()
        ]
        body = json.dumps({"inputs": inputs}).encode()
        with urllib.request.urlopen(f"http://{server.url}/v2/models/tiny/infer", data=body) as answer:
            (output,) = json.load(answer)["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])
    client = grpc.InferenceServerClient(server.grpc_url)
    asked = []
    for name, array in FEEDS.items():
        asked.append(grpc.InferInput(name, list(array.shape), "INT64"))
        asked[-1].set_data_from_numpy(array)
    found = client.infer("tiny", asked).as_numpy("vectors")
    client.close()
    return found


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_the_answer_is_the_engine_s(repo: Path, server: Server, kind: str) -> None:
    with OnnxRuntimeRunner(repo / "tiny/1/model.onnx") as engine:
        np.testing.assert_array_equal(vectors(kind, server), engine.infer(FEEDS)["vectors"])


def test_texts_become_embeddings(repo: Path, server: Server) -> None:
    got = embed(server.grpc_url, ["the cat sat on the mat", "a cat"])
    with OnnxRuntimeRunner(repo / "tiny/1/model.onnx") as engine:
        found = engine.infer(FEEDS)["vectors"]
    for row, count in ((0, 6), (1, 2)):
        mean = found[row, :count].mean(axis=0)
        np.testing.assert_allclose(got[row], mean / np.linalg.norm(mean), rtol=1e-5)


def test_concurrent_requests_are_batched(server: Server) -> None:
    before = ensembles.counts(server.grpc_url, "tiny")
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda i: embed(server.grpc_url, ["the cat sat" if i % 2 else "a mat"]), range(64)))
    after = ensembles.counts(server.grpc_url, "tiny")
    assert after[0] - before[0] == 64
    assert after[1] - before[1] <= 16
    assert all(np.array_equal(answers[i], answers[i % 2]) for i in range(64))


def test_what_is_not_utf_8_is_one_request_s_fault(server: Server) -> None:
    client = grpc.InferenceServerClient(server.grpc_url)
    asked = grpc.InferInput("TEXT", [1, 1], "BYTES")
    asked.set_data_from_numpy(np.array([[b"\xff\xfe"]], object))
    with pytest.raises(grpc.InferenceServerException, match="not UTF-8"):
        client.infer("tiny_text", [asked])
    assert embed(server.grpc_url, ["a cat"]).shape == (1, 8)


REFUSED = [(rule, mutate) for rule, mutate in MUTATIONS if rule != "python-model"]  # without it the server hangs


def test_the_server_refuses_what_the_checker_refuses(tmp_path: Path, installation: Installation) -> None:
    """Each mutated ensemble under a name of its own would need its models too, so each gets a server of its own."""
    agreed = {}
    for number, (rule, mutate) in enumerate(REFUSED):
        repo = ensembles.write(tmp_path / str(number), "embedding")
        mutate(repo)
        assert rule in {p.rule for p in check_repository(repo)}
        twin = write_twin(repo, tmp_path / str(number) / "twin")
        try:
            with Server(twin, installation) as running:
                running.wait_until_ready(30)
                refused = False
        except PublishError:
            refused = True
        agreed[number, rule] = refused
    # The server takes a step with smaller batches than the ensemble's, and fails the requests that are larger.
    silent = {"ensemble-batch"}
    assert {rule for (_, rule), refused in agreed.items() if not refused} <= silent, agreed


def test_a_server_that_is_killed_answers_the_same_when_it_is_back(repo: Path, installation: Installation) -> None:
    with serving(repo, installation=installation) as first:
        before = embed(first.grpc_url, ["the cat"])
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
    with serving(repo, installation=installation) as second:
        np.testing.assert_array_equal(embed(second.grpc_url, ["the cat"]), before)


def test_a_new_version_and_its_rollback_lose_no_request(tmp_path: Path, installation: Installation) -> None:
    ensembles.write(tmp_path, "embedding", seed=0)
    live = write_twin(tmp_path / "repo", tmp_path / "live")
    answers: list[np.ndarray] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def ask(url: str) -> None:
        while not stop.is_set():
            try:
                answers.append(embed(url, ["the cat sat"]))
            except BaseException as error:
                failures.append(error)

    with Server(live, installation, poll_seconds=1) as server:
        server.wait_until_ready()
        first = embed(server.grpc_url, ["the cat sat"])
        threads = [threading.Thread(target=ask, args=(server.grpc_url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        ensembles.write(tmp_path, "embedding", seed=1)
        twin = write_twin(tmp_path / "repo", tmp_path / "twin")
        # The model's version and its kept configuration, as publishing renames them into place.
        (live / "tiny/.configs").mkdir(exist_ok=True)
        for version in ("1", "2"):
            shutil.copy(live / "tiny/config.pbtxt", live / f"tiny/.configs/{version}.pbtxt")
        shutil.copytree(twin / "tiny/2", live / "tiny/.2")
        (live / "tiny/.2").rename(live / "tiny/2")
        second = wait_for(
            lambda: embed(server.grpc_url, ["the cat sat"]), lambda found: not np.array_equal(found, first)
        )
        rollback(live / "tiny")
        wait_for(lambda: embed(server.grpc_url, ["the cat sat"]), lambda found: np.array_equal(found, first))
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[:3]
    assert len(answers) > 20
    assert all(np.array_equal(found, first) or np.array_equal(found, second) for found in answers)


def test_labels_the_response_cache_and_rate_limits(tmp_path: Path, installation: Installation) -> None:
    repo = serving_keys.write(tmp_path)
    pixels = np.array([[1, -2, 3, 0.5]], np.float32)
    with OnnxRuntimeRunner(repo / "animals/1/model.onnx") as engine:
        logits = engine.infer({"pixels": pixels})["logits"][0]
    with serving(repo, installation=installation) as server:
        client = grpc.InferenceServerClient(server.grpc_url)
        asked = grpc.InferInput("pixels", [1, 4], "FP32")
        asked.set_data_from_numpy(pixels)
        for _ in range(3):
            found = client.infer("animals", [asked], outputs=[grpc.InferRequestedOutput("logits", class_count=1)])
        best = int(np.argmax(logits))
        value, index, name = found.as_numpy("logits").reshape(-1)[0].decode().split(":", 2)
        assert (float(value), int(index)) == (pytest.approx(float(logits[best]), abs=1e-5), best)
        assert name == serving_keys.LABELS.splitlines()[best]
        stats = client.get_inference_statistics("animals", as_json=True)["model_stats"][0]["inference_stats"]
        assert int(stats["cache_hit"]["count"]) == 2
        client.close()


def test_the_server_refuses_the_serving_keys_that_the_checker_refuses(
    tmp_path: Path, installation: Installation
) -> None:
    agreed = {}
    for number, (rule, mutate) in enumerate(serving_keys.REFUSED):
        repo = serving_keys.write(tmp_path / str(number))
        mutate(repo)
        try:
            with Server(write_twin(repo, tmp_path / str(number) / "twin"), installation) as running:
                running.wait_until_ready(30)
                agreed[number, rule] = False
        except PublishError:
            agreed[number, rule] = True
    assert all(agreed.values()), agreed


def test_a_warm_up_with_a_real_sample_runs_and_one_that_is_broken_is_refused(
    tmp_path: Path, installation: Installation
) -> None:
    row = {"ids": np.arange(12, dtype=np.int64)[None] % 10, "gain": np.array([2], np.float32)}
    model = onnx_model(tokens_model(tmp_path / "m.onnx"), name="tiny", row=row, threads=1)
    repo = write_repository(tmp_path / "repo", model=model, config=TritonConfig()).parent
    assert check_repository(repo) == []
    with Server(write_twin(repo, tmp_path / "twin"), installation) as running:
        running.wait_until_ready(30)
    (file,) = (repo / "tiny/warmup").glob("ids.*")
    # An id that is not in the table: the server runs what lies in the file, and the model refuses it.
    for content in (file.read_bytes()[:-8], np.full(12, 99, "<i8").tobytes(), None):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        assert {p.rule for p in check_repository(repo)} <= {"warm-up-data", "warm-up-runs"}
        assert check_repository(repo)
        with (
            pytest.raises(PublishError),
            Server(write_twin(repo, tmp_path / "twin"), installation) as running,
        ):
            running.wait_until_ready(30)


def test_pictures_become_scores(tmp_path: Path, installation: Installation) -> None:
    repo = test_triton_image_ensemble.built(tmp_path)
    files = sorted((tmp_path / "pictures").iterdir())[:4]
    inputs = (TensorInfo(name="pixels", dtype=np.dtype(np.float32), shape=("batch", 3, 8, 8)),)
    spec = DataSpec(data=str(tmp_path / "pictures"), preprocessing=test_triton_image_ensemble.HOW, batch_size=4)
    with OnnxRuntimeRunner(repo / "eye/1/model.onnx") as engine:
        want = engine.infer(next(iter(open_data(spec, inputs))))["scores"]
    with serving(repo, installation=installation) as server:
        client = grpc.InferenceServerClient(server.grpc_url)
        asked = grpc.InferInput("IMAGE", [4, 1], "BYTES")
        asked.set_data_from_numpy(np.array([[file.read_bytes()] for file in files], object))
        found = client.infer("eye_image", [asked]).as_numpy("scores")
        asked = grpc.InferInput("IMAGE", [1, 1], "BYTES")
        asked.set_data_from_numpy(np.array([[b"no picture"]], object))
        with pytest.raises(grpc.InferenceServerException, match="cannot be read"):
            client.infer("eye_image", [asked])
        client.close()
    # JPEG decoders of two Pillow builds may differ in the last bit of a pixel.
    np.testing.assert_allclose(found, want, atol=0.02)
    exact = [index for index, file in enumerate(files) if file.suffix != ".jpg"]
    np.testing.assert_array_equal(found[exact], want[exact])


def wait_for(make, holds, seconds: float = 30.0):  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = make()
        if holds(found):
            return found
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")
