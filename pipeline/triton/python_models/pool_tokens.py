"""Triton python backend: token vectors to one embedding a text, the mean over real tokens, of length 1.

Runs inside the server, whose Python needs ``numpy``.
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """``[batch, tokens, width]`` and ``attention_mask [batch, tokens]`` to ``embedding [batch, width]`` float32."""

    def initialize(self, args):
        names = [tensor["name"] for tensor in json.loads(args["model_config"])["input"]]
        self.vectors = next(name for name in names if name != "attention_mask")

    def execute(self, requests):
        responses = []
        for request in requests:
            vectors = pb_utils.get_input_tensor_by_name(request, self.vectors).as_numpy()
            mask = pb_utils.get_input_tensor_by_name(request, "attention_mask").as_numpy()
            tensor = pb_utils.Tensor("embedding", pool(vectors, mask))
            responses.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
        return responses


def pool(vectors, mask):
    """Return the mean vector over the tokens whose mask is not 0, divided by its length."""
    weights = (mask > 0).astype(np.float32)[..., None]
    mean = (vectors.astype(np.float32) * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
