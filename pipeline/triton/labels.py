"""Names of classes beside a model: the server answers a request for a classification with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import PublishError
from pipeline.types import TensorInfo

_KEY = "triton.labels"


def read_labels(path: Path) -> tuple[str, ...]:
    """Return the names in a label file, one a line.

    Raises:
        PublishError: The file cannot be read, is not UTF-8, is empty or has an empty line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PublishError(
            f"The label file cannot be read: {error}",
            where=f"{_KEY}: {path}",
            fix="Write one class on each line, in UTF-8.",
        ) from error
    empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if empty is not None or not lines:
        raise PublishError(
            f"Line {empty} of the label file is empty." if lines else "The label file is empty.",
            where=f"{_KEY}: {path}",
            fix="Write one class on each line, the first for index 0.",
        )
    return tuple(lines)


def label_text(labels: Sequence[str]) -> str:
    """Return the text of a label file."""
    return "".join(f"{label}\n" for label in labels)


def label_file(labels: Sequence[str]) -> str:
    """Return the name of a label file in a model's folder: with its content in it, so that each version finds its own."""
    return f"labels.{hashlib.sha256(label_text(labels).encode()).hexdigest()[:12]}.txt"


def labelled_output(outputs: Sequence[TensorInfo], labels: Sequence[str]) -> TensorInfo:
    """Return the output that the labels name: floats ``[batch, classes]`` with as many classes as there are labels.

    Raises:
        PublishError: There is none, or more than one.
    """
    found = [o for o in outputs if o.dtype.kind == "f" and len(o.shape) == 2 and o.shape[1] == len(labels)]
    if len(found) != 1:
        listed = ", ".join(f"{o.name} {list(o.shape)}" for o in outputs)
        raise PublishError(
            f"{len(found) or 'No'} outputs have the shape [batch, {len(labels)}] that {len(labels)} labels need: {listed}.",
            where=_KEY,
            fix="Give as many labels as the model has classes, or leave triton.labels out.",
        )
    return found[0]
