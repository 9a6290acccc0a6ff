import dataclasses

import pytest

from diffstill.errors import DiffstillError
from diffstill.protocols import PROTOCOLS, literature_epochs, protocol


@pytest.mark.parametrize(
    ("images_per_class", "epochs"),
    [(1, 3000), (2, 2000), (10, 2000), (11, 1500), (50, 1500), (51, 1000), (200, 1000), (201, 500), (500, 500), (501, 300), (1300, 300)],
)
def test_literature_epochs_by_images_per_class(images_per_class, epochs):
    assert literature_epochs(images_per_class, 10) == epochs


@pytest.mark.parametrize(("images_per_class", "epochs"), [(1, 2000), (10, 1300), (50, 1000), (100, 600), (300, 300), (1300, 200)])
def test_a_hundred_classes_get_two_thirds_rounded_down_to_a_hundred(images_per_class, epochs):
    assert literature_epochs(images_per_class, 100) == epochs


@pytest.mark.parametrize(
    ("images", "classes", "steps"),
    [
        (10, 10, 3000 * 1),  # one partial batch
        (100, 10, 2000 * 2),  # 64 + 36
        (640, 10, 1000 * 10),  # 64 per class, ten whole batches
        (1281, 10, 1000 * 21),  # a last batch of one
        (100, 100, 2000 * 2),
    ],
)
def test_literature_budget_is_epochs_times_batches(images, classes, steps):
    assert protocol("literature").budget(images, classes) == steps


def test_short_budgets_are_equal_for_every_training_set():
    for name, recipe in PROTOCOLS.items():
        if name != "literature":
            assert {recipe.budget(images, classes) for images, classes in ((10, 10), (1437, 10), (12454, 100))} == {int(name.removeprefix("short-"))}


def test_protocols_differ_in_their_budget_alone():
    recipes = {tuple(value for name, value in dataclasses.asdict(recipe).items() if name not in ("name", "steps")) for recipe in PROTOCOLS.values()}
    assert recipes == {(0.01, 0.9, 5e-4, 64, (2 / 3, 5 / 6), 0.2, 1.0)}


def test_every_protocol_is_found_by_its_name():
    assert all(protocol(name).name == name for name in PROTOCOLS)


def test_an_unknown_protocol_is_refused_with_the_known_ones():
    with pytest.raises(DiffstillError, match=r"'short-7' is not known.*literature, short-20"):
        protocol("short-7")
