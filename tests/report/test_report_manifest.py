from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.recipe import Recipe, parse
from pipeline.report.manifest import make_manifest, read_manifest, recipe_values, write_manifest


def recipe(source: Path, **changes: object) -> Recipe:
    return parse({"name": "tiny", "source": {"huggingface": str(source)}, "seed": 7, **changes})


def build(root: Path) -> tuple[Path, Path, Path]:
    """A source folder, a data file and a build directory with the files that a build leaves."""
    source, folder = root / "src" / "tiny-bert", root / "build" / "tiny"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"weights")
    data = root / "src" / "corpus.jsonl"
    data.write_text('{"text": "a"}\n')
    for name in (
        "model.fp32.onnx",
        "engines/cpu/model.onnx",
        "engines/cpu/measurements.json",
        "report.json",
        "report.html",
        "manifest.json",
        ".stages/collect.json",
        ".lock",
        "triton/tiny/1/model.onnx",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return source, data, folder


def made(root: Path) -> str:
    source, data, folder = build(root)
    asked = recipe(source, calibration={"data": str(data)})
    return make_manifest(folder, recipe=asked, inputs={"source": source, "calibration": data}).to_json()


def test_inputs_and_outputs_with_their_hashes(tmp_path: Path) -> None:
    values = json.loads(made(tmp_path))
    assert [(i["role"], i["name"]) for i in values["inputs"]] == [
        ("calibration", "corpus.jsonl"),
        ("source", "tiny-bert/config.json"),
        ("source", "tiny-bert/model.safetensors"),
    ]
    assert values["inputs"][2] == {
        "role": "source",
        "name": "tiny-bert/model.safetensors",
        "sha256": hashlib.sha256(b"weights").hexdigest(),
        "bytes": 7,
    }
    assert [o["path"] for o in values["outputs"]] == [
        "engines/cpu/model.onnx",
        "model.fp32.onnx",
        "triton/tiny/1/model.onnx",
    ]
    assert values["outputs"][1]["sha256"] == hashlib.sha256(b"content of model.fp32.onnx").hexdigest()
    assert values["seeds"] == {"recipe": 7}
    assert {"python", "onnx", "onnxruntime", "numpy", "enginewright"} <= set(values["versions"])


def test_two_builds_in_two_places_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one"), made(tmp_path / "elsewhere" / "other")
    assert one == other
    assert str(tmp_path) not in one


def test_a_changed_byte_changes_the_manifest(tmp_path: Path) -> None:
    before = made(tmp_path / "a")
    source, _, folder = build(tmp_path / "b")
    (folder / "model.fp32.onnx").write_text("content of model.fp32.onnX")
    after = make_manifest(folder, recipe=recipe(source), inputs={"source": source}).to_json()
    changed = {o["path"]: o["sha256"] for o in json.loads(after)["outputs"]}
    assert (
        changed["model.fp32.onnx"] != {o["path"]: o["sha256"] for o in json.loads(before)["outputs"]}["model.fp32.onnx"]
    )


def test_external_data_of_an_onnx_input_is_listed(tmp_path: Path) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.ones(4, np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    asked = parse({"source": {"onnx": str(tmp_path / "m.onnx")}})
    manifest = make_manifest(tmp_path / "out", recipe=asked, inputs={"source": tmp_path / "m.onnx"}, outputs=[])
    assert [(i.name, i.bytes) for i in manifest.inputs] == [
        ("m.onnx", (tmp_path / "m.onnx").stat().st_size),
        ("m.bin", 16),
    ]
    assert manifest.recipe["source"]["onnx"] == "m.onnx"  # type: ignore[call-overload, index]


def test_only_paths_of_the_recipe_are_cut() -> None:
    asked = parse(
        {
            "source": {"huggingface": "org/name"},
            "calibration": {"data": "corpus.jsonl", "template": "/{text}"},
            "validate": {"data": "/data/held/out.jsonl", "gates": {"sqnr_db": ">= 20"}},
        }
    )
    values = recipe_values(asked)
    assert values["source"]["huggingface"] == "org/name"
    assert (values["calibration"]["data"], values["calibration"]["template"]) == ("corpus.jsonl", "/{text}")
    assert values["validate"]["data"] == "out.jsonl"
    assert values["validate"]["gates"] == {"sqnr_db": ">= 20"}


def test_a_hash_that_is_remembered_is_used(tmp_path: Path) -> None:
    source, _, folder = build(tmp_path)
    manifest = make_manifest(
        folder, recipe=recipe(source), inputs={"source": source}, outputs=[], hash_file=lambda path: path.name
    )
    assert [i.sha256 for i in manifest.inputs] == ["config.json", "model.safetensors"]


def test_written_and_read_back(tmp_path: Path) -> None:
    source, data, folder = build(tmp_path)
    manifest = make_manifest(folder, recipe=recipe(source), inputs={"source": source, "calibration": data})
    assert write_manifest(manifest, folder) == folder / "manifest.json"
    assert read_manifest(folder) == manifest


@pytest.mark.parametrize("text", [None, "{}", "\x00"])
def test_a_missing_or_broken_manifest_says_so(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError) as caught:
        read_manifest(tmp_path)
    assert caught.value.where == str(tmp_path / "manifest.json")


def test_an_input_that_is_gone_is_named(tmp_path: Path) -> None:
    source, _, folder = build(tmp_path)
    with pytest.raises(StoreError) as caught:
        make_manifest(folder, recipe=recipe(source), inputs={"calibration": tmp_path / "gone.jsonl"}, outputs=[])
    assert "gone.jsonl" in caught.value.where
