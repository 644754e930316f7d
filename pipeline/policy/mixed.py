"""Mixed precision by measurement: which quantized nodes go back to high precision.

Every quantized node is first measured alone (what it adds to the noise at the outputs); nodes that cost most noise for
what they compute go first, and every step is measured with all others together, because noise does not add up exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.types import Progress, silent

ELEMENT = 256
"""Multiplications that one element of a node's output counts for. Narrow operands save a byte for about every element that
is moved, and a GPU multiplies some hundred INT8 numbers while it reads a byte: an A100 156, an H100 295."""
WORTH = 0.25
"""A unit that makes less than this part of an even share of the noise that is left is not worth high precision for its own sake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Nodes that have one precision together.

    Attributes:
        nodes: Their names; more than one where query, key and value read one tensor.
        products: Multiplications in their MatMul, Gemm and Conv.
        elements: Elements of their outputs.
        noise: ``sum (ref - out)² / sum ref²`` of the worst output with this unit alone quantized.
    """

    nodes: tuple[str, ...]
    products: int
    elements: int
    noise: float

    @property
    def cost(self) -> int:
        """What high precision costs, in multiplications."""
        return max(1, self.products + ELEMENT * self.elements)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What goes back to high precision.

    Attributes:
        high: Those units, the one that costs most noise for what it computes first.
        before: Noise with everything quantized, over the signal.
        after: Noise with the rest quantized.
    """

    high: tuple[Unit, ...]
    before: float
    after: float


def choose(
    units: Sequence[Unit],
    measure: Callable[[Sequence[Unit]], float],
    *,
    most_noise: float | None,
    spare: float,
    progress: Progress = silent,
) -> Choice:
    """Return the units that go back to high precision.

    Args:
        units: What is quantized now.
        measure: Noise over signal at the worst output with these units quantized.
        most_noise: Enough is done when the noise is at most this; ``None`` spends all of ``spare``.
        spare: Multiplications that may go back to high precision.
        progress: Told of every step.
    """
    noise = before = least_noise = measure(units)
    enough = 0.0 if most_noise is None else most_noise
    high: list[Unit] = []
    best = 0
    for index, unit in enumerate(ranked(units)):
        progress("mixed", index, len(units))
        if noise <= enough:
            break
        # Where there is a noise to reach, little helps: what a deep network makes comes from many units.
        least = WORTH * noise / len(units) if most_noise is None else 0.0
        if unit.products <= spare and unit.noise > 0 and unit.noise >= least:
            # A step may raise the noise by chance on a few samples, and the next ones lower it all the more, so no step is refused
            # (that cost MiniLM 0.9 dB on held-out data); but what does not pay in the end is taken back.
            high.append(unit)
            spare -= unit.products
            noise = measure(_without(units, high))
            if noise < least_noise:
                least_noise, best = noise, len(high)
    high, noise = high[:best], least_noise
    if most_noise is not None and noise <= most_noise:
        noise = _given_back(units, high, measure, most_noise, noise)
    progress("mixed", len(units), len(units))
    return Choice(high=tuple(high), before=before, after=noise)


def ranked(units: Sequence[Unit]) -> list[Unit]:
    """Return the units, the one that costs most noise for what it computes first."""
    return sorted(units, key=lambda u: (-u.noise / u.cost, u.nodes))


def _given_back(
    units: Sequence[Unit],
    high: list[Unit],
    measure: Callable[[Sequence[Unit]], float],
    most_noise: float,
    noise: float,
) -> float:
    """Quantize again what was not needed in the end, the dearest first; return the noise."""
    for unit in sorted(high, key=lambda u: (-u.cost, u.nodes)):
        found = measure(_without(units, [u for u in high if u is not unit]))
        if found <= most_noise:
            high.remove(unit)
            noise = found
    return noise


def _without(units: Sequence[Unit], high: Sequence[Unit]) -> list[Unit]:
    names = {unit.nodes for unit in high}
    return [unit for unit in units if unit.nodes not in names]
