"""Random streams: pure functions of a purpose and numbers, no two of which share a key."""

import pytest
import torch

from diffstill.draws import Purpose, seeded, shuffled


def test_draws_are_a_pure_function_of_their_key():
    before = torch.random.get_rng_state()
    numbers = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**31 - 1, 7, 10**6)]
    keys = [(purpose, *own) for purpose in Purpose for own in numbers]
    draws = {key: torch.rand(4, generator=seeded(*key)) for key in keys}
    assert all(torch.equal(torch.rand(4, generator=seeded(*key)), value) for key, value in draws.items())
    assert len({tuple(value.tolist()) for value in draws.values()}) == len(draws)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_draws_of_different_purposes_share_no_key():
    """As they did: step 5 of the autoencoder's training and image 5 of class 1 had one stream."""
    step = torch.rand(4, generator=seeded(Purpose.VAE_STEP, 0, 5))
    image = torch.rand(4, generator=seeded(Purpose.IMAGE, 0, 1, 5))
    assert not torch.equal(step, image)
    orders = [shuffled(50, purpose, 0, 0).tolist() for purpose in Purpose]
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (-1,), (2**32,)])
def test_a_key_has_at_most_three_numbers_of_32_bits(numbers):
    """More, or larger ones, could meet another key."""
    with pytest.raises(ValueError, match="at most three numbers"):
        seeded(Purpose.IMAGE, *numbers)
