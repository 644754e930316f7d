"""Triton python backend: an ONNX model by ONNX Runtime on the CPU, for a server that has no onnxruntime backend.

Runs inside the server, whose Python needs ``numpy`` and ``onnxruntime``. Requests of one execution whose shapes agree are one batch.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Serves ``model.onnx`` beside it."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        options = ort.SessionOptions()
        threads = config.get("parameters", {}).get("intra_op_thread_count", {}).get("string_value")
        options.intra_op_num_threads = int(threads or 0)
        # As the pipeline measures: this fusion is slower on CPUs.
        self.session = ort.InferenceSession(
            str(folder / "model.onnx"),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["SkipLayerNormFusion"],
        )
        self.batched = int(config.get("max_batch_size", 0)) > 0
        self.ranks = {value.name: len(value.shape) for value in self.session.get_inputs()}
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests):
        feeds = [self.feeds(request) for request in requests]
        groups: dict[object, list[int]] = {}
        for index, feed in enumerate(feeds):
            alike = tuple(array.shape[1:] for array in feed.values()) if self.batched else index
            groups.setdefault(alike, []).append(index)
        responses = [None] * len(requests)
        for members in groups.values():
            for index, response in zip(members, self.answers([feeds[i] for i in members])):
                responses[index] = response
        return responses

    def feeds(self, request):
        found = {}
        for name, rank in self.ranks.items():
            array = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            # A [batch] tensor travels as [batch, 1].
            found[name] = array.reshape(array.shape[:rank]) if array.ndim > rank else array
        return found

    def answers(self, feeds):
        joined = {name: np.concatenate([f[name] for f in feeds]) for name in feeds[0]} if len(feeds) > 1 else feeds[0]
        try:
            values = self.session.run(self.outputs, joined)
        except Exception as error:  # one request's fault must not stop the server
            refused = pb_utils.TritonError(str(error))
            return [pb_utils.InferenceResponse(error=refused) for _ in feeds]
        found, first = [], 0
        for feed in feeds:
            count = len(next(iter(feed.values()))) if len(feeds) > 1 else None
            rows = slice(first, None if count is None else first + count)
            tensors = [
                pb_utils.Tensor(n, np.ascontiguousarray(v if count is None else v[rows]))
                for n, v in zip(self.outputs, values)
            ]
            found.append(pb_utils.InferenceResponse(output_tensors=tensors))
            first += count or 0
        return found
