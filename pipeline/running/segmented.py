"""A session of a model that is too large for memory: its segments are loaded one at a time.

Batches go through a segment one after the other and wait there for the next one, so weights are read once for many
batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime as ort

from pipeline.errors import EngineError
from pipeline.running.segments import Segment, segments
from pipeline.running.session import failed, session
from pipeline.types import Array, Feeds

CARRIED_BYTES = 512 << 20
"""What batches that wait between two segments may hold; then they go on, and later ones follow behind them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some outputs of a batch.

    Attributes:
        feeds: The batch.
        values: Outputs that no earlier piece of the batch had, by name.
        last: Whether no other piece of the batch follows.
    """

    feeds: Feeds
    values: dict[str, Array]
    last: bool


def in_order(pieces: Iterable[Piece]) -> Iterator[dict[str, Array]]:
    """Yield all outputs of one batch after the other."""
    waiting: dict[int, dict[str, Array]] = {}
    for piece in pieces:
        values = waiting.setdefault(id(piece.feeds), {})
        values.update(piece.values)
        if piece.last:
            yield waiting.pop(id(piece.feeds))


class TensorSeen(NamedTuple):
    """An input or output as ONNX Runtime describes it; a dimension is a number, a symbol or unknown."""

    name: str
    type: str
    shape: list[int | str | None]


@dataclass(slots=True, kw_only=True)
class _Waiting:
    """A batch between two segments."""

    feeds: Feeds
    values: dict[str, ort.OrtValue] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(v.tensor_size_in_bytes() for v in self.values.values())


class SegmentedSession:
    """Behaves like an ONNX Runtime session of the whole model, with one segment's weights in memory at a time.

    Args:
        model: Its nodes in topological order, its weights in files of their own.
        folder: Where they are.
        threads: Intra-op threads; 0 is one per core.
        optimize: ``False`` runs every node as it stands.
        segment_bytes: Most weights of a segment.

    Attributes:
        segments: The parts of the graph, in order.

    Raises:
        EngineError: ONNX Runtime refuses a segment.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        folder: Path,
        *,
        segment_bytes: int,
        threads: int = 0,
        optimize: bool = True,
    ) -> None:
        self.segments = segments(model.graph, segment_bytes)
        self._model, self._folder, self._threads, self._optimize = model, folder, threads, optimize
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._inputs = {v.name: v for v in model.graph.input if v.name not in self._constants}
        self._types: dict[str, onnx.ValueInfoProto] = dict(self._inputs)
        self._seen: dict[str, TensorSeen] = {}
        self._handed_on = {name for segment in self.segments for name in segment.inputs}
        for segment in self.segments:  # loading reads no weights, and says now what ONNX Runtime refuses
            self._learn(self._open(segment, [n for n in segment.outputs if self._leaves(n)], optimize=False))

    def get_inputs(self) -> list[TensorSeen]:
        """Return the model's inputs."""
        return [_described(value) for value in self._inputs.values()]

    def get_outputs(self) -> list[TensorSeen]:
        """Return the model's outputs, with the types that ONNX Runtime infers."""
        return [self._seen.get(value.name) or _described(value) for value in self._model.graph.output]

    def run(self, outputs: Sequence[str] | None, feeds: Feeds) -> list[Array]:
        """Return some outputs (all if ``None``) of one batch."""
        names = [value.name for value in self._model.graph.output] if outputs is None else list(outputs)
        found = next(in_order(self.stream(names, [feeds])))
        return [found[name] for name in names]

    def pieces(self, outputs: Sequence[str]) -> int:
        """Return how many pieces :meth:`stream` yields for a batch."""
        return max(1, len(self._needed(outputs)))

    def stream(self, outputs: Sequence[str], batches: Iterable[Feeds]) -> Iterator[Piece]:
        """Yield one piece of a batch for every segment that ``outputs`` need; batches are in order for each output."""
        needed = self._needed(outputs)
        wanted, source = set(outputs), iter(batches)
        if not needed:
            yield from (Piece(feeds=feeds, values=self._known(wanted, feeds), last=True) for feeds in source)
        while (first := next(source, None)) is not None:
            entering = itertools.chain([first], source)
            waiting: list[_Waiting] = []
            for place, (segment, names) in enumerate(needed):
                live = self._open(segment, names, optimize=self._optimize)
                later = {name for other, _ in needed[place + 1 :] for name in other.inputs}
                last = place == len(needed) - 1
                for batch in self._entering(entering, waiting) if place == 0 else waiting:
                    values = self._known(wanted, batch.feeds) if place == 0 else {}
                    self._advance(batch, self._through(live, segment, names, batch), later, wanted, values)
                    yield Piece(feeds=batch.feeds, values=values, last=last)
                    del values  # whoever drops the piece frees its arrays
                del live

    @staticmethod
    def _advance(
        batch: _Waiting, made: dict[str, ort.OrtValue], later: set[str], wanted: set[str], values: dict[str, Array]
    ) -> None:
        """Keep in ``batch`` what later segments read, and put what is wanted into ``values``."""
        batch.values = {name: value for name, value in batch.values.items() if name in later}
        while made:
            name, value = made.popitem()
            if name in later:
                batch.values[name] = value
            if name in wanted:
                values[name] = value.numpy()

    def optimized(self, folder: Path) -> Iterator[onnx.GraphProto]:
        """Yield the graph of every segment after ONNX Runtime's optimizations, without weights; ``folder`` is for files."""
        for index, segment in enumerate(self.segments):
            path = folder / f"{index}.onnx"
            self._open(segment, [n for n in segment.outputs if self._leaves(n)], optimize=True, save_optimized=path)
            yield onnx.load(path, load_external_data=False).graph
            for file in folder.glob(f"{index}.onnx*"):
                file.unlink()

    def _leaves(self, name: str) -> bool:
        return name in self._handed_on or any(name == value.name for value in self._model.graph.output)

    def _needed(self, outputs: Sequence[str]) -> list[tuple[Segment, list[str]]]:
        """Return the segments that ``outputs`` need, each with what it has to make, in order."""
        wanted, found = set(outputs), []
        for segment in reversed(self.segments):
            names = [name for name in segment.outputs if name in wanted]
            if names:
                found.append((segment, names))
                wanted.update(segment.inputs)
        return found[::-1]

    @staticmethod
    def _entering(source: Iterator[Feeds], waiting: list[_Waiting]) -> Iterator[_Waiting]:
        """Take batches until those that wait behind the first segment hold all that they may."""
        while sum(batch.nbytes for batch in waiting) < CARRIED_BYTES:
            if (feeds := next(source, None)) is None:
                return
            waiting.append(_Waiting(feeds=feeds))
            yield waiting[-1]

    def _through(
        self, live: ort.InferenceSession, segment: Segment, names: list[str], batch: _Waiting
    ) -> dict[str, ort.OrtValue]:
        try:
            given = {name: batch.values.get(name) or _value(batch.feeds[name]) for name in segment.inputs}
            return dict(zip(names, live.run_with_ort_values(names, given), strict=True))
        except KeyError as error:
            raise EngineError(f"The data does not provide the input {error}.", where=str(self._folder)) from error
        except Exception as error:  # ONNX Runtime's exception classes share no public base
            raise failed(error) from error

    def _known(self, wanted: set[str], feeds: Feeds) -> dict[str, Array]:
        """Return outputs that no node makes: inputs and constants that are passed through."""
        made = {name for segment in self.segments for name in segment.outputs}
        constants = {n: self._constants[n] for n in wanted - made if n in self._constants}
        passed = {n: feeds[n] for n in wanted - made if n in feeds}
        return passed | {n: onnx.numpy_helper.to_array(t, str(self._folder)) for n, t in constants.items()}

    def _open(
        self, segment: Segment, outputs: list[str], *, optimize: bool, save_optimized: Path | None = None
    ) -> ort.InferenceSession:
        graph = onnx.GraphProto(name="segment", node=segment.nodes, initializer=segment.weights)
        graph.input.extend(self._types[name] for name in segment.inputs)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        part = onnx.ModelProto(
            ir_version=self._model.ir_version,
            graph=graph,
            opset_import=self._model.opset_import,
            functions=self._model.functions,
        )
        return session(
            part.SerializeToString(),
            folder=self._folder,
            threads=self._threads,
            optimize=optimize,
            prepack=False,
            save_optimized=save_optimized,
        )

    def _learn(self, live: ort.InferenceSession) -> None:
        """Remember the types of what a segment hands on."""
        for value in live.get_outputs():
            self._seen[value.name] = TensorSeen(value.name, value.type, value.shape)
            kind = value.type.removeprefix("tensor(").removesuffix(")")
            if not value.type.startswith("tensor("):
                if value.name in self._handed_on:
                    raise EngineError(
                        f"The model would have to be cut at {value.name!r}, which is a {value.type} and no tensor.",
                        where=str(self._folder),
                        fix="Let its weights take more memory: memory_mb.",
                    )
                continue
            # ONNX Runtime's own symbols mean other sizes in other segments.
            shape = [d if isinstance(d, int) or not str(d).startswith("unk__") else None for d in value.shape]
            number = onnx.TensorProto.FLOAT if kind == "float" else onnx.TensorProto.DataType.Value(kind.upper())
            self._types[value.name] = onnx.helper.make_tensor_value_info(value.name, number, shape)


def _value(given: Array | ort.OrtValue) -> ort.OrtValue:
    """Return a feed as ONNX Runtime's own value, which it is where numpy has no such type."""
    return given if isinstance(given, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(given)


def _described(value: onnx.ValueInfoProto) -> TensorSeen:
    kind = value.type.tensor_type
    name = {"FLOAT": "float"}.get(n := onnx.TensorProto.DataType.Name(kind.elem_type), n.lower())
    shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in kind.shape.dim]
    return TensorSeen(value.name, f"tensor({name})" if value.type.HasField("tensor_type") else "", shape)
