"""Triton python backend: texts to a transformer's inputs, with the tokenizer and lengths that calibration used.

Runs inside the server, whose Python needs ``numpy`` and ``tokenizers``. ``tokenizer.json`` and ``settings.json`` lie beside it.
All requests of one execution are padded to one length, so that the model behind can take them as one batch.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    """``TEXT [batch, 1]`` bytes in UTF-8 to ``input_ids``, ``attention_mask``, … ``[batch, tokens]``."""

    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def execute(self, requests):
        texts, counts, errors = [], [], []
        for request in requests:
            values = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy().reshape(-1)
            try:
                mine = [value.decode("utf-8") for value in values]
                error = None
            except UnicodeDecodeError as wrong:
                mine, error = [""] * len(values), f"TEXT is not UTF-8: {wrong}"
            texts += mine
            counts.append(len(mine))
            errors.append(error)
        feeds = collate(self.tokenizer.encode_batch(texts), self.settings)
        responses, first = [], 0
        for count, error in zip(counts, errors):
            if error is not None:
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(error)))
            else:
                rows = slice(first, first + count)
                tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array[rows])) for name, array in feeds.items()]
                responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
            first += count
        return responses


def collate(encodings, settings):
    """Return every input ``[batch, tokens]`` in the model's type."""
    lengths = [len(encoding.ids) for encoding in encodings]
    longest, step = max([1, *lengths]), settings["multiple_of"]
    # Never beyond the longest that the model takes.
    width = settings["length"] or max(longest, min(-(-longest // step) * step, settings["max_length"]))
    mask = np.zeros((len(encodings), width), np.int64)
    ids = np.full(mask.shape, settings["pad_id"], np.int64)
    types = np.full(mask.shape, settings["pad_type_id"], np.int64)
    for row, (encoding, length) in enumerate(zip(encodings, lengths)):
        place = slice(width - length, width) if settings["pad_left"] else slice(0, length)
        mask[row, place] = 1
        ids[row, place] = encoding.ids
        types[row, place] = encoding.type_ids
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "position_ids": positions}
    return {name: made[name].astype(dtype) for name, dtype in settings["inputs"].items()}
