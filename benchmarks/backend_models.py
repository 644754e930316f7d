"""One of onnx's backend test models through `quantize`: a valid variant that runs, or a clean error.

The model goes through what ``python -m pipeline quantize`` runs, calibrated on the test's own inputs as a user would
give them (an ``.npz``), for the CPU and for a GPU at once, with every matrix product, convolution and addition asked
for in INT8. Whatever is no :class:`~pipeline.errors.PipelineError` is a defect.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
FAMILIES = {"cpu": "cpu", "a100": "gpu-int8"}
QUANTIZED_OPS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Add")
DEFECTS = ("invalid", "bug", "hang", "crash")
"""Outcomes that must not occur; the others are ``quantized``, ``nothing to quantize`` and ``refused``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model with its test's inputs; ``feeds`` is ``None`` where they are not all arrays."""

    name: str
    model: bytes
    feeds: dict[str, Any] | None
    expected: tuple[Any, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a model.

    Attributes:
        name: Kind and name of the test.
        status: ``quantized``, ``nothing to quantize``, ``refused`` or one of :data:`DEFECTS`.
        kind: The class of the error, if there was one.
        detail: Its text, or the traceback of a defect.
        sqnr_db: Signal to quantization noise of the worst output, by family, where it could be compared.
        seconds: Wall-clock time.
    """

    name: str
    status: str
    kind: str = ""
    detail: str = ""
    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Invalid(Exception):  # noqa: N818 (a verdict on a variant, raised inside this file only)
    """A variant that is not valid or does not run like its source."""


def cases(kinds: Sequence[str] = KINDS, *, every: int = 1) -> list[Case]:
    """Return every ``every``-th model of these kinds."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        tests = [(kind, test) for kind in kinds for test in load_model_tests(kind=kind)]
        return [_case(kind, test) for kind, test in tests[::every]]


def _case(kind: str, test: Any) -> Case:
    model = test.model or onnx.load(Path(test.model_dir) / "model.onnx")
    given: Sequence[Any] = ()
    expected: Sequence[Any] | None = None
    if test.data_sets:
        given, expected = test.data_sets[0]
    elif test.model_dir:
        folder = Path(test.model_dir) / "test_data_set_0"
        given, expected = _stored(folder, "input"), _stored(folder, "output")
    constants = {t.name for t in model.graph.initializer}
    names = [i.name for i in model.graph.input if i.name not in constants]
    if len(names) != len(given):  # a test may give what an initializer gives too
        names = [i.name for i in model.graph.input][: len(given)]
    arrays = len(names) == len(given) and all(isinstance(a, (np.ndarray, np.generic)) for a in given)
    return Case(
        name=f"{kind}/{test.name}",
        model=model.SerializeToString(),
        feeds={n: np.asarray(a) for n, a in zip(names, given, strict=True)} if arrays else None,
        expected=tuple(_kind(v) for v in expected) if expected is not None else None,
    )


def _stored(folder: Path, prefix: str) -> list[Any]:
    found: list[Any] = []
    for path in sorted(folder.glob(f"{prefix}_*.pb"), key=lambda p: int(p.stem.rpartition("_")[2])):
        try:
            found.append(onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes())))
        except Exception:  # a sequence or an optional: its file holds another message
            found.append(None)
    return found


def attempt(case: Case, folder: Path) -> Outcome:
    """Quantize one model in ``folder`` and check what comes out; never raises."""
    from pipeline.errors import PipelineError

    log = logging.getLogger("pipeline.notice")
    before, log.disabled = log.disabled, True  # 2,000 times "few samples"
    try:
        return _attempt(case, folder)
    except PipelineError as error:
        defect = "defect" in error.fix or not error.what
        return Outcome(
            name=case.name, status="bug" if defect else "refused", kind=type(error).__name__, detail=str(error)
        )
    except Invalid as error:
        return Outcome(name=case.name, status="invalid", kind="Invalid", detail=str(error))
    except Exception as error:  # the point of the exercise
        text = traceback.format_exc()
        return Outcome(name=case.name, status="bug", kind=type(error).__name__, detail=text)
    finally:
        log.disabled = before


def _attempt(case: Case, folder: Path) -> Outcome:
    from pipeline.build import BuildOptions, build
    from pipeline.recipe import parse

    source = folder / "model.onnx"
    source.write_bytes(case.model)
    calibration: dict[str, Any] = {}
    if case.feeds:
        np.savez(folder / "calibration.npz", **{n: _savable(a) for n, a in case.feeds.items()})
        calibration["data"] = str(folder / "calibration.npz")
    recipe = parse(
        {
            "source": {"onnx": str(source)},
            "calibration": calibration,
            "policy": {
                "preset": "int8-all",
                "rules": [{"op_type": op, "precision": "int8"} for op in QUANTIZED_OPS],
            },
            "targets": list(FAMILIES),
            "threads": 1,
        }
    )
    build(recipe, folder / "build", options=BuildOptions(until="quantize"))
    reference = _reference(source, case)
    pairs = 0
    noise: dict[str, float] = {}
    for family in FAMILIES.values():
        variant = folder / "build" / "variants" / family / "model.onnx"
        pairs += _check(variant, family, case, reference, noise)
    return Outcome(name=case.name, status="quantized" if pairs else "nothing to quantize", sqnr_db=noise)


def _reference(source: Path, case: Case) -> list[Any] | None:
    """Return the source's outputs in ONNX Runtime; ``None`` where it does not run."""
    from pipeline.errors import EngineError
    from pipeline.running.session import run, session

    if case.feeds is None:
        return None
    proto = onnx.load(source)
    proto.ir_version = min(proto.ir_version, onnx.helper.find_min_ir_version_for(proto.opset_import, True))
    try:
        return run(session(proto.SerializeToString(), threads=1, optimize=False), None, case.feeds)
    except EngineError:
        return None


def _check(variant: Path, family: str, case: Case, reference: list[Any] | None, noise: dict[str, float]) -> int:
    """Return how many quantized tensors the variant has; add its SQNR to ``noise``."""
    from pipeline.running.session import run, session

    proto = onnx.load(variant)
    try:
        onnx.checker.check_model(str(variant), full_check=_is_fully_valid(case))
    except Exception as error:
        raise Invalid(f"{family}: onnx.checker: {error}") from error
    names = [o.name for o in onnx.load_from_string(case.model).graph.output]
    if [o.name for o in proto.graph.output] != names:
        raise Invalid(f"{family}: the outputs are {[o.name for o in proto.graph.output]}, not {names}")
    if reference is not None:
        for optimize in (False, True):
            try:
                live = session(variant, threads=1, optimize=optimize)
                wanted = {i.name for i in live.get_inputs()}
                got = run(live, names, {n: a for n, a in (case.feeds or {}).items() if n in wanted})
            except Exception as error:
                raise Invalid(f"{family}, optimize={optimize}: {error}") from error
            if [_kind(v) for v in got] != [_kind(v) for v in reference]:
                raise Invalid(
                    f"{family}, optimize={optimize}: outputs {[_kind(v) for v in got]}, "
                    f"not {[_kind(v) for v in reference]}"
                )
            found = min((_sqnr_db(w, g) for w, g in zip(reference, got, strict=True)), default=float("inf"))
            noise[family] = min(noise.get(family, float("inf")), found)
    return sum(n.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear") for n in proto.graph.node)


def _is_fully_valid(case: Case) -> bool:
    try:
        onnx.checker.check_model(onnx.load_from_string(case.model), full_check=True)
    except Exception:
        return False
    return True


def _kind(value: Any) -> Any:
    """Return the dtype and shape of an output, or those of a sequence's elements."""
    if isinstance(value, (np.ndarray, np.generic)):
        return ("text" if value.dtype.kind in "OUS" else value.dtype.name, value.shape)
    if isinstance(value, list):
        return [_kind(v) for v in value]
    return type(value).__name__


def _sqnr_db(want: Any, got: Any) -> float:
    """Return 10 log10(signal / noise) of two arrays; infinite where there is nothing to compare."""
    if not isinstance(want, np.ndarray) or want.dtype.kind != "f" or not want.size:
        return float("inf")
    a, b = want.astype(np.float64), got.astype(np.float64)
    known = np.isfinite(a)
    noise, signal = float(np.square(a[known] - b[known]).sum()), float(np.square(a[known]).sum())
    if noise == 0.0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def _savable(array: Any) -> Any:
    return array.astype(str) if array.dtype.kind == "O" else array


def walk(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, int]]:
    """Yield every outcome (status and class of error) with its count, most frequent first within each status."""
    counts: dict[tuple[str, str], int] = {}
    for outcome in outcomes:
        counts[outcome.status, outcome.kind] = counts.get((outcome.status, outcome.kind), 0) + 1
    order = {s: i for i, s in enumerate(("quantized", "nothing to quantize", "refused", *DEFECTS))}
    for (status, kind), count in sorted(counts.items(), key=lambda item: (order[item[0][0]], -item[1])):
        yield f"{status}: {kind}" if kind else status, count
