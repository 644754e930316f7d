"""The one door to every reader."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from calibrators.data import arrays, images, npy, records, text, windows
from calibrators.data.batches import Batches, Samples
from calibrators.data.callables import CallableSamples
from calibrators.data.fit import Fit
from calibrators.data.preprocessing import preprocessing
from calibrators.data.spec import DataSpec
from pipeline.errors import DataError
from pipeline.types import CalibrationData, TensorInfo

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
FORMATS = ".npz, .npy, .jsonl, .txt, a folder of .npy/.npz or of pictures, or package.module:callable"


def open_data(spec: DataSpec, inputs: Sequence[TensorInfo]) -> CalibrationData:
    """Return the samples that ``spec`` names as batches for a model with these inputs.

    The result is sized, can be read again and again, gives the same batches in the same order, and holds one batch at
    a time. Samples keep their order. Names, types, ranks and fixed dimensions are checked here, before anything runs;
    only what needs the values themselves (an int64 that does not fit int32) is found while reading.

    Args:
        spec: What to read.
        inputs: The model's inputs. A fixed batch dimension wins over ``spec.batch_size``; samples that do not fill
            it are left out, with a notice.

    Raises:
        DataError: The data is missing, malformed or does not fit the model; says which array and where.
        MissingError: A package that the format needs is not installed.
    """
    check_place(spec.data)
    path = Path(spec.data)
    if not _exists(path):
        return _called(spec, inputs)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in records.SUFFIXES:
        return windows.joined(path, spec, inputs) if spec.join else text.text_file(path, spec, inputs)
    if spec.join:
        raise DataError("Only texts can be joined.", where=spec.data, fix="Leave `join` out, or give .jsonl or .txt.")
    fit = Fit.of(inputs)
    if path.is_dir():
        return _batches(_folder(path, spec, fit), fit, spec)
    if suffix in npy.SUFFIXES:
        return _batches(arrays.ArraySamples([path], fit, limit=spec.samples, where=spec.data), fit, spec)
    if suffix in images.SUFFIXES:
        raise DataError("One picture is no data set.", where=spec.data, fix="Name the folder that holds the pictures.")
    raise DataError(f"Files like {suffix or path.name!r} are not read.", where=spec.data, fix=f"Read are {FORMATS}.")


def check_place(data: str) -> None:
    """Refuse a place where nothing is; costs nothing, so it can be done long before the data is read.

    Raises:
        DataError: ``data`` is no file or folder that exists, and no ``package.module:callable``.
    """
    if not _exists(Path(data)) and not _CALLABLE.fullmatch(data):
        raise DataError("There is no such file or folder.", where=data, fix=f"Check the path. Read are {FORMATS}.")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise DataError(
            f"The data cannot be read: {error.strerror or error}.", where=str(path), fix="Check the path."
        ) from error


def _batches(samples: Samples, fit: Fit, spec: DataSpec) -> CalibrationData:
    return Batches(samples, fit, batch_size=spec.batch_size)


def _called(spec: DataSpec, inputs: Sequence[TensorInfo]) -> CalibrationData:
    if not spec.trust_data:
        raise DataError(
            "The data is code, which is not run unless you say so.",
            where=spec.data,
            fix="If you trust it, set trust_data: true (--trust-data).",
        )
    fit = Fit.of(inputs)
    return _batches(CallableSamples(spec.data, fit, limit=spec.samples), fit, spec)


def _folder(path: Path, spec: DataSpec, fit: Fit) -> Samples:
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    numpy_files = sorted((file for file in files if file.suffix.lower() in npy.SUFFIXES), key=arrays.natural)
    pictures = [file for file in files if file.suffix.lower() in images.SUFFIXES]
    if numpy_files and pictures:
        raise DataError(
            f"The folder holds both arrays ({numpy_files[0].name}) and pictures ({pictures[0].name}).",
            where=spec.data,
            fix="Keep one kind in it.",
        )
    if numpy_files:
        return arrays.ArraySamples(numpy_files, fit, limit=spec.samples, where=spec.data)
    if pictures:
        chosen = images.in_turns(pictures)[: spec.samples]
        how = preprocessing(spec.preprocessing, spec.tokenizer, spec.data)
        return images.ImageSamples(path, chosen, fit, how)
    texts = sorted(file.name for file in files if file.suffix.lower() in records.SUFFIXES)
    raise DataError(
        "The folder holds no .npy, .npz or pictures.",
        where=spec.data,
        fix=f"Name the file itself: {spec.data}/{texts[0]}." if texts else f"Read are {FORMATS}.",
    )
