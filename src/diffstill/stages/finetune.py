"""Stage `finetune`: latents and generator -> denoiser, the weights that the method moved.

One step, from the batch to the loss, is `_Finetune.step`; its maths is in `diffusion` and `memory`.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor

from diffstill.artifacts import Array, Artifact, WorkFolder, new_artifact, open_artifact, read_shards, refuse_foreign, to_pixels
from diffstill.config import FinetuneConfig
from diffstill.diffusion import add_noise, denoising_loss, drop_labels, predicted_clean
from diffstill.errors import DiffstillError
from diffstill.memory import ClassMemory, diversity, representativeness
from diffstill.networks import Generator, choose_trainable, load_generator
from diffstill.pictures import contact_sheet
from diffstill.record import Record, ignore
from diffstill.training import Training, balanced_indices, batch_indices, pack, seeded, set_threads, unpack

METRICS = ("loss", "loss_real", "loss_gen", "memory_real", "memory_gen")
FINETUNE = 3  # the first number of a draw's key, after the seed
SHOWN_CLASSES, SHOWN_IMAGES = 10, 4
"""Rows and columns of a preview."""
PREVIEW_STEPS = 10
"""Sampling steps of a preview: enough to see what the weights have learned, and soon done."""


def finetune(
    config: FinetuneConfig, *, latents: Path, generator: Path, denoiser: Path, device: str = "cpu", record: Record = ignore
) -> dict[str, float]:
    """Fine-tune the generator with the paper's objective, once per seed.

    Writes the `denoiser` artifact: per seed a folder `seed-<s>` with `delta.safetensors` (the averaged weights that
    were trained), `metrics.jsonl` (every step) and `metrics.csv` (every `log_every` steps). Returns the last metrics.
    A killed run goes on from its last checkpoint.
    """
    set_threads(config.threads)
    encoded, made = open_artifact(latents, "latents"), open_artifact(generator, "generator")
    if encoded.manifest.inputs["generator"] != made.digest:
        raise DiffstillError(f"{latents}: was encoded with another generator than {generator}; run `encode` again")
    refuse_foreign(denoiser)
    inputs = {"latents": encoded, "generator": made}
    data = _Latents.open(encoded, device)
    last: dict[str, float] = {}
    with WorkFolder("finetune", config, inputs) as work, new_artifact(denoiser, "denoiser", config, inputs) as draft:
        for seed in config.seeds:
            run = _Finetune(config, seed, data, load_generator(generator, made.facts["frequency_shift"]).to(device))
            run.train(work, record)
            last = run.write(draft.folder / f"seed-{seed}")
            record.file(draft.folder / f"seed-{seed}" / "metrics.csv")
        draft.facts |= _facts(config, run)
    work.clear()
    return last


def _facts(config: FinetuneConfig, run: _Finetune) -> dict[str, object]:
    names = ("seeds", "policy", "capacity_real", "capacity_gen", "steps", "lambda_real", "lambda_gen", "update", "trainable")
    return {
        **{name: getattr(config, name) for name in names},
        "seeds": list(config.seeds),
        "parameters": sum(weight.numel() for weight in run.opened.transformer.parameters()),
        "trained_parameters": sum(weight.numel() for weight in run.training.weights),
    }


@dataclass(frozen=True)
class _Latents:
    """The training latents: mean and std (N, F, C, h, w), scaled; labels (N,) on the CPU."""

    mean: Tensor
    std: Tensor
    labels: Tensor
    classes: int
    device: str

    @staticmethod
    def open(encoded: Artifact, device: str) -> _Latents:
        arrays, scaling = read_shards(encoded.folder, "train"), encoded.facts["scaling_factor"]
        mean, std = (torch.from_numpy(arrays[name].astype(np.float32) * scaling).to(device) for name in ("mean", "std"))
        return _Latents(mean, std, torch.from_numpy(arrays["labels"]), len(encoded.facts["classes"]), device)

    def members(self) -> list[Array]:
        """The image numbers of each class."""
        return [np.flatnonzero(self.labels.numpy() == label) for label in range(self.classes)]


@dataclass(frozen=True)
class _Batch:
    """Everything that a step draws: a pure function of (seed, step)."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    labels: Tensor
    dropped: Tensor


class _Finetune:
    """One fine-tune: its weights, its memories and how a step goes."""

    def __init__(self, config: FinetuneConfig, seed: int, data: _Latents, opened: Generator) -> None:
        self.config, self.seed, self.data, self.opened = config, seed, data, opened
        if config.balanced and config.batch_size % data.classes:
            raise DiffstillError(
                f"`finetune.balanced` needs a batch size that is a multiple of the {data.classes} classes, not {config.batch_size}; change `finetune.batch_size`"
            )
        if opened.learned_variance:
            raise DiffstillError(
                "this generator predicts a variance beside the noise; fine-tuning one is not supported yet, use a generator that predicts noise alone"
            )
        self.names = list(chosen := choose_trainable(opened.transformer, config.trainable))
        self.training = Training(list(chosen.values()), config.learning_rate, config.ema_decay, config.weight_decay)
        self.alphas_cumprod = opened.alphas_cumprod()
        self.members = data.members()
        self.memories = self._empty_memories()
        self.candidates = {name: _Candidates(config.epoch_candidates) for name in self.memories}
        self.history = torch.zeros(config.steps, len(METRICS), device=data.device)

    def _empty_memories(self) -> dict[str, ClassMemory]:
        policy = self.config.policy
        if policy == "none":
            return {}
        dim = self.data.mean[0, 0].numel()
        capacities = {"real": self.config.capacity_real, "gen": self.config.capacity_gen}
        return {name: ClassMemory(self.data.classes, capacity, dim, policy, self.data.device) for name, capacity in capacities.items()}

    def draw(self, step: int) -> _Batch:
        """The batch of `step`: images, mirrored or not, posterior sample, timesteps, noise, dropped labels."""
        config, data = self.config, self.data
        size, draws = config.batch_size, seeded(self.seed, FINETUNE, step)
        rows = balanced_indices(self.members, self.seed, step, size) if config.balanced else batch_indices(len(data.labels), self.seed, step, size)
        view = torch.randint(data.mean.shape[1], (size,), generator=draws)
        t = torch.randint(len(self.alphas_cumprod), (size,), generator=draws)
        dropped = torch.rand(size, generator=draws) < config.label_drop
        noise, eps = torch.randn((2, size, *data.mean.shape[2:]), generator=draws).to(data.device)
        at, of = rows.to(data.device), view.to(data.device)
        return _Batch(data.mean[at, of] + data.std[at, of] * noise, eps, t, data.labels[rows], dropped)

    def step(self) -> None:
        """One optimiser step: L_diffusion + lambda_real L_real + lambda_gen L_gen, then the memories take the batch in."""
        config, done, device = self.config, self.training.done, self.data.device
        batch = self.draw(done)
        abar_t = self.alphas_cumprod[batch.t].to(device)
        x_t = add_noise(batch.x0, batch.eps, abar_t)
        labels = drop_labels(batch.labels, batch.dropped, self.opened.null_label).to(device)
        eps_theta = self.opened.predict_noise(x_t, batch.t.to(device), labels)
        loss = denoising_loss(eps_theta, batch.eps)
        x0_hat = predicted_clean(x_t, eps_theta, abar_t).flatten(1)
        usable = self._usable(batch)
        loss_real, loss_gen = self._terms(x0_hat, batch.labels, usable)
        self.training.advance(loss + config.lambda_real * loss_real + config.lambda_gen * loss_gen)
        self._remember({"real": (batch.x0.flatten(1), batch.labels), "gen": (x0_hat.detach()[usable.to(device)], batch.labels[usable])})
        self.history[done] = torch.stack([loss.detach(), loss_real.detach(), loss_gen.detach(), *self._fill()])

    def _usable(self, batch: _Batch) -> Tensor:
        """Predictions that may meet the memories: conditional ones and, if asked for, those from little noise. (B,) on the CPU."""
        bound = self.config.max_timestep
        return ~batch.dropped if bound is None else ~batch.dropped & (batch.t < bound)

    def _terms(self, x0_hat: Tensor, labels: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        """L_real and L_gen of the usable predictions."""
        if not self.memories:
            return x0_hat.new_zeros(()), x0_hat.new_zeros(())
        device = x0_hat.device
        chosen, classes = x0_hat[usable.to(device)], labels[usable].to(device)
        return representativeness(chosen, classes, self.memories["real"]), diversity(chosen, classes, self.memories["gen"])

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

    def _epoch_ends(self) -> bool:
        seen, images = self.training.done * self.config.batch_size, len(self.data.labels)  # this step's batch included
        return seen // images > (seen - self.config.batch_size) // images

    def _fill(self) -> list[Tensor]:
        """Mean entries per class of the two memories."""
        if not self.memories:
            return [torch.zeros((), device=self.data.device)] * 2
        return [self.memories[name].filled.float().mean() for name in ("real", "gen")]

    def train(self, work: WorkFolder, record: Record) -> None:
        """Step until the end, from the last checkpoint if there is one."""
        name = f"seed-{self.seed}"
        saved = work.load(name)
        if saved is not None:
            self._load(saved)
        else:
            self._preview(record)
        with record.progress(
            f"finetune {name}", self.config.steps * self.config.batch_size, "img", self.training.done * self.config.batch_size
        ) as bar:
            while self.training.done < self.config.steps:
                self.step()
                bar.update(self.config.batch_size)
                self._preview(record)
                if self.training.done % self.config.checkpoint_every == 0 or self.training.done == self.config.steps:
                    self._refuse_divergence()
                    work.save(name, self._state())
        for step, values in self._rows():
            record.metrics({f"{name}/{metric}": value for metric, value in values.items()}, step)

    def _preview(self, record: Record) -> None:
        """Show what the averaged weights draw, where that is due: before the first step, every so often, after the last."""
        every, done = self.config.preview_every, self.training.done
        if every and (done % every == 0 or done == self.config.steps):
            self._refuse_divergence()
            record.image(f"seed-{self.seed}/preview", self._sheet, done)

    def _sheet(self) -> Image:
        """A row per class, each image from the noise that `sample` gives it, without guidance."""
        rows, steps = min(SHOWN_CLASSES, self.data.classes), min(PREVIEW_STEPS, len(self.alphas_cumprod))
        slots = [(label, number) for label in range(rows) for number in range(SHOWN_IMAGES)]
        batches = [slots[start : start + self.config.batch_size] for start in range(0, len(slots), self.config.batch_size)]
        with self.training.averaged():
            drawn = torch.cat([self._draw_preview(batch, steps) for batch in batches])
        drawn = drawn.nan_to_num()  # of weights that have just diverged; the next loss tells
        return contact_sheet(to_pixels(drawn.float().cpu().numpy()).reshape(rows, SHOWN_IMAGES, *drawn.shape[1:]))

    def _draw_preview(self, slots: Sequence[tuple[int, int]], steps: int) -> Tensor:
        noise = [seeded(self.seed, *slot) for slot in slots]
        return self.opened.draw([label for label, _ in slots], noise, sampler="ddim", steps=steps, guidance=1.0)

    def _refuse_divergence(self) -> None:
        finite = self.history.isfinite().all(dim=1)
        if not finite.all():
            step = int(finite.int().argmin()) + 1
            raise DiffstillError(f"the loss is not finite at step {step}: fine-tuning diverged; lower `finetune.learning_rate`")

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
        return [
            (step, dict(zip(METRICS, values[step - 1], strict=True))) for step in range(1, self.config.steps + 1) if step % every == 0 or step == 1
        ]

    def write(self, folder: Path) -> dict[str, float]:
        """Write the averaged weights and the metrics; returns the last metrics."""
        folder.mkdir(parents=True)
        delta = dict(zip(self.names, (average.cpu().contiguous() for average in self.training.average), strict=True))
        save_file(delta, folder / "delta.safetensors")
        lines = [dict(zip(("step", *METRICS), (step, *values), strict=True)) for step, values in enumerate(self.history.cpu().tolist(), start=1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ("step", *METRICS), lineterminator="\n")
            writer.writeheader()
            writer.writerows({"step": step, **values} for step, values in self._rows())
        return {name: value for name, value in lines[-1].items() if name != "step"}


class _Candidates:
    """What an epoch collects for a memory: the newest `bound` vectors per class, in the order in which they came."""

    def __init__(self, bound: int) -> None:
        self.newest: defaultdict[int, deque[tuple[int, Tensor]]] = defaultdict(lambda: deque(maxlen=bound))
        self.seen = 0

    def collect(self, vectors: Tensor, labels: Tensor) -> None:
        for vector, label in zip(vectors, labels.tolist(), strict=True):
            self.newest[label].append((self.seen, vector))
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
