"""Which units go back to high precision, with noise that adds up exactly."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeline.policy.mixed import ELEMENT, Unit, choose


def unit(name: str, noise: float, products: int = 1000, elements: int = 0) -> Unit:
    return Unit(nodes=(name,), products=products, elements=elements, noise=noise)


def total(units: Sequence[Unit]) -> float:
    return sum(u.noise for u in units)


def names(units: Sequence[Unit]) -> list[str]:
    return [u.nodes[0] for u in units]


def test_most_noise_for_its_products_goes_first() -> None:
    units = [unit("a", 4.0, 4000), unit("b", 3.0, 1000), unit("c", 2.0, 1000), unit("d", 1.0, 1000)]
    found = choose(units, total, most_noise=None, spare=2000)
    assert names(found.high) == ["b", "c"]
    assert (found.before, found.after) == (10.0, 5.0)


def test_a_unit_that_does_not_fit_leaves_room_for_smaller_ones() -> None:
    units = [unit("a", 8.0, 3000), unit("b", 2.0, 1000)]
    assert names(choose(units, total, most_noise=None, spare=2000).high) == ["b"]


def test_it_stops_when_the_noise_is_low_enough() -> None:
    units = [unit("a", 4.0), unit("b", 3.0), unit("c", 2.0), unit("d", 1.0)]
    found = choose(units, total, most_noise=3.0, spare=1e9)
    assert names(found.high) == ["a", "b"]
    assert found.after == 3.0


def test_what_was_not_needed_in_the_end_is_quantized_again() -> None:
    """Of ``a`` and ``b`` either would do with ``c``; the dearer one comes back."""
    units = [unit("a", 2.0, 10), unit("b", 3.0, 20), unit("c", 5.0, 100)]
    found = choose(units, total, most_noise=3.0, spare=1e9)
    assert names(found.high) == ["a", "c"]
    assert found.after == 3.0


def test_less_than_a_quarter_of_an_even_share_of_what_is_left_is_not_worth_high_precision() -> None:
    units = [unit("a", 1.0), unit("b", 0.12)]
    assert names(choose(units, total, most_noise=None, spare=1000).high) == ["a"]
    assert names(choose(units, total, most_noise=None, spare=1e9).high) == ["a", "b"]  # now it is all of it
    # Of 1.12, an even share is 0.56, and a quarter of that 0.14; the noisy one is too large to go back.
    assert choose([unit("a", 1.0, 5000), unit("b", 0.12)], total, most_noise=None, spare=1000).high == ()
    assert names(choose([unit("a", 1.0, 5000), unit("b", 0.15)], total, most_noise=None, spare=1000).high) == ["b"]


@pytest.mark.parametrize("most_noise", [100.0, None])
def test_a_deep_networks_noise_is_made_of_many_small_parts(most_noise: float | None) -> None:
    units = [unit(f"{i:03}", 1.0) for i in range(200)]
    found = choose(units, total, most_noise=most_noise, spare=100_000)
    assert len(found.high) == 100
    assert (found.before, found.after) == (200.0, 100.0)


def test_a_noise_that_is_to_be_reached_takes_small_units_too() -> None:
    """The noisy one does not fit, and of the small ones every bit is needed."""
    units = [unit("a", 100.0, 5000), unit("b", 0.5), unit("c", 0.5)]
    found = choose(units, total, most_noise=100.0, spare=2000)
    assert sorted(names(found.high)) == ["b", "c"]


def test_what_makes_no_noise_stays_narrow() -> None:
    units = [unit("a", 1.0), unit("b", 0.0), unit("c", 0.0)]
    for most_noise in (None, 0.0):
        assert names(choose(units, total, most_noise=most_noise, spare=1e9).high) == ["a"]


def test_nothing_may_go_back_where_less_than_the_share_is_narrow_already() -> None:
    units = [unit("a", 1.0), unit("add", 5.0, products=0, elements=10)]
    assert choose(units, total, most_noise=None, spare=-1.0).high == ()


def test_an_output_element_costs_as_many_multiplications_as_a_gpu_does_meanwhile() -> None:
    assert unit("add", 1.0, products=0, elements=10).cost == 10 * ELEMENT
    units = [unit("add", 1.0, products=0, elements=100), unit("gemm", 1.0, products=ELEMENT * 50, elements=0)]
    assert names(choose(units, total, most_noise=1.0, spare=1e9).high) == ["gemm"]


def test_what_overflows_goes_first() -> None:
    units = [unit("a", 1.0), unit("b", 1e30, 100_000)]
    found = choose(units, total, most_noise=1.0, spare=1e9)
    assert names(found.high) == ["b"]
    assert found.after == 1.0


def test_steps_that_do_not_pay_in_the_end_are_taken_back() -> None:
    """``b``'s error cancels most of ``a``'s: without ``a`` alone it is worse, without both it is best; ``c`` only cancels."""
    units = [unit("a", 4.0), unit("b", 3.0), unit("c", 1.0)]
    noise = {"abc": 2.0, "bc": 3.0, "c": 1.0, "": 1.5}

    def measured(some: Sequence[Unit]) -> float:
        return noise["".join(sorted(names(some)))]

    found = choose(units, measured, most_noise=None, spare=1e9)
    assert names(found.high) == ["a", "b"]
    assert (found.before, found.after) == (2.0, 1.0)
    noise = {"abc": 2.0, "bc": 3.0, "c": 3.0, "": 2.5}
    found = choose(units, measured, most_noise=None, spare=1e9)
    assert (found.high, found.after) == ((), 2.0)
