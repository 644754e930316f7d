"""Ensembles: what is written, that the tokenizer is calibration's, and every rule that the checker has for them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ensembles
import numpy as np
import pytest
import tokenizers
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from calibrators.data.batches import Sample
from pipeline.errors import PublishError
from pipeline.recipe import TritonConfig
from pipeline.triton.checker import check_repository
from pipeline.triton.ensemble import python_source, tokenizer_files, write_ensemble
from pipeline.triton.served import onnx_model
from pipeline.triton.twin import write_twin

TEXTS = ["the cat sat on the mat", "a cat", "unheard of words", "mat " * 40]


def config(repo: Path, name: str) -> pb.ModelConfig:
    return text_format.Parse((repo / name / "config.pbtxt").read_text(), pb.ModelConfig())


def edit(name: str, change: Callable[[pb.ModelConfig], object]) -> Callable[[Path], None]:
    def apply(repo: Path) -> None:
        found = config(repo, name)
        change(found)
        (repo / name / "config.pbtxt").write_text(text_format.MessageToString(found))

    return apply


def loaded(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A python model's module, with a stand-in for what the server gives it."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(python_source(name), module.__dict__)
    return module


@pytest.mark.parametrize("kind", ["text", "embedding"])
def test_an_ensemble_passes_the_checker_and_says_what_clients_see(tmp_path: Path, kind: str) -> None:
    repo = ensembles.write(tmp_path, kind)
    assert check_repository(repo) == []
    found = config(repo, "tiny_text")
    assert [(t.name, t.data_type, list(t.dims)) for t in found.input] == [("TEXT", pb.TYPE_STRING, [1])]
    outputs = [(t.name, list(t.dims)) for t in found.output]
    assert outputs == ([("vectors", [-1, 8])] if kind == "text" else [("embedding", [8])])
    steps = [s.model_name for s in found.ensemble_scheduling.step]
    assert steps == ["tiny_tokenizer", "tiny", *(["tiny_pooling"] if kind == "embedding" else [])]
    again = {p: p.read_bytes() for p in repo.rglob("*") if p.is_file()}
    ensembles.write(tmp_path, kind)
    assert {p: p.read_bytes() for p in repo.rglob("*") if p.is_file()} == again


def test_the_server_tokenizes_as_calibration_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = ensembles.write(tmp_path, "text")
    served = onnx_model(tmp_path / "m0.onnx", name="tiny")
    encoder = ensembles.encoder(tmp_path / "tokenizer", served)
    made = [dict(zip(("input_ids", "token_type_ids"), encoder.tokenizer.encode(t), strict=True)) for t in TEXTS]
    want = encoder.collate([Sample(where=t, feeds=f, kind=None) for t, f in zip(TEXTS, made, strict=True)])
    module = loaded(monkeypatch, "tokenize_text")
    folder = repo / "tiny_tokenizer/1"
    settings = json.loads((folder / "settings.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    got = module.collate(tokenizer.encode_batch(TEXTS), settings)
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert got[name].dtype == values.dtype
        np.testing.assert_array_equal(got[name], values)  # 16 tokens, the longest that is kept
    short = module.collate(tokenizer.encode_batch(TEXTS[:2]), settings)
    assert short["input_ids"].shape == (
        2,
        8,
    )  # padded to a multiple, so that requests of nearly one length are one batch
    np.testing.assert_array_equal(short["attention_mask"].sum(axis=1), [6, 2])


def test_pooling_is_the_mean_over_real_tokens_of_length_1(monkeypatch: pytest.MonkeyPatch) -> None:
    module = loaded(monkeypatch, "pool_tokens")
    vectors = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    got = module.pool(vectors, np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    for row, count in zip(range(2), (3, 5), strict=True):
        mean = vectors[row, :count].mean(axis=0)
        np.testing.assert_allclose(got[row], mean / np.linalg.norm(mean), rtol=1e-5)


class _Given:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values = name, values

    def as_numpy(self) -> np.ndarray:
        return self.values


def test_requests_of_one_execution_get_their_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lengths in one execution: those of one length are one batch, and each request gets its rows back."""
    module = loaded(monkeypatch, "run_onnx")
    server = module.pb_utils
    server.get_input_tensor_by_name = lambda request, name: next(t for t in request if t.name == name)
    server.Tensor = _Given
    server.InferenceResponse = lambda output_tensors=None, error=None: output_tensors if error is None else error
    server.TritonError = str
    (tmp_path / "1").mkdir()
    ensembles.text_model(tmp_path / "1/model.onnx")
    served = module.TritonPythonModel()
    made = {"max_batch_size": 8, "output": [{"name": "vectors"}]}
    served.initialize({"model_config": json.dumps(made), "model_repository": str(tmp_path), "model_version": "1"})
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, 8, shape) for shape in ((1, 3), (2, 5), (3, 3), (1, 5))]
    requests = [[_Given("input_ids", i), _Given("attention_mask", np.ones_like(i))] for i in ids]
    found = served.execute(requests)
    for request, (vectors,) in zip(requests, found, strict=True):
        ((alone,),) = served.execute([request])
        np.testing.assert_array_equal(vectors.values, alone.values)
        assert vectors.values.shape == (*request[0].values.shape, 8)
    refused = served.execute([[_Given("input_ids", np.array([[99]])), _Given("attention_mask", np.array([[1]]))]])
    assert "indices" in refused[0]


def test_the_twin_keeps_what_clients_see(tmp_path: Path) -> None:
    repo = ensembles.write(tmp_path, "embedding")
    twin = write_twin(repo, tmp_path / "twin")
    assert {d.name for d in twin.iterdir()} == {d.name for d in repo.iterdir()}
    before, after = config(repo, "tiny"), config(twin, "tiny")
    assert (before.backend, after.backend) == ("onnxruntime", "python")
    assert list(after.input) == list(before.input)
    assert after.dynamic_batching == before.dynamic_batching
    assert (twin / "tiny/1/model.py").read_text() == python_source("run_onnx")
    edit("tiny", lambda c: setattr(c, "backend", "tensorrt"))(repo)
    with pytest.raises(PublishError, match="TensorRT engine, which needs its GPU"):
        write_twin(repo, tmp_path / "twin")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"max_batch_size": 0, "ensemble": "text"}, "forms batches"), ({"ensemble": "embedding"}, "no token vectors")],
)
def test_what_cannot_be_an_ensemble_is_refused(tmp_path: Path, options: dict[str, object], said: str) -> None:
    from dataclasses import replace

    served = onnx_model(ensembles.text_model(tmp_path / "m.onnx"), name="tiny")
    made = tokenizer_files(ensembles.encoder(tmp_path / "tokenizer", served))
    if options["ensemble"] == "embedding":
        served = replace(served, outputs=(replace(served.outputs[0], shape=("batch", 8)),))
    with pytest.raises(PublishError, match=said):
        write_ensemble(tmp_path / "repo", served, TritonConfig(**options), made)  # type: ignore[arg-type]


def _step(config: pb.ModelConfig, index: int) -> Any:
    return config.ensemble_scheduling.step[index]


MUTATIONS: list[tuple[str, Callable[[Path], None]]] = [
    ("python-model", lambda repo: (repo / "tiny_tokenizer/1/model.py").unlink()),
    ("ensemble-model", lambda repo: shutil.rmtree(repo / "tiny_pooling")),
    ("ensemble-model", edit("tiny_text", lambda c: setattr(_step(c, 1), "model_name", "other"))),
    ("ensemble-model", edit("tiny_text", lambda c: c.ensemble_scheduling.ClearField("step"))),
    ("ensemble-batch", edit("tiny_text", lambda c: setattr(c, "max_batch_size", 64))),
    ("ensemble-tensor", edit("tiny_text", lambda c: _step(c, 1).input_map.pop("attention_mask"))),
    ("ensemble-tensor", edit("tiny_text", lambda c: _step(c, 1).input_map.update(input_ids="nothing"))),
    ("ensemble-tensor", edit("tiny_text", lambda c: _step(c, 0).output_map.update(logits="logits"))),
    ("ensemble-tensor", edit("tiny_text", lambda c: setattr(c.output[0], "name", "other"))),
    ("ensemble-type", edit("tiny_tokenizer", lambda c: setattr(c.output[0], "data_type", pb.TYPE_INT32))),
    ("ensemble-type", edit("tiny_text", lambda c: setattr(c.output[0], "data_type", pb.TYPE_FP16))),
    ("ensemble-dims", edit("tiny_pooling", lambda c: c.input[0].dims.append(4))),
    ("ensemble-dims", edit("tiny_text", lambda c: c.output[0].dims.__setitem__(0, 9))),
]


@pytest.mark.parametrize(("rule", "mutate"), MUTATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_each_mutation_is_found(tmp_path: Path, rule: str, mutate: Callable[[Path], None]) -> None:
    repo = ensembles.write(tmp_path, "embedding")
    mutate(repo)
    found = check_repository(repo)
    assert (rule, "error") in {(p.rule, p.severity) for p in found}, [str(p) for p in found]
    assert all(p.where and p.message and p.fix for p in found)
