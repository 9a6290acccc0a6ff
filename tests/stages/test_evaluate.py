import json
import re
import shutil
from contextlib import contextmanager
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from chains import contents
from diffstill.artifacts import load_split, new_artifact, open_artifact, write_shards
from diffstill.config import EvaluateConfig, PrepareConfig, SampleConfig
from diffstill.errors import DiffstillError
from diffstill.protocols import protocol
from diffstill.stages.evaluate import _first, _picture, _random, evaluate
from diffstill.students import accuracy, build_student, pixel_statistics, train_student

CLASSES = ("zero", "one", "two")
TINY = {
    "students": ("convnet-1",),
    "images_per_class": (1, 2),
    "student_seeds": (0, 1),
    "random_seeds": (0, 1),
    "protocol": "short-20",
    "evaluations": 2,
}


@pytest.fixture(autouse=True)
def work_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSTILL_WORK", str(tmp_path / "work"))


@pytest.fixture
def images(tmp_path):
    """Three digits: 40 training images of each class, 10 for val, 30 for test."""
    data = load_digits()
    pixels = np.rint(data.images * 255 / 16).astype(np.uint8)[:, None]
    folder = tmp_path / "images"
    with new_artifact(folder, "images", PrepareConfig(), {}) as draft:
        for split, span in (("train", slice(0, 40)), ("val", slice(40, 50)), ("test", slice(50, 80))):
            chosen = np.concatenate([np.flatnonzero(data.target == label)[span] for label in range(3)])
            write_shards(draft.folder, split, {"pixels": pixels[chosen], "labels": data.target[chosen].astype(np.int64)}, 50)
        draft.facts.update(classes=list(CLASSES), flip=False, counts={"train": dict.fromkeys(CLASSES, 40)}, side=8, channels=1)
    return folder


def make_distilled(folder, images, *, count=3, seeds=(0, 1), mode="L", size=8, **facts):
    """A distilled set whose image k of class c and seed s shows real image 10 s + k of that class."""
    artifact = open_artifact(images, "images")
    pixels, labels = load_split(artifact, "train")
    with new_artifact(folder, "distilled", SampleConfig(), {"images": artifact}) as draft:
        for seed in seeds:
            for label, name in enumerate(CLASSES):
                (draft.folder / f"seed-{seed}" / name).mkdir(parents=True)
                for k in range(count):
                    picture = Image.fromarray(pixels[labels == label][10 * seed + k, 0]).convert(mode).resize((size, size))
                    picture.save(draft.folder / f"seed-{seed}" / name / f"{k:05d}.png")
            rows = [f"{name}/{k:05d}.png,{name},{seed}\n" for name in CLASSES for k in range(count)]
            (draft.folder / f"seed-{seed}" / "metadata.csv").write_text("file_name,label,seed\n" + "".join(rows))
        own = {"source": "distilled", "seeds": list(seeds), "images_per_class": count, "classes": list(CLASSES), "images_digest": artifact.digest}
        draft.facts |= own | facts
    return folder


@pytest.fixture
def distilled(tmp_path, images):
    return make_distilled(tmp_path / "distilled", images)


def read(scores):
    return [json.loads(line) for line in (scores / "scores.jsonl").read_text().splitlines()]


def config(**changes):
    return EvaluateConfig(**(TINY | changes))


class Counting:
    """A record that counts steps, and stops the command after some."""

    def __init__(self, stop_after=None):
        self.total = self.done = self.steps = 0
        self.stop_after = stop_after

    @contextmanager
    def progress(self, _description, total, _unit, done=0):
        self.total, self.done = total, done
        yield self

    def file(self, path):
        assert path.is_file()

    def update(self, n=1):
        self.steps += n
        if self.stop_after is not None and self.steps >= self.stop_after:  # all threads stop here, however late they hear of it
            raise KeyboardInterrupt


# What is judged


def test_baselines_give_one_line_per_student_run(images, tmp_path):
    metrics = evaluate(config(), images=images, scores=tmp_path / "scores")
    lines = read(tmp_path / "scores")
    keys = [(line["source"], line["student"], line["images_per_class"], line["generation_seed"], line["student_seed"]) for line in lines]
    assert keys == [("full", "convnet-1", None, None, seed) for seed in (0, 1)] + [
        ("random", "convnet-1", size, draw, seed) for size in (1, 2) for draw in (0, 1) for seed in (0, 1)
    ]
    assert [line["train_images"] for line in lines] == [120] * 2 + [3] * 4 + [6] * 4
    assert {(line["protocol"], line["steps"], line["labels"]) for line in lines} == {("short-20", 20, "hard")}
    assert metrics.keys() == {"full_convnet-1", "random_convnet-1_ipc1", "random_convnet-1_ipc2"}
    assert metrics["random_convnet-1_ipc2"] == fmean(line["accuracy_test"] for line in lines if line["images_per_class"] == 2)


def test_the_manifest_says_what_was_judged(images, distilled, tmp_path):
    evaluate(config(), images=images, scores=tmp_path / "scores", distilled=distilled)
    artifact, real = open_artifact(tmp_path / "scores", "scores"), open_artifact(images, "images")
    assert artifact.facts == {"sources": ["distilled"], "students": ["convnet-1"], "protocol": "short-20", "images_digest": real.digest}
    assert artifact.manifest.inputs == {"images": real.digest, "distilled": open_artifact(distilled, "distilled").digest}
    assert {line["images_digest"] for line in read(tmp_path / "scores")} == {real.digest}


def test_a_distilled_set_is_judged_seed_by_seed_and_size_by_size(images, distilled, tmp_path):
    metrics = evaluate(config(images_per_class=(1, 3)), images=images, scores=tmp_path / "scores", distilled=distilled)
    lines = read(tmp_path / "scores")
    assert [(line["images_per_class"], line["generation_seed"], line["student_seed"]) for line in lines] == [
        (size, draw, seed) for size in (1, 3) for draw in (0, 1) for seed in (0, 1)
    ]
    assert metrics.keys() == {"distilled_convnet-1_ipc1", "distilled_convnet-1_ipc3"}


def test_a_line_against_a_student_trained_by_hand(images, distilled, tmp_path):
    evaluate(config(images_per_class=(2,)), images=images, scores=tmp_path / "scores", distilled=distilled)
    (line,) = (line for line in read(tmp_path / "scores") if (line["generation_seed"], line["student_seed"]) == (1, 1))
    real = open_artifact(images, "images")
    (train, labels), val, test = (load_split(real, split) for split in ("train", "val", "test"))
    statistics = pixel_statistics([train])
    shown = np.concatenate([train[labels == label][10:12] for label in range(3)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    student = build_student("convnet-1", classes=3, channels=1, side=8, seed=1)
    history = train_student(
        student,
        shown,
        np.repeat(np.arange(3), 2),
        protocol=protocol("short-20"),
        classes=3,
        statistics=statistics,
        flip=False,
        seed=1,
        evaluations=2,
        evaluate=lambda one: {"test": accuracy(one, *test, statistics)},
    )
    assert line["accuracy_test"] == history[-1].metrics["test"]
    assert line["accuracy_val"] == accuracy(student, *val, statistics)
    assert line["best_test"] == max(look.metrics["test"] for look in history)
    assert line["best_step"] in (10, 20)
    torch.set_num_threads(threads)


def test_an_untuned_set_keeps_its_name(images, tmp_path):
    untuned = make_distilled(tmp_path / "untuned", images, source="untuned")
    metrics = evaluate(config(images_per_class=(1,)), images=images, scores=tmp_path / "scores", distilled=untuned)
    assert metrics.keys() == {"untuned_convnet-1_ipc1"}


def test_the_order_of_the_classes_in_a_distilled_set_does_not_matter(images, distilled, tmp_path):
    reordered = make_distilled(tmp_path / "reordered", images, classes=["two", "zero", "one"])
    for name, folder in (("scores", distilled), ("others", reordered)):
        evaluate(config(images_per_class=(1,)), images=images, scores=tmp_path / name, distilled=folder)
    assert read(tmp_path / "scores") == read(tmp_path / "others")


def test_colour_pictures_are_read_channels_first(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(_picture(tmp_path / "a.png", (8, 8), "RGB"), pixels.transpose(2, 0, 1))


def test_small_distilled_sets_are_the_first_images_of_every_class():
    pictures = {5: np.arange(12, dtype=np.uint8).reshape(3, 4, 1, 1, 1)}
    pixels, labels = _first(pictures, 2, 5)
    assert pixels.flatten().tolist() == [0, 1, 4, 5, 8, 9]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_random_sets_are_balanced_nested_and_drawn_by_seed():
    labels = np.random.default_rng(0).integers(0, 4, 200)
    train = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1), labels
    sets = {(size, seed): _random(train, 4, size, seed) for size in (1, 5, 20) for seed in (0, 1)}
    for (size, _), (pixels, own) in sets.items():
        assert np.bincount(own).tolist() == [size] * 4
        assert (labels[pixels.flatten()] == own).all()
        assert len(set(pixels.flatten().tolist())) == 4 * size
    for seed in (0, 1):
        chosen = [set(sets[size, seed][0].flatten().tolist()) for size in (1, 5, 20)]
        assert chosen[0] < chosen[1] < chosen[2]
    assert set(sets[5, 0][0].flatten().tolist()) != set(sets[5, 1][0].flatten().tolist())


def test_by_default_random_real_is_drawn_ten_times(images, tmp_path):
    ten = EvaluateConfig(students=("convnet-1",), images_per_class=(1,), student_seeds=(0,), baselines=("random",), protocol="short-20")
    evaluate(ten, images=images, scores=tmp_path / "scores")
    assert [line["generation_seed"] for line in read(tmp_path / "scores")] == list(range(10))


def test_random_images_of_one_class_say_nothing_of_those_of_another():
    """Whatever the seed: a permutation for each class, though all classes are alike."""
    train = np.arange(120, dtype=np.uint8).reshape(120, 1, 1, 1), np.arange(120) % 4
    for seed in range(3):
        pixels, own = _random(train, 4, 30, seed)
        orders = {tuple(pixels[own == label].flatten() // 4) for label in range(4)}
        assert len(orders) == 4


def test_one_student_of_several(images, tmp_path):
    both = config(students=("convnet-1", "convnet-2"), baselines=("full",), student_seeds=(0,))
    evaluate(both, images=images, scores=tmp_path / "both")
    evaluate(both, images=images, scores=tmp_path / "one", student="convnet-2")
    assert read(tmp_path / "one") == [line for line in read(tmp_path / "both") if line["student"] == "convnet-2"]
    assert open_artifact(tmp_path / "one", "scores").facts["students"] == ["convnet-2"]


def test_the_full_split_teaches_more_than_chance(images, tmp_path):
    longer = config(baselines=("full",), protocol="short-200", student_seeds=(0,))
    assert evaluate(longer, images=images, scores=tmp_path / "scores")["full_convnet-1"] > 0.8


def test_metric_names_hold_no_dots(images, tmp_path):
    metrics = evaluate(config(baselines=("full",), student_seeds=(0,)), images=images, scores=tmp_path / "scores")
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in metrics)


# Equal bytes, going on


def test_workers_and_repetition_change_no_byte(images, tmp_path):
    for name, workers in (("one", 1), ("two", 2), ("again", 2)):
        evaluate(config(workers=workers, student_seeds=(0,)), images=images, scores=tmp_path / name)
    assert (tmp_path / "one" / "scores.jsonl").read_bytes() == (tmp_path / "two" / "scores.jsonl").read_bytes()
    assert (tmp_path / "two" / "manifest.json").read_bytes() == (tmp_path / "again" / "manifest.json").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_command_goes_on_where_it_was(images, tmp_path, workers):
    whole = Counting()
    evaluate(config(workers=workers, baselines=("random",)), images=images, scores=tmp_path / "whole", record=whole)
    assert (whole.total, whole.done, whole.steps) == (160, 0, 160)

    with pytest.raises(KeyboardInterrupt):
        evaluate(config(workers=workers, baselines=("random",)), images=images, scores=tmp_path / "scores", record=Counting(stop_after=90))
    assert not (tmp_path / "scores").exists()
    rest = Counting()
    evaluate(config(workers=workers, baselines=("random",)), images=images, scores=tmp_path / "scores", record=rest)
    assert 60 <= rest.done < 90
    assert (rest.total, rest.steps) == (160, 160 - rest.done)
    assert (tmp_path / "scores" / "scores.jsonl").read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()
    assert (tmp_path / "scores" / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    assert [path.suffix for path in (tmp_path / "work").iterdir()] == [".lock"]


def test_an_edited_score_is_made_again(images, tmp_path, caplog):
    evaluate(config(baselines=("random",)), images=images, scores=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(baselines=("random",)), images=images, scores=tmp_path / "scores", record=Counting(stop_after=90))
    (finished,) = (tmp_path / "work").rglob("finished.jsonl")
    count = len(finished.read_text().splitlines())  # two work side by side: it depends on who was how far
    assert count in (3, 4)
    finished.write_text(re.sub(r'("accuracy_test": 0\.)\d', r"\g<1>9", finished.read_text(), count=1))
    rest = Counting()
    evaluate(config(baselines=("random",)), images=images, scores=tmp_path / "scores", record=rest)
    assert rest.done == 20 * (count - 1)
    assert contents(tmp_path / "scores") == contents(tmp_path / "whole")
    assert "a line is damaged" in caplog.text


def test_another_number_of_workers_goes_on_too(images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(workers=1, baselines=("random",)), images=images, scores=tmp_path / "scores", record=Counting(stop_after=50))
    rest = Counting()
    evaluate(config(workers=2, baselines=("random",)), images=images, scores=tmp_path / "scores", record=rest)
    assert rest.done == 40


def test_a_student_that_diverged_has_no_score(images, tmp_path, monkeypatch):
    """Of NaN the first class is the greatest, so it would be one at chance level."""

    def diverged(student, *given, **named):
        history = train_student(student, *given, **named)
        next(student.parameters()).data[0] = torch.nan
        return history

    monkeypatch.setattr("diffstill.stages.evaluate.train_student", diverged)
    with pytest.raises(DiffstillError, match=r"convnet-1 on full, student seed 0: weight `\S+` is no finite number after 20 steps"):
        evaluate(config(baselines=("full",), student_seeds=(0,)), images=images, scores=tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_class": (1, 41)}, r"class 'zero' has 40 training images, `evaluate.images_per_class` asks for 41"),
        ({"students": ("convnet-4",)}, r"'convnet-4' needs images of at least 16 px"),
        ({"students": ("convnet-1", "resnet18s")}, r"'resnet18s' is not known; did you mean"),
    ],
)
def test_refused_configurations(images, tmp_path, changes, message):
    with pytest.raises(DiffstillError, match=message):
        evaluate(config(**changes), images=images, scores=tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_a_student_outside_the_configuration_is_refused(images, tmp_path):
    with pytest.raises(DiffstillError, match=r"'resnet-18' is not among `evaluate.students`; use one of convnet-1"):
        evaluate(config(), images=images, scores=tmp_path / "scores", student="resnet-18")


def test_full_alone_needs_no_size_to_fit(images, tmp_path):
    huge = config(images_per_class=(41,), baselines=("full",), student_seeds=(0,))
    assert evaluate(huge, images=images, scores=tmp_path / "scores").keys() == {"full_convnet-1"}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"classes": ["zero", "one", "three"]}, r"not made for the classes of the images, 'three' is in only one of them"),
        ({"classes": ["zero", "one"]}, r"not made for the classes of the images, 'two' is in only one of them"),
        ({"images_digest": "0" * 64}, r"made from images 000000000000, but is to be judged on images .*sample it anew"),
        ({"count": 1}, r"holds 1 images per class, `evaluate.images_per_class` asks for 2"),
        ({"mode": "RGB"}, r"00000.png: is 8x8 RGB, expected 8x8 L"),
        ({"size": 9}, r"00000.png: is 9x9 L, expected 8x8 L"),
        ({"images_per_class": 9, "count": 1}, r"00001.png: missing or no image"),
    ],
)
def test_refused_distilled_sets(images, tmp_path, facts, message):
    wrong = make_distilled(tmp_path / "wrong", images, **facts)
    with pytest.raises(DiffstillError, match=message):
        evaluate(config(), images=images, scores=tmp_path / "scores", distilled=wrong)


def test_swapped_folders_are_refused(images, distilled, tmp_path):
    with pytest.raises(DiffstillError, match="holds a `distilled` artifact where `images` is expected"):
        evaluate(config(), images=distilled, scores=tmp_path / "scores", distilled=images)


def test_a_foreign_output_folder_is_refused_before_any_training(images, tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "thesis.tex").write_text("dear")
    watching = Counting()
    with pytest.raises(DiffstillError, match="is not an artifact; refusing to replace it"):
        evaluate(config(), images=images, scores=tmp_path / "scores", record=watching)
    assert watching.steps == 0


def test_images_without_val_are_refused(images, tmp_path):
    bare = tmp_path / "bare"
    with new_artifact(bare, "images", PrepareConfig(), {}) as draft:
        for shard in [*images.glob("train-*"), *images.glob("test-*")]:
            shutil.copy(shard, draft.folder)
        draft.facts |= open_artifact(images, "images").facts
    with pytest.raises(DiffstillError, match="has no shard val-"):
        evaluate(config(), images=bare, scores=tmp_path / "scores")
