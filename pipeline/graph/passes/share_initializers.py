"""Store equal tensors once."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
import onnx_ir as ir

from pipeline import model as files
from pipeline.graph.passes.graph_pass import GraphPass

FIRST_BYTES = 4096
"""What is compared before a tensor is read whole."""


class ShareInitializers(GraphPass):
    """Merge initializers of the main graph with the same type, shape and bytes.

    Only tensors whose type, shape and first piece agree are read whole, one piece at a time. Lazy tensors are left
    out: what they are computed from was shared before.
    """

    name = "share-initializers"

    def change(self, model: ir.Model) -> int:
        """Return the number of initializers merged away."""
        groups: dict[object, list[ir.Value]] = defaultdict(list)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if (
                tensor is None
                or isinstance(tensor, ir.LazyTensor)
                or value.is_graph_output()
                or value.is_graph_input()
                or tensor.dtype == ir.DataType.STRING
            ):
                continue
            groups[tensor.dtype, tuple(tensor.shape.numpy())].append(value)
        count = 0
        for whole in (False, True):
            groups = _split(groups, whole=whole)
        for group in groups.values():
            for value in group[1:]:
                value.replace_all_uses_with(group[0])
                del model.graph.initializers[value.name or ""]
                count += 1
        return count


def _split(groups: dict[object, list[ir.Value]], *, whole: bool) -> dict[object, list[ir.Value]]:
    finer: dict[object, list[ir.Value]] = defaultdict(list)
    for key, group in groups.items():
        for value in group if len(group) > 1 else ():
            finer[key, _digest(value, whole=whole)].append(value)
    return finer


def _digest(value: ir.Value, *, whole: bool) -> bytes:
    tensor = value.const_value
    assert tensor is not None
    digest = hashlib.sha256()
    for piece in files.chunks(tensor, piece_bytes=files.CHUNK_BYTES if whole else FIRST_BYTES):
        digest.update(np.ascontiguousarray(piece).data.cast("B") if piece.dtype.isbuiltin else piece.tobytes())
        if not whole:
            break
    return digest.digest()
