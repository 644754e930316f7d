"""What a collection found: a statistic for every request, in one file, and mergeable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from calibrators.atomic import write_whole
from calibrators.channel_absmax import ChannelAbsmax
from calibrators.channel_range import ChannelRange
from calibrators.sketch import Sketch
from calibrators.statistic import Statistic
from pipeline.errors import DataError
from pipeline.types import Array

FORMAT = 1
"""Version of the file's layout."""


@dataclass(frozen=True, slots=True, order=True)
class Request:
    """A tensor to observe.

    Attributes:
        tensor: Its name in the model's main graph: a node's output, a graph input or an initializer.
        statistic: ``sketch``, ``channel_absmax`` or ``channel_range``.
        axis: The channel axis of a per-channel statistic; -1 is the last.
    """

    tensor: str
    statistic: str = "sketch"
    axis: int = -1


def empty_statistic(request: Request) -> Statistic:
    """Return the empty statistic that ``request`` asks for.

    Raises:
        DataError: There is no statistic of that name.
    """
    if request.statistic == "sketch":
        return Sketch()
    if request.statistic == "channel_absmax":
        return ChannelAbsmax(request.axis)
    if request.statistic == "channel_range":
        return ChannelRange(request.axis)
    raise DataError(
        f"There is no statistic {request.statistic!r}.",
        where=f"tensor {request.tensor}",
        fix="Use sketch, channel_absmax or channel_range.",
    )


class Statistics(Mapping[str, Sketch]):
    """The statistics of a model's tensors; as a mapping, the sketch of each tensor that has one.

    Attributes:
        model_sha256: Hash of the model that was run, external data included.
        samples: How many samples were run.
        seconds: Wall-clock time of the collection; ``None`` if it was not measured (read from a file).
        fp32_forward_seconds: The part of it spent inside ONNX Runtime; ``None`` likewise.
        peak_rss_bytes: Largest resident set of the process so far; ``None`` likewise.
    """

    def __init__(
        self,
        statistics: Mapping[Request, Statistic],
        *,
        model_sha256: str,
        samples: int,
        constants: frozenset[Request] = frozenset(),
    ) -> None:
        self._statistics = dict(sorted(statistics.items()))
        self._constants = constants
        self.model_sha256 = model_sha256
        self.samples = samples
        self.seconds: float | None = None
        self.fp32_forward_seconds: float | None = None
        self.peak_rss_bytes: int | None = None

    def __getitem__(self, tensor: str) -> Sketch:
        found = self._statistics.get(Request(tensor))
        if not isinstance(found, Sketch):
            raise KeyError(tensor)
        return found

    def __iter__(self) -> Iterator[str]:
        return (request.tensor for request in self._statistics if request.statistic == "sketch")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def requests(self) -> tuple[Request, ...]:
        """Return what was asked for, sorted."""
        return tuple(self._statistics)

    def of(self, request: Request) -> Statistic:
        """Return the statistic of one request; raises ``KeyError`` if it was not collected."""
        return self._statistics[request]

    def sketch(self, tensor: str) -> Sketch:
        """Return a tensor's sketch.

        Raises:
            DataError: The tensor was not observed; names it.
        """
        if tensor not in self:
            raise DataError(
                "Nothing was collected for this tensor, so it has no range.",
                where=f"tensor {tensor}",
                fix="Calibrate again with the current policy, which asks for it.",
            )
        return self[tensor]

    def save(self, path: Path) -> None:
        """Write a ``.safetensors`` file: the same bytes for the same statistics. Timings are not in it.

        Raises:
            StoreError: The file cannot be written.
        """
        from safetensors.numpy import save

        arrays: dict[str, Array] = {}
        numbers: dict[int, int] = {}
        entries = []
        for request, statistic in self._statistics.items():
            number = numbers.setdefault(id(statistic), len(numbers))
            arrays.update({f"{number:06}.{name}": array for name, array in statistic.arrays().items()})
            shared = [request.tensor, request.statistic, request.axis, number, request in self._constants]
            entries.append(shared)
        header = {"format": FORMAT, "model": self.model_sha256, "samples": self.samples, "entries": entries}
        # One metadata key: safetensors writes several in no fixed order.
        write_whole(path, save(arrays, metadata={"statistics": json.dumps(header, ensure_ascii=False)}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the statistics that :meth:`save` wrote.

        Raises:
            DataError: The file is missing or does not hold statistics.
        """
        header, arrays = _read(path)
        try:
            if header["format"] != FORMAT:
                raise DataError(
                    f"The file has format {header['format']}; this version reads {FORMAT}.",
                    where=str(path),
                    fix="Calibrate again.",
                )
            statistics: dict[Request, Statistic] = {}
            made: dict[int, Statistic] = {}
            constants = []
            for tensor, kind, axis, number, is_constant in header["entries"]:
                request = Request(tensor, kind, axis)
                if number not in made:
                    made[number] = type(empty_statistic(request)).from_arrays(arrays.get(number, {}))
                statistics[request] = made[number]
                if is_constant:
                    constants.append(request)
            model, samples = str(header["model"]), int(header["samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise _no_statistics(path) from error
        return cls(statistics, model_sha256=model, samples=samples, constants=frozenset(constants))

    @classmethod
    def merge(cls, parts: Sequence[Statistics]) -> Statistics:
        """Return the statistics of several shards together, bit for bit those of one run over all of them.

        Raises:
            DataError: There are none, or they come from different models or requests.
        """
        if not parts:
            raise DataError("There are no statistics to merge.", fix="Name at least one file.")
        first = parts[0]
        for part in parts[1:]:
            _require_mergeable(first, part)
        made: dict[int, Statistic] = {}
        merged: dict[Request, Statistic] = {}
        for request in first.requests:
            key = id(first.of(request))
            if key not in made:
                made[key] = total = empty_statistic(request)
                # A constant is the same in every shard and counts once.
                for part in parts[:1] if request in first._constants else parts:
                    total.merge(part.of(request))
            merged[request] = made[key]
        samples = sum(part.samples for part in parts)
        result = cls(merged, model_sha256=first.model_sha256, samples=samples, constants=first._constants)
        result.seconds = _total([part.seconds for part in parts])
        result.fp32_forward_seconds = _total([part.fp32_forward_seconds for part in parts])
        peaks = [part.peak_rss_bytes for part in parts if part.peak_rss_bytes is not None]
        result.peak_rss_bytes = max(peaks) if len(peaks) == len(parts) else None
        return result


def _require_mergeable(first: Statistics, other: Statistics) -> None:
    if first.model_sha256 != other.model_sha256:
        raise DataError(
            "Statistics of different models cannot be merged.",
            where=f"models {first.model_sha256[:12]} and {other.model_sha256[:12]}",
            fix="Run every shard on the same ONNX file.",
        )
    if first.requests != other.requests or first._constants != other._constants:
        differing = sorted(set(first.requests) ^ set(other.requests))
        raise DataError(
            "Statistics of different requests cannot be merged.",
            where=f"tensor {differing[0].tensor}" if differing else "",
            fix="Run every shard with the same policy.",
        )


def _total(seconds: list[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None


def _read(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Array]]]:
    from safetensors import SafetensorError, safe_open

    arrays: dict[int, dict[str, Array]] = {}
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = json.loads((file.metadata() or {})["statistics"])
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                number, name = key.split(".", 1)
                arrays.setdefault(int(number), {})[name] = file.get_tensor(key)
    except OSError as error:
        raise DataError(
            f"The statistics cannot be read: {error.strerror or error}.", where=str(path), fix="Check the path."
        ) from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise _no_statistics(path) from error
    if not isinstance(header, dict):
        raise _no_statistics(path)
    return header, arrays


def _no_statistics(path: Path) -> DataError:
    return DataError("The file holds no calibration statistics.", where=str(path), fix="Calibrate again.")
