"""ClassMemory and the two terms against slow references, written loop by loop from the equations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffstill.memory import ClassMemory, diversity, representativeness
from slow_memory import SlowMemory

DIM = 6


def contents(memory: ClassMemory, label: int) -> Tensor:
    """The unit vectors of a class, oldest first."""
    return memory.entries[label, : int(memory.filled[label])]


def expected(slow: SlowMemory, label: int) -> Tensor:
    own = slow.entries.get(label, [])
    return torch.nn.functional.normalize(torch.tensor(own), dim=1) if own else torch.zeros(0, DIM)


@pytest.mark.parametrize("policy", ["redundancy", "fifo"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), capacity=st.integers(1, 5), classes=st.integers(1, 3), batches=st.lists(st.integers(0, 7), min_size=1, max_size=6)
)
def test_memory_and_terms_agree_with_the_loops(policy: str, seed: int, capacity: int, classes: int, batches: list[int]) -> None:
    draws = torch.Generator().manual_seed(seed)
    fast, slow = ClassMemory(classes, capacity, DIM, policy), SlowMemory(capacity, policy)  # type: ignore[arg-type]
    for size in batches:
        vectors = torch.randn(size, DIM, generator=draws)
        labels = torch.randint(classes, (size,), generator=draws)
        for accumulate in ("paper", "as_published") if size else ():
            for term, kind in ((representativeness, "real"), (diversity, "gen")):
                expected_term = slow.term(vectors, labels, kind, as_published=accumulate == "as_published")
                assert term(vectors, labels, fast, accumulate).item() == pytest.approx(expected_term, abs=1e-5)
        fast.add(vectors, labels)
        slow.add(vectors, labels)
        for label in range(classes):
            torch.testing.assert_close(contents(fast, label), expected(slow, label), atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", ["redundancy", "fifo"])
def test_similarity_matrix_is_kept_right(policy: str) -> None:
    memory = ClassMemory(2, 4, DIM, policy)  # type: ignore[arg-type]
    for seed in range(5):
        draws = torch.Generator().manual_seed(seed)
        memory.add(torch.randn(6, DIM, generator=draws), torch.randint(2, (6,), generator=draws))
    torch.testing.assert_close(memory.similarity, memory.entries @ memory.entries.mT, atol=1e-6, rtol=0)


def test_the_most_redundant_leaves_and_fifo_drops_the_oldest() -> None:
    # the second and third are nearly the same direction, and the third leans to the fourth
    vectors = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.05, 0.0], [0.0, 1.0, 0.0]])
    left = {}
    for policy in ("redundancy", "fifo"):
        memory = ClassMemory(1, 3, 3, policy)  # type: ignore[arg-type]
        memory.add(vectors, torch.zeros(4, dtype=torch.long))
        left[policy] = contents(memory, 0)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    torch.testing.assert_close(left["redundancy"], unit[[0, 1, 3]])
    torch.testing.assert_close(left["fifo"], unit[[1, 2, 3]])


def test_of_equally_redundant_entries_the_oldest_leaves() -> None:
    memory = ClassMemory(1, 3, 6, "redundancy")
    vectors = torch.eye(6)[[4, 2, 0, 5]]  # all at right angles: equally redundant
    memory.add(vectors, torch.zeros(4, dtype=torch.long))
    assert torch.equal(contents(memory, 0), vectors[1:])


@pytest.mark.parametrize(("more", "leaver"), [(5e-7, 0), (1e-4, 1)])
def test_redundancies_are_equal_up_to_a_millionth(more: float, leaver: int) -> None:
    """cos(a, c) is 0.5 and cos(b, c) `more` than that: b is the most redundant, unless that is rounding."""
    b = (0.9, math.sqrt(1 - 0.9**2), 0.0)
    y = (0.5 + more - 0.9 * 0.5) / b[1]
    vectors = torch.tensor([[1.0, 0.0, 0.0], b, [0.5, y, math.sqrt(1 - 0.5**2 - y**2)]])
    memory = ClassMemory(1, 2, 3, "redundancy")
    memory.add(vectors, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(contents(memory, 0), vectors[[one for one in range(3) if one != leaver]])


@pytest.mark.parametrize("common", [2.0, 5.0, 7.0, 10.0])
def test_the_oldest_of_many_equals_leaves(common: float) -> None:
    """Whatever the order in which similarities are summed: 65 directions, each at the same angle to all others."""
    memory = ClassMemory(1, 64, 66, "redundancy")
    vectors = torch.cat([torch.full((65, 1), common), torch.eye(65)], dim=1)
    memory.add(vectors, torch.zeros(65, dtype=torch.long))
    torch.testing.assert_close(contents(memory, 0), torch.nn.functional.normalize(vectors[1:], dim=1))


def test_what_a_memory_keeps_carries_no_gradient() -> None:
    memory = ClassMemory(1, 2, DIM, "redundancy")
    memory.add(torch.randn(3, DIM).requires_grad_(), torch.zeros(3, dtype=torch.long))
    assert not any(tensor.requires_grad for tensor in memory.state().values())


def test_a_redundant_newcomer_does_not_enter() -> None:
    memory = ClassMemory(1, 2, 2, "redundancy")
    memory.add(torch.tensor([[1.0, 0.3], [1.0, -0.3]]), torch.zeros(2, dtype=torch.long))
    before = memory.entries.clone()
    memory.add(torch.tensor([[1.0, 0.0]]), torch.zeros(1, dtype=torch.long))  # between the two: closest to both
    torch.testing.assert_close(memory.entries, before)


def test_order_of_classes_in_a_batch_does_not_matter() -> None:
    draws = torch.Generator().manual_seed(1)
    vectors, labels = torch.randn(12, DIM, generator=draws), torch.arange(12) % 3
    one, other = ClassMemory(3, 2, DIM, "redundancy"), ClassMemory(3, 2, DIM, "redundancy")
    one.add(vectors, labels)
    by_class = torch.argsort(labels, stable=True)
    other.add(vectors[by_class], labels[by_class])
    for label in range(3):
        torch.testing.assert_close(contents(one, label), contents(other, label))


def test_terms_do_not_depend_on_length_but_on_direction() -> None:
    draws = torch.Generator().manual_seed(2)
    vectors, labels = torch.randn(6, DIM, generator=draws), torch.arange(6) % 2
    memory = ClassMemory(2, 8, DIM, "fifo")
    memory.add(torch.randn(10, DIM, generator=draws), torch.arange(10) % 2)
    for term in (representativeness, diversity):
        torch.testing.assert_close(term(vectors, labels, memory), term(7.5 * vectors, labels, memory))


def test_the_gradient_pulls_towards_the_farthest_and_away_from_the_nearest() -> None:
    memory = ClassMemory(1, 2, 2, "fifo")
    memory.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, dtype=torch.long))
    x0_hat = torch.tensor([[2.0, 1.0]], requires_grad=True)  # nearer to the first entry than to the second
    labels = torch.zeros(1, dtype=torch.long)
    (pull,) = torch.autograd.grad(representativeness(x0_hat, labels, memory), x0_hat)
    (push,) = torch.autograd.grad(diversity(x0_hat, labels, memory), x0_hat)
    assert pull[0, 1] < 0 < pull[0, 0]  # descending turns it towards (0, 1)
    assert push[0, 1] < 0 < push[0, 0]  # descending turns it away from (1, 0)


def test_an_empty_memory_and_an_empty_batch_give_zero() -> None:
    memory = ClassMemory(2, 3, DIM, "redundancy")
    labels = torch.tensor([0, 1])
    assert representativeness(torch.ones(2, DIM), labels, memory).item() == 0
    assert diversity(torch.ones(2, DIM), labels, memory).item() == 0
    memory.add(torch.ones(1, DIM), torch.tensor([0]))
    assert diversity(torch.ones(2, DIM), labels, memory).item() == pytest.approx(0.5)  # class 1 counts, with 0
    none = torch.zeros(0, DIM)
    assert representativeness(none, labels[:0], memory).item() == 0


def test_state_round_trip_goes_on_alike() -> None:
    draws = torch.Generator().manual_seed(3)
    first, second = torch.randn(9, DIM, generator=draws), torch.randn(9, DIM, generator=draws)
    labels = torch.arange(9) % 2
    one, other = ClassMemory(2, 3, DIM, "redundancy"), ClassMemory(2, 3, DIM, "redundancy")
    one.add(first, labels)
    other.load_state({name: tensor.clone() for name, tensor in one.state().items()})
    one.add(second, labels)
    other.add(second, labels)
    for name, tensor in one.state().items():
        assert torch.equal(tensor, other.state()[name])


def test_the_published_sum_counts_the_first_class_as_often_as_there_are_classes() -> None:
    """The k-th of n classes counts n - k + 1 times: 3.35 times the mean in batches of 8 over ten classes."""
    memory = ClassMemory(10, 1, 2, "redundancy")
    memory.add(torch.tensor([[0.0, 1.0]] * 10), torch.arange(10))
    factors = []
    for seed in range(2000):
        labels = torch.randint(10, (8,), generator=torch.Generator().manual_seed(seed))
        alike = torch.tensor([[0.0, 1.0]] * 8)
        factors.append(diversity(alike, labels, memory, "as_published").item())
    assert sum(factors) / len(factors) == pytest.approx(3.35, abs=0.02)


def test_with_a_capacity_of_one_redundancy_is_a_tie_and_the_newcomer_stays() -> None:
    memory = ClassMemory(1, 1, 2, "redundancy")
    for vector in ([1.0, 0.0], [0.6, 0.8], [0.0, 1.0]):
        memory.add(torch.tensor([vector]), torch.tensor([0]))
        torch.testing.assert_close(contents(memory, 0), torch.tensor([vector]))
