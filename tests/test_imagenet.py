"""ImageNet's classes and subsets, against what is known of them from elsewhere."""

import csv
from importlib.resources import files

import pytest

from diffstill.imagenet import SUBSETS, index_of, title_of, titled

WOOF = ("n02096294", "n02093754", "n02111889", "n02088364", "n02086240", "n02089973", "n02087394", "n02115641", "n02099601", "n02105641")


def test_all_classes_stand_in_the_order_of_their_index():
    wnids = SUBSETS["imagenet1k"]
    assert [index_of(wnid) for wnid in wnids] == list(range(1000))
    assert list(wnids) == sorted(set(wnids))  # ImageNet counts its classes in the order of their wnids


@pytest.mark.parametrize(
    ("wnid", "index", "title"),
    [("n01440764", 0, "tench"), ("n02086240", 155, "Shih-Tzu"), ("n15075141", 999, "toilet tissue"), ("n02099601", 207, "golden retriever")],
)
def test_known_classes(wnid, index, title):
    assert (index_of(wnid), title_of(wnid)) == (index, title)


@pytest.mark.parametrize("name", ["", "n00000000", "cat", "155"])
def test_what_is_no_class_has_neither_index_nor_title(name):
    assert (index_of(name), title_of(name)) == (None, None)


def test_subsets_keep_the_order_of_the_literature():
    assert {name: len(wnids) for name, wnids in SUBSETS.items()} == {
        "imagewoof": 10,
        "imagenette": 10,
        "imageidc": 10,
        "imagenet100": 100,
        "imagenet1k": 1000,
    }
    with files("diffstill").joinpath("imagenet_classes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("imagewoof", "imagenette", "imageidc", "imagenet100"):
        positions = {row["wnid"]: int(row[name]) for row in rows if row[name]}
        assert [positions[wnid] for wnid in SUBSETS[name]] == list(range(len(positions)))
    assert SUBSETS["imagenette"][:2] == ("n01440764", "n02102040")


def test_the_dogs_of_imagewoof():
    assert sorted(SUBSETS["imagewoof"]) == sorted(WOOF)


def test_every_class_has_a_title():
    assert all(title_of(wnid) for wnid in SUBSETS["imagenet1k"])


def test_a_class_is_shown_by_its_name_in_words():
    assert titled("n02086240") == "Shih-Tzu (n02086240)"
    assert titled("my-cat") == "my-cat"
