"""The lint against TensorRT for RTX, which parses and builds the same graphs in a child process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.compile_check import available
from tests.lint.confusion import Matrix, compare, measure
from tests.lint.oracle import Oracle
from tests.lint.placements import ATTENTION, MEASURED, attention, attention_fuses
from tests.lint.suites import SM80, SM89, SUITES, Suite, generate, sound
from tests.lint.wild import wild

pytestmark = pytest.mark.skipif(not available(), reason="needs TensorRT for RTX: pip install '.[rtx]'")

REFUSED = [(index, suite) for index, suite in enumerate(SUITES) if suite.expect == "refused"]


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with Oracle() as live:
        yield live


def check(suite: Suite, matrix: Matrix, count: int) -> None:
    """The lint and its judge agree on every graph, and the graphs are what their generators say."""
    assert matrix.strange == []
    faulty, clean = matrix.outcomes
    assert clean == {"accepted": count}
    assert matrix.flagged == (count, 0)
    assert faulty.get("crash", 0) == 0 or suite.rule == "QDQ118"
    assert faulty.get("accepted", 0) == (0 if suite.expect == "refused" else count)


@pytest.mark.parametrize(("index", "suite"), REFUSED, ids=[f"{s.rule}-{s.what}" for _, s in REFUSED])
def test_a_sample_of_every_rule_about_validity(oracle: Oracle, index: int, suite: Suite) -> None:
    check(suite, measure(suite, 3, oracle, seed=100 + index), 3)


def test_a_sample_of_random_graphs(oracle: Oracle) -> None:
    matrix = compare(generate(wild, 30, seed=5), oracle)
    assert matrix.strange == []
    assert matrix.true_positive > 5
    assert matrix.true_negative > 2


def test_a_refused_build_does_not_change_the_next(oracle: Oracle) -> None:
    """A build that was refused leaves its GPU behind in the process; the oracle must not pass that on."""
    case = generate(sound, 1, seed=2)[0]
    with Oracle() as fresh:
        before = fresh.ask(case.model, SM80)
    refused = next(s for s in SUITES if s.rule == "QDQ102").faulty
    assert oracle.ask(generate(refused, 1, seed=0)[0].model, (7, 5)).outcome == "builder"
    after = oracle.ask(case.model, SM80)
    assert after.compiled.layers == before.compiled.layers


def test_int8_read_as_int8_is_seen_in_the_compiled_layers(oracle: Oracle) -> None:
    """The silent change of QDQ106: the graph says UINT8 or INT32, the engine makes Int8."""
    for case in generate(next(s for s in SUITES if s.rule == "QDQ106").faulty, 3, seed=1):
        made = [t.dtype for layer in oracle.ask(case.model, SM80).compiled for t in layer.outputs]
        assert "Int8" in made
        assert not {"UInt8", "Int32"} & set(made)


@pytest.mark.slow
@pytest.mark.parametrize(("index", "suite"), list(enumerate(SUITES)), ids=[f"{s.rule}-{s.what}" for s in SUITES])
def test_fifty_faulty_and_fifty_clean_graphs(oracle: Oracle, index: int, suite: Suite) -> None:
    check(suite, measure(suite, 50, oracle, seed=index), 50)


@pytest.mark.slow
def test_random_graphs(oracle: Oracle) -> None:
    matrix = compare(generate(wild, 500, seed=7), oracle)
    assert matrix.strange == []


@pytest.mark.slow
@pytest.mark.parametrize(("narrow", "capability"), [(False, SM80), (True, SM89)], ids=["int8", "fp8"])
def test_attention_fuses_as_the_rule_says(oracle: Oracle, *, narrow: bool, capability: tuple[int, int]) -> None:
    for places in ATTENTION:
        compiled = oracle.ask(attention(places, narrow=narrow), capability).compiled
        assert (compiled.fused_attention == 1) is attention_fuses(places, narrow=narrow), places


@pytest.mark.slow
def test_what_the_rules_about_speed_cost(oracle: Oracle) -> None:
    """Warnings cost bytes, kernels or low-precision products; notes do not cost bytes, whatever the literature says."""
    for rule, what, advised, against, capability in MEASURED:
        good, bad = (oracle.ask(make(), capability).compiled for make in (advised, against))
        if "no finding" in what:
            continue
        if rule in ("QDQ206", "QDQ207") or "N = 8" in what:
            assert bad.bytes_moved < good.bytes_moved, what
        else:
            low = (good.low_precision_flops_share or 0) > (bad.low_precision_flops_share or 0)
            assert bad.bytes_moved > good.bytes_moved or bad.kernels > good.kernels or low, what
