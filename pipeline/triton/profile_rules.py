"""Rules that compare a configuration with the optimization profiles of the TensorRT engines it serves.

An engine can only be opened on its GPU, so the profiles are read from the version's manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from engines.tensorrt.profiles import Profile, ShapeRange
from pipeline import model as onnx_files
from pipeline.errors import PublishError
from pipeline.triton.problem import Problem, Severity
from pipeline.triton.protobuf import ModelConfig
from pipeline.triton.version_manifest import MANIFEST, profiles_of, read_manifest

Sizes = Sequence[int]


def check_profiles(version: Path, config: ModelConfig, *, where: str) -> list[Problem]:
    """Return what is wrong between a configuration and the profiles of the engines in ``version``.

    Args:
        version: A version's folder.
        config: The model's configuration.
        where: The configuration's file.
    """
    place = f"{config.name}/{version.name}/{MANIFEST}"
    try:
        manifest = read_manifest(version)
        listed = (manifest or {}).get("profiles") or {}
        engines = {str(name): profiles_of(values) for name, values in listed.items()}
    except (PublishError, ValueError, AttributeError) as error:
        message = error.what if isinstance(error, PublishError) else f"The manifest is wrong: {error}."
        return [_problem("manifest", place, message, "Publish the engines again.")]
    if manifest is None and config.backend == "tensorrt":
        message = "There is no manifest: profiles, CUDA graphs and warm-up shapes were not checked against the engines."
        return [_problem("manifest", place, message, "Publish the engines again.", severity="warning")]
    problems = [*_files(version, manifest or {}, f"{config.name}/{version.name}")]
    for name, profiles in engines.items():
        if profiles:
            problems += _engine(config, name, profiles, where)
    if config.backend == "tensorrt":
        problems += _graphs(config, engines, where)
    return problems


def _files(version: Path, manifest: Mapping[str, object], where: str) -> Iterator[Problem]:
    files = manifest.get("files")
    for name, facts in sorted(files.items()) if isinstance(files, dict) else ():
        path = version / name
        if path.is_file() and onnx_files.sha256(path) != (facts or {}).get("sha256"):
            yield _problem(
                "file-changed", f"{where}/{name}", "The file is not the one that was published.", "Publish it again."
            )


def _engine(config: ModelConfig, name: str, profiles: tuple[Profile, ...], where: str) -> Iterator[Problem]:
    batched = config.max_batch_size > 0
    inputs = {tensor.name: list(tensor.dims) for tensor in config.input}
    strange = sorted({n for profile in profiles for n in profile} ^ set(inputs))
    if strange:
        what = f"The profiles of {name} and the configuration differ in the inputs {', '.join(strange)}."
        yield _problem("profile-dims", where, what, "List the engine's inputs.")
        return
    largest = max(min(shapes.max[0] for shapes in profile.values() if shapes.max) for profile in profiles)
    if batched and config.max_batch_size > largest:
        what = f"max_batch_size is {config.max_batch_size}, the profiles of {name} take at most {largest}."
        yield _problem("profile-batch", f"{where}: max_batch_size", what, "Lower it, or build the engine for more.")
    for tensor, dims in inputs.items():
        if not any(_within(dims, profile[tensor], batched=batched) for profile in profiles):
            what = f"No profile of {name} takes the shape {dims}."
            yield _problem("profile-dims", f"{where}: input {tensor!r}", what, "Set dims to what a profile takes.")
    yield from _instances(config, name, len(profiles), where)
    yield from _warm_ups(config, name, profiles, where)


def _within(dims: Sizes, shapes: ShapeRange, *, batched: bool) -> bool:
    skip = 1 if batched else 0
    low, high = shapes.min[skip:], shapes.max[skip:]
    # A [batch] tensor travels as [batch, 1].
    dims = [] if list(dims) == [1] and not low else dims
    return len(dims) == len(low) and all(d == -1 or a <= d <= b for d, a, b in zip(dims, low, high, strict=True))


def _instances(config: ModelConfig, name: str, count: int, where: str) -> Iterator[Problem]:
    for index, group in enumerate(config.instance_group):
        place = f"{where}: instance_group[{index}].profile"
        named = set(group.profile)
        missing, strange = (sorted(a - b) for a, b in ((every(count), named), (named, every(count))))
        if strange:
            what = f"{name} has no profile {', '.join(strange)}; it has {count}."
            yield _problem("instance-profiles", place, what, f"Name profiles from 0 to {count - 1}.")
        if missing and (count > 1 or named):
            what = f"The instances never use the profiles {', '.join(missing)} of {name}."
            yield _problem("instance-profiles", place, what, "Name every profile.", severity="warning")


def every(count: int) -> set[str]:
    """Return the names of ``count`` profiles."""
    return {str(index) for index in range(count)}


def _warm_ups(config: ModelConfig, name: str, profiles: tuple[Profile, ...], where: str) -> Iterator[Problem]:
    cold = set(range(len(profiles)))
    for warmup in config.model_warmup:
        shapes = {n: list(data.dims) for n, data in warmup.inputs.items()}
        fits = [i for i, p in enumerate(profiles) if _takes(p, shapes, warmup.batch_size, config.max_batch_size > 0)]
        if not fits:
            what = f"No profile of {name} takes this warm-up request: {shapes}, batch {warmup.batch_size}."
            place = f"{where}: model_warmup {warmup.name!r}"
            yield _problem("warm-up-profile", place, what, "Give it a shape that a profile takes.")
        cold -= set(fits)
    if cold and config.model_warmup:
        what = f"No warm-up request fits the profiles {', '.join(map(str, sorted(cold)))} of {name}."
        yield _problem("warm-up-profile", f"{where}: model_warmup", what, "Add one for each.", severity="warning")


def _takes(profile: Profile, shapes: Mapping[str, Sizes], batch: int, batched: bool) -> bool:
    return all(
        name in profile
        and _within(dims, profile[name], batched=batched)
        and (not batched or profile[name].min[0] <= batch <= profile[name].max[0])
        for name, dims in shapes.items()
    )


def _graphs(config: ModelConfig, engines: Mapping[str, tuple[Profile, ...]], where: str) -> Iterator[Problem]:
    batched = config.max_batch_size > 0
    inputs = {tensor.name for tensor in config.input}
    for index, spec in enumerate(config.optimization.cuda.graph_spec):
        place = f"{where}: optimization.cuda.graph_spec[{index}]"
        shapes = {name: list(shape.dim) for name, shape in spec.input.items()}
        lowest, highest = (1, config.max_batch_size) if batched else (0, 0)
        if not lowest <= spec.batch_size <= highest:
            what = f"A batch of {spec.batch_size} does not lie between {lowest} and {highest}."
            yield _problem("cuda-graphs", place, what, "Set batch_size to one that the server forms.")
        elif set(shapes) != inputs:
            what = f"The graph and the configuration differ in the inputs {', '.join(sorted(set(shapes) ^ inputs))}."
            yield _problem("cuda-graphs", place, what, "Give every input once.")
        else:
            for name, profiles in engines.items():
                if profiles and not any(_takes(p, shapes, spec.batch_size, batched) for p in profiles):
                    what = f"No profile of {name} takes the graph's shapes {shapes}, batch {spec.batch_size}."
                    yield _problem("cuda-graphs", place, what, "Use shapes that a profile takes.")
    if config.optimization.cuda.graphs and not config.optimization.cuda.graph_spec:
        what = (
            "CUDA graphs are on, but none is named: the server captures batches of powers of two at the largest shapes."
        )
        place = f"{where}: optimization.cuda"
        yield _problem("cuda-graphs", place, what, "Add a graph_spec for each batch and shape.", severity="warning")


def _problem(rule: str, where: str, message: str, fix: str, *, severity: Severity = "error") -> Problem:
    return Problem(rule=rule, severity=severity, where=where, message=message, fix=fix)
