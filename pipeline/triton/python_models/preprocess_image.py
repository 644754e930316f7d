"""Triton python backend: encoded pictures to a model's input, with the preprocessing that calibration used.

Runs inside the server, whose Python needs ``numpy`` and ``pillow``. ``pixels.py``, which calibration ran too, and ``preprocessing.json``
lie beside it.
"""

import io
import json
import runpy
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image


class TritonPythonModel:
    """``IMAGE [batch, 1]``, the bytes of a file each, to the model's input ``[batch, channels, height, width]``."""

    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        values = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
        self.settings, self.name, self.dtype = values["preprocessing"], values["input"], values["dtype"]
        self.pixels = runpy.run_path(str(folder / "pixels.py"))

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            files = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().reshape(-1)
            # Pictures of one request that end in different sizes are refused by numpy.
            tensor = pb_utils.Tensor(self.name, np.stack([self.array(content) for content in files]))
            return pb_utils.InferenceResponse(output_tensors=[tensor])
        except Exception as wrong:  # one request's picture must not stop the others
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"IMAGE cannot be read: {wrong}"))

    def array(self, content):
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(self.pixels["DEEP"]):
                raise ValueError(f"more than 8 bits a channel (mode {image.mode})")
            return self.pixels["converted"](self.pixels["to_array"](self.settings, image), self.dtype)
