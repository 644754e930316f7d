"""LayerNormalization, GELU and BatchNormalization: recognised in every spelling, and only there."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from canonical_models import assert_same, canonical, ops, parse, run_ort

RNG = np.random.default_rng(7)
X = RNG.standard_normal((2, 3, 8)).astype(np.float32)

SQUARES = {"pow": "s = Pow(d, two)", "mul": "s = Mul(d, d)"}
ENDS = {
    "div": "n = Div(d, r)",
    "reciprocal": "q = Reciprocal(r)\n n = Mul(q, d)",
    "one-over": "q = Div(one, r)\n n = Mul(d, q)",
    "two-subs": "d2 = Sub(x, m)\n n = Div(d2, r)",
}
AFFINE = {"scale-bias": "t = Mul(n, w)\n y = Add(b, t)", "scale": "y = Mul(w, n)", "none": "y = Identity(n)"}


def layer_norm(square: str, end: str, affine: str, *, opset: int = 17) -> onnx.ModelProto:
    reduce = "<axes = [-1]>(x)" if opset < 18 else "(x, axes)"
    again = "<axes = [2]>(s)" if opset < 18 else "(s, axes)"
    weights = ", ".join(f"{v:.3f}" for v in RNG.standard_normal(8))
    return parse(
        f"""g (float[N, 3, 8] x) => (float[N, 3, 8] y)
        <float two = {{2.0}}, float one = {{1.0}}, float eps = {{0.00001}}, int64[1] axes = {{-1}},
         float[8] w = {{{weights}}}, float[8] b = {{{weights}}}> {{
            m = ReduceMean{reduce}
            d = Sub(x, m)
            {square}
            v = ReduceMean{again}
            e = Add(v, eps)
            r = Sqrt(e)
            {end}
            {affine}
        }}""",
        opset=opset,
    )


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("end", ENDS)
def test_layer_norm_is_found_in_every_spelling(square: str, end: str, opset: int) -> None:
    for affine in AFFINE.values():
        source = layer_norm(SQUARES[square], ENDS[end], affine, opset=opset)
        model = canonical(source)
        assert ops(model) == {"LayerNormalization": 1}
        assert_same(source, model, {"x": X})


def test_layer_norm_with_another_axis_or_a_shared_part_stays() -> None:
    source = layer_norm(SQUARES["pow"], ENDS["div"], AFFINE["scale"])
    for node in source.graph.node:
        if node.op_type == "ReduceMean":
            node.attribute[0].ints[:] = [1]
    source.graph.initializer[4].CopyFrom(onnx.numpy_helper.from_array(np.ones(8, np.float32), "w"))
    model = canonical(source)
    assert "LayerNormalization" not in ops(model)
    assert_same(source, model, {"x": X})

    shared = layer_norm(SQUARES["pow"], ENDS["div"], AFFINE["scale"])
    shared.graph.output.append(onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, ["N", 3, 1]))
    model = canonical(shared)
    assert "LayerNormalization" not in ops(model)
    assert_same(shared, model, {"x": X})


GELUS = {
    "legacy": ("none", "a = Div(x, root2)\n e = Erf(a)\n p = Add(e, one)\n m = Mul(x, p)\n y = Mul(m, half)"),
    "dynamo": ("none", "a = Div(x, root2)\n e = Erf(a)\n p = Add(e, one)\n m = Mul(half, p)\n y = Mul(x, m)"),
    "scaled-input": ("none", "a = Mul(root05, x)\n e = Erf(a)\n p = Add(one, e)\n h = Mul(x, half)\n y = Mul(h, p)"),
    "divided": ("none", "a = Mul(x, root05)\n e = Erf(a)\n p = Add(one, e)\n h = Mul(x, p)\n y = Div(h, two)"),
    "tanh-pow": (
        "tanh",
        "c = Pow(x, three)\n k = Mul(c, coef)\n i = Add(x, k)\n z = Mul(i, root2pi)\n t = Tanh(z)\n"
        "p = Add(t, one)\n m = Mul(half, p)\n y = Mul(x, m)",
    ),
    "tanh-muls": (
        "tanh",
        "q = Mul(x, x)\n c = Mul(x, q)\n k = Mul(coef, c)\n i = Add(k, x)\n z = Mul(root2pi, i)\n t = Tanh(z)\n"
        "p = Add(one, t)\n h = Mul(half, x)\n y = Mul(h, p)",
    ),
    "tanh-factored": (
        "tanh",
        "q = Mul(x, coef)\n c = Mul(x, q)\n i = Add(one, c)\n w = Mul(x, root2pi)\n z = Mul(w, i)\n t = Tanh(z)\n"
        "p = Add(one, t)\n h = Mul(half, x)\n y = Mul(h, p)",
    ),
}
NUMBERS = (
    "<float root2 = {1.4142135}, float root05 = {0.70710678}, float one = {1.0}, float half = {0.5}, float two = {2.0},"
    " float three = {3.0}, float coef = {0.044715}, float root2pi = {0.79788456}>"
)


@pytest.mark.parametrize("spelling", GELUS)
def test_gelu_is_found_in_every_spelling(spelling: str) -> None:
    kind, body = GELUS[spelling]
    source = parse(f"g (float[N, 3, 8] x) => (float[N, 3, 8] y) {NUMBERS} {{ {body} }}")
    model = canonical(source)
    assert ops(model) == {"Gelu": 1}
    assert [a.as_string() for a in model.graph[0].attributes.values()] == ([] if kind == "none" else ["tanh"])
    assert_same(source, model, {"x": X})


def test_gelu_of_a_product_is_found() -> None:
    body = "x = Mul(u, v)\n" + GELUS["legacy"][1]
    source = parse(f"g (float[N, 3, 8] u, float[N, 3, 8] v) => (float[N, 3, 8] y) {NUMBERS} {{ {body} }}")
    model = canonical(source)
    assert ops(model) == {"Mul": 1, "Gelu": 1}
    assert_same(source, model, {"u": X, "v": X + 1})


@pytest.mark.parametrize(
    "body",
    [
        "a = Div(x, two)\n e = Erf(a)\n p = Add(e, one)\n m = Mul(x, p)\n y = Mul(m, half)",
        "a = Div(x, root2)\n e = Erf(a)\n p = Add(e, two)\n m = Mul(x, p)\n y = Mul(m, half)",
        "a = Div(x, root2)\n e = Erf(a)\n p = Add(e, one)\n m = Mul(x, p)\n y = Mul(m, one)",
        "a = Div(x, root2)\n e = Erf(a)\n p = Add(e, one)\n m = Mul(x, x)\n k = Mul(m, half)\n y = Mul(k, p)",
        "z = Mul(x, half)\n t = Tanh(z)\n p = Add(t, one)\n m = Mul(half, p)\n y = Mul(x, m)",
    ],
)
def test_what_is_nearly_a_gelu_stays(body: str) -> None:
    source = parse(f"g (float[N, 3, 8] x) => (float[N, 3, 8] y) {NUMBERS} {{ {body} }}")
    model = canonical(source)
    assert "Gelu" not in ops(model)
    assert_same(source, model, {"x": X})


def batch_norm(body: str, inputs: str, **tensors: np.ndarray) -> onnx.ModelProto:
    model = parse(f"g ({inputs}) => (float y) {{ {body} }}", opset=15)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(3)
    channels = tensors.pop("channels")
    statistics = {name: rng.standard_normal(channels).astype(np.float32) for name in ("scale", "shift", "mean")}
    statistics["var"] = rng.uniform(0.1, 2, channels).astype(np.float32)
    for name, array in {**tensors, **statistics}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


NORM = "y = BatchNormalization<epsilon = 0.001>(c, scale, shift, mean, var)"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", ["conv", "grouped", "transposed", "transposed-grouped", "gemm", "gemm-trans"])
def test_batch_norm_is_folded(case: str, bias: bool) -> None:
    rng = np.random.default_rng(11)
    body, inputs, shape, channels, feed = {
        "conv": ("Conv<pads = [1, 1, 1, 1]>", "float[N, 4, 5, 5] x", (6, 4, 3, 3), 6, (2, 4, 5, 5)),
        "grouped": ("Conv<group = 2>", "float[N, 4, 5, 5] x", (6, 2, 3, 3), 6, (2, 4, 5, 5)),
        "transposed": ("ConvTranspose", "float[N, 4, 5, 5] x", (4, 6, 3, 3), 6, (2, 4, 5, 5)),
        "transposed-grouped": ("ConvTranspose<group = 2>", "float[N, 4, 5, 5] x", (4, 3, 3, 3), 6, (2, 4, 5, 5)),
        "gemm": ("Gemm<alpha = 0.5, beta = 2.0>", "float[N, 4] x", (4, 6), 6, (3, 4)),
        "gemm-trans": ("Gemm<transB = 1>", "float[N, 4] x", (6, 4), 6, (3, 4)),
    }[case]
    tensors = {"w": rng.standard_normal(shape).astype(np.float32)}
    if bias:
        tensors["b"] = rng.standard_normal(channels).astype(np.float32)
    source = batch_norm(f"c = {body}(x, w{', b' if bias else ''})\n {NORM}", inputs, channels=channels, **tensors)
    model = canonical(source)
    assert ops(model) == {body.split("<")[0]: 1}
    # onnx's reference ConvTranspose does not do groups
    assert_same(source, model, {"x": rng.standard_normal(feed).astype(np.float32)}, 1e-4, run_ort)


def test_batch_norm_after_a_shared_convolution_stays() -> None:
    weights = np.random.default_rng(1).standard_normal((6, 4, 3, 3)).astype(np.float32)
    source = batch_norm(f"c = Conv(x, w)\n {NORM}", "float[N, 4, 5, 5] x", channels=6, w=weights)
    source.graph.output.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, None))
    model = canonical(source)
    assert ops(model) == {"Conv": 1, "BatchNormalization": 1}


def test_a_large_weight_is_folded_lazily() -> None:
    import onnx_ir as ir

    weights = np.random.default_rng(1).standard_normal((256, 256, 3, 3)).astype(np.float32)
    source = batch_norm(f"c = Conv(x, w)\n {NORM}", "float[N, 256, 3, 3] x", channels=256, w=weights)
    model = canonical(source)
    conv = model.graph[0]
    assert isinstance(conv.inputs[1].const_value, ir.LazyTensor)
    assert_same(source, model, {"x": np.ones((1, 256, 3, 3), np.float32)}, 1e-3)
