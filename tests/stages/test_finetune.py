"""Fine-tuning: one step against a slow reference, memories, resuming, refusals."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from chains import Chain, contents, flip
from diffstill.artifacts import Rows, open_artifact
from diffstill.config import FinetuneConfig, Params
from diffstill.diffusion import add_noise, drop_labels, variational_loss
from diffstill.errors import DiffstillError
from diffstill.networks import load_generator
from diffstill.pictures import contact_sheet, read_png
from diffstill.pretrained import read_checkpoint
from diffstill.ranks import Ranks
from diffstill.record import Progress, ignore
from diffstill.stages.finetune import METRICS, PREVIEW_STEPS, SHOWN_IMAGES, FineTuning, Latents, _Ahead, _Candidates, finetune
from diffstill.stages.sample import sample
from original_dit import random_checkpoint
from slow_memory import SlowMemory

pytestmark = pytest.mark.usefixtures("unhurried")


def settings_of(chain: Chain, **changes: Any) -> FinetuneConfig:
    values = chain.params.model_dump(mode="json")
    values["finetune"] |= changes
    return Params.model_validate_json(json.dumps(values)).finetune


def tuning(chain: Chain, seed: int = 0, **changes: Any) -> FineTuning:
    torch.set_num_threads(1)
    latents = Latents.open(open_artifact(chain.artifacts / "latents", "latents"), "cpu")
    return FineTuning(settings_of(chain, **changes), seed, latents, load_generator(chain.artifacts / "generator"))


@pytest.mark.parametrize("policy", ["redundancy", "fifo"])
@pytest.mark.parametrize("max_timestep", [None, 400])
def test_every_step_is_the_equation(tiny_chain: Chain, policy: str, max_timestep: int | None) -> None:
    """L = L_diffusion + lambda_real mean_c L_real + lambda_gen mean_c L_gen: values and gradients, at and over capacity."""
    config = {
        "policy": policy,
        "max_timestep": max_timestep,
        "lambda_real": 0.7,
        "lambda_gen": 1.3,
        "batch_size": 9,
        "steps": 6,
        "capacity_real": 3,
        "capacity_gen": 2,
    }
    fast = tuning(tiny_chain, **config)
    real, gen = SlowMemory(3, policy), SlowMemory(2, policy)
    for step in range(6):
        batch, network = fast.draw(step), fast.opened
        abar = fast.alphas_cumprod[batch.t].reshape(-1, 1, 1, 1)
        x_t = abar.sqrt() * batch.x0 + (1 - abar).sqrt() * batch.eps
        labels = torch.tensor([3 if dropped else label for label, dropped in zip(batch.classes.tolist(), batch.dropped.tolist(), strict=True)])
        eps_theta = network.transformer(x_t, timestep=batch.t, class_labels=labels).sample
        x0_hat = ((x_t - (1 - abar).sqrt() * eps_theta) / abar.sqrt()).flatten(1)
        usable = torch.tensor([not dropped and (max_timestep is None or t < max_timestep) for dropped, t in zip(batch.dropped, batch.t, strict=True)])
        met, of = x0_hat[usable], batch.classes[usable]
        loss_real = real.term(met.detach(), of, "real") if len(of) else 0.0
        loss_gen = gen.term(met.detach(), of, "gen") if len(of) else 0.0
        diffusion = (eps_theta - batch.eps).square().mean()
        fast.step()
        logged = dict(zip(METRICS, fast.history[step].tolist(), strict=True))
        assert logged["loss"] == pytest.approx(diffusion.item(), rel=1e-4)
        assert logged["loss_real"] == pytest.approx(loss_real, abs=1e-4)
        assert logged["loss_gen"] == pytest.approx(loss_gen, abs=1e-4)
        real.add(batch.x0.flatten(1), batch.classes)
        gen.add(met.detach(), of)
        assert logged["memory_real"] == pytest.approx(sum(map(len, real.entries.values())) / 3)
        assert logged["memory_gen"] == pytest.approx(sum(map(len, gen.entries.values())) / 3)


def test_the_gradient_is_that_of_the_whole_sum(tiny_chain: Chain) -> None:
    config = {"lambda_real": 0.7, "lambda_gen": 1.3, "steps": 3}
    fast = tuning(tiny_chain, **config)
    fast.step()
    name, weight = next((name, weight) for name, weight in zip(fast.names, fast.training.weights, strict=True) if name.endswith("proj_out_2.bias"))
    assert name
    before = weight.detach().clone()
    total_at = {}
    for sign in (1, -1):  # numerically: move one weight up and down, at the same memories and draws
        with torch.no_grad():
            weight.copy_(before)
            weight[0] += sign * 1e-3
        twin = tuning(tiny_chain, **config)
        twin.training.load({key: value for key, value in fast._state().items() if not key.startswith("memory")})
        for which, memory in twin.memories.items():
            memory.load_state(fast.memories[which].state())
        twin.training.done = 1
        twin.step()
        loss, loss_real, loss_gen = twin.history[1, :3].tolist()
        total_at[sign] = loss + 0.7 * loss_real + 1.3 * loss_gen
    with torch.no_grad():
        weight.copy_(before)
    fast.step()
    assert weight.grad is not None
    assert weight.grad[0].item() == pytest.approx((total_at[1] - total_at[-1]) / 2e-3, rel=0.05, abs=2e-3)


def test_a_learned_variance_is_trained_with_weight_one(tiny_chain: Chain, tmp_path: Path) -> None:
    torch.save(random_checkpoint(depth=1, width=64, classes=3, side=4), tmp_path / "DiT.pt")
    plain = tuning(tiny_chain)
    opened = replace(load_generator(tiny_chain.artifacts / "generator"), transformer=read_checkpoint(tmp_path / "DiT.pt"))
    run = FineTuning(settings_of(tiny_chain, policy="none"), 0, plain.data, opened)
    batch, abar = run.draw(0), run.alphas_cumprod
    x_t = add_noise(batch.x0, batch.eps, abar[batch.t])
    with torch.no_grad():
        output = run.opened.predict(x_t, batch.t, drop_labels(batch.classes, batch.dropped, 3))
    squares = (output[:, :4] - batch.eps).square().mean()
    bits = variational_loss(output, batch.x0, x_t, batch.t, abar)
    run.step()
    assert bits > 0.001 * squares  # well above the tolerance of the next line
    assert run.history[0, 0].item() == pytest.approx((squares + bits).item(), rel=1e-4)
    gradient = next(weight.grad for name, weight in zip(run.names, run.training.weights, strict=True) if name == "proj_out_2.bias")
    assert gradient is not None
    assert gradient.reshape(2, 2, 8)[..., 4:].abs().min() > 0  # that of the variance


def test_the_bound_on_the_noise_is_exclusive_and_asks_for_a_label_too(tiny_chain: Chain) -> None:
    t, dropped = torch.tensor([0, 399, 400, 401, 0, 399]), torch.tensor([False] * 4 + [True] * 2)
    for bound, usable in ((400, [0, 1]), (1, [0]), (None, [0, 1, 2, 3])):
        run = tuning(tiny_chain, max_timestep=bound, batch_size=6)
        assert run._usable(replace(run.draw(0), t=t, dropped=dropped)).tolist() == usable


def test_draws_are_spread_as_the_settings_say(tiny_chain: Chain) -> None:
    """Labels dropped as often as asked for, all timesteps, both views, a posterior sample and not its mean."""
    run = tuning(tiny_chain, batch_size=4000, label_drop=0.2)
    batch = run.draw(0)
    assert batch.dropped.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert batch.t.float().mean().item() == pytest.approx(499.5, abs=20)
    assert (batch.t.min() < 10, batch.t.max() > 989) == (True, True)
    again = tuning(tiny_chain, batch_size=4000).draw(0).x0
    wide = replace(run.data, std=torch.full_like(run.data.std, 10 / run.data.scaling))
    run.data = wide
    assert torch.equal(again, batch.x0)
    assert run.draw(0).x0.std().item() == pytest.approx(10, rel=0.05)
    mirrored = replace(wide, mean=torch.stack([torch.full(wide.shape, -1.0), torch.full(wide.shape, 1.0)]).expand(len(wide.labels), -1, -1, -1, -1))
    run.data = replace(mirrored, std=torch.zeros_like(mirrored.mean))
    assert run.draw(0).x0.sign().mean().item() == pytest.approx(0, abs=0.05)


def test_what_is_drawn_ahead_is_what_would_have_been_drawn(tiny_chain: Chain) -> None:
    class Drawer:
        run, asked = tuning(tiny_chain), list[int]()

        def draw(self, step: int) -> Any:
            self.asked.append(step)
            return self.run.draw(step)

    drawer = Drawer()
    ahead = _Ahead(drawer.draw)
    for step in (3, 4, 5, 1):  # the last after a jump
        for ours, theirs in zip(vars(ahead.take(step)).values(), vars(drawer.run.draw(step)).values(), strict=True):
            assert torch.equal(ours, theirs)
    ahead._coming[2].result()
    assert drawer.asked == [3, 4, 5, 6, 1, 2]


def test_draws_depend_on_seed_and_step_alone(tiny_chain: Chain) -> None:
    one, other = tuning(tiny_chain), tuning(tiny_chain)
    other.step()
    for a, b in zip(vars(one.draw(5)).values(), vars(other.draw(5)).values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.draw(5).eps, one.draw(6).eps)
    assert not torch.equal(one.draw(5).eps, tuning(tiny_chain, seed=1).draw(5).eps)


def test_an_epoch_meets_every_image_once(tiny_chain: Chain) -> None:
    run = tuning(tiny_chain, batch_size=8)
    images = len(run.data.labels)
    from diffstill.draws import Purpose
    from diffstill.training import batch_indices

    rows = torch.cat([batch_indices(images, Purpose.FINETUNE_BATCH, 0, step, 8) for step in range(-(-images // 8))])[:images]
    assert rows.sort().values.tolist() == list(range(images))


def test_latents_read_from_disk_are_those_in_memory(tiny_chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = tuning(tiny_chain)
    monkeypatch.setattr("diffstill.stages.finetune.RESIDENT", 0.0)
    read = tuning(tiny_chain)
    assert isinstance(resident.data.mean, torch.Tensor)
    assert isinstance(read.data.mean, Rows)
    for step in (0, 7, 30):
        assert torch.equal(read.draw(step).x0, resident.draw(step).x0)


def test_memories_that_do_not_fit_are_refused(tiny_chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 3 * (5 + 2) * 4 * 4 * 4 * 4  # classes, entries, a latent of 4 x 4 x 4, bytes
    monkeypatch.setattr("diffstill.stages.finetune.free_memory", lambda _: needed - 1)
    with pytest.raises(DiffstillError, match=r"the memories of 3 classes take .* lower `finetune.capacity_real`"):
        tuning(tiny_chain, capacity_real=5, capacity_gen=2)
    tuning(tiny_chain, capacity_real=5, capacity_gen=1)


def test_epochs_are_passes_over_the_training_images(tiny_chain: Chain) -> None:
    run = tuning(tiny_chain, epochs=3)
    images = len(run.data.labels)
    assert run.steps == 3 * images // 12
    assert sum(len(run.draw(step).classes) for step in range(run.steps)) <= 3 * images < (run.steps + 1) * 12
    assert tuning(tiny_chain, epochs=3, batch_size=images // 2 + 1).steps == 5  # batches cross from one epoch into the next
    assert tuning(tiny_chain, epochs=1, batch_size=10_000).steps == 1


def test_a_batch_that_the_ranks_cannot_share_is_refused(tiny_chain: Chain) -> None:
    data = tuning(tiny_chain).data
    with pytest.raises(DiffstillError, match="a batch of 9 cannot be cut evenly over 2 processes"):
        FineTuning(settings_of(tiny_chain, batch_size=9), 0, data, load_generator(tiny_chain.artifacts / "generator"), Ranks(0, 2, "cpu"))


def test_what_is_written_are_the_averages_and_nothing_stays_behind(tiny_chain: Chain, tmp_path: Path) -> None:
    run = tuning(tiny_chain, steps=3, learning_rate=0.05, ema_decay=0.5)
    run.train(None, ignore)
    run.write(tmp_path / "seed-0")
    written = load_file(tmp_path / "seed-0" / "delta.safetensors")
    for name, average, weight in zip(run.names, run.training.average, run.training.weights, strict=True):
        assert torch.equal(written[name], average)
        assert not torch.equal(average, weight) or not weight.grad.any()
    seen = ref(run)
    del run
    assert seen() is None  # not even until the next garbage collection: two generators would not fit on a GPU


def test_the_metrics_are_those_of_the_steps(tiny_chain: Chain, tmp_path: Path) -> None:
    """All of them in one file, every so many and the first in the other, the last returned."""
    config = settings_of(tiny_chain, steps=7, log_every=3)
    last = finetune(config, **inputs_of(tiny_chain), denoiser=tmp_path / "denoiser")
    run = tuning(tiny_chain, steps=7)
    run.train(None, ignore)
    steps = run.history.tolist()
    lines = [json.loads(line) for line in (tmp_path / "denoiser" / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert [[line[name] for name in METRICS] for line in lines] == [pytest.approx(step) for step in steps]
    assert [line["step"] for line in lines] == list(range(1, 8))
    with (tmp_path / "denoiser" / "seed-0" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3, 6]
    assert float(rows[1]["loss_gen"]) == pytest.approx(steps[2][METRICS.index("loss_gen")])
    assert last == pytest.approx(dict(zip(METRICS, steps[-1], strict=True)))


def test_weights_decay_as_the_settings_say(tiny_chain: Chain) -> None:
    """AdamW's decay alone tells two first steps apart: each weight is shorter by learning rate times decay."""
    plain, decayed = (tuning(tiny_chain, learning_rate=0.01, weight_decay=decay) for decay in (0.0, 0.5))
    before = [weight.detach().clone() for weight in plain.training.weights]
    plain.step()
    decayed.step()
    for old, weight, shorter in zip(before, plain.training.weights, decayed.training.weights, strict=True):
        torch.testing.assert_close(weight.detach() - shorter.detach(), 0.01 * 0.5 * old, atol=1e-6, rtol=1e-3)


def test_candidates_carry_no_gradient_and_keep_no_batch_alive(tiny_chain: Chain) -> None:
    run = tuning(tiny_chain, update="epoch")
    run.step()
    waiting = [vector for own in run.candidates["gen"].newest.values() for _, vector in own]
    assert waiting
    assert not any(vector.requires_grad for vector in waiting)
    assert all(vector.untyped_storage().nbytes() == vector.nbytes for vector in waiting)


def test_candidates_wait_for_one_epoch_alone() -> None:
    candidates = _Candidates(2)
    candidates.collect(torch.arange(8.0).reshape(4, 2), torch.tensor([1, 0, 1, 1]))
    vectors, labels = candidates.release()
    assert (vectors[:, 0].tolist(), labels.tolist()) == ([2, 4, 6], [0, 1, 1])
    assert len(candidates.release()[1]) == 0


def test_candidates_of_an_epoch_are_counted(tiny_chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 3 * (5 + 2 + 4 * 10) * 4 * 4 * 4 * 4
    monkeypatch.setattr("diffstill.stages.finetune.free_memory", lambda _: needed - 1)
    config = {"capacity_real": 5, "capacity_gen": 2, "epoch_candidates": 10}
    with pytest.raises(DiffstillError, match="the memories of 3 classes take"):
        tuning(tiny_chain, update="epoch", **config)
    tuning(tiny_chain, update="step", **config)


def test_balanced_batches(tiny_chain: Chain) -> None:
    run = tuning(tiny_chain, balanced=True, batch_size=12)
    for step in range(3):
        assert run.draw(step).classes.bincount().tolist() == [4, 4, 4]
    uneven = run.config.model_copy(update={"batch_size": 10})
    with pytest.raises(DiffstillError, match="multiple of the 3 classes"):
        FineTuning(uneven, 0, run.data, load_generator(tiny_chain.artifacts / "generator"))


def test_no_policy_no_terms(tiny_chain: Chain) -> None:
    run = tuning(tiny_chain, policy="none", steps=3)
    for _ in range(3):
        run.step()
    assert run.history[:, 1:].abs().max() == 0
    assert run.history[:, 0].min() > 0


def test_with_update_epoch_the_memories_fill_when_the_epoch_ends(tiny_chain: Chain) -> None:
    images = len(tuning(tiny_chain).data.labels)
    size = images // 3 + 1  # an epoch ends within the third step
    run = tuning(tiny_chain, update="epoch", batch_size=size, steps=4, capacity_real=64, capacity_gen=64, epoch_candidates=20)
    for _ in range(4):
        run.step()
    fill = run.history[:, METRICS.index("memory_real")].tolist()
    assert fill[:2] == [0, 0]
    assert fill[2] == 20  # the newest candidates of each class, bounded
    assert run.history[2, 1] == 0 < run.history[3, 1]  # compared from the next step on


class _Killed(BaseException):
    pass


class KillAfter:
    """A record that stops the stage in the middle, like a kill between two steps."""

    def __init__(self, updates: int) -> None:
        self.left = updates

    def metrics(self, values: Any, step: int) -> None: ...

    def file(self, path: Path) -> None: ...

    def image(self, name: str, draw: Callable[[], Image.Image], step: int) -> None: ...

    @contextmanager
    def progress(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
        yield self

    def update(self, n: int = 1) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Killed


def test_a_damaged_checkpoint_is_made_again_with_one_line(tiny_chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = settings_of(tiny_chain, checkpoint_every=3, steps=5, preview_every=0)
    finetune(config, **inputs_of(tiny_chain), denoiser=tmp_path / "whole")
    with pytest.raises(_Killed):
        finetune(config, **inputs_of(tiny_chain), denoiser=tmp_path / "again", record=KillAfter(4))
    (checkpoint,) = (tmp_path / "work").rglob("*.safetensors")
    flip(checkpoint)
    all_steps = KillAfter(5)
    finetune(config, **inputs_of(tiny_chain), denoiser=tmp_path / "again", record=all_steps)
    assert all_steps.left == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert len(caplog.messages) == 1
    assert f"{checkpoint}: damaged" in caplog.messages[0]


@pytest.mark.parametrize("update", ["step", "epoch"])
def test_a_killed_run_goes_on_and_ends_alike(tiny_chain: Chain, tmp_path: Path, update: str) -> None:
    config = settings_of(tiny_chain, update=update, checkpoint_every=3, steps=11, batch_size=60)
    inputs = {"latents": tiny_chain.artifacts / "latents", "generator": tiny_chain.artifacts / "generator"}
    finetune(config, **inputs, denoiser=tmp_path / "whole")
    with pytest.raises(_Killed):
        finetune(config, **inputs, denoiser=tmp_path / "again", record=KillAfter(7))
    assert not (tmp_path / "again").exists()
    steps_left = KillAfter(5)  # 11 steps, 6 of them in the last checkpoint
    finetune(config, **inputs, denoiser=tmp_path / "again", record=steps_left)
    assert steps_left.left == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_one_fine_tune_per_seed(tiny_chain: Chain, tmp_path: Path) -> None:
    inputs = {"latents": tiny_chain.artifacts / "latents", "generator": tiny_chain.artifacts / "generator"}
    finetune(settings_of(tiny_chain, seeds=[0, 5], steps=3), **inputs, denoiser=tmp_path / "two")
    finetune(settings_of(tiny_chain, seeds=[5], steps=3), **inputs, denoiser=tmp_path / "one")
    two, one = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert two["seed-5/delta.safetensors"] == one["seed-5/delta.safetensors"] != two["seed-0/delta.safetensors"]


def test_latents_of_another_generator_are_refused(tiny_chain: Chain, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_chain.artifacts / "generator", tmp_path / "generator")
    manifest = tmp_path / "generator" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"null_label": 3', '"null_label": 4'))
    with pytest.raises(DiffstillError, match="another generator"):
        finetune(tiny_chain.params.finetune, latents=tiny_chain.artifacts / "latents", generator=tmp_path / "generator", denoiser=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_divergence_is_an_error_and_leaves_nothing(tiny_chain: Chain, tmp_path: Path) -> None:
    config = settings_of(tiny_chain, learning_rate=1e30, steps=6)
    with pytest.raises(DiffstillError, match=r"not finite at step \d+: fine-tuning diverged; lower `finetune.learning_rate`"):
        finetune(config, latents=tiny_chain.artifacts / "latents", generator=tiny_chain.artifacts / "generator", denoiser=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_first_step_that_is_not_finite_is_named(tiny_chain: Chain) -> None:
    run = tuning(tiny_chain, steps=6)
    run._refuse_divergence()
    run.history[2:, 1] = torch.nan
    with pytest.raises(DiffstillError, match="not finite at step 3:"):
        run._refuse_divergence()


# --- previews -----------------------------------------------------------------------------------------------------


class Gallery(KillAfter):
    """A record that keeps the pictures, and stops the stage in the middle if asked to."""

    def __init__(self, updates: int = 1000) -> None:
        super().__init__(updates)
        self.shown: dict[tuple[str, int], np.ndarray[Any, Any]] = {}

    def image(self, name: str, draw: Callable[[], Image.Image], step: int) -> None:
        self.shown[name, step] = np.asarray(draw())


def inputs_of(chain: Chain) -> dict[str, Path]:
    return {"latents": chain.artifacts / "latents", "generator": chain.artifacts / "generator"}


def weights_in(denoiser: Path) -> dict[str, str]:
    """Everything that was learned; the manifest names the knobs, so it differs where `preview_every` does."""
    return {name: digest for name, digest in contents(denoiser).items() if name.startswith("seed-")}


def test_previews_change_no_weight(tiny_chain: Chain, tmp_path: Path) -> None:
    """On, off, not looked at, and after a resume: the same bytes. What was shown before the kill is not shown again."""
    config = {"steps": 11, "checkpoint_every": 4, "batch_size": 7}
    looked_at, again, resumed = Gallery(), Gallery(7), Gallery()
    finetune(settings_of(tiny_chain, preview_every=0, **config), **inputs_of(tiny_chain), denoiser=tmp_path / "off")
    finetune(settings_of(tiny_chain, preview_every=3, **config), **inputs_of(tiny_chain), denoiser=tmp_path / "ignored")
    finetune(settings_of(tiny_chain, preview_every=3, **config), **inputs_of(tiny_chain), denoiser=tmp_path / "on", record=looked_at)
    with pytest.raises(_Killed):
        finetune(settings_of(tiny_chain, preview_every=3, **config), **inputs_of(tiny_chain), denoiser=tmp_path / "resumed", record=again)
    finetune(settings_of(tiny_chain, preview_every=3, **config), **inputs_of(tiny_chain), denoiser=tmp_path / "resumed", record=resumed)
    assert weights_in(tmp_path / "off") == weights_in(tmp_path / "on")
    assert contents(tmp_path / "ignored") == contents(tmp_path / "on") == contents(tmp_path / "resumed")
    assert [step for _, step in looked_at.shown] == [0, 3, 6, 9, 11]
    assert [step for _, step in again.shown] == [0, 3, 6]
    assert [step for _, step in resumed.shown] == [6, 9, 11]  # from the checkpoint of step 4
    for record in (again, resumed):
        for at, picture in record.shown.items():
            assert np.array_equal(picture, looked_at.shown[at])
    pictures = [picture.tobytes() for picture in looked_at.shown.values()]
    assert len(set(pictures)) == len(pictures)


class Clock:
    """Seconds that pass where the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Gallery):
    """A record for which a step takes 10 s and a preview 1 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def update(self, n: int = 1) -> None:
        self.clock.now += 10

    def image(self, name: str, draw: Callable[[], Image.Image], step: int) -> None:
        self.shown[name, step] = np.zeros(0)
        self.clock.now += 1


def test_previews_take_two_percent_of_the_time(tiny_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 s a step they are due at each, but n + 1 of them may be shown no earlier than after 50 (n + 1) s; but for the last."""
    clock = Clock()
    monkeypatch.setattr("diffstill.training.monotonic", clock)
    monkeypatch.setattr("diffstill.stages.finetune.PREVIEW_SHARE", 0.02)
    record = Slow(clock)
    config = settings_of(tiny_chain, preview_every=1, steps=22, batch_size=2)
    finetune(config, **inputs_of(tiny_chain), denoiser=tmp_path / "out", record=record)
    assert [step for _, step in record.shown] == [0, 10, 15, 20, 22]


def test_how_fast_the_machine_is_changes_no_byte(tiny_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings_of(tiny_chain, preview_every=1, checkpoint_every=1, steps=4, batch_size=4)
    finetune(config, **inputs_of(tiny_chain), denoiser=tmp_path / "fast", record=Gallery())
    monkeypatch.setattr("diffstill.training.CHECKPOINT_SHARE", 0.0)
    monkeypatch.setattr("diffstill.stages.finetune.PREVIEW_SHARE", 0.0)
    record = Gallery()
    finetune(config, **inputs_of(tiny_chain), denoiser=tmp_path / "slow", record=record)
    assert [step for _, step in record.shown] == [0, 4]
    assert contents(tmp_path / "slow") == contents(tmp_path / "fast")


def test_previews_are_switched_off_by_zero(tiny_chain: Chain, tmp_path: Path) -> None:
    record = Gallery()
    finetune(settings_of(tiny_chain, preview_every=0, steps=2), **inputs_of(tiny_chain), denoiser=tmp_path / "out", record=record)
    assert record.shown == {}


def test_the_preset_shows_the_first_and_the_last_step_of_each_seed(tiny_chain: Chain, tmp_path: Path) -> None:
    record = Gallery()
    finetune(settings_of(tiny_chain, seeds=[0, 5]), **inputs_of(tiny_chain), denoiser=tmp_path / "out", record=record)
    assert list(record.shown) == [(f"seed-{seed}/preview", step) for seed in (0, 5) for step in (0, 5, 10, 12)]


def test_a_preview_is_what_the_weights_draw(tiny_chain: Chain, tmp_path: Path) -> None:
    """The first shows images of the untuned generator, the last those of the denoiser, as stage `sample` draws them."""
    record = Gallery()
    finetune(settings_of(tiny_chain), **inputs_of(tiny_chain), denoiser=tmp_path / "denoiser", record=record)
    knobs = {"images_per_class": SHOWN_IMAGES, "seeds": [0], "guidance": 1.0, "sampler": "ddim", "steps": PREVIEW_STEPS}
    values = tiny_chain.params.model_dump(mode="json")
    config = Params.model_validate_json(json.dumps(values | {"sample": values["sample"] | knobs})).sample
    for step, denoiser in ((0, None), (12, tmp_path / "denoiser")):
        folder = tmp_path / f"drawn-{step}"
        sample(config, generator=tiny_chain.artifacts / "generator", denoiser=denoiser, distilled=folder)
        rows = [[read_png(folder / "seed-0" / name / f"{number:05d}.png") for number in range(SHOWN_IMAGES)] for name in ("0", "1", "2")]
        expected = np.asarray(contact_sheet(np.array(rows)))
        shown = record.shown["seed-0/preview", step]
        assert shown.shape == expected.shape
        assert np.abs(shown.astype(int) - expected).max() <= 1  # another batch size may change rounding


def test_a_preview_shows_the_averaged_weights(tiny_chain: Chain) -> None:
    run = tuning(tiny_chain, steps=3, learning_rate=0.05, ema_decay=0.9)
    for _ in range(3):
        run.step()
    shown, averages = np.asarray(run._sheet()), [average.clone() for average in run.training.average]
    with torch.no_grad():
        for average, weight in zip(run.training.average, run.training.weights, strict=True):
            average.copy_(weight)
        assert not np.array_equal(np.asarray(run._sheet()), shown)
        for average, weight, old in zip(run.training.average, run.training.weights, averages, strict=True):
            average.copy_(old)
            weight.copy_(old)
    assert np.array_equal(np.asarray(run._sheet()), shown)


def test_a_preview_touches_neither_weights_nor_random_streams(tiny_chain: Chain) -> None:
    run = tuning(tiny_chain, steps=4)
    for _ in range(3):
        run.step()
    before = {key: array.copy() for key, array in run._state().items()}
    draws, stream = run.draw(3), torch.get_rng_state()
    run._sheet()
    assert torch.equal(torch.get_rng_state(), stream)
    after = run._state()
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert np.array_equal(array, after[key]), key
    for a, b in zip(vars(draws).values(), vars(run.draw(3)).values(), strict=True):
        assert torch.equal(a, b)
    own = dict(run.opened.transformer.named_parameters())
    assert all(own[name] is weight and weight.requires_grad for name, weight in zip(run.names, run.training.weights, strict=True))


def test_a_large_generator_is_previewed_some_classes_at_a_time(tiny_chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many images at once as training takes, and of the first classes only."""
    whole = np.asarray(tuning(tiny_chain, batch_size=100)._sheet())
    small = np.asarray(tuning(tiny_chain, batch_size=5)._sheet())
    assert np.abs(small.astype(int) - whole).max() <= 1
    monkeypatch.setattr("diffstill.stages.finetune.SHOWN_CLASSES", 2)
    fewer = np.asarray(tuning(tiny_chain, batch_size=100)._sheet())
    assert np.abs(fewer.astype(int) - whole[: len(whole) * 2 // 3]).max() <= 1


def test_previews_leave_room_for_the_compiled_blocks_of_a_step(tiny_chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame for the scaled block and one for the plain one, each without and with gradients, whatever is left for the last batch."""
    frames, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled(block, backend=frames))
    monkeypatch.setattr("diffstill.stages.finetune.PREVIEW_STEPS", 1)
    torch._dynamo.reset()
    run = tuning(tiny_chain, compile=True, batch_size=9, steps=4)  # a preview has 12 images
    assert len(run.opened.transformer.transformer_blocks) == 2
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            run._sheet()
            run.step()
    assert frames.frame_count == 2 * 2
    torch._dynamo.reset()


@pytest.mark.parametrize(("rate", "told"), [(1e2, "the loss is .* after the last step, where noise"), (1e30, "not finite")])
def test_a_fine_tune_that_diverged_is_refused(tiny_chain: Chain, tmp_path: Path, rate: float, told: str) -> None:
    with pytest.raises(DiffstillError, match=f"{told}.*lower `finetune.learning_rate`"):
        finetune(settings_of(tiny_chain, learning_rate=rate), **inputs_of(tiny_chain), denoiser=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_not_written_though_the_loss_was_one(tiny_chain: Chain) -> None:
    run = tuning(tiny_chain, steps=1, preview_every=0)
    whole = run.step

    def step() -> None:
        whole()
        run.training.average[1][..., 0] = torch.nan

    run.step = step  # type: ignore[method-assign]
    with pytest.raises(DiffstillError, match=f"weight `{run.names[1]}` after the last step: holds the value nan"):
        run.train(None, ignore)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_divergence_is_told_with_previews_too(tiny_chain: Chain, tmp_path: Path) -> None:
    config = settings_of(tiny_chain, learning_rate=1e30, steps=6, preview_every=1)
    with pytest.raises(DiffstillError, match=r"not finite at step \d+: fine-tuning diverged"):
        finetune(config, **inputs_of(tiny_chain), denoiser=tmp_path / "out", record=Gallery())
