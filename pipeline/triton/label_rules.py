"""Rules of label files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.triton.problem import Problem
from pipeline.triton.protobuf import ModelConfig


def check_labels(folder: Path, config: ModelConfig, *, where: str) -> Iterator[Problem]:
    """Yield the label files that the server would refuse, or whose lines are not the classes.

    Args:
        folder: The model's folder, which label files are looked for in.
        config: Its configuration.
        where: The configuration's file.
    """
    for output in config.output:
        if not output.label_filename:
            continue
        path, place = folder / output.label_filename, f"{where}: output {output.name!r}"
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            message, fix = f"There is no label file {output.label_filename!r} in the model's folder.", "Put it there."
        else:
            # As the server splits it: a line of spaces is a label, what follows the last newline is one only if it is there.
            count = len(path.read_bytes().removesuffix(b"\n").split(b"\n"))
            classes = output.dims[-1] if output.dims else -1
            if classes in (-1, count):
                continue
            message, fix = f"The file has {count} labels, the output {classes} classes.", "Write a line for each class."
        yield Problem(rule="labels", severity="error", where=place, message=message, fix=fix)
