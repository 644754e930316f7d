"""A model's ``config.pbtxt``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.errors import PublishError
from pipeline.notices import notice
from pipeline.recipe import TritonConfig
from pipeline.triton.accelerator import add_accelerator
from pipeline.triton.labels import label_file, label_text, labelled_output, read_labels
from pipeline.triton.protobuf import ModelConfig, kind_cpu, kind_gpu, new_config, to_text, type_value
from pipeline.triton.served import BACKENDS, ServedModel, check_name, plan_name, triton_type
from pipeline.triton.warm_up import FOLDER, common_profiles, data_file, warm_ups
from pipeline.types import TensorInfo

HEADER = """\
# Dimensions leave out the batch where max_batch_size > 0; -1 is any size.
# Warm-up requests are real samples, or zeros: id 0 is in every vocabulary, random bytes may be out of range or NaN.
"""


@dataclass(frozen=True, slots=True)
class Configured:
    """A model's ``config.pbtxt`` and the files beside it that it names.

    Attributes:
        text: The configuration.
        beside: Path in the model's folder to content; each name tells contents apart.
    """

    text: str
    beside: Mapping[str, bytes]


def configured(model: ServedModel, config: TritonConfig) -> Configured:
    """Return the configuration of ``model``; the same model and options give the same bytes.

    Raises:
        PublishError: The name, backend, a data type, a shape or a preferred batch size cannot be served.
        MissingError: ``tritonclient`` is not installed.
    """
    message = build_config(model, config)
    beside = dict(_add_warmup(message, model))
    if model.labels is not None:
        labels = read_labels(model.labels)
        output = labelled_output(model.outputs, labels)
        name = message.output[model.outputs.index(output)].label_filename = label_file(labels)
        beside[name] = label_text(labels).encode()
    return Configured(HEADER + to_text(message), beside)


def build_config(model: ServedModel, config: TritonConfig) -> ModelConfig:
    """Return Triton's ``ModelConfig`` for ``model`` without the files that it may name; see :func:`configured`.

    ``max_batch_size`` is 0, with a notice, where a dimension that would be the batch is fixed: the server demands an
    open first dimension of every input and output.
    """
    check_name(model.name)
    if model.backend not in BACKENDS or BACKENDS[model.backend].by_capability != bool(model.engines):
        raise PublishError(
            f"There is no {model.backend!r} model to publish.", where=model.name, fix="Use the onnxruntime backend."
        )
    _check_preferred(config)
    batch = _max_batch_size(model, config)
    message = new_config()
    message.name = model.name
    message.backend = model.backend
    message.max_batch_size = batch
    for tensors, fields in ((model.inputs, message.input), (model.outputs, message.output)):
        for info in tensors:
            _add_tensor(fields, info, batched=batch > 0)
    if batch > 0 and config.dynamic_batching is not None:
        message.dynamic_batching.max_queue_delay_microseconds = config.dynamic_batching.max_queue_delay_us
        message.dynamic_batching.preferred_batch_size.extend(sorted(set(config.dynamic_batching.preferred_batch_sizes)))
    on_gpu = bool(model.engines) or model.at_load is not None
    message.instance_group.add(kind=kind_gpu() if on_gpu else kind_cpu(), count=config.instances)
    if on_gpu:
        message.instance_group[0].gpus.extend(sorted(set(config.gpus)))
    if model.engines:
        _add_profiles(message, model, config)
    if model.at_load is not None:
        add_accelerator(message, model, cache=config.engine_cache)
    _add_scheduling(message, config)
    for capability in sorted(model.engines):
        # No default file: on a GPU that the map lacks, the server would load it without a word.
        message.cc_model_filenames[capability] = plan_name(capability)
    if model.threads > 0 and not on_gpu:
        message.parameters["intra_op_thread_count"].string_value = str(model.threads)
    return message


def _add_profiles(message: ModelConfig, model: ServedModel, config: TritonConfig) -> None:
    """Name every profile, because without names the server uses the first alone, and the graphs that it captures.

    Raises:
        PublishError: The engines have different profiles, or a graph's batch is larger than the server's or every profile's.
    """
    profiles = common_profiles(model)
    if any(plan.profiles != profiles for plan in model.engines.values()):
        raise PublishError(
            "The engines of one model have different optimization profiles, and its configuration names one set.",
            where=", ".join(plan.target for _, plan in sorted(model.engines.items())),
            fix="Build all targets with the same builder.profiles, or publish with --split-by-target.",
        )
    if len(profiles) > 1:
        message.instance_group[0].profile.extend(str(index) for index in range(len(profiles)))
    for batch in sorted(set(config.cuda_graphs)):
        batched = message.max_batch_size > 0
        fitting = [p for p in profiles if all(s.min[0] <= batch <= s.max[0] for s in p.values() if s.max)]
        if batch > max(message.max_batch_size, 1) or not fitting:
            raise PublishError(
                f"No CUDA graph can be captured for a batch of {batch}: it is larger than max_batch_size "
                f"({message.max_batch_size}), or no profile of the engines takes it.",
                where="triton.cuda_graphs",
                fix="Leave it out, or raise triton.max_batch_size and build the engines with a profile that takes it.",
            )
        message.optimization.cuda.graphs = True
        for profile in fitting:
            # Exact: with a lower bound the server pads smaller requests with what lies in the buffer.
            spec = message.optimization.cuda.graph_spec.add(batch_size=batch if batched else 0)
            for name, shapes in sorted(profile.items()):
                spec.input[name].dim.extend(shapes.opt[1:] if batched else shapes.opt)
            if spec in list(message.optimization.cuda.graph_spec)[:-1]:
                del message.optimization.cuda.graph_spec[-1]


def _add_scheduling(message: ModelConfig, config: TritonConfig) -> None:
    """Say which versions are served, what an execution takes of shared resources, and whether answers are remembered."""
    policy, limits = config.version_policy, config.rate_limiter
    if policy is not None:
        if policy.latest is not None:
            message.version_policy.latest.num_versions = policy.latest
        elif policy.all:
            message.version_policy.all.SetInParent()
        else:
            message.version_policy.specific.versions.extend(sorted(set(policy.specific)))
    if limits is not None:
        limiter = message.instance_group[0].rate_limiter
        limiter.priority = limits.priority
        for shared, resources in ((False, limits.resources), (True, limits.global_resources)):
            for name, count in sorted(resources.items()):
                # A count of its own device is the default: the field is written where it is set.
                limiter.resources.add(name=name, count=count, **({"global": True} if shared else {}))
    if config.response_cache:
        message.response_cache.enable = True


def _check_preferred(config: TritonConfig) -> None:
    if config.max_batch_size == 0 or config.dynamic_batching is None:
        return
    wrong = [n for n in config.dynamic_batching.preferred_batch_sizes if not 1 <= n <= config.max_batch_size]
    if wrong:
        raise PublishError(
            f"Preferred batch sizes must lie between 1 and max_batch_size ({config.max_batch_size}); {wrong} do not.",
            where="triton.dynamic_batching.preferred_batch_sizes",
            fix="Leave them out or raise triton.max_batch_size.",
        )


def _max_batch_size(model: ServedModel, config: TritonConfig) -> int:
    if config.max_batch_size == 0:
        return 0
    fixed = [i for i in (*model.inputs, *model.outputs) if not i.shape or isinstance(i.shape[0], int)]
    if not fixed:
        return config.max_batch_size
    named = ", ".join(f"{info.name} {_shown(info)}" for info in fixed[:3])
    notice(
        "batching-off",
        f"Served without batching (max_batch_size 0): the batch dimension of {named} is fixed. "
        "Export the model with a dynamic batch dimension to let the server form batches.",
        where=f"triton model {model.name}",
    )
    return 0


def _shown(info: TensorInfo) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in info.shape) + "]"


def _add_tensor(fields: ModelConfig, info: TensorInfo, *, batched: bool) -> None:
    dims = [d if isinstance(d, int) else -1 for d in info.shape]
    if 0 in dims:
        raise PublishError(
            "Triton cannot serve a tensor that has a dimension of size 0.",
            where=f"tensor {info.name!r} {_shown(info)}",
            fix="Export the model with this dimension open or of size 1 and more.",
        )
    tensor = fields.add(name=info.name, data_type=type_value(triton_type(info)))
    dims = dims[1:] if batched else dims
    tensor.dims.extend(dims or [1])
    if batched and not dims:
        # The configuration must name at least one dimension: a [batch] tensor travels as [batch, 1].
        tensor.reshape.SetInParent()


def _add_warmup(message: ModelConfig, model: ServedModel) -> Iterator[tuple[str, bytes]]:
    """Add the warm-up requests, and yield the files of their data: path in the model's folder, content."""
    requests = warm_ups(model, max_batch_size=message.max_batch_size)
    if not requests:
        notice(
            "no-warm-up",
            "The repository holds no warm-up request: the size of an input is open and no sample says it.",
            where=f"triton model {model.name}",
        )
    for request in requests:
        warmup = message.model_warmup.add(name=request.name, batch_size=request.batch_size)
        for info in model.inputs:
            data = warmup.inputs[info.name]
            data.data_type = type_value(triton_type(info))
            data.dims.extend(request.dims[info.name] or [1])
            if info.name in request.data:
                name, content = data_file(info.name, request.data[info.name])
                data.input_data_file = name
                yield f"{FOLDER}/{name}", content
            else:
                data.zero_data = True
