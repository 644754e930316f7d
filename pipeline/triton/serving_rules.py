"""Rules that the configuration breaks or keeps by itself, whatever the engine is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.triton.problem import Problem
from pipeline.triton.protobuf import ModelConfig, kind_cpu
from pipeline.triton.warm_up_rules import check_warm_up


def check_serving(config: ModelConfig, *, where: str) -> Iterator[Problem]:
    """Yield the problems of batching, instances, shapes and warm-up requests that need no engine to be seen."""
    yield from _batching(config, where)
    yield from _tensors(config, where)
    for index, group in enumerate(config.instance_group):
        if group.count < 1:
            yield Problem(
                rule="instances",
                severity="error",
                where=f"{where}: instance_group[{index}].count",
                message=f"An instance group of {group.count} instances serves nothing.",
                fix="Set count to 1 or more.",
            )
        if group.gpus and group.kind == kind_cpu():
            yield Problem(
                rule="instances",
                severity="error",
                where=f"{where}: instance_group[{index}].gpus",
                message="Instances on the CPU cannot name GPUs.",
                fix="Delete gpus, or set kind: KIND_GPU.",
            )
        yield from _rate_limiter(group.rate_limiter, f"{where}: instance_group[{index}].rate_limiter")
    if config.response_cache.enable and (
        config.HasField("sequence_batching") or config.model_transaction_policy.decoupled
    ):
        yield Problem(
            rule="response-cache",
            severity="error",
            where=f"{where}: response_cache",
            message="The server remembers no answers of sequences and of models that answer more or less than once.",
            fix="Delete response_cache.",
        )
    for warmup in config.model_warmup:
        yield from check_warm_up(config, warmup, f"{where}: model_warmup {warmup.name!r}")


def _rate_limiter(limiter: ModelConfig, where: str) -> Iterator[Problem]:
    names = [resource.name for resource in limiter.resources]
    wrong = [r.name for r in limiter.resources if not r.name or r.count < 1 or names.count(r.name) > 1]
    if wrong:
        yield Problem(
            rule="rate-limiter",
            severity="error",
            where=where,
            message=f"The resource {wrong[0]!r} has no name or no count, or is there twice.",
            fix="Name each resource once, with a count of 1 or more.",
        )


def check_resources(configs: Mapping[str, ModelConfig]) -> Iterator[Problem]:
    """Yield the resources that one model takes for a device's own and another for shared; the server refuses them.

    Args:
        configs: Model folder to its configuration.
    """
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    for name, config in configs.items():
        for group in config.instance_group:
            for resource in group.rate_limiter.resources:
                (shared if getattr(resource, "global") else own).setdefault(resource.name, name)
    for resource in sorted(set(shared) & set(own)):
        yield Problem(
            rule="rate-limiter",
            severity="error",
            where=f"{shared[resource]} and {own[resource]}: instance_group.rate_limiter",
            message=f"The resource {resource!r} is shared by all devices and a device's own at once.",
            fix="Give one of them another name.",
        )


def _batching(config: ModelConfig, where: str) -> Iterator[Problem]:
    limit = config.max_batch_size
    if limit < 0:
        yield Problem(
            rule="max-batch-size",
            severity="error",
            where=f"{where}: max_batch_size",
            message=f"max_batch_size is {limit}.",
            fix="Use 0 for no batching, or the largest batch.",
        )
    if not config.HasField("dynamic_batching"):
        return
    if limit == 0:
        yield Problem(
            rule="dynamic-batching",
            severity="warning",
            where=f"{where}: dynamic_batching",
            message="Dynamic batching is configured, but max_batch_size 0 turns batching off.",
            fix="Delete dynamic_batching, or set max_batch_size.",
        )
    wrong = [n for n in config.dynamic_batching.preferred_batch_size if not 1 <= n <= limit]
    if wrong:
        yield Problem(
            rule="preferred-batch",
            severity="error",
            where=f"{where}: dynamic_batching.preferred_batch_size",
            message=f"Preferred batch sizes {wrong} do not lie between 1 and max_batch_size ({limit}).",
            fix="Leave them out or raise max_batch_size.",
        )


def _tensors(config: ModelConfig, where: str) -> Iterator[Problem]:
    for kind, tensors in (("input", config.input), ("output", config.output)):
        for tensor in tensors:
            wrong = [d for d in (*tensor.dims, *tensor.reshape.shape) if d < 1 and d != -1]
            if wrong or not tensor.dims:
                yield Problem(
                    rule="dims",
                    severity="error",
                    where=f"{where}: {kind} {tensor.name!r}",
                    message=f"{wrong[0]} is no dimension." if wrong else "The tensor has no dimensions.",
                    fix="Every dimension is at least 1, or -1 for any size.",
                )
