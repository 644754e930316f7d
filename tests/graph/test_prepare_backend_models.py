"""The models of onnx's own backend tests: each becomes a valid model of equal outputs, or a clean error."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from canonical_models import prepare
from onnx.reference import ReferenceEvaluator

from pipeline.errors import PipelineError
from pipeline.types import Feeds

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    kind: str
    name: str
    model: onnx.ModelProto
    feeds: Feeds | None


def cases(kinds: tuple[str, ...]) -> Iterator[Case]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in kinds:
            for test in load_model_tests(kind=kind):
                yield _case(kind, test)


def _case(kind: str, test: object) -> Case:
    model = test.model or onnx.load(Path(test.model_dir) / "model.onnx")  # type: ignore[attr-defined]
    given: list[object] = []
    if test.data_sets:  # type: ignore[attr-defined]
        given = list(test.data_sets[0][0])  # type: ignore[attr-defined]
    elif test.model_dir:  # type: ignore[attr-defined]
        for path in sorted((Path(test.model_dir) / "test_data_set_0").glob("input_*.pb")):  # type: ignore[attr-defined]
            with contextlib.suppress(Exception):
                given.append(onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes())))
    plain = len(given) == len(model.graph.input) and all(isinstance(a, np.ndarray | np.generic) for a in given)
    feeds = {i.name: np.asarray(a) for i, a in zip(model.graph.input, given, strict=True)} if plain else None
    return Case(kind=kind, name=test.name, model=model, feeds=feeds)  # type: ignore[attr-defined]


def outcome(case: Case, folder: Path) -> str:
    """Prepare one model; any exception but a PipelineError fails the test."""
    source = folder / "model.onnx"
    source.write_bytes(case.model.SerializeToString())
    try:
        prepared = prepare(source, folder / "out.onnx", sample=case.feeds)
    except PipelineError as error:
        if "defect" in error.fix:
            raise AssertionError(case.name) from error
        return f"{type(error).__name__}: {' '.join(error.what.split())[:60]}"
    made = onnx.load(prepared.path)
    constants = {t.name for t in case.model.graph.initializer}
    assert [v.name for v in made.graph.output] == [v.name for v in case.model.graph.output], case.name
    assert [v.name for v in made.graph.input] == [v.name for v in case.model.graph.input if v.name not in constants]
    if prepared.max_relative_difference is not None:
        assert prepared.max_relative_difference <= 4e-3, case.name
        return "equal in ONNX Runtime"
    if any(n.op_type.startswith(("Random", "Bernoulli", "Multinomial")) for n in case.model.graph.node):
        return "valid, random"
    return _reference_outcome(case, made)


def _reference_outcome(case: Case, made: onnx.ModelProto) -> str:
    """Compare in onnx's reference evaluator what ONNX Runtime does not run."""
    try:
        wanted = ReferenceEvaluator(case.model).run(None, case.feeds or {})
    except Exception:
        onnx.checker.check_model(made, full_check=True)
        return "valid by onnx's checker"
    for ours, theirs in zip(ReferenceEvaluator(made).run(None, case.feeds or {}), wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=case.name)
    return "equal in onnx's reference evaluator"


def count(kinds: tuple[str, ...], folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for case in cases(kinds):
        counts[f"{case.kind}: {outcome(case, folder)}"] += 1
    return counts


def test_the_models_converted_from_torch(tmp_path: Path) -> None:
    counts = count(KINDS[1:], tmp_path)
    assert sum(counts.values()) > 130
    assert sum(number for name, number in counts.items() if "equal" in name) > 120


@pytest.mark.slow
def test_all_backend_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = count(KINDS, tmp_path)
    with capsys.disabled():
        for name, number in sorted(counts.items()):
            print(f"\n{number:5d}  {name}", end="")  # noqa: T201
    assert sum(counts.values()) > 1900
    equal = sum(number for name, number in counts.items() if "equal" in name)
    assert equal > 1700
