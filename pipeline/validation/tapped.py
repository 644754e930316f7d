"""Reads inner tensors of a model, as its nodes compute them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from engines.onnxruntime import ort_value, tensor_info
from pipeline.model import read_proto
from pipeline.running.memory import open_session
from pipeline.running.session import run
from pipeline.types import Array, Feeds
from pipeline.validation.feeds import fit


class Tapped:
    """A model that also gives inner tensors; graph optimizations are off, so every tensor exists.

    Args:
        path: The model; external data beside it.
        tensors: Names of the tensors to give.
        threads: Intra-op threads, 0 for one per core.

    Raises:
        EngineError: ONNX Runtime refuses the model, or it has no such tensor.
    """

    def __init__(self, path: Path, tensors: Sequence[str], threads: int) -> None:
        proto = read_proto(path)
        known = {value.name for value in proto.graph.output}
        new = dict.fromkeys(name for name in tensors if name not in known)
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in new)
        self.tensors = list(dict.fromkeys(tensors))
        serialized = proto.SerializeToString()
        self._session = open_session(serialized, threads=threads, optimize=False, folder=path.parent, made_from=path)
        self.inputs = tuple(tensor_info(value) for value in self._session.get_inputs())

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Return the tensors by name for one batch.

        Raises:
            DataError: An input is missing.
            EngineError: ONNX Runtime fails on the batch.
        """
        wanted = {name: ort_value(values) for name, values in fit(self, feeds).items()}
        return dict(zip(self.tensors, run(self._session, self.tensors, wanted), strict=True))
