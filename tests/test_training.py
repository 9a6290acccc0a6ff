"""Training loops: draws that are pure functions, an average that agrees with its recursion, checkpoints that change nothing."""

from threading import Event

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffstill import training as training_module
from diffstill.artifacts import WorkFolder
from diffstill.config import SampleConfig
from diffstill.draws import Purpose, seeded
from diffstill.training import Checkpoints, TimeShare, Training, balanced_indices, batch_indices, ema_decay, pack, set_threads, unpack

# --- draws --------------------------------------------------------------------------------------------------------


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


def test_balanced_batches_order_each_class_by_itself():
    members = [np.arange(20) + 20 * label for label in range(3)]
    drawn = balanced_indices(members, Purpose.FINETUNE_BATCH, 0, 0, 60).reshape(3, 20) % 20
    assert len({tuple(own.tolist()) for own in drawn}) == 3


def test_the_cpu_computes_deterministically_on_the_threads_asked_for():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        set_threads(2)
        assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (2, True)
        set_threads(1, "cuda")
        assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (1, False)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


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
        for mine, theirs in zip((*training.weights, *training.average), (*plain, *average), strict=True):
            torch.testing.assert_close(mine, theirs)  # after each step: the average soon forgets its first ones
    assert training.done == 20
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


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_work_on_the_side_takes_its_share_of_the_time(monkeypatch):
    """Whatever it takes: cheap or dear, the sum never passes the share, and there is no more waiting than that."""
    clock = Clock()
    monkeypatch.setattr(training_module, "monotonic", clock)
    for cost in (0.0, 0.3, 7.0):
        share, started = TimeShare(0.02), clock.now
        assert share.left  # what it costs is not known yet
        times = 0
        for _ in range(5000):
            clock.now += 1.0
            if share.left:
                with share.taken():
                    clock.now += cost
                times += 1
        passed = clock.now - started
        assert share.spent == pytest.approx(times * cost)
        assert times == 5000 if not cost else passed * 0.02 - 2 * cost < share.spent <= passed * 0.02


class SlowDisk(WorkFolder):
    """Keeps nothing before it is told to, and what it kept in a list."""

    def __init__(self):
        super().__init__("pretrain", SampleConfig(), {})
        self.ready, self.kept, self.error = Event(), [], None

    def save(self, name, arrays):
        assert self.ready.wait(30), "the steps wait for the disk"
        if self.error:
            raise self.error
        self.kept.append((name, {key: array.copy() for key, array in arrays.items()}))


def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_change_it(monkeypatch):
    weights, loss_at = problem()
    training, disk, states = Training(weights, 1e-2, 0.99), SlowDisk(), {}
    with Checkpoints(disk, "vae") as checkpoints:
        for step in range(6):
            training.advance(loss_at(step))
            states[step] = {key: array.copy() for key, array in pack(training.state()).items()}
            if step == 2:
                checkpoints.offer(lambda: pack(training.state()), last=False)
        assert disk.kept == []
        disk.ready.set()
        checkpoints.offer(lambda: pack(training.state()), last=True)
    assert [name for name, _ in disk.kept] == ["vae", "vae"]
    for (_, kept), step in zip(disk.kept, (2, 5), strict=True):
        assert kept.keys() == states[step].keys()
        assert all(np.array_equal(kept[key], states[step][key]) for key in kept)


def test_a_checkpoint_that_costs_more_than_its_share_is_left_out_but_for_the_last(monkeypatch):
    clock, disk = Clock(), SlowDisk()
    disk.ready.set()
    monkeypatch.setattr(training_module, "monotonic", clock)

    def state():
        clock.now += 1.0
        return {"at": np.array(clock.now)}

    with Checkpoints(disk, "vae") as checkpoints:
        for step in range(1, 201):
            clock.now += 1.0
            checkpoints.offer(state, last=step == 200)
    taken = [float(arrays["at"]) for _, arrays in disk.kept]
    assert taken == [2.0, 101.0, 151.0, 201.0, 205.0]  # at once, then n of them not before 50 n seconds, and the last


def test_a_checkpoint_that_cannot_be_written_ends_the_training():
    disk = SlowDisk()
    disk.ready.set()
    disk.error = OSError("no space left on device")
    with pytest.raises(OSError, match="no space left"), Checkpoints(disk, "vae") as checkpoints:
        checkpoints.offer(dict, last=True)
    with Checkpoints(None, "vae") as checkpoints:
        checkpoints.offer(lambda: pytest.fail("a rank without a folder copies nothing"), last=True)


def test_unpack_is_the_inverse_of_pack():
    groups = {"a": {"x": torch.arange(3), "y/z": torch.ones(2, 2, dtype=torch.float16)}, "ab": {"x": torch.tensor(1.5)}}
    packed = pack(groups)
    for group, tensors in groups.items():
        found = unpack(packed, group)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
