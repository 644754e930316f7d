"""A tiny text model and its ensemble: two tokens' worth of everything that serving text needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import tokenizers
import tritonclient.grpc as grpc
from onnx import TensorProto, helper, numpy_helper

from calibrators.data.spec import DataSpec
from calibrators.data.text import Encoder, encoder_of
from pipeline.recipe import DynamicBatching, TritonConfig
from pipeline.triton.ensemble import tokenizer_files, write_ensemble
from pipeline.triton.repository import write_repository
from pipeline.triton.served import ServedModel, onnx_model

WORDS = ["[PAD]", "[UNK]", "the", "cat", "sat", "on", "a", "mat"]


def text_model(path: Path, *, seed: int = 0) -> Path:
    """input_ids, attention_mask [batch, tokens] int64 -> vectors [batch, tokens, 8]."""
    table = np.random.default_rng(seed).standard_normal((len(WORDS), 8)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["vectors"]),
    ]
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "tokens"])
        for n in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["batch", "tokens", 8])]
    constants = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([-1]), "last")]
    graph = helper.make_graph(nodes, "text", inputs, outputs, constants)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def encoder(folder: Path, model: ServedModel) -> Encoder:
    """The tokenizer as calibration opens it."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    return encoder_of(DataSpec(data="test", tokenizer=folder, max_length=16), model.inputs)


def write(folder: Path, kind: str, *, seed: int = 0, delay: int = 0, maximum: int = 32) -> Path:
    """A repository with the model ``tiny`` and its ensemble; returns it."""
    served = onnx_model(text_model(folder / f"m{seed}.onnx", seed=seed), name="tiny", threads=1)
    batching = DynamicBatching(max_queue_delay_us=delay)
    config = TritonConfig(ensemble=kind, max_batch_size=maximum, dynamic_batching=batching)
    write_repository(folder / "repo", model=served, config=config)
    write_ensemble(folder / "repo", served, config, tokenizer_files(encoder(folder / "tokenizer", served)))
    return folder / "repo"


def embed(url: str, texts: list[str], model: str = "tiny_text") -> np.ndarray:
    """Ask a server's ensemble for the texts' embeddings."""
    client = grpc.InferenceServerClient(url)
    asked = grpc.InferInput("TEXT", [len(texts), 1], "BYTES")
    asked.set_data_from_numpy(np.array([[t.encode()] for t in texts], object))
    found = client.infer(model, [asked]).as_numpy("embedding")
    client.close()
    return found


def counts(url: str, model: str) -> tuple[int, int]:
    """Return how many inferences and executions of a model the server counted."""
    client = grpc.InferenceServerClient(url)
    found = client.get_inference_statistics(model, as_json=True)["model_stats"][0]
    client.close()
    return int(found.get("inference_count", 0)), int(found.get("execution_count", 0))
