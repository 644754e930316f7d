"""Convolutions as products: patches, smoothing into what is in front of them, GPTQ; and networks of depthwise ones survive INT8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import model as models
from pipeline.build import BuildOptions, build
from pipeline.notices import collecting
from pipeline.quantize.products import product
from pipeline.quantize.transforms.groups import groups
from pipeline.quantize.transforms.smooth import apply
from pipeline.quantize.transforms.smoothing import Smoothing, by_tensor
from pipeline.quantize.transforms.smoothing_search import search
from pipeline.recipe import parse
from pipeline.types import Role
from tests.quantize import graphs
from tests.quantize.planning import plan_for
from tests.quantize.planning import plan_for as planned

DRAW = np.random.default_rng
CHANNELS = 16


def conv(reader: str, weight: str, out: str, name: str, bias: str = "", **attributes: object) -> onnx.NodeProto:
    return helper.make_node("Conv", [reader, weight, *([bias] if bias else [])], [out], name=name, **attributes)


@pytest.mark.parametrize(
    ("weight", "attributes", "space"),
    [
        ((6, 4, 3, 3), {"pads": [1, 1, 1, 1]}, (7, 9)),
        ((6, 4, 3, 2), {"pads": [0, 1, 2, 0], "strides": [2, 1]}, (7, 9)),
        ((8, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}, (6, 6)),  # depthwise, two outputs a channel
        ((6, 2, 3, 3), {"group": 2, "dilations": [2, 1]}, (9, 8)),
        ((6, 4, 1, 1), {"strides": [2, 2]}, (5, 5)),
        ((5, 4, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (7, 8)),
        ((5, 4, 2, 4), {"auto_pad": "SAME_LOWER"}, (7, 8)),
        ((5, 4, 3), {"pads": [2, 0], "dilations": [2]}, (12,)),
        ((5, 4, 2, 2, 3), {"auto_pad": "VALID"}, (4, 5, 6)),
    ],
)
def test_rows_times_weight_are_the_convolution(
    tmp_path: Path, weight: tuple[int, ...], attributes: dict[str, object], space: tuple[int, ...]
) -> None:
    draw = DRAW(0)
    values = draw.normal(size=(3, 4, *space)).astype(np.float32)
    w = draw.normal(size=weight).astype(np.float32)
    nodes = [conv("x", "w", "y", "conv", **attributes)]
    path = graphs.save(
        tmp_path / "m.onnx", nodes, [("x", ["b", 4, *space])], [("y", ["n", "o", *"hwd"[: len(space)]])], {"w": w}
    )
    with OnnxRuntimeRunner(path) as runner:
        expected = runner.infer({"x": values})["y"]
    made = product(next(iter(models.load(path).graph)))
    assert made is not None
    rows = made.reading.rows(values)
    got = np.concatenate(list(rows @ made.weight()), axis=1)  # groups follow each other in the output channels
    by_position = np.moveaxis(expected, 1, -1).reshape(-1, weight[0])
    np.testing.assert_allclose(got, by_position, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(made.stored(made.weight()), w)
    scale = draw.uniform(1, 2, 4).astype(np.float32)
    np.testing.assert_array_equal(
        made.stored(made.weight() * scale[made.channels][:, :, None]), w * made.by_channel(scale)
    )
    few = made.reading.rows(values, limit=5)
    assert few.shape == (rows.shape[0], 5, rows.shape[2])
    assert all((rows[0] == row).all(axis=1).any() for row in few[0])


def chain(path: Path, kind: str, *, offset: float = 0.0) -> Path:
    """x -> Conv "first" -> something -> Conv "second" -> y."""
    draw = DRAW(1)
    shape = (CHANNELS, CHANNELS, 1, 1)
    weights = {n: (draw.normal(size=shape) / 4).astype(np.float32) for n in ("w1", "w2")}
    weights["w1"] *= np.exp(draw.normal(size=(CHANNELS, 1, 1, 1))).astype(np.float32)  # uneven channels
    weights |= {
        "b1": draw.normal(size=CHANNELS).astype(np.float32),
        "b2": draw.normal(size=CHANNELS).astype(np.float32),
    }
    weights["b1"] += np.float32(offset)
    weights |= {"one": np.float32([0.8]), "each": draw.uniform(0.5, 2, (CHANNELS, 1, 1)).astype(np.float32)}
    second = conv("t", "w2", "y", "second", "b2")
    make = helper.make_node
    middle = {
        "relu": [make("Relu", ["c"], ["t"], name="relu")],
        "pooled": [
            make("LeakyRelu", ["c"], ["r"], name="leaky"),
            make("MaxPool", ["r"], ["t"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        ],
        "constants": [
            make("Sigmoid", ["c"], ["s"], name="sigmoid"),
            make("Mul", ["one", "s"], ["m"], name="factor"),
            make("Add", ["m", "each"], ["t"], name="summand"),
        ],
        "divided": [make("Exp", ["c"], ["s"], name="exp"), make("Div", ["s", "each"], ["t"], name="divisor")],
        "excitation": [
            make("HardSwish", ["c"], ["h"], name="swish"),
            make("GlobalAveragePool", ["h"], ["g"], name="squeeze"),
            make("Sigmoid", ["g"], ["s"], name="gate"),
            make("Mul", ["h", "s"], ["t"], name="excite"),
        ],
        "nonlinear": [make("HardSwish", ["c"], ["t"], name="swish")],
        "padded": [make("Relu", ["c"], ["t"], name="relu")],
        "depthwise": [make("Relu", ["c"], ["t"], name="relu")],
        "direct": [make("Identity", ["c"], ["t"], name="same")],
        "relu6": [make("Clip", ["c", "zero", "six"], ["t"], name="relu6")],
    }[kind]
    if kind in ("padded", "depthwise"):
        weights["w2"] = draw.normal(size=(CHANNELS, 1 if kind == "depthwise" else CHANNELS, 3, 3)).astype(np.float32)
        group = CHANNELS if kind == "depthwise" else 1
        second = conv("t", "w2", "y", "second", pads=[1, 1, 1, 1], group=group)
    if kind == "relu6":
        weights |= {"zero": np.float32(0), "six": np.float32(6)}
    if kind == "direct":
        middle, second = [], conv("c", "w2", "y", "second")
    nodes = [conv("x", "w1", "c", "first", "b1"), *middle, second]
    return graphs.save(
        path, nodes, [("x", ["b", CHANNELS, 8, 8])], [("y", ["n", "o", "h", "w"])], _used(nodes, weights)
    )


def _used(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    read = {name for node in nodes for name in node.input}
    return {name: values for name, values in weights.items() if name in read}


def ranges(path: Path, feeds: dict[str, np.ndarray], tensor: str) -> tuple[np.ndarray, np.ndarray]:
    proto = onnx.load(path)
    proto.graph.output.append(onnx.ValueInfoProto(name=tensor))
    exposed = path.with_name("exposed.onnx")
    onnx.save(proto, exposed)
    with OnnxRuntimeRunner(exposed) as runner:
        values = runner.infer(feeds)[tensor]
    return values.min(axis=(0, 2, 3)), values.max(axis=(0, 2, 3))


FREE = ("relu", "pooled", "constants", "divided", "padded", "depthwise", "direct")


@pytest.mark.parametrize("kind", [*FREE, "excitation", "nonlinear", "relu6"])
@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
def test_smoothing_a_convolution_keeps_the_float_function(tmp_path: Path, kind: str, family: str) -> None:
    path = chain(tmp_path / "m.onnx", kind)
    feeds = {"x": DRAW(2).normal(size=(4, CHANNELS, 8, 8)).astype(np.float32)}
    plan = plan_for(path, family, {"second"}, smooth=0.8)
    model = models.load(path)
    tensor = "c" if kind == "direct" else "t"
    (group,) = groups(model, plan)
    assert (group.tensor, group.axis) == (tensor, 1)
    extremes = ranges(path, feeds, tensor)
    chosen = by_tensor(search(path, plan, {tensor: extremes}, [feeds]))
    assert set(chosen) == {tensor}
    before = len(model.graph)
    changed = apply(model, chosen)
    added = [n.op_type for n in model.graph][: len(model.graph)].count("Mul") - [
        n.op_type for n in models.load(path).graph
    ].count("Mul")
    assert len(model.graph) - before == (0 if kind in FREE else 1 + chosen[tensor].shifted)
    assert added == (0 if kind in FREE else 1)
    assert tensor in changed or kind in ("nonlinear", "relu6")
    models.save(model, tmp_path / "smoothed.onnx")
    with OnnxRuntimeRunner(path) as one, OnnxRuntimeRunner(tmp_path / "smoothed.onnx") as two:
        expected, got = one.infer(feeds)["y"], two.infer(feeds)["y"]
    assert np.abs(got - expected).max() / np.abs(expected).max() <= 1e-5
    if kind in FREE:  # the tensor that is quantized is the one that was divided
        low, high = ranges(tmp_path / "smoothed.onnx", feeds, tensor)
        smoothing = chosen[tensor]
        np.testing.assert_allclose(low, (extremes[0] - smoothing.shift) / smoothing.scale, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(high, (extremes[1] - smoothing.shift) / smoothing.scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "may_shift"), [("constants", True), ("direct", True), ("relu", False), ("padded", False)]
)
def test_channels_are_shifted_only_where_no_zeros_are_read_beside_and_something_takes_it_in(
    tmp_path: Path, kind: str, may_shift: bool
) -> None:
    path = chain(tmp_path / "m.onnx", kind, offset=8.0)  # nearly all values are above 0
    feeds = {"x": DRAW(3).normal(size=(4, CHANNELS, 8, 8)).astype(np.float32)}
    tensor = "c" if kind == "direct" else "t"
    low, high = ranges(path, feeds, tensor)
    (found,) = search(path, plan_for(path, "gpu-int8", {"second"}, smooth=0.8), {tensor: (low, high)}, [feeds])
    assert found.shifted is may_shift


def test_somebody_else_who_reads_the_tensor_keeps_it(tmp_path: Path) -> None:
    draw = DRAW(4)
    weights = {n: draw.normal(size=(CHANNELS, CHANNELS, 1, 1)).astype(np.float32) for n in ("w1", "w2")}
    nodes = [
        conv("x", "w1", "c", "first"),
        helper.make_node("Relu", ["c"], ["t"], name="relu"),
        conv("t", "w2", "d", "second"),
        helper.make_node("Mul", ["d", "t"], ["y"], name="also"),
    ]
    path = graphs.save(
        tmp_path / "m.onnx", nodes, [("x", ["b", CHANNELS, 4, 4])], [("y", ["n", "o", "h", "w"])], weights
    )
    ones = np.ones(CHANNELS, np.float32)
    (group,) = groups(models.load(path), plan_for(path, "gpu-int8", {"second"}))
    smoothing = Smoothing(
        group=group, alpha=0.5, shifted=False, scale=ones * 2, shift=ones * 0, error=0.0, plain_error=1.0
    )
    model = models.load(path)
    apply(model, {"t": smoothing})
    assert [n.op_type for n in model.graph].count("Mul") == 2
    # On a CPU the first convolution writes INT8 itself: a Mul behind its quantizer would gain nothing.
    assert groups(models.load(path), plan_for(path, "cpu", {"first", "second"})) == groups(
        models.load(path), plan_for(path, "cpu", {"first"})
    )


def mobile(path: Path, *, seed: int = 5) -> Path:
    """Three inverted residuals as in MobileNet and EfficientNet, with channels as uneven as training leaves depthwise layers."""
    draw = DRAW(seed)
    weights: dict[str, np.ndarray] = {}
    nodes: list[onnx.NodeProto] = []

    def layer(reader: str, name: str, shape: tuple[int, ...], *, spread: float, **attributes: object) -> str:
        fan = float(np.prod(shape[1:]))
        scale = np.exp(spread * draw.normal(size=(shape[0], 1, 1, 1)))
        weights[f"{name}_w"] = (draw.normal(size=shape) / np.sqrt(fan) * scale).astype(np.float32)
        weights[f"{name}_b"] = (0.3 * draw.normal(size=shape[0]) * scale.reshape(-1)).astype(np.float32)
        nodes.append(conv(reader, f"{name}_w", f"{name}_c", name, f"{name}_b", **attributes))
        return f"{name}_c"

    current = "x"
    for index, activation in enumerate(("relu6", "silu", "relu6")):
        wide = layer(current, f"expand{index}", (64, CHANNELS, 1, 1), spread=1.2)
        wide = _activated(nodes, weights, wide, activation)
        deep = layer(wide, f"depthwise{index}", (64, 1, 3, 3), spread=1.2, group=64, pads=[1, 1, 1, 1])
        deep = _activated(nodes, weights, deep, activation)
        narrow = layer(deep, f"project{index}", (CHANNELS, 64, 1, 1), spread=0.2)
        nodes.append(helper.make_node("Add", [narrow, current], [f"s{index}"], name=f"skip{index}"))
        current = f"s{index}"
    nodes.append(helper.make_node("GlobalAveragePool", [current], ["y"], name="pool"))
    return graphs.save(path, nodes, [("x", ["b", CHANNELS, 16, 16])], [("y", ["n", "o", "h", "w"])], weights)


def _activated(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], value: str, kind: str) -> str:
    if kind == "relu6":
        weights |= {"zero": np.float32(0), "six": np.float32(6)}
        nodes.append(helper.make_node("Clip", [value, "zero", "six"], [f"{value}_a"], name=f"{value}/relu6"))
    else:
        nodes.append(helper.make_node("Sigmoid", [value], [f"{value}_s"], name=f"{value}/sigmoid"))
        nodes.append(helper.make_node("Mul", [value, f"{value}_s"], [f"{value}_a"], name=f"{value}/silu"))
    return f"{value}_a"


def quantized(tmp_path: Path, source: Path, target: str, **policy: str) -> tuple[float, Path]:
    """Build and return the SQNR in dB on data that was not calibrated on, and the variant."""
    values = DRAW(6).normal(size=(96, CHANNELS, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=values[:64])
    recipe = parse(
        {
            "source": {"onnx": str(source)},
            "calibration": {"data": str(tmp_path / "data.npz"), "samples": 64},
            "policy": policy,
            "targets": [target],
        }
    )
    out = tmp_path / "-".join(["out", target, *policy.values()])
    with collecting():
        build(recipe, out, options=BuildOptions(until="quantize"))
    variant = out / "variants" / {"cpu": "cpu", "a100": "gpu-int8"}[target] / "model.onnx"
    with OnnxRuntimeRunner(source) as one, OnnxRuntimeRunner(variant, optimize=target == "cpu") as two:
        expected, got = one.infer({"x": values[64:]})["y"], two.infer({"x": values[64:]})["y"]
    noise = np.square(got.astype(np.float64) - expected).sum()
    return float(10 * np.log10(np.square(expected, dtype=np.float64).sum() / noise)), variant


def test_networks_of_depthwise_convolutions_survive_int8(tmp_path: Path) -> None:
    source = mobile(tmp_path / "m.onnx")
    plain, _ = quantized(tmp_path, source, "a100", smooth="off", rounding="rtn")
    rounded, _ = quantized(tmp_path, source, "a100", smooth="off", rounding="gptq")
    default, variant = quantized(tmp_path, source, "a100")
    assert (variant.parent / "rounding/index.json").exists()  # GPTQ is the default here
    assert rounded > plain
    assert default > plain + 2
    assert default > 24


def test_on_a_cpu_a_corrected_bias_is_stored_in_the_accumulator_s_scale_and_the_kernels_fuse(tmp_path: Path) -> None:
    source = mobile(tmp_path / "m.onnx")
    plain, _ = quantized(tmp_path, source, "cpu", smooth="off", rounding="rtn")
    better, variant = quantized(tmp_path, source, "cpu", smooth="off", rounding="gptq")
    assert better > plain
    stored = {i.name: i for i in onnx.load(variant).graph.initializer}
    corrected = [n for n in stored if "_corrected" in n and n.endswith("_quantized")]
    assert corrected
    assert {stored[n].data_type for n in corrected} == {onnx.TensorProto.INT32}


def test_gptq_gives_a_convolution_without_a_bias_one(tmp_path: Path) -> None:
    draw = DRAW(7)
    weights = {"w": (draw.normal(size=(CHANNELS, CHANNELS, 3, 3)) / 12).astype(np.float32)}
    nodes = [helper.make_node("Relu", ["x"], ["r"], name="relu"), conv("r", "w", "y", "conv", pads=[1, 1, 1, 1])]
    source = graphs.save(
        tmp_path / "m.onnx", nodes, [("x", ["b", CHANNELS, 16, 16])], [("y", ["n", "o", "h", "w"])], weights
    )
    results = {}
    for target in ("cpu", "a100"):
        for rounding in ("rtn", "gptq"):
            results[target, rounding], variant = quantized(tmp_path, source, target, smooth="off", rounding=rounding)
            (made,) = (n for n in onnx.load(variant).graph.node if n.op_type == "Conv")
            assert len([i for i in made.input if i]) == (3 if rounding == "gptq" else 2)
    # What the weights' rounding costs is small beside the activations', but there is less of it.
    assert results["a100", "gptq"] > results["a100", "rtn"]


def test_a_bias_that_would_overflow_in_the_rounded_weight_s_scale_is_kept(tmp_path: Path) -> None:
    draw = DRAW(8)
    weights = {"w": (1e-6 * draw.normal(size=(CHANNELS, CHANNELS, 1, 1))).astype(np.float32)}
    weights["b"] = np.float32([1e6, *[1.0] * (CHANNELS - 1)])
    nodes = [helper.make_node("Relu", ["x"], ["r"], name="relu"), conv("r", "w", "y", "conv", "b")]
    source = graphs.save(
        tmp_path / "m.onnx", nodes, [("x", ["b", CHANNELS, 16, 16])], [("y", ["n", "o", "h", "w"])], weights
    )
    decibel, _ = quantized(tmp_path, source, "cpu", smooth="off", rounding="gptq")
    assert decibel > 40  # the output is its bias


def test_a_residual_add_keeps_its_convolution_s_input_as_it_is(tmp_path: Path) -> None:
    weights = {"w": DRAW(9).normal(size=(CHANNELS, CHANNELS, 1, 1)).astype(np.float32)}
    nodes = [
        helper.make_node("Relu", ["x"], ["t"], name="relu"),
        conv("t", "w", "d", "second"),
        helper.make_node("Add", ["d", "t"], ["y"], name="skip"),
    ]
    path = graphs.save(
        tmp_path / "m.onnx", nodes, [("x", ["b", CHANNELS, 4, 4])], [("y", ["n", "o", "h", "w"])], weights
    )
    model = models.load(path)
    residual = planned(path, "gpu-int8", {"second", "skip"}, roles={"skip": Role.RESIDUAL_ADD})
    assert groups(model, residual) == ()  # a Mul would have to be undone for the add
    assert len(groups(model, planned(path, "gpu-int8", {"second"}))) == 1
