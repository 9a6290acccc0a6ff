"""Stage `evaluate`: students trained from scratch on a small set and tested on real images."""

from __future__ import annotations

import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from diffstill.artifacts import Artifact, Rows, WorkFolder, load_split, new_artifact, open_artifact, refuse_foreign
from diffstill.config import EvaluateConfig
from diffstill.draws import Purpose, shuffled
from diffstill.errors import DiffstillError
from diffstill.protocols import Protocol, protocol
from diffstill.record import Progress, Record, ignore
from diffstill.students import PixelStatistics, accuracy, build_student, pixel_statistics, resized, train_student

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
TrainingSet = tuple[Pixels, Labels]
Score = dict[str, Any]

COUNTED = 1024
"""Training images in memory at a time while their pixels are counted."""
FINISHED = "finished"
IDENTITY = ("source", "student", "images_per_class", "generation_seed", "student_seed")


def evaluate(
    config: EvaluateConfig,
    *,
    images: Path,
    scores: Path,
    distilled: Path | None = None,
    student: str | None = None,
    record: Record = ignore,
    device: str = "cpu",
) -> dict[str, float]:
    """Judge `distilled` (or, without it, the real baselines of `config`) by students; `student` names one of them, None means all.

    Writes the `scores` artifact: `scores.jsonl`, one line per trained student. Returns the mean test accuracy (0..1) per source,
    student and images per class. Finished students of an interrupted command are kept. Raises `DiffstillError` on sets and students
    that do not fit `images`.
    """
    refuse_foreign(scores)
    inputs = {"images": open_artifact(images, "images")} | ({"distilled": open_artifact(distilled, "distilled")} if distilled else {})
    judge = _Judge.of(config, inputs["images"], device)
    students = _students(config, student)
    sources = [_distilled(config, inputs["distilled"], judge)] if distilled else _baselines(config, judge)
    runs = _runs(config, sources, students)
    judge.refuse_misfits(students)

    alone = config.model_copy(update={"workers": 1})  # their number changes no score
    with WorkFolder("evaluate", alone, inputs, student or "", device=device) as work:
        lines = _trained(runs, judge, config.workers, work, record)
        _write(scores, config, inputs, lines, record)
        work.clear()
    return _summary(lines)


def _write(scores: Path, config: EvaluateConfig, inputs: Mapping[str, Artifact], lines: list[Score], record: Record) -> None:
    with new_artifact(scores, "scores", config, inputs) as draft:
        (draft.folder / "scores.jsonl").write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
        record.file(draft.folder / "scores.jsonl")
        draft.facts |= {
            "sources": list(dict.fromkeys(line["source"] for line in lines)),
            "students": list(dict.fromkeys(line["student"] for line in lines)),
            "protocol": config.protocol,
            "images_digest": inputs["images"].digest,
        }


def _students(config: EvaluateConfig, student: str | None) -> tuple[str, ...]:
    if student is None:
        return config.students
    if student not in config.students:
        raise DiffstillError(f"student {student!r} is not among `evaluate.students`; use one of {', '.join(config.students)}")
    return (student,)


# Training sets


@dataclass(frozen=True)
class _Source:
    """Where training sets come from: one per size (images per class, None = all) and generation seed (None = there is only one)."""

    name: str
    sizes: tuple[int | None, ...]
    seeds: tuple[int | None, ...]
    draw: Callable[[int | None, int | None], TrainingSet]


def _distilled(config: EvaluateConfig, artifact: Artifact, judge: _Judge) -> _Source:
    """The first images of every class, for each generation seed. Raises `DiffstillError` where the artifact does not fit."""
    facts = artifact.facts
    if differing := sorted(set(facts["classes"]) ^ set(judge.facts["classes"])):
        raise DiffstillError(
            f"{artifact.folder}: not made for the classes of the images, {differing[0]!r} is in only one of them; "
            "sample all classes of `prepare`, or judge it on the images it was made from"
        )
    if facts["images_digest"] != judge.images_digest:
        raise DiffstillError(
            f"{artifact.folder}: made from images {facts['images_digest'][:12]}, but is to be judged on images {judge.images_digest[:12]}, "
            "whose test split it may have seen; sample it anew"
        )
    wanted, held = max(config.images_per_class), facts["images_per_class"]
    if wanted > held:
        raise DiffstillError(
            f"{artifact.folder}: holds {held} images per class, `evaluate.images_per_class` asks for {wanted}; lower it, or raise `sample.images_per_class`"
        )
    pictures = {seed: _pictures(artifact.folder / f"seed-{seed}", wanted, judge.facts) for seed in facts["seeds"]}
    return _Source(facts["source"], config.images_per_class, tuple(facts["seeds"]), partial(_first, pictures))


def _first(pictures: Mapping[int | None, Pixels], size: int | None, seed: int | None) -> TrainingSet:
    """The first `size` images of each class out of (K, n, C, S, S)."""
    chosen = pictures[seed][:, :size]
    return chosen.reshape(-1, *chosen.shape[2:]), np.repeat(np.arange(len(chosen)), chosen.shape[1])


def _pictures(folder: Path, count: int, facts: Mapping[str, Any]) -> Pixels:
    """The first `count` PNGs of each class, (K, count, C, S, S), classes, side and channels being those of the real images."""
    size, mode = (facts["side"], facts["side"]), "L" if facts["channels"] == 1 else "RGB"
    paths = [[folder / name / f"{k:05d}.png" for k in range(count)] for name in facts["classes"]]
    return np.stack([np.stack([_picture(path, size, mode) for path in own]) for own in paths])


def _picture(path: Path, size: tuple[int, int], mode: str) -> Pixels:
    """One PNG as (C, S, S). Raises `DiffstillError` if it is missing, unreadable, or of another size or mode."""
    try:
        with Image.open(path) as image:
            if (image.size, image.mode) != (size, mode):
                raise DiffstillError(
                    f"{path}: is {image.size[0]}x{image.size[1]} {image.mode}, expected {size[0]}x{size[1]} {mode}; make the `distilled` artifact anew"
                )
            pixels = np.asarray(image)
    except (FileNotFoundError, UnidentifiedImageError) as error:
        raise DiffstillError(f"{path}: missing or no image; make the `distilled` artifact anew") from error
    return pixels[None] if mode == "L" else np.moveaxis(pixels, -1, 0)


def _baselines(config: EvaluateConfig, judge: _Judge) -> list[_Source]:
    sources = []
    if "random" in config.baselines:
        _refuse_scarce(config, judge)
        sources.append(_Source("random", config.images_per_class, config.random_seeds, partial(_random, judge.train, judge.classes)))
    if "full" in config.baselines:
        whole = judge.train[0][:], judge.train[1]
        sources.append(_Source("full", (None,), (None,), lambda _size, _seed: whole))
    return sources


def _refuse_scarce(config: EvaluateConfig, judge: _Judge) -> None:
    counts, wanted = np.bincount(judge.train[1], minlength=judge.classes), max(config.images_per_class)
    for name, count in zip(judge.facts["classes"], counts, strict=True):
        if wanted > count:
            raise DiffstillError(
                f"class {name!r} has {count} training images, `evaluate.images_per_class` asks for {wanted}; lower it, or drop the class"
            )


def _random(train: tuple[Rows | Pixels, Labels], classes: int, size: int | None, seed: int | None) -> TrainingSet:
    """`size` random real images of each class: the head of a permutation per (seed, class), so that smaller sets lie in larger ones."""
    pixels, labels = train
    own = [np.flatnonzero(labels == label) for label in range(classes)]
    orders = [shuffled(len(numbers), Purpose.RANDOM_REAL, seed or 0, label)[:size] for label, numbers in enumerate(own)]
    chosen = np.concatenate([numbers[order] for numbers, order in zip(own, orders, strict=True)])
    return pixels[chosen], labels[chosen]


# Runs


@dataclass(frozen=True)
class _Run:
    """One student to be trained. `generation_seed` is the draw of the training set, `student_seed` that of weights and batches."""

    source: str
    student: str
    images_per_class: int | None
    generation_seed: int | None
    student_seed: int


def _runs(config: EvaluateConfig, sources: list[_Source], students: tuple[str, ...]) -> dict[_Run, Callable[[], TrainingSet]]:
    """Every run, and how to get its training set."""
    return {
        _Run(source.name, name, size, seed, student_seed): partial(source.draw, size, seed)
        for source in sources
        for name, size, seed, student_seed in product(students, source.sizes, source.seeds, config.student_seeds)
    }


@dataclass(frozen=True)
class _Judge:
    """What all students of one command share: the real images, their statistics and the recipe."""

    train: tuple[Rows, Labels]
    """Pixels are read when a training set is drawn."""
    val: TrainingSet
    test: TrainingSet
    facts: Mapping[str, Any]
    images_digest: str
    statistics: PixelStatistics
    protocol: Protocol
    evaluations: int
    device: str

    @classmethod
    def of(cls, config: EvaluateConfig, images: Artifact, device: str) -> _Judge:
        recipe, facts = protocol(config.protocol), images.facts
        if misfit := recipe.misfit(facts["side"], len(facts["classes"])):
            raise DiffstillError(misfit)
        val, test = ((resized(pixels, recipe.side), labels) for pixels, labels in (load_split(images, split) for split in ("val", "test")))
        pixels, labels = Rows(images.folder, "train", "pixels"), Rows(images.folder, "train", "labels")[:]
        statistics = pixel_statistics(resized(pixels[start : start + COUNTED], recipe.side) for start in range(0, len(pixels), COUNTED))
        return cls((pixels, labels), val, test, facts, images.digest, statistics, recipe, config.evaluations, device)

    @property
    def classes(self) -> int:
        return len(self.facts["classes"])

    def build(self, student: str, seed: int) -> torch.nn.Module:
        side = self.protocol.side or self.facts["side"]
        return build_student(student, classes=self.classes, channels=self.facts["channels"], side=side, seed=seed)

    def refuse_misfits(self, students: tuple[str, ...]) -> None:
        """Raise `DiffstillError` before hours are spent if a student is unknown or does not take these images."""
        for name in students:
            self.build(name, 0)

    def steps(self, run: _Run) -> int:
        images = len(self.train[1]) if run.images_per_class is None else run.images_per_class * self.classes
        return self.protocol.budget(images, self.classes)

    def score(self, run: _Run, training_set: TrainingSet, step_done: Callable[[], None]) -> Score:
        """Train one student and test it: its line of `scores.jsonl`. The best step looks at test and is a side value only."""
        pixels, labels = resized(training_set[0], self.protocol.side), training_set[1]
        student = self.build(run.student, run.student_seed).to(self.device)
        history = train_student(
            student,
            pixels,
            labels,
            protocol=self.protocol,
            classes=self.classes,
            statistics=self.statistics,
            flip=self.facts["flip"],
            seed=run.student_seed,
            evaluations=self.evaluations,
            evaluate=lambda trained: {"test": accuracy(trained, *self.test, self.statistics)},
            step_done=step_done,
        )
        for name, weight in student.named_parameters():
            if not weight.isfinite().all():
                raise DiffstillError(
                    f"{run.student} on {run.source}, student seed {run.student_seed}: weight `{name}` is no finite number after "
                    f"{history[-1].step} steps: training diverged under `evaluate.protocol` {self.protocol.name}; choose another, or leave the student out"
                )
        best = max(history, key=lambda look: look.metrics["test"])
        return asdict(run) | {
            "protocol": self.protocol.name,
            "steps": history[-1].step,
            "train_images": len(labels),
            "accuracy_test": history[-1].metrics["test"],
            "accuracy_val": accuracy(student, *self.val, self.statistics),
            "best_test": best.metrics["test"],
            "best_step": best.step,
            "labels": "hard",
            "images_digest": self.images_digest,
        }


class _Stopped(Exception):  # noqa: N818  (no error: another run failed or the user interrupted)
    """Ends the other students' training after one failed."""


def _trained(runs: Mapping[_Run, Callable[[], TrainingSet]], judge: _Judge, workers: int, work: WorkFolder, record: Record) -> list[Score]:
    """The scores of all runs, sorted, each student trained on one thread; those that an earlier command finished are not trained again."""
    finished = [_Run(**{field: line[field] for field in IDENTITY}) for line in work.lines(FINISHED)]
    left = [run for run in runs if run not in finished]
    done = sum(judge.steps(run) for run in finished)
    lock, stop = threading.Lock(), threading.Event()
    with record.progress("evaluate", sum(map(judge.steps, runs)), "step", done) as bar, _pool(workers, stop) as pool:
        step_done = partial(_count_step, bar, lock, stop)
        futures = [pool.submit(_finish, run, runs[run], judge, work, lock, step_done) for run in left]
        for future in as_completed(futures):
            future.result()
    return sorted(work.lines(FINISHED), key=_place)


@contextmanager
def _pool(workers: int, stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute on one CPU thread each; if the block fails, running students stop at their next step and waiting ones never start."""
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _finish(run: _Run, draw: Callable[[], TrainingSet], judge: _Judge, work: WorkFolder, lock: threading.Lock, step_done: Callable[[], None]) -> None:
    line = judge.score(run, draw(), step_done)
    with lock:
        work.append(FINISHED, line)


def _count_step(bar: Progress, lock: threading.Lock, stop: threading.Event) -> None:
    if stop.is_set():
        raise _Stopped
    with lock:
        bar.update(1)


def _place(line: Score) -> tuple[Any, ...]:
    """Sort key of a score; None (all images, no draw) comes last."""
    return tuple((line[field] is None, line[field]) for field in IDENTITY)


def _summary(lines: list[Score]) -> dict[str, float]:
    """Mean test accuracy over generation and student seeds, by `<source>_<student>_ipc<n>`, or `full_<student>`."""
    cells = defaultdict(list)
    for line in lines:
        size = "" if line["images_per_class"] is None else f"_ipc{line['images_per_class']}"
        cells[re.sub(r"[^A-Za-z0-9_-]", "_", f"{line['source']}_{line['student']}{size}")].append(line["accuracy_test"])
    return {name: fmean(values) for name, values in cells.items()}
