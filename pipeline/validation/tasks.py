"""Task metrics: what the network is for, scored by the same code for FP32 and for the engine."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from calibrators.data.spec import DataSpec
from calibrators.data.windows import windows
from pipeline.errors import DataError, PipelineError, RecipeError
from pipeline.recipe import Validation
from pipeline.types import CalibrationData, Runner, TensorInfo
from pipeline.validation.classification import Classification
from pipeline.validation.labels import read_labels, read_pairs
from pipeline.validation.language import Perplexity
from pipeline.validation.lookup import require
from pipeline.validation.similarity import EmbeddingSimilarity

BUILT_IN = ("accuracy", "f1", "embedding-similarity", "perplexity")


class Task(Protocol):
    """Something that scores a model."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    def score(self, runner: Runner, data: CalibrationData) -> dict[str, float | None]:
        """Return metric name to value; ``None`` where it is undefined.

        Args:
            runner: FP32 or the engine.
            data: The validation samples.

        Raises:
            PipelineError: The labels, the data and the model's outputs do not go together.
        """
        ...


Metric = Callable[[Runner, CalibrationData, Path | None], Mapping[str, float]]
"""A user's task: ``def score(runner, data, labels) -> {"name": value}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserTask:
    """The user's ``package.module:callable``, called with ``(runner, data, labels)``; ``labels`` may be ``None``."""

    name: str
    function: Metric
    labels: Path | None = None

    def score(self, runner: Runner, data: CalibrationData) -> dict[str, float | None]:
        """Return what the user's function does.

        Raises:
            DataError: It fails, or returns no mapping of names to numbers.
        """
        try:
            values: Any = self.function(runner, data, self.labels)
        except PipelineError:
            raise
        except Exception as error:  # the user's code
            raise DataError(f"The task failed: {type(error).__name__}: {error}", where=self.name) from error
        if not isinstance(values, Mapping):
            raise self._wrong(f"It returned a {type(values).__name__}, not a mapping")
        try:
            floats = {str(name): float(value) for name, value in values.items()}
        except (TypeError, ValueError) as error:
            raise self._wrong(f"It returned something that is no number: {error}") from error
        return {name: value if math.isfinite(value) else None for name, value in floats.items()}

    def _wrong(self, what: str) -> DataError:
        return DataError(f"{what}.", where=self.name, fix='Return {"metric name": number}.')


def open_task(config: Validation, inputs: Sequence[TensorInfo]) -> Task | None:
    """Return the recipe's task, its labels read and checked; ``None`` if it names none.

    Args:
        config: The recipe's ``validate`` section.
        inputs: The model's inputs.

    Raises:
        RecipeError: An unknown task, no labels, or the user's code without ``trust_data``.
        DataError: The labels or the user's function cannot be read.
    """
    if config.task is None:
        return None
    labels = Path(config.labels) if config.labels is not None else None
    if ":" in config.task:
        return UserTask(name=config.task, function=_import(config.task, trusted=config.trust_data), labels=labels)
    require(config.task, [*BUILT_IN, "package.module:callable"], "validate.task")
    spec = DataSpec(
        data=str(labels),
        tokenizer=config.tokenizer,
        max_length=config.max_length,
        batch_size=config.batch_size,
    )
    if config.task == "perplexity":
        return Perplexity(text=windows(labels, spec, inputs, stride=config.stride) if labels is not None else None)
    if labels is None:
        raise RecipeError(
            f"The task {config.task} needs labels.",
            where="validate.labels",
            fix="Name a file (see docs/validation.md).",
        )
    if config.task == "embedding-similarity":
        return EmbeddingSimilarity.of_pairs(read_pairs(labels), spec, inputs)
    return Classification(name=config.task, labels=read_labels(labels), where=str(labels))


def _import(name: str, *, trusted: bool) -> Metric:
    if not trusted:
        raise RecipeError(
            "The task is code, which is not run unless you say so.",
            where=f"validate.task: {name}",
            fix="If you trust it, set trust_data: true (--trust-data).",
        )
    module, _, attribute = name.partition(":")
    folder = str(Path.cwd())  # not on the path by itself: only code that the user trusts is looked for there
    try:
        if folder not in sys.path and "" not in sys.path:
            sys.path.insert(0, folder)
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # the user's module may fail in any way while it is imported
        raise DataError(
            f"It cannot be imported: {type(error).__name__}: {error}",
            where=f"validate.task: {name}",
            fix="Write package.module:callable, and run from the folder that holds the package (or install it).",
        ) from error
    if not callable(found):
        raise DataError(f"It is a {type(found).__name__}, no function.", where=f"validate.task: {name}")
    function: Metric = found
    return function
