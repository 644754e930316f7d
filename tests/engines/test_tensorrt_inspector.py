"""Inspector JSON of TensorRT 10.x and 11.x, from samples in its documentation, not from engines built here."""

from __future__ import annotations

import json

import pytest

from engines.compiled_layers import CompiledLayers
from engines.tensorrt.inspector import parse_inspector
from pipeline.errors import EngineError

# The convolution is the sample of the 10.x documentation ("Engine Inspector"); the reformat's sentences are from a public
# 10.x engine dump, the Myelin layers' form (types as single words, ONNX origins in the metadata) from public tests.
SAMPLE_10 = {
    "Layers": [
        {
            "Name": "node_of_gpu_0/res4_0_branch2a_1 + node_of_gpu_0/res4_0_branch2a_bn_2",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {
                    "Name": "gpu_0/res3_3_branch2c_bn_3",
                    "Dimensions": [16, 512, 28, 28],
                    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format.",
                }
            ],
            "Outputs": [
                {
                    "Name": "gpu_0/res4_0_branch2a_bn_2",
                    "Dimensions": [16, 256, 28, 28],
                    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format.",
                }
            ],
            "ParameterType": "Convolution",
            "Kernel": [1, 1],
            "Groups": 1,
            "Weights": {"Type": "Int8", "Count": 131072},
            "Bias": {"Type": "Float", "Count": 256},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32",
            "TacticValue": "0x11bde0e1d9f2f35d",
            "Metadata": "[ONNX Layer: conv]\x1f[ONNX Layer: relu]",
        },
        {
            "Name": "Reformatting CopyNode for Input Tensor 0",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "x", "Dimensions": [1, 3, 4, 4], "Format/Datatype": "Row major linear FP16 format"}],
            "Outputs": [
                {
                    "Name": "r",
                    "Dimensions": [1, 3, 4, 4],
                    "Format/Datatype": "Channel major FP16 format where channel % 4 == 0",
                }
            ],
            "Metadata": "",
        },
        {
            "Name": "v_projection_fused",
            "LayerType": "fusion",
            "Inputs": [{"Name": "a", "Dimensions": [8, 16], "Format/Datatype": "Int8"}],
            "Constants": [{"Name": "w", "Dimensions": [16, 32], "Format/Datatype": "Int8"}],
            "Outputs": [{"Name": "v", "Dimensions": [8, 32], "Format/Datatype": "Half"}],
            "TacticName": "sm80_xmma_gemm_i8f32_i8i32_f32_by_fusion_tactic",
            "Metadata": "[ONNX Layer: v_projection]",
        },
        {"Name": "pad", "LayerType": "NoOp", "Inputs": [], "Outputs": []},
    ],
    "Bindings": ["x", "y"],
}

# The keys that "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x" gives for inputs and outputs, in layers.
SAMPLE_11 = {
    "Layers": [
        {
            "Name": "gemm_0",
            "LayerType": "gemm",
            "Inputs": [
                {
                    "Name": "tokens",
                    "Dimensions": [8, 16],
                    "Format": "Row major linear FP8 format (kLINEAR)",
                    "DataType": "FP8",
                }
            ],
            "Constants": [
                {"Name": "w", "Dimensions": [16, 4], "Format": "Row major linear format (kLINEAR)", "Datatype": "FP8"}
            ],
            "Outputs": [{"Name": "out", "Dimensions": [8, 4], "Format": "kLINEAR", "DataType": "BFloat16"}],
            "TacticName": "sm90_tactic",
            "Metadata": "[ONNX Layer: /proj/MatMul]",
        }
    ],
    "I/O Tensors": [{"Name": "tokens", "IOMode": "Input", "DataType": "Float", "Dimensions": [8, 16]}],
}


def test_layers_of_10() -> None:
    conv, reformat, gemm, pad = parse_inspector(json.dumps(SAMPLE_10))
    assert (conv.kind, conv.origins) == ("correlation", ("conv", "relu"))
    assert [t.dtype for t in (*conv.inputs, *conv.constants, *conv.outputs)] == ["Int8", "Int8", "Float", "Int8"]
    assert conv.is_low_precision
    # A 1x1 convolution: two operations for every weight, at every output position of every image.
    assert conv.flops == pytest.approx(2 * 131072 * 16 * 28 * 28)
    assert conv.bytes_moved == 16 * 512 * 28 * 28 + 131072 + 4 * 256 + 16 * 256 * 28 * 28
    assert (reformat.kind, reformat.inputs[0].dtype, reformat.outputs[0].dtype) == ("reformat", "Half", "Half")
    assert (gemm.kind, gemm.is_low_precision, gemm.flops) == ("gemm", True, 2 * 8 * 16 * 32)
    assert not pad.is_kernel


def test_layers_of_11() -> None:
    (gemm,) = parse_inspector(json.dumps(SAMPLE_11))
    assert [t.dtype for t in (*gemm.inputs, *gemm.constants, *gemm.outputs)] == ["FP8", "FP8", "BF16"]
    assert gemm.origins == ("/proj/MatMul",)
    assert gemm.bytes_moved == 8 * 16 + 16 * 4 + 2 * 8 * 4


def test_compiled_layers_of_full_tensorrt_add_up_and_survive_json() -> None:
    layers = CompiledLayers(
        builder="tensorrt 10.13",
        compute_capability="SM80",
        engine_bytes=1,
        layers=parse_inspector(json.dumps(SAMPLE_10)),
    )
    assert (layers.kernels, layers.low_precision_flops_share) == (3, 1.0)
    assert layers.of_node("relu")[0].kind == "correlation"
    assert CompiledLayers.from_json(layers.to_json()) == layers


def test_names_alone_are_layers_without_tensors() -> None:
    (layer,) = parse_inspector('{"Layers": ["conv + relu"], "Bindings": []}')
    assert (layer.name, layer.inputs, layer.flops) == ("conv + relu", (), 0.0)


@pytest.mark.parametrize("text", ["", "Layers:", "[]", '{"Bindings": []}'])
def test_another_text_is_an_error(text: str) -> None:
    with pytest.raises(EngineError, match="not the JSON"):
        parse_inspector(text)


@pytest.mark.parametrize(
    ("sentence", "dtype"),
    [
        ("Row major linear FP32", "Float"),
        ("Four wide channel vectorized row major Int8 format", "Int8"),
        ("Row major INT32 format", "Int32"),
        ("Row major linear UInt8 format", "UInt8"),
        ("Float", "Float"),
        ("Int64", "Int64"),
        ("BF16", "BF16"),
        ("Boolean", "Bool"),
        ("FP8", "FP8"),
        ("E8M0", "E8M0"),
        ("Unheard of", "Unheard of"),
    ],
)
def test_types_are_read_from_words_and_sentences(sentence: str, dtype: str) -> None:
    raw = {"Layers": [{"Name": "n", "LayerType": "kgen", "Inputs": [{"Name": "i", "Format/Datatype": sentence}]}]}
    assert parse_inspector(json.dumps(raw))[0].inputs[0].dtype == dtype
