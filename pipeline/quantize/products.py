"""What a GEMM or a convolution multiplies: rows of its input and its weight as plain matrices, one for each group of channels.

A convolution is the product of its input's patches (im2col) with its weight: every method that works on ``X @ W`` works on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pipeline import model as models
from pipeline.graph.operands import Operands, operands
from pipeline.types import Array

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How a convolution walks over its input; one number for each spatial axis.

    Attributes:
        kernel: Taps.
        strides: Steps between two outputs.
        dilations: Steps between two taps.
        pads: Zeros before and after each axis, in ONNX' order: all begins, then all ends.
        same: ``SAME_UPPER`` or ``SAME_LOWER``: as many zeros as the input's size asks for, in place of ``pads``; else ``""``.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    same: str = ""

    @property
    def padded(self) -> bool:
        """Whether zeros may stand beside the input."""
        return bool(self.same) or any(self.pads)

    def patches(self, values: Array, limit: int | None) -> Array:
        """Return what each output position sees, ``[positions, channels, taps]``.

        Args:
            values: ``[batch, channels, *space]``.
            limit: At most so many positions, evenly spread over the batch and its space.
        """
        axes = len(self.kernel)
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        padded = np.pad(values, [(0, 0), (0, 0), *self._zeros(values.shape[2:], reach)])
        view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
        view = view[(slice(None), slice(None), *(slice(None, None, s) for s in self.strides))]
        view = view[(*(slice(None),) * (2 + axes), *(slice(None, None, d) for d in self.dilations))]
        places = (len(view), *view.shape[2 : 2 + axes])
        count = math.prod(places)
        kept = min(count, limit or count)
        batch, *where = np.unravel_index(np.arange(kept) * count // max(kept, 1), places)
        found: Array = view[(batch, slice(None), *where)]
        return found.reshape(kept, values.shape[1], math.prod(self.kernel))

    def _zeros(self, space: tuple[int, ...], reach: list[int]) -> list[tuple[int, int]]:
        axes = len(self.kernel)
        if not self.same:
            return [(self.pads[axis], self.pads[axis + axes]) for axis in range(axes)]
        found = []
        for size, stride, width in zip(space, self.strides, reach, strict=True):
            total = max((-(-size // stride) - 1) * stride + width - size, 0)
            less, more = total // 2, total - total // 2
            found.append((less, more) if self.same == "SAME_UPPER" else (more, less))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a node reads its input: products with the same one read the same rows.

    Attributes:
        groups: Groups of channels that are multiplied apart.
        window: A convolution's; ``None`` is a GEMM, whose channels are the last axis.
    """

    groups: int = 1
    window: Window | None = None

    def rows(self, values: Array, mask: Array | None = None, limit: int | None = None) -> F32:
        """Return the rows that are multiplied, ``[groups, rows, products summed]``.

        Args:
            values: The input.
            mask: 0 at padding, ``[batch, positions]``; left out where a GEMM reads such positions.
            limit: At most so many rows: the first of a GEMM, evenly spread ones of a convolution.
        """
        if self.window is None:
            if mask is not None and values.ndim >= 3 and values.shape[:2] == mask.shape:
                values = values[mask != 0]
            found: F32 = values.reshape(1, -1, values.shape[-1])[:, :limit].astype(np.float32)
            return found
        patches = self.window.patches(values, limit).astype(np.float32)
        grouped = patches.reshape(len(patches), self.groups, -1)
        return np.ascontiguousarray(grouped.transpose(1, 0, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A node with a constant weight, as products of matrices.

    Attributes:
        node: MatMul, Gemm or Conv.
        what: Its operands.
        reading: How it reads its input.
        shape: The stored weight's.
    """

    node: ir.Node
    what: Operands
    reading: Reading
    shape: tuple[int, ...]

    @property
    def channel_axis(self) -> int:
        """Return which axis of the input is its channels."""
        return -1 if self.reading.window is None else 1

    @property
    def channels(self) -> npt.NDArray[np.int64]:
        """Return which channel of the input each row of the weight multiplies, ``[groups, products summed]``."""
        groups = self.reading.groups
        if self.reading.window is None:
            return np.arange(self.shape[1 - (self.what.channel_axis or 0)])[None]
        each = np.arange(groups * self.shape[1]).reshape(groups, self.shape[1])
        return np.repeat(each, math.prod(self.shape[2:]), axis=1)

    def weight(self) -> F32:
        """Return the weight as ``[groups, products summed, outputs of a group]``; outputs follow each other group by group."""
        assert self.what.weight is not None
        value = self.node.inputs[self.what.weight]
        assert value is not None
        assert value.const_value is not None
        weight = models.read(value.const_value).astype(np.float32)
        if self.reading.window is None:
            return (weight if self.what.channel_axis == 1 else weight.T)[None]
        outputs = self.shape[0] // self.reading.groups
        by_group: F32 = weight.reshape(self.reading.groups, outputs, -1).transpose(0, 2, 1)
        return by_group

    def stored(self, values: Array) -> Array:
        """Return such matrices in the layout in which the node stores its weight."""
        if self.reading.window is None:
            found: Array = values[0] if self.what.channel_axis == 1 else values[0].T
            return found
        return values.transpose(0, 2, 1).reshape(self.shape)

    def by_channel(self, scale: Array) -> Array:
        """Return a factor for each input channel in a shape that broadcasts over the stored weight."""
        if self.reading.window is None:
            return scale if self.what.channel_axis == 0 else scale[:, None]
        groups = self.reading.groups
        each: Array = np.repeat(scale.reshape(groups, -1), self.shape[0] // groups, axis=0)
        found: Array = each.reshape(*each.shape, *[1] * (len(self.shape) - 2))
        return found

    def by_output(self, scale: Array) -> Array:
        """Return a factor for each output channel in a shape that broadcasts over the stored weight."""
        axis = self.what.channel_axis or 0
        found: Array = scale.reshape([-1 if i == axis else 1 for i in range(len(self.shape))])
        return found


def product(node: ir.Node) -> Product | None:
    """Return a node's product; ``None`` where it has no constant weight or is a transposed convolution."""
    what = operands(node)
    if what is None or what.weight is None or node.op_type not in ("MatMul", "Gemm", "Conv"):
        return None
    shape = what.weight_shape(node)
    if not shape or not all(shape):
        return None
    reading = (
        Reading() if node.op_type != "Conv" else Reading(groups=_int(node, "group", 1), window=_window(node, shape))
    )
    return Product(node=node, what=what, reading=reading, shape=shape)


def product_of(node: ir.Node) -> Product:
    """Return the product of a node that is known to have one."""
    found = product(node)
    assert found is not None
    return found


def _window(node: ir.Node, shape: tuple[int, ...]) -> Window:
    axes = len(shape) - 2
    same = node.attributes.get("auto_pad")
    kind = "" if same is None else same.as_string()
    return Window(
        kernel=shape[2:],
        strides=_ints(node, "strides", axes),
        dilations=_ints(node, "dilations", axes),
        pads=_ints(node, "pads", 2 * axes, 0) if kind in ("", "NOTSET") else (0,) * (2 * axes),
        same=kind if kind.startswith("SAME") else "",
    )


def _ints(node: ir.Node, name: str, count: int, default: int = 1) -> tuple[int, ...]:
    found = node.attributes.get(name)
    return (default,) * count if found is None else tuple(found.as_ints())


def _int(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else found.as_int()
