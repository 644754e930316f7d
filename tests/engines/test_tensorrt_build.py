"""The shared builder, shown through TensorRT for RTX, which builds here without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from engines.compile_check import compile_check
from engines.target import target
from engines.tensorrt import build as module
from engines.tensorrt.build import build_engine, mismatches, profiles_for
from engines.tensorrt.cache_bytes import cache_bytes
from engines.tensorrt.flavour import Flavour, require
from engines.tensorrt.gpus import Gpu, parse_gpus
from engines.tensorrt.latency import alternating
from engines.tensorrt.options import BuilderOptions, Implicit
from engines.tensorrt.profiles import ShapeRange
from engines.tensorrt.refusal import refused_node
from pipeline.errors import EngineError, MissingError, RecipeError
from pipeline.types import Precision
from tests.quantize.graphs import mlp, save

SHAPES = {"x": (8, 32)}


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return mlp(tmp_path / "mlp.onnx")[0]


def test_an_rtx_engine_is_built_here_with_its_manifest(onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = BuilderOptions()
    options = replace(options, profiles=tuple(profiles_for(options, onnx, SHAPES, 16)))
    assert options.profiles[0]["x"] == ShapeRange(min=(1, 32), opt=(8, 32), max=(16, 32))
    told: list[tuple[str, int, int]] = []
    made = build_engine(onnx, target("rtx4090"), options, SHAPES, progress=lambda *step: told.append(step))
    # An engine of TensorRT for RTX starts with these four bytes.
    assert made.data[:4] == b"vtrt"
    assert sum(layer.flops for layer in made.layers) == pytest.approx(2 * 8 * (32 * 48 + 48 * 24))
    assert [step[1] for step in told] == sorted({step[1] for step in told})
    assert told[-1][1:] == (1000, 1000)
    made.write(tmp_path / "engine")
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["compute_capability"], manifest["runtime"]) == ("8.9", "tensorrt-rtx")
    assert (
        manifest["engine"]["bytes"] == (tmp_path / "engine" / "model.plan").stat().st_size == made.layers.engine_bytes
    )
    assert mismatches(manifest, onnx, capability="8.9") == []
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "mlp.onnx"
    # One more field (the IR version again) makes another file of the same model.
    other.write_bytes(onnx.read_bytes() + b"\x08\x0a")
    assert len(mismatches(manifest, other, capability="8.0")) == 2


def test_several_profiles_can_be_given(onnx: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    profiles = (
        {"x": ShapeRange(min=(1, 32), opt=(1, 32), max=(1, 32))},
        {"x": ShapeRange(min=(2, 32), opt=(8, 32), max=(9, 32))},
    )
    made = build_engine(onnx, target("rtx5090"), BuilderOptions(profiles=profiles, optimization_level=0), SHAPES)
    assert made.layers.compute_capability == "SM120"
    assert len(made.manifest["options"]["profiles"]) == 2


def test_an_option_that_rtx_lacks_is_refused_before_the_build(onnx: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(RecipeError, match=r"has no `builder\.version_compatible`"):
        build_engine(onnx, target("rtx4090"), BuilderOptions(version_compatible=True), SHAPES)


def test_a_plugin_library_that_does_not_load_is_named(onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=r"(?s)plugin library.*no\.so"):
        build_engine(onnx, target("rtx4090"), BuilderOptions(plugin_libraries=(tmp_path / "no.so",)), SHAPES)


def _with_gpus(monkeypatch: pytest.MonkeyPatch, *found: Gpu) -> None:
    monkeypatch.setattr(module, "gpus", lambda: found)


def test_without_the_gpu_the_error_names_what_is_here(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch)
    with pytest.raises(MissingError, match=r"A100 engine on a GPU with SM80; this machine has none"):
        build_engine(onnx, target("a100"), BuilderOptions(), SHAPES)
    _with_gpus(monkeypatch, Gpu(name="NVIDIA L4", capability=(8, 9), uuid="GPU-1", driver="575"))
    with pytest.raises(MissingError, match=r"this machine has NVIDIA L4 \(SM89\)"):
        build_engine(onnx, target("a100"), BuilderOptions(), SHAPES)


def test_with_the_gpu_the_package_is_named(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch, Gpu(name="NVIDIA L4", capability=(8, 9), uuid="GPU-1", driver="575"))
    monkeypatch.setattr("engines.tensorrt.flavour.installed", lambda _: None)
    for name, options in (("l4", BuilderOptions()), ("a100", BuilderOptions(hardware_compatibility="ampere_plus"))):
        with pytest.raises(MissingError, match=r"(?s)needs TensorRT, which is not installed.*\.\[tensorrt\]"):
            build_engine(onnx, target(name), options, SHAPES)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.tensorrt.flavour.installed", lambda _: None)
    with pytest.raises(MissingError, match=r"(?s)A check needs TensorRT for RTX.*\.\[rtx\]"):
        require(Flavour.RTX, "A check")


def test_nvidia_smi_is_read() -> None:
    said = "NVIDIA A100-SXM4-80GB, 8.0, GPU-aa, 575.57.08\nNVIDIA H100, 9.0, GPU-bb, 575.57.08\nNo devices were found\n"
    assert [(g.name, g.sm, g.uuid) for g in parse_gpus(said)] == [
        ("NVIDIA A100-SXM4-80GB", "SM80", "GPU-aa"),
        ("NVIDIA H100", "SM90", "GPU-bb"),
    ]


def test_a_parsers_refusal_names_the_node(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    weights = {"s": np.float32(0.1).reshape(()), "z": np.asarray(3, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="off_centre"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="back"),
    ]
    path = save(tmp_path / "bad.onnx", nodes, [("x", ["b", 4])], [("y", ["b", 4])], weights)
    with pytest.raises(EngineError) as caught:
        build_engine(path, target("rtx4090"), BuilderOptions(), {"x": (1, 4)})
    assert refused_node(caught.value) == "off_centre"


def test_a_builders_refusal_quotes_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    weights: dict[str, Any] = {"s": np.float32(0.1).reshape(())}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], name="q", output_dtype=17),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"], name="dq"),
        helper.make_node("MatMul", ["d", "d"], ["y"], name="gemm"),
    ]
    path = save(tmp_path / "fp8.onnx", nodes, [("x", [64, 64])], [("y", [64, 64])], weights)
    with pytest.raises(EngineError, match=r"builder refuses the graph for SM80: .*fp8_e4m3"):
        compile_check(path, (8, 0), {"x": (64, 64)})


@pytest.mark.parametrize(
    ("what", "node"),
    [
        ("TensorRT's parser refuses the graph for SM80: node /a/Mul (Mul): broken; node b (Add): broken", "/a/Mul"),
        ("TensorRT's parser refuses the graph for SM80: node ? (Mul): broken", None),
        (
            "TensorRT's builder refuses …: Could not find any implementation for node {ForeignNode[/l/MatMul.../l/Add]}.",
            "/l/MatMul",
        ),
        ("TensorRT's builder refuses …: no implementation for node /l/Conv + /l/Relu.", "/l/Conv"),
        ("TensorRT's builder refuses …: layer failed [ONNX Layer: /up/MatMul] and so on", "/up/MatMul"),
        ("TensorRT's parser refuses …: node two words (Mul): broken", "two words"),
        ("TensorRT's builder refuses …: out of memory", None),
    ],
)
def test_the_refused_node_is_found_in_messages(what: str, node: str | None) -> None:
    assert refused_node(EngineError(what)) == node


def test_a_calibration_cache_for_the_installed_version() -> None:
    text = cache_bytes({"a: b": 0.5}, "MinMaxCalibration", "10.13.3.9.post1").decode()
    # 0.5 is 3f000000 as a big-endian float32.
    assert text == "TRT-101303-MinMaxCalibration\na: b: 3f000000\n"


def test_ranges_for_an_explicit_build_are_refused(onnx: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    asked = Implicit(precisions=frozenset({Precision.INT8}), scales={"x": 0.1})
    with pytest.raises(EngineError, match="both or neither"):
        build_engine(onnx, target("rtx4090"), BuilderOptions(), SHAPES, implicit=asked)


def test_an_implicit_request_needs_no_tensorrt_to_be_made() -> None:
    assert Implicit(precisions=frozenset({Precision.INT8}), scales={"x": 0.1}).data is None


def test_engines_take_turns_at_going_first() -> None:
    orders = alternating(["int8", "fp16"])
    assert [next(orders) for _ in range(3)] == [["int8", "fp16"], ["fp16", "int8"], ["int8", "fp16"]]
