"""Pictures in front of a model: the server runs calibration's own code on the bytes of a file."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tritonclient.grpc import model_config_pb2 as pb

from calibrators.data.open import open_data
from calibrators.data.spec import DataSpec
from pipeline.build import build
from pipeline.errors import PublishError
from pipeline.recipe import parse
from pipeline.triton.checker import check_repository
from pipeline.triton.ensemble import python_source
from pipeline.types import TensorInfo

HOW = {"size": 12, "crop": 8, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "channels": "bgr"}


def vision_model(path: Path) -> Path:
    """pixels[batch, 3, 8, 8] -> scores[batch, 16]."""
    draw = np.random.default_rng(0)
    weights = draw.standard_normal((16, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["pixels", "weights"], ["features"]),
            helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["scores"]),
        ],
        "vision",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 16])],
        [numpy_helper.from_array(weights, "weights")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def pictures(folder: Path, count: int = 6) -> list[Path]:
    """Pictures of several sizes, kinds and modes."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, files = np.random.default_rng(1), []
    for index in range(count):
        image = Image.fromarray(draw.integers(0, 256, (14 + index, 20 - index, 3), dtype=np.uint8))
        file = folder / f"{index}.{('png', 'jpg', 'bmp')[index % 3]}"
        (image.convert("L") if index == 3 else image).save(file)
        files.append(file)
    return files


def built(folder: Path, *, ensemble: str = "image") -> Path:
    """A build's repository, with the ensemble ``eye_image``."""
    pictures(folder / "pictures")
    recipe = {
        "name": "eye",
        "source": {"onnx": str(vision_model(folder / "m.onnx"))},
        "calibration": {"data": str(folder / "pictures"), "preprocessing": HOW, "method": "minmax"},
        "triton": {"ensemble": ensemble, "max_batch_size": 4},
        "targets": ["cpu"],
    }
    build(parse(recipe), folder / "build")
    return folder / "build/triton"


def test_the_ensemble_takes_files_and_gives_the_model_s_outputs(tmp_path: Path) -> None:
    repo = built(tmp_path)
    assert check_repository(repo) == []
    assert sorted(d.name for d in repo.iterdir()) == ["eye", "eye_image", "eye_preprocessing"]
    found = text_format.Parse((repo / "eye_image/config.pbtxt").read_text(), pb.ModelConfig())
    assert [(t.name, t.data_type, list(t.dims)) for t in found.input] == [("IMAGE", pb.TYPE_STRING, [1])]
    assert [(t.name, list(t.dims)) for t in found.output] == [("scores", [16])]
    assert [s.model_name for s in found.ensemble_scheduling.step] == ["eye_preprocessing", "eye"]
    assert sorted(p.name for p in (tmp_path / "build/serving").iterdir()) == ["pixels.py", "preprocessing.json"]


class _Given:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values = name, values

    def as_numpy(self) -> np.ndarray:
        return self.values


def test_the_server_s_arrays_are_calibration_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built(tmp_path) / "eye_preprocessing/1"
    server = types.ModuleType("triton_python_backend_utils")
    server.get_input_tensor_by_name = lambda request, name: next(t for t in request if t.name == name)  # type: ignore[attr-defined]
    server.Tensor = _Given  # type: ignore[attr-defined]
    server.InferenceResponse = lambda output_tensors=None, error=None: output_tensors if error is None else error  # type: ignore[attr-defined]
    server.TritonError = str  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    module: dict[str, object] = {}
    exec(python_source("preprocess_image"), module)
    model = module["TritonPythonModel"]()  # type: ignore[operator]
    model.initialize({"model_repository": str(folder.parent), "model_version": "1"})
    inputs = (TensorInfo(name="pixels", dtype=np.dtype(np.float32), shape=("batch", 3, 8, 8)),)
    spec = DataSpec(data=str(tmp_path / "pictures"), preprocessing=HOW, batch_size=6)
    (want,) = list(open_data(spec, inputs))
    files = sorted((tmp_path / "pictures").iterdir())
    contents = np.array([[file.read_bytes()] for file in files], object)
    broken = np.array([[b"no picture"]], object)
    deep = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(deep, "png")
    answers = model.execute(
        [
            [_Given("IMAGE", contents)],
            [_Given("IMAGE", broken)],
            [_Given("IMAGE", np.array([[deep.getvalue()]], object))],
        ]
    )
    (tensor,) = answers[0]
    assert (tensor.name, tensor.values.dtype) == ("pixels", np.float32)
    np.testing.assert_array_equal(tensor.values, want["pixels"])
    assert answers[1].startswith("IMAGE cannot be read")
    assert "more than 8 bits" in answers[2]


def test_a_model_that_takes_no_picture_is_refused(tmp_path: Path) -> None:
    from tests.quantize.graphs import mlp

    path, _ = mlp(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32))
    recipe = {
        "source": {"onnx": str(path)},
        "calibration": {"data": str(tmp_path / "data.npz"), "preprocessing": HOW},
        "triton": {"ensemble": "image"},
    }
    with pytest.raises(PublishError, match="one input of 4 dimensions"):
        build(parse(recipe), tmp_path / "build")


def test_the_settings_are_written_out(tmp_path: Path) -> None:
    settings = json.loads((built(tmp_path) / "eye_preprocessing/1/preprocessing.json").read_text())
    assert (settings["input"], settings["dtype"]) == ("pixels", "float32")
    assert settings["preprocessing"]["channels"] == "bgr"
    assert settings["preprocessing"]["interpolation"] == "bilinear"  # a default, said all the same
