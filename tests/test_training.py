"""Training loops: draws that are pure functions, an average that agrees with its recursion, checkpoints that change nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffstill.artifacts import WorkFolder
from diffstill.config import SampleConfig
from diffstill.draws import Purpose, seeded, shuffled
from diffstill.training import Training, balanced_indices, batch_indices, ema_decay, pack, unpack

# --- draws --------------------------------------------------------------------------------------------------------


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


@given(images=st.integers(1, 20), seed=st.integers(0, 5), batch_size=st.integers(1, 30))
def test_every_epoch_shows_each_image_once_however_it_is_cut(images, seed, batch_size):
    steps = -(-3 * images // batch_size)
    stream = torch.cat([batch_indices(images, Purpose.VAE_BATCH, seed, step, batch_size) for step in range(steps)])[: 3 * images]
    assert torch.equal(stream, batch_indices(images, Purpose.VAE_BATCH, seed, 0, 3 * images))
    for epoch in stream.split(images):
        assert sorted(epoch.tolist()) == list(range(images))


def test_epochs_and_seeds_shuffle_differently():
    stream = batch_indices(50, Purpose.DIT_BATCH, 0, 0, 100)
    assert not torch.equal(stream[:50], stream[50:])
    assert not torch.equal(stream, batch_indices(50, Purpose.DIT_BATCH, 1, 0, 100))
    assert not torch.equal(stream, batch_indices(50, Purpose.FINETUNE_BATCH, 0, 0, 100))


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), share=st.integers(1, 3), seed=st.integers(0, 5))
def test_balanced_batches_hold_as_many_of_every_class(sizes, share, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    members = [np.flatnonzero(labels == label) for label in range(len(sizes))]
    batches = [balanced_indices(members, Purpose.FINETUNE_BATCH, seed, step, share * len(sizes)) for step in range(12)]
    for batch in batches:
        assert np.bincount(labels[batch.numpy()], minlength=len(sizes)).tolist() == [share] * len(sizes)
    for own in members:
        stream = [image for batch in batches for image in batch.tolist() if image in own]
        for epoch in range(len(stream) // len(own)):
            assert sorted(stream[epoch * len(own) : (epoch + 1) * len(own)]) == own.tolist()


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "decay"), [(0, 1 / 10), (1, 2 / 11), (90, 91 / 100), (8990, 0.999), (10**6, 0.999)])
def test_the_decay_warms_up(step, decay):
    assert ema_decay(step, 0.999) == pytest.approx(decay)


def problem(seed=0):
    draws = seeded(Purpose.SHOWN, seed)
    weights = [torch.randn(3, 2, generator=draws).requires_grad_(), torch.randn(2, generator=draws).requires_grad_()]
    inputs = torch.randn(20, 8, 3, generator=draws)
    return weights, lambda step: (inputs[step] @ weights[0] + weights[1]).square().mean()


def test_the_average_is_lent_and_given_back():
    """Bit for bit, also where the block fails; and training goes on as if nothing had been."""
    (weights, loss_at), (others, other_loss_at) = problem(), problem()
    training, undisturbed = Training(weights, 1e-2, 0.5), Training(others, 1e-2, 0.5)
    for step in range(6):
        own, average = [weight.detach().clone() for weight in weights], [value.clone() for value in training.average]
        with training.averaged():
            assert all(torch.equal(weight, value) for weight, value in zip(weights, average, strict=True))
        with pytest.raises(ZeroDivisionError), training.averaged():
            raise ZeroDivisionError
        assert all(torch.equal(a, b) for a, b in zip((*weights, *training.average), (*own, *average), strict=True))
        training.advance(loss_at(step))
        undisturbed.advance(other_loss_at(step))
    assert all(torch.equal(a, b) for a, b in zip((*weights, *training.average), (*others, *undisturbed.average), strict=True))
    assert not torch.equal(weights[0], training.average[0])


def test_steps_and_average_agree_with_plain_adamw_and_the_recursion():
    weights, loss_at = problem()
    training = Training(weights, 1e-2, 0.5, weight_decay=0.1)
    plain, plain_loss_at = problem()
    optimizer, average = torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.1), [weight.detach().clone() for weight in plain]
    for step in range(20):
        training.advance(loss_at(step), learning_rate=0.01 * (step + 1))
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        optimizer.zero_grad()
        plain_loss_at(step).backward()
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        average = [decay * old + (1 - decay) * new.detach() for old, new in zip(average, plain, strict=True)]
    assert training.done == 20
    for mine, theirs in zip(training.weights, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(training.average, average, strict=True):
        torch.testing.assert_close(mine, theirs)
    training.adopt_average()
    torch.testing.assert_close(weights[0].detach(), average[0])


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bytes():
    """Through the file: weights, average, moments and step count all come back."""
    weights, loss_at = problem()
    straight = Training(weights, 1e-2, 0.99)
    for step in range(10):
        straight.advance(loss_at(step))

    work = WorkFolder("pretrain", SampleConfig(), {})
    weights, loss_at = problem()
    killed = Training(weights, 1e-2, 0.99)
    for step in range(4):
        killed.advance(loss_at(step))
    work.save("vae", pack(killed.state()))

    weights, loss_at = problem()
    resumed, saved = Training(weights, 1e-2, 0.99), work.load("vae")
    assert saved is not None
    resumed.load(saved)
    for step in range(resumed.done, 10):
        resumed.advance(loss_at(step))
    assert resumed.done == 10
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed.weights + resumed.average, straight.weights + straight.average, strict=True))


def test_unpack_is_the_inverse_of_pack():
    groups = {"a": {"x": torch.arange(3), "y/z": torch.ones(2, 2, dtype=torch.float16)}, "ab": {"x": torch.tensor(1.5)}}
    packed = pack(groups)
    for group, tensors in groups.items():
        found = unpack(packed, group)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
