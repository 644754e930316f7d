"""A model's ``config.pbtxt``."""

from __future__ import annotations

from pipeline.errors import PublishError
from pipeline.notices import notice
from pipeline.recipe_triton import TritonConfig
from pipeline.triton.labels import label_file, labelled_output, read_labels
from pipeline.triton.protobuf import ModelConfig, kind_cpu, kind_gpu, new_config, to_text, type_value
from pipeline.triton.served import BACKENDS, ServedModel, check_name, plan_name, triton_type
from pipeline.types import TensorInfo

HEADER = """\
# Dimensions leave out the batch where max_batch_size > 0; -1 is any size.
# The warm-up request is all zeros: id 0 is in every vocabulary, random bytes may be out of range or NaN.
"""


def config_text(model: ServedModel, config: TritonConfig) -> str:
    """Return the text of ``config.pbtxt``; the same model and options give the same text.

    Raises:
        PublishError: The name, backend, a data type, a shape or a preferred batch size cannot be served.
        MissingError: ``tritonclient`` is not installed.
    """
    return HEADER + to_text(build_config(model, config))


def build_config(model: ServedModel, config: TritonConfig) -> ModelConfig:
    """Return Triton's ``ModelConfig`` for ``model``; see :func:`config_text`.

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
    on_gpu = bool(model.engines)
    message.instance_group.add(kind=kind_gpu() if on_gpu else kind_cpu(), count=config.instances)
    if on_gpu:
        message.instance_group[0].gpus.extend(sorted(set(config.gpus)))
    _add_scheduling(message, config)
    if model.labels is not None:
        labels = read_labels(model.labels)
        output = labelled_output(model.outputs, labels)
        message.output[model.outputs.index(output)].label_filename = label_file(labels)
    for capability in sorted(model.engines):
        # No default file: on a GPU that the map lacks, the server would load it without a word.
        message.cc_model_filenames[capability] = plan_name(capability)
    if model.threads > 0:
        message.parameters["intra_op_thread_count"].string_value = str(model.threads)
    _add_warmup(message, model, batched=batch > 0)
    return message


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


def _add_warmup(message: ModelConfig, model: ServedModel, *, batched: bool) -> None:
    shapes = {info.name: _sample_dims(info, model, batched=batched) for info in model.inputs}
    unknown = sorted(name for name, dims in shapes.items() if dims is None)
    if unknown:
        notice(
            "no-warm-up",
            f"The repository holds no warm-up request: the size of {', '.join(unknown)} is open and no sample says it.",
            where=f"triton model {model.name}",
        )
        return
    warmup = message.model_warmup.add(name="zeros", batch_size=1)
    for info in model.inputs:
        data = warmup.inputs[info.name]
        data.data_type = type_value(triton_type(info))
        data.dims.extend(shapes[info.name] or [1])
        data.zero_data = True


def _sample_dims(info: TensorInfo, model: ServedModel, *, batched: bool) -> list[int] | None:
    """Return the dimensions of a warm-up tensor, without the batch when batched; ``None`` where one is not known."""
    sample = model.sample.get(info.name, ())
    skip = 1 if batched else 0
    dims: list[int] = []
    for index, dim in enumerate(info.shape[skip:], start=skip):
        if isinstance(dim, int):
            dims.append(dim)
        elif len(sample) == len(info.shape) and sample[index] > 0:
            dims.append(sample[index])
        else:
            return None
    return dims
