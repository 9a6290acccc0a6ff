"""Stage `finetune`: latents and generator -> denoiser, the weights that the method moved.

One step, from the batch to the loss, is `FineTuning.step`; its maths is in `diffusion` and `memory`. Under `torchrun`
every rank draws the whole batch and predicts its rows; the terms and the memories see all of them.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from weakref import WeakMethod, finalize

import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor

from diffstill.artifacts import Array, Artifact, Draft, Rows, WorkFolder, new_artifact, open_artifact, refuse_foreign, to_pixels
from diffstill.config import FinetuneConfig
from diffstill.diffusion import add_noise, denoising_loss, drop_labels, predicted_clean, variational_loss
from diffstill.draws import Purpose, seeded
from diffstill.errors import DiffstillError
from diffstill.memory import ClassMemory, diversity, representativeness
from diffstill.networks import NONSENSE, Generator, choose_trainable, moved_labels, open_generator, refuse_unsound, take_delta
from diffstill.pictures import contact_sheet
from diffstill.ranks import Ranks, joined
from diffstill.record import Record, ignore
from diffstill.training import Checkpoints, TimeShare, Training, balanced_indices, batch_indices, free_memory, pack, sent, set_threads, unpack

METRICS = ("loss", "loss_real", "loss_gen", "memory_real", "memory_gen")
SHOWN_CLASSES, SHOWN_IMAGES = 10, 4
"""Rows and columns of a preview."""
PREVIEW_STEPS = 10
"""Sampling steps of a preview: enough to see what the weights have learned, and soon done."""
PREVIEW_SHARE = 0.02
"""Of the time of a fine-tune, previews between the first and the last take at most so much."""
RESIDENT = 0.5
"""Share of the device's free memory that latents may take there."""
ALONE = Ranks(0, 1, "cpu")


def finetune(
    config: FinetuneConfig, *, latents: Path, generator: Path, denoiser: Path, device: str = "cpu", record: Record = ignore
) -> dict[str, float]:
    """Fine-tune the generator with the paper's objective, once per seed.

    Writes the `denoiser` artifact: per seed a folder `seed-<s>` with `delta.safetensors` (the averaged weights that
    were trained), `metrics.jsonl` (every step) and `metrics.csv` (every `log_every` steps). Returns the last metrics.
    A killed run goes on from its last checkpoint.
    """
    set_threads(config.threads, device)
    encoded, made = open_artifact(latents, "latents"), open_artifact(generator, "generator")
    if encoded.manifest.inputs["generator"] != made.digest:
        raise DiffstillError(f"{latents}: was encoded with another generator than {generator}; run `encode` again")
    refuse_foreign(denoiser)
    inputs = {"latents": encoded, "generator": made}
    with joined(device) as ranks, ExitStack() as written:
        data = Latents.open(encoded, ranks.device)
        work = written.enter_context(WorkFolder("finetune", config, inputs, device=ranks.device)) if ranks.main else None
        draft = written.enter_context(new_artifact(denoiser, "denoiser", config, inputs)) if ranks.main else None
        for seed in config.seeds:
            facts, last = _tune(config, seed, data, made, ranks, work, draft, record)
        if draft:
            draft.facts |= facts
    if work:
        work.clear()
    return last


def _tune(
    config: FinetuneConfig, seed: int, data: Latents, made: Artifact, ranks: Ranks, work: WorkFolder | None, draft: Draft | None, record: Record
) -> tuple[dict[str, object], dict[str, float]]:
    """One fine-tune, written by the main rank; its facts and last metrics. Networks and memories are free again when it returns."""
    run = FineTuning(config, seed, data, open_generator(made).to(ranks.device), ranks)
    run.train(work, record)
    if draft:
        run.write(draft.folder / f"seed-{seed}")
        record.file(draft.folder / f"seed-{seed}" / "metrics.csv")
    return _facts(config, run), run.last()


def _facts(config: FinetuneConfig, run: FineTuning) -> dict[str, object]:
    names = ("seeds", "policy", "capacity_real", "capacity_gen", "lambda_real", "lambda_gen", "update", "trainable")
    return {
        **{name: getattr(config, name) for name in names},
        "seeds": list(config.seeds),
        "steps": run.steps,
        "parameters": sum(weight.numel() for weight in run.opened.transformer.parameters()),
        "trained_parameters": sum(weight.numel() for weight in run.training.weights),
    }


@dataclass(frozen=True)
class Latents:
    """The training latents as they are stored: mean and std (N, F, C, h, w) float16, unscaled; labels (N,) on the CPU."""

    mean: Tensor | Rows
    std: Tensor | Rows
    labels: Tensor
    classes: int
    scaling: float
    device: str

    @staticmethod
    def open(encoded: Artifact, device: str) -> Latents:
        """On the device where they take no more than `RESIDENT` of its free memory, else read from disk as they are drawn."""
        facts = encoded.facts
        mean, std, labels = (Rows(encoded.folder, "train", name) for name in ("mean", "std", "labels"))
        fits = 2 * 2 * math.prod(mean.shape) <= RESIDENT * free_memory(device)
        found = [_loaded(rows, device) if fits else rows for rows in (mean, std)]
        return Latents(found[0], found[1], torch.from_numpy(labels[:]), len(facts["classes"]), facts["scaling_factor"], device)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return tuple(self.mean.shape[2:])

    def take(self, rows: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled mean and std of images `rows` (B,), each in its view (B,): (B, C, h, w) float32 on the device."""
        mean, std = (self._chosen(kept, rows, views).float() * self.scaling for kept in (self.mean, self.std))
        return mean, std

    def _chosen(self, kept: Tensor | Rows, rows: Tensor, views: Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept[sent(rows, self.device), sent(views, self.device)]
        return sent(torch.from_numpy(kept[rows.numpy()])[torch.arange(len(rows)), views], self.device)

    def members(self) -> list[Array]:
        """The image numbers of each class."""
        return [np.flatnonzero(self.labels.numpy() == label) for label in range(self.classes)]


def _loaded(rows: Rows, device: str, at_once: int = 4096) -> Tensor:
    """All rows on the device, never twice in memory."""
    whole = torch.empty(rows.shape, dtype=torch.float16, device=device)
    for start in range(0, len(rows), at_once):
        whole[start : start + at_once] = torch.from_numpy(rows[start : start + at_once])
    return whole


@dataclass(frozen=True)
class _Batch:
    """Everything that a step draws, a pure function of (seed, step); `classes`, `t` and `dropped` are on the CPU."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    classes: Tensor
    dropped: Tensor

    def __getitem__(self, rows: slice) -> _Batch:
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class FineTuning:
    """One fine-tune: its weights, its memories and how a step goes."""

    def __init__(self, config: FinetuneConfig, seed: int, data: Latents, opened: Generator, ranks: Ranks = ALONE) -> None:
        self.config, self.seed, self.data, self.ranks = config, seed, data, ranks
        self.steps = config.steps if config.epochs is None else config.epochs * len(data.labels) // config.batch_size or 1
        self.mine = ranks.rows(config.batch_size)
        config.refuse_unbalanced(data.classes)
        self.names = list(chosen := choose_trainable(opened.transformer, config.trainable))
        self.opened = opened.accelerate(config.precision, compiled=config.compile, checkpointing=config.gradient_checkpointing)
        self.opened.parallel = ranks.wrap(opened.transformer)
        self.training = Training(list(chosen.values()), config.learning_rate, config.ema_decay, config.weight_decay)
        self.alphas_cumprod = opened.alphas_cumprod().to(data.device)
        self.members = data.members()
        self.memories = self._empty_memories()
        self.candidates = {name: _Candidates(config.epoch_candidates) for name in self.memories}
        self.history = torch.zeros(self.steps, len(METRICS), device=data.device)
        self.ahead = _Ahead(self.draw) if torch.device(data.device).type == "cuda" else None

    def _empty_memories(self) -> dict[str, ClassMemory]:
        policy = self.config.policy
        if policy == "none":
            return {}
        dim = math.prod(self.data.shape)
        capacities = {"real": self.config.capacity_real, "gen": self.config.capacity_gen}
        waiting = 2 * self.config.epoch_candidates if self.config.update == "epoch" else 0
        self._refuse_crowding((sum(capacities.values()) + 2 * waiting) * self.data.classes * dim * 4)  # twice: as they wait, and as they join
        return {name: ClassMemory(self.data.classes, capacity, dim, policy, self.data.device) for name, capacity in capacities.items()}

    def draw(self, step: int) -> _Batch:
        """The batch of `step`: images, mirrored or not, posterior sample, timesteps, noise, dropped labels."""
        config, data = self.config, self.data
        size, draws = config.batch_size, seeded(Purpose.FINETUNE_STEP, self.seed, step)
        place = Purpose.FINETUNE_BATCH, self.seed, step, size
        rows = balanced_indices(self.members, *place) if config.balanced else batch_indices(len(data.labels), *place)
        view = torch.randint(data.mean.shape[1], (size,), generator=draws)
        t = torch.randint(len(self.alphas_cumprod), (size,), generator=draws)
        dropped = torch.rand(size, generator=draws) < config.label_drop
        noise, eps = sent(torch.randn((2, size, *data.shape), generator=draws), data.device)
        mean, std = data.take(rows, view)
        return _Batch(mean + std * noise, eps, t, data.labels[rows], dropped)

    def step(self) -> None:
        """One optimiser step: L_diffusion + lambda_real L_real + lambda_gen L_gen, then the memories take the batch in.

        This rank predicts its rows; both terms are of the whole batch, so that they do not depend on the number of ranks.
        """
        config, done = self.config, self.training.done
        batch = self.ahead.take(done) if self.ahead else self.draw(done)
        loss, x0_hat = self._predict(batch[self.mine])
        x0_hat = self.ranks.gather(x0_hat)
        usable = self._usable(batch)
        at, of = sent(usable, x0_hat.device), batch.classes[usable]
        loss_real, loss_gen = self._terms(x0_hat[at], of)
        self.training.advance(loss + config.lambda_real * loss_real + config.lambda_gen * loss_gen)
        self._remember({"real": (batch.x0.flatten(1), batch.classes), "gen": (x0_hat.detach()[at], of)})
        self.history[done] = torch.stack([self.ranks.mean(loss.detach()), loss_real.detach(), loss_gen.detach(), *self._fill()])

    def _predict(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """L_diffusion and x0_hat (B, D) of a batch."""
        device, channels = self.data.device, batch.x0.shape[1]
        t = sent(batch.t, device)
        abar_t = self.alphas_cumprod[t]
        x_t = add_noise(batch.x0, batch.eps, abar_t)
        labels = drop_labels(self.opened.labels_of(batch.classes), batch.dropped, self.opened.null_label)
        output = self.opened.predict(x_t, t, sent(labels, device))
        eps_theta = output[:, :channels]
        loss = denoising_loss(eps_theta, batch.eps)
        if self.opened.learned_variance:
            loss = loss + variational_loss(output, batch.x0, x_t, t, self.alphas_cumprod)
        return loss, predicted_clean(x_t, eps_theta, abar_t).flatten(1)

    def _usable(self, batch: _Batch) -> Tensor:
        """The rows of predictions that may meet the memories: conditional ones and, if asked for, those from little noise. On the CPU."""
        bound = self.config.max_timestep
        return (~batch.dropped if bound is None else ~batch.dropped & (batch.t < bound)).nonzero().flatten()

    def _terms(self, x0_hat: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """L_real and L_gen of the usable predictions."""
        if not self.memories:
            return x0_hat.new_zeros(()), x0_hat.new_zeros(())
        of = sent(classes, x0_hat.device)
        real, gen, accumulate = *self.memories.values(), self.config.accumulate
        return representativeness(x0_hat, of, real, accumulate), diversity(x0_hat, of, gen, accumulate)

    def _remember(self, newcomers: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Let the batch join the memories now, or once the epoch is over."""
        for name, memory in self.memories.items():
            vectors, labels = newcomers[name]
            if self.config.update == "step":
                memory.add(vectors, labels)
                continue
            self.candidates[name].collect(vectors, labels)
            if self._epoch_ends():
                memory.add(*self.candidates[name].release())

    def _refuse_crowding(self, size: int) -> None:
        """The memories grow with the classes: 2.1 GB for 1,000 of them, 64 entries each, at the paper's size."""
        free = free_memory(self.data.device)
        if size > free:
            raise DiffstillError(
                f"the memories of {self.data.classes} classes take {size / 2**30:.1f} GiB, but {self.data.device} has {free / 2**30:.1f} GiB left; "
                "lower `finetune.capacity_real` and `finetune.capacity_gen`"
            )

    def _epoch_ends(self) -> bool:
        seen, images = self.training.done * self.config.batch_size, len(self.data.labels)  # this step's batch included
        return seen // images > (seen - self.config.batch_size) // images

    def _fill(self) -> list[Tensor]:
        """Mean entries per class of the two memories."""
        if not self.memories:
            return [torch.zeros((), device=self.data.device)] * 2
        return [self.memories[name].filled.float().mean() for name in ("real", "gen")]

    def train(self, work: WorkFolder | None, record: Record) -> None:
        """Step until the end, from the last checkpoint if there is one; only the main rank has a folder for them."""
        name, previews = f"seed-{self.seed}", TimeShare(PREVIEW_SHARE)
        saved = self.ranks.share(work.load(name) if work else None)
        if saved is not None:
            self._load(saved)
        else:
            self._preview(record, previews)
        size, done = self.config.batch_size, self.training.done
        with record.progress(f"finetune {name}", self.steps * size, "img", done * size) as bar, Checkpoints(work, name) as kept:
            while self.training.done < self.steps:
                self.step()
                bar.update(size)
                self._preview(record, previews)
                last = self.training.done == self.steps
                if self.training.done % self.config.checkpoint_every == 0 or last:
                    self._refuse_divergence()
                    kept.offer(self._state, last=last)
        self._refuse_nonsense()
        for step, values in self._rows():
            record.metrics({f"{name}/{metric}": value for metric, value in values.items()}, step)

    def _preview(self, record: Record, time: TimeShare) -> None:
        """Show what the averaged weights draw: before the first step, after the last, and every so often while there is time.

        No artifact may depend on it: how many there are does on how fast the machine is.
        """
        every, done = self.config.preview_every, self.training.done
        if not every or not self.ranks.main:
            return
        if done in (0, self.steps) or (done % every == 0 and time.left):
            self._refuse_divergence()  # and waits for the steps so far, which are not the preview's
            with time.taken():
                record.image(f"seed-{self.seed}/preview", self._sheet, done)

    def _sheet(self) -> Image:
        """A row per class, each image from the noise that `sample` gives it, without guidance."""
        rows, steps = min(SHOWN_CLASSES, self.data.classes), min(PREVIEW_STEPS, len(self.alphas_cumprod))
        slots = [(label, number) for label in range(rows) for number in range(SHOWN_IMAGES)]
        size = self.mine.stop - self.mine.start
        # All batches have the size of a step's: of another one the blocks would be compiled anew, three times over in bf16
        # (first, scaled and plain ones), and past dynamo's limit of 8 in all they are not compiled any more.
        filled = slots + slots[:1] * (-len(slots) % size)
        with self.training.averaged():
            latents = [self._draw_preview(filled[start : start + size], steps) for start in range(0, len(filled), size)]
            drawn = self.opened.decode_all(torch.cat(latents)[: len(slots)])
        drawn = drawn.nan_to_num()  # of weights that have just diverged; the next loss tells
        return contact_sheet(to_pixels(drawn.float().cpu().numpy()).reshape(rows, SHOWN_IMAGES, *drawn.shape[1:]))

    def _draw_preview(self, slots: Sequence[tuple[int, int]], steps: int) -> Tensor:
        noise = [seeded(Purpose.IMAGE, self.seed, *slot) for slot in slots]
        return self.opened.draw_latents([label for label, _ in slots], noise, sampler="ddim", steps=steps, guidance=1.0)

    def _refuse_divergence(self) -> None:
        finite = self.history.isfinite().all(dim=1)
        if not finite.all():
            step = int(finite.int().argmin()) + 1
            raise DiffstillError(f"the loss is not finite at step {step}: fine-tuning diverged; lower `finetune.learning_rate`")

    def _refuse_nonsense(self) -> None:
        """Weights that are no numbers though the last loss was one, or a loss far above that of a network that says 0."""
        loss, fix = self.last()["loss"], "fine-tuning diverged; lower `finetune.learning_rate`"
        if loss > NONSENSE:
            raise DiffstillError(f"the loss is {loss:g} after the last step, where noise that is not predicted at all gives 1: {fix}")
        for name, average in zip(self.names, self.training.average, strict=True):
            refuse_unsound(average, torch.finfo(average.dtype).max, f"weight `{name}` after the last step", fix)

    def _state(self) -> dict[str, Array]:
        return pack(
            {
                **self.training.state(),
                "history": {"history": self.history},
                **{f"memory-{name}": memory.state() for name, memory in self.memories.items()},
                **{f"candidates-{name}": candidates.state() for name, candidates in self.candidates.items()},
            }
        )

    def _load(self, saved: Mapping[str, Array]) -> None:
        self.training.load(saved)
        self.history.copy_(unpack(saved, "history")["history"])
        for name, memory in self.memories.items():
            memory.load_state(unpack(saved, f"memory-{name}"))
            self.candidates[name].load_state(unpack(saved, f"candidates-{name}"), self.data.device)

    def _rows(self) -> list[tuple[int, dict[str, float]]]:
        """The logged steps, from 1, with their metrics."""
        values = self.history.cpu().tolist()
        every = self.config.log_every
        return [(step, dict(zip(METRICS, values[step - 1], strict=True))) for step in range(1, self.steps + 1) if step % every == 0 or step == 1]

    def write(self, folder: Path) -> None:
        """Write the averaged weights that have moved, and the metrics."""
        folder.mkdir(parents=True)
        averages = dict(zip(self.names, self.training.average, strict=True))
        save_file(take_delta(averages, moved_labels(self.opened, self.data.classes)), folder / "delta.safetensors")
        lines = [dict(zip(("step", *METRICS), (step, *values), strict=True)) for step, values in enumerate(self.history.cpu().tolist(), start=1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ("step", *METRICS), lineterminator="\n")
            writer.writeheader()
            writer.writerows({"step": step, **values} for step, values in self._rows())

    def last(self) -> dict[str, float]:
        """The metrics of the last step."""
        return dict(zip(METRICS, self.history[-1].tolist(), strict=True))


class _Ahead:
    """Draws the batch of the next step while the device computes this one. Keeps alive neither what draws nor its thread."""

    def __init__(self, draw: Callable[[int], _Batch]) -> None:
        self._draw, pool = WeakMethod(draw), ThreadPoolExecutor(1)
        self._submit, self._coming = pool.submit, dict[int, Future[_Batch]]()
        finalize(self, pool.shutdown, wait=False, cancel_futures=True)

    def _drawn(self, step: int) -> _Batch:
        draw = self._draw()
        if draw is None:
            raise RuntimeError("who draws is gone")
        return draw(step)

    def take(self, step: int) -> _Batch:
        """The batch of `step`."""
        coming = self._coming.pop(step, None) or self._submit(_Ahead._drawn, self, step)  # one thread draws them all
        batch = coming.result()
        self._coming = {step + 1: self._submit(_Ahead._drawn, self, step + 1)}
        return batch


class _Candidates:
    """What an epoch collects for a memory: the newest `bound` vectors per class, in the order in which they came."""

    def __init__(self, bound: int) -> None:
        self.newest: defaultdict[int, deque[tuple[int, Tensor]]] = defaultdict(lambda: deque(maxlen=bound))
        self.seen = 0

    def collect(self, vectors: Tensor, labels: Tensor) -> None:
        for vector, label in zip(vectors, labels.tolist(), strict=True):
            self.newest[label].append((self.seen, vector.clone()))  # a row alone would keep its whole batch alive
            self.seen += 1

    def release(self) -> tuple[Tensor, Tensor]:
        state = self.state()
        self.newest.clear()
        return state["vectors"], state["labels"]

    def state(self) -> dict[str, Tensor]:
        ordered = sorted((order, label) for label, own in self.newest.items() for order, _ in own)
        by_order = {order: vector for own in self.newest.values() for order, vector in own}
        vectors = [by_order[order] for order, _ in ordered]
        return {
            "vectors": torch.stack(vectors) if vectors else torch.zeros(0, 1),
            "labels": torch.tensor([label for _, label in ordered], dtype=torch.long),
        }

    def load_state(self, state: Mapping[str, Tensor], device: str) -> None:
        self.collect(state["vectors"].to(device), state["labels"])
