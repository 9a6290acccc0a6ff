"""Tiny experiments: artifacts of every stage, written by hand in milliseconds, with student runs of any accuracy."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffstill.artifacts import Artifact, Kind, new_artifact, read_manifest, write_shards
from diffstill.config import EncodeConfig, EvaluateConfig, FinetuneConfig, PrepareConfig, PretrainConfig, ReportConfig, SampleConfig
from diffstill.scores import read_runs, table
from diffstill.stages.report import _accuracy_csv, report

STUDENT = "convnet-2"
CLASSES = ("cat & <dog>", '"q$u$ote"')
STEPS: Mapping[str, Kind] = {
    "images": "images",
    "generator": "generator",
    "latents": "latents",
    "denoiser": "denoiser",
    "distilled": "distilled",
    "untuned": "distilled",
}


def line(images_digest: str, source: str, size: int | None, generation_seed: int | None, student_seed: int, accuracy: float) -> dict:
    """One student run as it stands in scores.jsonl; its accuracy on val is half of that on test."""
    return {
        "source": source,
        "student": STUDENT,
        "images_per_class": size,
        "generation_seed": generation_seed,
        "student_seed": student_seed,
        "protocol": "short-20",
        "steps": 20,
        "train_images": 2 * (size or 6),
        "accuracy_test": accuracy,
        "accuracy_val": accuracy / 2,
        "best_test": min(1.0, accuracy + 0.05),
        "best_step": 15,
        "labels": "hard",
        "images_digest": images_digest,
    }


@dataclass
class Experiment:
    """Folders of the artifacts of one experiment by name; `scores` can be written more than once."""

    root: Path
    scores: list[Path] = field(default_factory=list)
    paths: dict[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        self.paths = {name: self.root / name for name in STEPS}

    def opened(self, *names: str) -> dict[str, Artifact]:
        """Artifacts by name, to be inputs of another."""
        return {name: read_manifest(self.paths[name], STEPS[name]) for name in names}

    @property
    def images(self) -> Artifact:
        return self.opened("images")["images"]

    def line(self, *run, **changes) -> dict:
        """A run on these images, see `line`."""
        return line(self.images.digest, *run) | changes

    def judge(self, lines: Sequence[Mapping[str, Any]], name: str = "scores", inputs: Sequence[str] = ("images", "distilled")) -> Path:
        """Write scores."""
        folder = self.root / name
        with new_artifact(folder, "scores", EvaluateConfig(), self.opened(*inputs)) as draft:
            (draft.folder / "scores.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
            draft.facts |= {"sources": list(dict.fromkeys(one["source"] for one in lines)), "students": [STUDENT]}
        self.scores.append(folder)
        return folder

    def report(self, name: str = "report", config: ReportConfig | None = None) -> tuple[Path, dict[str, float]]:
        """Run the stage `report`: its folder, and what it returned. Takes seconds, for the figures."""
        out, inputs = self.root / name, {name: path for name, path in self.paths.items() if name not in ("generator", "latents")}
        return out, report(config or ReportConfig(shown_per_class=2), **inputs, scores=self.scores, report=out)

    def summarise(self, name: str = "report", config: ReportConfig | None = None) -> Path:
        """A report without figures, in milliseconds: with all that `publish` reads of it."""
        opened = [read_manifest(folder, "scores") for folder in self.scores]
        runs = read_runs(opened)
        inputs = self.opened("images", "denoiser", "distilled", "untuned") | {f"scores-{number:03d}": one for number, one in enumerate(opened)}
        with new_artifact(self.root / name, "report", config or ReportConfig(), inputs) as draft:
            (draft.folder / "scores.jsonl").write_text("".join(run.model_dump_json() + "\n" for run in runs))
            (draft.folder / "accuracy.csv").write_text(_accuracy_csv(table(runs), runs[0].protocol))
            (draft.folder / "report.html").write_text("<!doctype html><title>A report</title>")
            students = sorted({run.student for run in runs})
            draft.facts |= {"protocol": runs[0].protocol, "students": students, "runs": len(runs), "images_digest": self.images.digest}
        return self.root / name


def write_images(
    folder: Path, classes: Sequence[str] = CLASSES, side: int = 8, channels: int = 1, config: PrepareConfig | None = None, leakage: str = ""
) -> None:
    config, draws = config or PrepareConfig(), np.random.default_rng(0)
    counts = {"train": 6, "val": 2, "test": 300}
    with new_artifact(folder, "images", config, {}) as draft:
        for split, count in counts.items():
            labels = np.repeat(np.arange(len(classes)), count)
            pixels = draws.integers(0, 256, (len(labels), channels, side, side), dtype=np.uint8)
            write_shards(draft.folder, split, {"pixels": pixels, "labels": labels.astype(np.int64)}, 4096)
        draft.facts |= {"source": config.source, "classes": list(classes), "side": side, "channels": channels, "flip": False}
        draft.facts |= {"leakage": leakage} if leakage else {}
        draft.facts["counts"] = {split: dict.fromkeys(classes, count) for split, count in counts.items()}


def write_denoiser(folder: Path, policy: str = "redundancy", seeds: Sequence[int] = (0,), inputs: Mapping[str, Artifact] | None = None) -> None:
    columns = "step,loss,loss_real,loss_gen,memory_real,memory_gen"
    with new_artifact(folder, "denoiser", FinetuneConfig(policy=policy, seeds=tuple(seeds)), inputs or {}) as draft:
        for seed in seeds:
            (draft.folder / f"seed-{seed}").mkdir()
            rows = [f"{step},{1 / step},{0.9 - step / 100},{0.2 + step / 100},{min(64, step)},{min(64, step)}" for step in range(1, 31)]
            (draft.folder / f"seed-{seed}" / "metrics.csv").write_text("\n".join([columns, *rows]) + "\n")
        draft.facts |= {"seeds": list(seeds), "policy": policy, "capacity_real": 64, "capacity_gen": 64, "steps": 30, "lambda_real": 0.002}
        draft.facts |= {"lambda_gen": 0.008, "update": "step", "trainable": "difffit", "parameters": 123456, "trained_parameters": 1234}


def write_sampled(
    folder: Path, source: str, inputs: Mapping[str, Artifact], images: Artifact, seeds: Sequence[int] = (0, 1, 2), per_class: int = 2, draw: int = 0
) -> None:
    """Random pixels: others for another `draw`."""
    facts = images.facts
    draws = np.random.default_rng((len(source), draw))
    with new_artifact(folder, "distilled", SampleConfig(seeds=tuple(seeds), images_per_class=per_class), inputs) as draft:
        for seed, name, number in itertools.product(seeds, facts["classes"], range(per_class)):
            path = draft.folder / f"seed-{seed}" / name / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (facts["side"], facts["side"]) if facts["channels"] == 1 else (facts["side"], facts["side"], 3)
            Image.fromarray(draws.integers(0, 256, shape, dtype=np.uint8)).save(path)
        draft.facts |= {"source": source, "seeds": list(seeds), "images_per_class": per_class, "classes": facts["classes"], "side": facts["side"]}
        draft.facts |= {"channels": facts["channels"], "guidance": 3.0, "sampler": "ddim", "steps": 25, "images_digest": images.digest}


def make_experiment(
    root: Path,
    classes: Sequence[str] = CLASSES,
    policy: str = "redundancy",
    tunes: Sequence[int] = (0,),
    side: int = 8,
    channels: int = 1,
    data: PrepareConfig | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    per_class: int = 2,
    draw: int = 0,
    weights_licence: str = "",
    leakage: str = "",
) -> Experiment:
    """All artifacts up to the two sampled sets; equal arguments give equal bytes."""
    made = Experiment(root)
    write_images(made.paths["images"], classes, side, channels, data, leakage)
    with new_artifact(made.paths["generator"], "generator", PretrainConfig(), made.opened("images")) as draft:
        draft.facts |= {"classes": list(classes)} | ({"licence": weights_licence} if weights_licence else {})
    with new_artifact(made.paths["latents"], "latents", EncodeConfig(), made.opened("images", "generator")) as draft:
        draft.facts["classes"] = list(classes)
    write_denoiser(made.paths["denoiser"], policy, tunes, made.opened("latents", "generator"))
    write_sampled(made.paths["untuned"], "untuned", made.opened("generator"), made.images, seeds, per_class)
    write_sampled(made.paths["distilled"], "distilled", made.opened("generator", "denoiser"), made.images, seeds, per_class, draw)
    return made


RANDOM = {1: [[0.30, 0.34], [0.36, 0.32], [0.40, 0.38]], 2: [[0.50, 0.54], [0.56, 0.52], [0.60, 0.58]]}
UNTUNED = {1: [[0.42, 0.40], [0.36, 0.38], [0.39, 0.41]], 2: [[0.54, 0.56], [0.52, 0.54], [0.54, 0.56]]}
DISTILLED = {1: [[0.61, 0.63], [0.60, 0.64], [0.66, 0.62]], 2: [[0.57, 0.53], [0.56, 0.58], [0.52, 0.60]]}
FULL = [0.90, 0.94]


def all_lines(images_digest: str, more: float = 0.0) -> list[dict]:
    """The runs of a whole experiment, by generation seed and student seed; distilled ones better by about `more`, not by the same for every seed."""
    lines = [
        line(images_digest, source, size, generation, student, accuracy + more * (0.98 + generation / 50) * (source == "distilled"))
        for source, sizes in (("random", RANDOM), ("untuned", UNTUNED), ("distilled", DISTILLED))
        for size, seeds in sizes.items()
        for generation, students in enumerate(seeds)
        for student, accuracy in enumerate(students)
    ]
    return lines + [line(images_digest, "full", None, None, student, accuracy) for student, accuracy in enumerate(FULL)]
