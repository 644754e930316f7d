"""ONNX Runtime's TensorRT provider in a configuration: the server builds the engine on its own GPU when it loads the model.

The keys are those of Triton's onnxruntime backend (its README, "ONNX Runtime with TensorRT optimization").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engines.tensorrt.profiles import Profile
from pipeline.triton.problem import Problem
from pipeline.triton.protobuf import ModelConfig, kind_cpu
from pipeline.triton.served import ServedModel

NAME = "tensorrt"
ENDS = ("min", "opt", "max")


def add_accelerator(message: ModelConfig, model: ServedModel, *, cache: str | None) -> None:
    """Ask for the TensorRT provider, with the model's profiles and a cache of engines and timings.

    No precision is asked for (``precision_mode: FP32``), because the graph says every tensor's: only without precision flags
    does the provider make a strongly typed network, and the backend can set one flag, not FP16 and INT8 together.

    Args:
        message: The configuration.
        model: What is served.
        cache: The server's folder for engines; ``/tmp/<model>.engines`` if not given.
    """
    folder = cache or f"/tmp/{model.name}.engines"
    found = message.optimization.execution_accelerators.gpu_execution_accelerator.add(name=NAME)
    found.parameters.update(
        precision_mode="FP32",
        trt_engine_cache_enable="1",
        trt_engine_cache_path=folder,
        trt_timing_cache_enable="1",
        trt_timing_cache_path=folder,
    )
    open_inputs = [i.name for i in model.inputs if any(not isinstance(d, int) for d in i.shape)]
    if open_inputs:
        for end in ENDS:
            found.parameters[f"trt_profile_{end}_shapes"] = _shapes(model.at_load or (), open_inputs, end)


def _shapes(profiles: Sequence[Profile], inputs: Sequence[str], end: str) -> str:
    """Return ``ids:1x16,mask:1x16``; an input that is there again belongs to the next profile."""
    return ",".join(
        f"{name}:{'x'.join(str(size) for size in getattr(profile[name], end))}"
        for profile in profiles
        for name in inputs
    )


_KEYS = {
    *("precision_mode", "max_workspace_size_bytes", "trt_engine_cache_enable", "trt_engine_cache_path"),
    *("trt_engine_cache_prefix", "trt_timing_cache_enable", "trt_timing_cache_path", "trt_builder_optimization_level"),
    *("trt_cuda_graph_enable", "trt_auxiliary_streams", "trt_tactic_sources", "trt_extra_plugin_lib_paths"),
    *(f"trt_profile_{end}_shapes" for end in ENDS),
}
"""Parameters of the backend that mean something for a graph whose precisions are its own."""


def check_accelerators(config: ModelConfig, *, where: str) -> Iterator[Problem]:
    """Yield what is wrong with a configuration's execution accelerators."""
    for index, accelerator in enumerate(config.optimization.execution_accelerators.gpu_execution_accelerator):
        place = f"{where}: gpu_execution_accelerator[{index}]"
        given = accelerator.parameters
        strange = sorted(set(given) - _KEYS)
        if accelerator.name != NAME or strange:
            what = strange[0] if accelerator.name == NAME else accelerator.name
            yield _problem("accelerator", place, f"{what!r} is not known here.", f"Use {NAME} and its parameters.")
            continue
        if config.backend != "onnxruntime" or any(g.kind == kind_cpu() for g in config.instance_group):
            what = "The accelerator is ignored: it is for the onnxruntime backend's instances on a GPU."
            yield _problem("accelerator", place, what, "Set backend: onnxruntime and kind: KIND_GPU.")
        if given.get("precision_mode", "FP32") != "FP32":
            what = f"precision_mode {given['precision_mode']} lets TensorRT ignore the precisions that the graph says."
            yield _problem("accelerator-precision", place, what, "Set precision_mode: FP32, which adds no precision.")
        yield from _profiles(config, given, place)


def _profiles(config: ModelConfig, given: ModelConfig, place: str) -> Iterator[Problem]:
    shapes = {end: _read(given.get(f"trt_profile_{end}_shapes", "")) for end in ENDS}
    if not any(shapes.values()):
        if config.max_batch_size > 0:
            what = "There are no profiles: the first request of every larger shape waits for a new engine."
            yield _problem("accelerator-profile", place, what, "Give trt_profile_min_, opt_ and max_shapes.")
        return
    names = {end: [name for name, _ in found] for end, found in shapes.items()}
    inputs = {t.name for t in config.input if config.max_batch_size > 0 or -1 in t.dims}
    if len({tuple(n) for n in names.values()}) > 1 or set(names["min"]) != inputs:
        what = f"The profiles name the inputs {sorted(set(names['min']))}, the open ones are {sorted(inputs)}."
        yield _problem("accelerator-profile", place, what, "Name every open input in min, opt and max alike.")
        return
    for (name, low), (_, best), (_, high) in zip(*shapes.values(), strict=True):
        if not len(low) == len(best) == len(high) or not all(
            a <= b <= c for a, b, c in zip(low, best, high, strict=True)
        ):
            what = f"The profile of {name!r} is not in order: {low}, {best}, {high}."
            yield _problem("accelerator-profile", place, what, "Write sizes with min <= opt <= max.")
            return
    largest = max((sizes[0] for _, sizes in shapes["max"] if sizes), default=0)
    if config.max_batch_size > largest:
        what = f"max_batch_size is {config.max_batch_size}, the profiles take at most {largest}."
        yield _problem("accelerator-profile", place, what, "Lower it, or raise trt_profile_max_shapes.")


def _read(text: str) -> list[tuple[str, list[int]]]:
    found = []
    for part in filter(None, text.split(",")):
        name, _, sizes = part.rpartition(":")
        found.append((name, [int(size) for size in sizes.split("x") if size.isdigit()]))
    return found


def _problem(rule: str, where: str, message: str, fix: str) -> Problem:
    return Problem(rule=rule, severity="error", where=where, message=message, fix=fix)
