"""Ranks quantized nodes by what each one loses.

Two figures for each node. *Local*: its output in the whole quantized model against FP32, so everything lost up to
there. *Isolated*: the network's outputs with only this node quantized, so what this node alone costs; the ranking is
by this one. Both run without graph optimizations: they are about quantization, not about kernels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.model import load
from pipeline.notices import notice
from pipeline.types import CalibrationData, Feeds, Progress, silent
from pipeline.validation.feeds import fixed_batch, mask_of, size_of
from pipeline.validation.measurement import LayerLoss
from pipeline.validation.metrics import Comparison, sqnr_db
from pipeline.validation.switch import SwitchedRunner, switched
from pipeline.validation.tapped import Tapped
from pipeline.validation.transplant import Pairing, quantized_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """What to rank, and what it may cost.

    Attributes:
        nodes: Names of quantized nodes; ``None`` ranks all.
        samples: Samples used, at most. The isolated figures cost ``samples x (nodes + 1)`` forward passes.
        seconds: No further batch is begun after this time; the ranking is then of fewer samples, and says so.
        memory_bytes: Node outputs held at once; more nodes are read in several passes.
    """

    nodes: tuple[str, ...] | None = None
    samples: int = 8
    seconds: float = 300.0
    memory_bytes: int = 1 << 28


def rank_layers(
    reference: Path,
    variant: Path,
    data: CalibrationData,
    options: LayerOptions | None = None,
    *,
    threads: int = 0,
    progress: Progress = silent,
) -> tuple[LayerLoss, ...]:
    """Return the loss of every quantized node, worst first.

    A node that the two graphs do not share by name and operator is left out, with a notice.

    Raises:
        DataError: There are no samples.
        EngineError: A model cannot be loaded or run.
        ModelError: The graphs do not correspond, or have different opsets.
    """
    options = options or LayerOptions()
    fp32, quantized = load(reference), load(variant)
    pairing = Pairing(fp32, quantized)
    asked = quantized_nodes(quantized) if options.nodes is None else options.nodes
    found = {name: node for name in asked if (node := pairing.quantized(name)) is not None}
    nodes = list(found)
    if missing := [name for name in asked if name not in found]:
        notice(
            "layers-not-ranked",
            f"{len(missing)} quantized nodes have no counterpart of the same name in the FP32 graph "
            f"and are not ranked: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}.",
            where=str(variant),
        )
    if not nodes:
        return ()
    taps = [
        (name, pairing.reference[name].outputs[0].name or "", node.outputs[0].name or "")
        for name, node in found.items()
    ]
    with switched(fp32, quantized, nodes, threads=threads) as live:
        feeds = list(_first(data, options.samples, whole=fixed_batch(live.runner) is not None))
        isolated = _isolated(live, feeds, options.seconds, progress)
    local = _local((reference, variant), taps, feeds, options.memory_bytes, threads)
    return _rank(nodes, local, isolated)


def _first(data: CalibrationData, count: int, *, whole: bool) -> Iterator[Feeds]:
    """Yield batches until ``count`` samples are there, the last one cut unless batches must stay ``whole``."""
    taken = 0
    for feeds in data:
        size = size_of(feeds)
        yield feeds if whole or taken + size <= count else {k: v[: count - taken] for k, v in feeds.items()}
        taken += size
        if taken >= count:
            return
    if not taken:
        raise DataError("There are no samples to rank the layers on.", fix="Give validation data with at least one.")


def _isolated(
    live: SwitchedRunner, feeds: Sequence[Feeds], seconds: float, progress: Progress
) -> dict[str, tuple[float, float]]:
    """Return each node's ``(sum ref^2, sum noise^2)`` at the output where their ratio is worst."""
    comparisons = {node: Comparison() for node in live.switches}
    deadline, total, done = time.monotonic() + seconds, len(live.switches) * len(feeds), 0
    progress("layers", 0, total)
    for index, batch in enumerate(feeds):
        if index and time.monotonic() > deadline:
            used = sum(map(size_of, feeds[:index]))
            notice("layers-fewer-samples", f"Ranking layers stopped after {used} samples: its time was up.")
            break
        mask, wanted = mask_of(batch), live.infer(batch)
        for node in live.switches:
            comparisons[node].update(wanted, live.infer(batch, (node,)), mask)
            done += 1
            progress("layers", done, total)
    progress("layers", total, total)
    return {node: comparison.worst() for node, comparison in comparisons.items()}


def _local(
    models: tuple[Path, Path],
    taps: Sequence[tuple[str, str, str]],
    feeds: Sequence[Feeds],
    memory_bytes: int,
    threads: int,
) -> dict[str, float | None]:
    """Return the SQNR in dB of each tap ``(node, FP32 tensor, quantized tensor)``."""
    result: dict[str, float | None] = {}
    rest, size = list(taps), 1  # the first tensor alone, to learn how large they are
    while rest:
        group, rest = rest[:size], rest[size:]
        fp32 = Tapped(models[0], [tap[1] for tap in group], threads)
        quantized = Tapped(models[1], [tap[2] for tap in group], threads)
        comparison, largest = Comparison(), 1
        for batch in feeds:
            given, got = fp32.infer(batch), quantized.infer(batch)
            wanted = {node: given[tensor] for node, tensor, _ in group}
            comparison.update(wanted, {node: got[tensor] for node, _, tensor in group}, mask_of(batch))
            largest = max([largest, *(values.nbytes for values in wanted.values())])
        result |= {node: metrics.sqnr_db for node, metrics in comparison.result().items()}
        size = max(1, memory_bytes // (2 * largest))
    return result


def _rank(
    nodes: Sequence[str], local: Mapping[str, float | None], isolated: Mapping[str, tuple[float, float]]
) -> tuple[LayerLoss, ...]:
    relative = {node: noise / signal if signal > 0 else 0.0 for node, (signal, noise) in isolated.items()}
    total = sum(relative.values())
    losses = [
        LayerLoss(
            node=node,
            local_sqnr_db=local.get(node),
            isolated_sqnr_db=sqnr_db(*isolated[node]),
            noise_share=relative[node] / total if total > 0 else None,
        )
        for node in nodes
    ]
    return tuple(sorted(losses, key=lambda loss: (-(loss.noise_share or 0.0), loss.node)))
