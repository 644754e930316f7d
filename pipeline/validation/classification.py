"""Accuracy and F1 of a classifier, of samples or of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.errors import DataError
from pipeline.notices import notice
from pipeline.types import Array, CalibrationData, Runner
from pipeline.validation.feeds import fit, size_of
from pipeline.validation.labels import IGNORE


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Scores the class with the largest output.

    ``accuracy`` gives ``accuracy``; ``f1`` gives ``f1_macro`` (the mean over the classes that occur in the labels or
    the predictions, a class never predicted right counting 0), ``f1_micro`` (of the pooled counts; with one label a
    sample it equals accuracy), ``f1`` (the macro one) and ``accuracy``.

    Attributes:
        name: ``accuracy`` or ``f1``.
        labels: ``[samples]``, or ``[samples, tokens]``; int64, -100 counts for nothing.
        where: The labels' file, for errors.
    """

    name: str
    labels: Array
    where: str = "labels"

    def score(self, runner: Runner, data: CalibrationData) -> dict[str, float | None]:
        """Return the metrics of one model; only counts are kept between batches.

        Raises:
            DataError: There are fewer labels than samples, no output fits them, or a label is no class.
        """
        if len(self.labels) < len(data):
            raise DataError(
                f"There are {len(self.labels)} labels for {len(data)} samples.",
                where=self.where,
                fix="Give a label for every sample, in the samples' order.",
            )
        if len(self.labels) > len(data):
            notice("labels-unused", f"The first {len(data)} of {len(self.labels)} labels are used.", where=self.where)
        counts = np.zeros((3, 0), np.int64)  # right, predicted, labelled; by class
        start = 0
        for feeds in data:
            end = start + size_of(feeds)
            logits = self._logits(runner.infer(fit(runner, feeds)))
            counts = _add(counts, *self._aligned(logits, self.labels[start:end]), classes=logits.shape[-1])
            start = end
        return self._metrics(counts)

    def _logits(self, outputs: Mapping[str, Array]) -> Array:
        """Return the output to take classes from: ``logits`` if there is one, else the first of a fitting rank."""
        rank = self.labels.ndim + 1
        fitting = {
            name: values
            for name, values in outputs.items()
            if values.ndim == rank and values.shape[-1] > 1 and np.issubdtype(values.dtype, np.floating)
        }
        if not fitting:
            raise DataError(
                f"No output of the model has {rank} axes with the classes on the last one.",
                where=self.where,
                fix=f"Outputs are {', '.join(f'{k} {list(v.shape)}' for k, v in outputs.items())}; "
                "for anything else write a task of your own (package.module:callable).",
            )
        return fitting.get("logits", next(iter(fitting.values())))

    def _aligned(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """Return predictions and labels that count, both flat."""
        classes = logits.shape[-1]
        if self.labels.ndim == 2:
            width = logits.shape[1]
            if (labels[:, width:] != IGNORE).any():
                raise DataError(
                    f"A sample has more labels than the model's {width} tokens.",
                    where=self.where,
                    fix=f"Give a label for every token (use {IGNORE} for those that do not count).",
                )
            filled = np.full((len(labels), width), IGNORE, np.int64)
            filled[:, : labels.shape[1]] = labels[:, :width]
            labels = filled
        counted = labels != IGNORE
        wanted = labels[counted]
        if wanted.size and (wanted.min() < 0 or wanted.max() >= classes):
            wrong = int(wanted.min()) if wanted.min() < 0 else int(wanted.max())
            raise DataError(
                f"Label {wrong} is none of the model's {classes} classes.",
                where=self.where,
                fix=f"Give class numbers from 0 to {classes - 1}.",
            )
        return logits.argmax(-1)[counted], wanted

    def _metrics(self, counts: Array) -> dict[str, float | None]:
        right, predicted, labelled = counts
        total = int(labelled.sum())
        if not total:
            raise DataError("Every label is one that does not count.", where=self.where)
        accuracy = float(right.sum() / total)
        if self.name == "accuracy":
            return {"accuracy": accuracy}
        occurs = predicted + labelled > 0
        macro = float(np.mean(2 * right[occurs] / (predicted + labelled)[occurs]))
        micro = float(2 * right.sum() / (predicted.sum() + labelled.sum()))
        return {"f1": macro, "f1_macro": macro, "f1_micro": micro, "accuracy": accuracy}


def _add(counts: Array, predicted: Array, wanted: Array, *, classes: int) -> Array:
    """Return ``counts`` (``[3, classes]``) with one batch added."""
    if counts.shape[1] < classes:
        counts = np.pad(counts, ((0, 0), (0, classes - counts.shape[1])))
    counts[0] += np.bincount(wanted[predicted == wanted], minlength=counts.shape[1])
    counts[1] += np.bincount(predicted, minlength=counts.shape[1])
    counts[2] += np.bincount(wanted, minlength=counts.shape[1])
    return counts
