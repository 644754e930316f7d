"""Rules of an ensemble: its models are there, and what one gives the next takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.triton.problem import Problem
from pipeline.triton.protobuf import ModelConfig, type_name

_Tensor = tuple[int, tuple[int, ...]]


def check_ensemble(config: ModelConfig, models: Mapping[str, ModelConfig], *, where: str) -> Iterator[Problem]:
    """Yield the problems of one ensemble.

    Args:
        config: The ensemble's configuration.
        models: Every configuration of the repository by name.
        where: The configuration's file.
    """
    known: dict[str, _Tensor] = {t.name: (t.data_type, tuple(t.dims)) for t in config.input}
    if not config.ensemble_scheduling.step:
        yield _problem("ensemble-model", where, "The ensemble has no steps.", "Name the models that it joins.")
    for index, step in enumerate(config.ensemble_scheduling.step):
        place = f"{where}: step[{index}] {step.model_name}"
        model = models.get(step.model_name)
        if model is None:
            yield _problem(
                "ensemble-model", place, "The repository has no such model.", "Publish it, or correct its name."
            )
            continue
        if config.max_batch_size > model.max_batch_size:
            yield _problem(
                "ensemble-batch",
                place,
                f"The ensemble takes batches of {config.max_batch_size}, this model of at most {model.max_batch_size}.",
                "Give both one max_batch_size.",
            )
        yield from _given(step, model, known, place)
        made = {t.name: (t.data_type, tuple(t.dims)) for t in model.output}
        for name, tensor in step.output_map.items():
            if name not in made:
                yield _problem("ensemble-tensor", place, f"The model has no output {name!r}.", "Correct output_map.")
            else:
                known[tensor] = made[name]
    for tensor in config.output:
        if tensor.name not in known:
            what = f"No step makes the output {tensor.name!r}."
            yield _problem("ensemble-tensor", where, what, "Correct the output_map of the step that should.")
        else:
            yield from _agree(known[tensor.name], (tensor.data_type, tuple(tensor.dims)), f"{where}: {tensor.name!r}")


def _given(step: ModelConfig, model: ModelConfig, known: Mapping[str, _Tensor], place: str) -> Iterator[Problem]:
    takes = {t.name: (t.data_type, tuple(t.dims)) for t in model.input}
    for name in sorted(set(takes) ^ set(step.input_map)):
        what = f"The model's input {name!r} is given nothing." if name in takes else f"The model has no input {name!r}."
        yield _problem("ensemble-tensor", place, what, "Map every input of the model and no other.")
    for name, tensor in step.input_map.items():
        if name not in takes:
            continue
        if tensor not in known:
            what = f"Nothing before this step makes the tensor {tensor!r}."
            yield _problem("ensemble-tensor", place, what, "Correct input_map, or the order of the maps before.")
        else:
            yield from _agree(known[tensor], takes[name], f"{place}: {name!r}")


def _agree(given: _Tensor, taken: _Tensor, place: str) -> Iterator[Problem]:
    if given[0] != taken[0]:
        what = f"The tensor is {type_name(given[0])} where it is made and {type_name(taken[0])} where it is read."
        yield _problem("ensemble-type", place, what, "Give both the same type.")
    fit = len(given[1]) == len(taken[1]) and all(
        a == b or -1 in (a, b) for a, b in zip(given[1], taken[1], strict=True)
    )
    if not fit:
        what = f"The tensor is {list(given[1])} where it is made and {list(taken[1])} where it is read."
        yield _problem("ensemble-dims", place, what, "Give both shapes that agree; -1 is any size.")


def _problem(rule: str, where: str, message: str, fix: str) -> Problem:
    return Problem(rule=rule, severity="error", where=where, message=message, fix=fix)
