"""Reader of a folder of pictures.

Pictures in several folders (one a class, usually) are taken in turns, one from each, so that the first ones of them
cover all classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibrators.data import pixels
from calibrators.data.arrays import natural
from calibrators.data.batches import Sample
from calibrators.data.fit import Fit, Shape, shown
from calibrators.data.pixels import DEEP
from calibrators.data.preprocessing import Preprocessing
from pipeline.errors import DataError, MissingError
from pipeline.model import sha256
from pipeline.types import Array, TensorInfo

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def in_turns(files: Sequence[Path]) -> list[Path]:
    """Return files one from each folder in turn, folders and names in natural order."""
    folders: defaultdict[Path, list[Path]] = defaultdict(list)
    for file in sorted(files, key=natural):
        folders[file.parent].append(file)
    return [file for file in chain.from_iterable(zip_longest(*folders.values())) if file is not None]


class ImageSamples:
    """Pictures as arrays, decoded anew in every reading.

    Args:
        folder: The folder that holds them.
        files: The pictures, in order.
        fit: The model's inputs: one of rank 4.
        preprocessing: How a picture becomes an array.

    Raises:
        DataError: The model takes something else than one picture, or a picture does not fit it or is broken.
        MissingError: Pillow is not installed.
    """

    def __init__(self, folder: Path, files: Sequence[Path], fit: Fit, preprocessing: Preprocessing) -> None:
        self.where = str(folder)
        self.files = tuple(files)
        """The pictures in the order of the samples."""
        self._preprocessing = preprocessing
        self._input = _picture_input(fit, self.where)
        self._kinds: list[Shape] = []
        for file in self.files:
            with _opened(file) as image:  # reads the header only
                self._kinds.append(preprocessing.shape(image.width, image.height))
            fit.check(self._input, np.dtype(self._input.dtype), self._kinds[-1], str(file))

    def kinds(self) -> Iterable[Shape]:
        """Return every picture's shape after preprocessing."""
        return self._kinds

    def __iter__(self) -> Iterator[Sample]:
        """Decode the pictures."""
        for file, kind in zip(self.files, self._kinds, strict=True):
            with _opened(file) as image:
                array = self._preprocessing.apply(image)
            yield Sample(where=str(file), feeds={self._input.name: self._converted(array, file)}, kind=kind)

    def _converted(self, array: Array, file: Path) -> Array:
        try:
            return pixels.converted(array, self._input.dtype)
        except ValueError as error:
            raise DataError(
                str(error), where=str(file), fix="Set scale: 1, mean: 0 and std: 1 in the preprocessing."
            ) from error

    def digest(self) -> str:
        """Return the SHA-256 of the pictures and of the preprocessing."""
        facts = [[sha256(file) for file in self.files], self._preprocessing.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _picture_input(fit: Fit, where: str) -> TensorInfo:
    info = fit.inputs[0]
    if len(fit.inputs) != 1 or len(info.shape) != 4 or info.dtype.kind not in "fiu":
        listed = ", ".join(f"{i.name} {i.dtype} {shown(i.shape)}" for i in fit.inputs)
        raise DataError(
            f"Pictures need a model with one input of 4 dimensions; this one has {listed}.",
            where=where,
            fix="Give the data as .npz with an array per input.",
        )
    return info


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingError("Reading pictures needs Pillow.", where=str(file), fix="pip install '.[images]'") from error
    try:
        with Image.open(file) as image:
            if image.mode.startswith(DEEP):
                raise DataError(
                    f"The picture has more than 8 bits a channel (mode {image.mode}), which Pillow would clip.",
                    where=str(file),
                    fix="Preprocess such pictures yourself and give .npz.",
                )
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"The picture cannot be decoded: {error}", where=str(file), fix="Replace or remove the file."
        ) from error
