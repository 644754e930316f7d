"""From an encoded picture to the array that a vision model takes; needs numpy and Pillow alone.

The server of an image ensemble runs this very file (see :mod:`pipeline.triton.ensemble`), so it imports nothing else.
``settings`` are the fields of :class:`calibrators.data.preprocessing.Preprocessing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""In the order of Pillow's ``Resampling`` codes, which ``preprocessor_config.json`` stores."""
DEEP = ("I", "F")
"""Pillow modes of more than 8 bits a channel (``I;16`` and the like begin with ``I``); converting them clips."""


def resized(settings: Mapping[str, Any], width: int, height: int) -> tuple[int, int]:
    """Return ``(width, height)`` after resizing a picture of that size."""
    size = settings["size"]
    if size is None:
        return width, height
    if not isinstance(size, int):
        return size[1], size[0]
    if settings["resize"] == "exact":
        return size, size
    short, long = min(width, height), max(width, height)
    other = max(1, int(size * long / short))
    return (size, other) if width <= height else (other, size)


def to_array(settings: Mapping[str, Any], image: Any) -> npt.NDArray[np.float32]:
    """Return a Pillow image as a float32 array ``[channels, height, width]`` or ``[height, width, channels]``."""
    from PIL import Image

    image = image.convert("L" if settings["channels"] == "gray" else "RGB")
    target = resized(settings, image.width, image.height)
    if target != image.size:
        image = image.resize(target, Image.Resampling(INTERPOLATIONS.index(settings["interpolation"])))
    pixels = np.asarray(image, np.float32)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    pixels = pixels[..., ::-1] if settings["channels"] == "bgr" else pixels
    crop = settings["crop"]
    if crop is not None:
        pixels = _centre(pixels, (crop, crop) if isinstance(crop, int) else crop)
    mean, std = np.asarray(settings["mean"], np.float32), np.asarray(settings["std"], np.float32)
    values = (pixels * np.float32(settings["scale"]) - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1) if settings["layout"] == "nchw" else values, np.float32)


def converted(array: npt.NDArray[np.float32], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return the array in the model's type.

    Raises:
        ValueError: The type is an integer and the values are fractions or do not fit.
    """
    wanted = np.dtype(dtype)
    if wanted.kind == "f":
        return array.astype(wanted, copy=False)
    limits = np.iinfo(wanted)
    if array.min() < limits.min or array.max() > limits.max or np.any(array != np.rint(array)):
        raise ValueError(f"The preprocessing makes fractions or values that the model's {wanted} input cannot hold.")
    return array.astype(wanted)


def _centre(pixels: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Return the centre of ``[height, width, channels]``, padded with zeros where it is smaller."""
    for axis, want in enumerate(size):
        have = pixels.shape[axis]
        if have < want:
            before = (want - have + 1) // 2  # as transformers.image_transforms.center_crop rounds
            width = [(0, 0)] * 3
            width[axis] = (before, want - have - before)
            pixels = np.pad(pixels, width)
        else:
            start = (have - want) // 2
            pixels = pixels[start : start + want] if axis == 0 else pixels[:, start : start + want]
    return pixels
