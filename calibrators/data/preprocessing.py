"""From a picture to the array that a vision model takes, as the recipe or ``preprocessor_config.json`` says.

The order is the usual one: resize, centre crop, channels, scale, normalise, layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calibrators.data import pixels
from calibrators.data.pixels import INTERPOLATIONS
from pipeline.errors import DataError
from pipeline.types import Array

if TYPE_CHECKING:
    from PIL import Image

Pixels = Annotated[int, Field(ge=1, le=16384)]
Size = Pixels | tuple[Pixels, Pixels]


class Preprocessing(BaseModel):
    """How a picture becomes an array. Unknown keys fail."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    size: Size | None = None
    """Height and width after resizing; one number is read as ``resize`` says. ``null`` leaves the picture's size."""
    resize: Literal["shortest-edge", "exact"] = "shortest-edge"
    """With one number as ``size``: the shorter edge gets it and the aspect stays, or both edges get it."""
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bilinear"
    """How pixels are interpolated (Pillow's filters)."""
    crop: Size | None = None
    """Height and width of the centre crop; a smaller picture is padded with zeros."""
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    """Channel order, or one channel."""
    scale: float = 1 / 255
    """Multiplies the pixels (0 to 255) first."""
    mean: tuple[float, ...] | float = 0.0
    """Subtracted after scaling; one number or one a channel, in the order of ``channels``."""
    std: tuple[float, ...] | float = 1.0
    """Divides after that; likewise."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """Where the channel axis is."""

    @model_validator(mode="after")
    def _channels(self) -> Self:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) not in (1, self.depth):
                raise ValueError(f"{name} has {len(value)} numbers for {self.depth} channels ({self.channels})")
        if not np.all(np.asarray(self.std)):
            raise ValueError("std must not be 0")
        return self

    @property
    def depth(self) -> int:
        """Number of channels."""
        return 1 if self.channels == "gray" else 3

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return ``(width, height)`` after resizing a picture of that size."""
        return pixels.resized(self.model_dump(), width, height)

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return the shape of the array for a picture of that size, without the batch axis."""
        width, height = self.resized(width, height)
        if self.crop is not None:
            height, width = self.crop if isinstance(self.crop, tuple) else (self.crop, self.crop)
        return (self.depth, height, width) if self.layout == "nchw" else (height, width, self.depth)

    def apply(self, image: Image.Image) -> Array:
        """Return the picture as a float32 array ``[channels, height, width]`` or ``[height, width, channels]``."""
        return pixels.to_array(self.model_dump(), image)


def preprocessing(values: dict[str, Any] | None, folder: Path | None, where: str) -> Preprocessing:
    """Return the preprocessing that the recipe spells out, or that a ``preprocessor_config.json`` says.

    Args:
        values: The recipe's ``preprocessing``. ``{huggingface: folder or file}`` reads the file and may be followed by
            keys that replace its values.
        folder: Folder whose ``preprocessor_config.json`` is used when there are no values.
        where: What to call the data in errors.

    Raises:
        DataError: Nothing says how to preprocess, or a key or value is wrong or not supported.
    """
    values = dict(values or {})
    source = values.pop("huggingface", None)
    if source is None and not values and folder is not None and (folder / _CONFIG).is_file():
        source = folder
    if source is None and not values:
        raise DataError(
            "Nothing says how pictures become the model's input.",
            where=where,
            fix="Set `preprocessing: {size: 256, crop: 224, mean: [...], std: [...]}`, or "
            "`preprocessing: {huggingface: FOLDER}` for a folder with preprocessor_config.json.",
        )
    base = _from_huggingface(Path(source)) if source is not None else {}
    try:
        return Preprocessing.model_validate({**base, **values})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'values'}: {e['msg']}" for e in error.errors())
        raise DataError(
            f"The preprocessing is wrong: {problems}.",
            where=str(source or where),
            fix=f"The keys are {', '.join(Preprocessing.model_fields)}.",
        ) from error


_CONFIG = "preprocessor_config.json"


def _from_huggingface(path: Path) -> dict[str, Any]:
    file = path / _CONFIG if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"It cannot be read: {error}", where=str(file), fix="Check the path.") from error
    for key in ("do_pad", "do_thumbnail", "do_align_long_axis"):
        if config.get(key):
            raise DataError(
                f"{key} is not supported.", where=str(file), fix="Preprocess the pictures yourself and give .npz."
            )
    grey = config.get("do_grayscale")
    values: dict[str, Any] = {"scale": 1.0, "channels": "gray" if grey else "rgb"}
    if config.get("do_flip_channel_order"):
        values["channels"] = "bgr"
    if config.get("do_rescale", True):
        values["scale"] = config.get("rescale_factor", 1 / 255)
    if config.get("do_normalize", True) and config.get("image_mean") is not None:
        values |= {"mean": config["image_mean"], "std": config["image_std"]}
    if config.get("do_resize", True):
        values |= _resize(config, file)
    if config.get("do_center_crop"):
        values["crop"] = _pair(config.get("crop_size", config.get("size")), file)
    return values


def _resize(config: dict[str, Any], file: Path) -> dict[str, Any]:
    code = config.get("resample", 2)
    if code not in range(len(INTERPOLATIONS)):
        raise DataError(f"resample {code!r} is no Pillow filter.", where=str(file))
    found: dict[str, Any] = {"interpolation": INTERPOLATIONS[code]}
    size = config.get("size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    if config.get("crop_pct") and isinstance(edge, int):  # ConvNeXT: resize a little larger, then crop to the edge
        if edge >= 384:
            return found | {"size": edge, "resize": "exact"}
        return found | {"size": int(edge / config["crop_pct"]), "resize": "shortest-edge", "crop": edge}
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return found | {"size": size["shortest_edge"], "resize": "shortest-edge"}
    if isinstance(size, int):  # before the keys had names; with a crop it was the shorter edge
        return found | {"size": size, "resize": "shortest-edge" if config.get("do_center_crop") else "exact"}
    return found | {"size": _pair(size, file)}


def _pair(size: object, file: Path) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, list) and len(size) == 2:
        return size[0], size[1]
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        return size["height"], size["width"]
    raise DataError(
        f"The size {size!r} is not supported.", where=str(file), fix="Set size and crop in the recipe's preprocessing."
    )
