"""Recipes of the literature against their published settings, budgets, and what they are for."""

import dataclasses

import pytest

from diffstill.errors import DiffstillError
from diffstill.protocols import NAMED, literature_epochs, protocol

MINIMAX = ("minimax-224", "minimax-256")


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
    ("name", "images", "classes", "steps"),
    [
        ("minimax-224", 10, 10, 3000 * 1),  # one partial batch
        ("minimax-224", 100, 10, 2000 * 2),  # 64 + 36
        ("minimax-256", 640, 10, 1000 * 10),  # 64 per class, ten whole batches
        ("minimax-256", 1281, 10, 1000 * 21),  # a last batch of one
        ("minimax-224", 100, 100, 2000 * 2),
        ("minimax-1k", 10_000, 1000, 2000 * 79),  # batches of 128
        ("condensation-small", 10, 10, 1000),
        ("condensation-small", 500, 10, 1000 * 8),
    ],
)
def test_a_budget_in_epochs_is_epochs_times_batches(name, images, classes, steps):
    assert protocol(name).budget(images, classes) == steps


@pytest.mark.parametrize("steps", [1, 7, 150, 9_999_999])
def test_short_protocols_take_any_number_of_steps_equal_for_every_training_set(steps):
    recipe = protocol(f"short-{steps}")
    assert recipe.name == f"short-{steps}"
    assert {recipe.budget(images, classes) for images, classes in ((10, 10), (1437, 10), (12454, 100))} == {steps}


def test_recipes_are_those_of_the_literature():
    """Gu et al. 2024 and Kim et al. 2022, their code: SGD, x0.2 at 2/3 and 5/6, CutMix always or in half of the batches."""
    usual = {"learning_rate": 0.01, "weight_decay": 5e-4, "batch_size": 64, "cutmix_share": 1.0, "augmentation": "crop"}
    differing = {
        **dict.fromkeys((*MINIMAX, "short-150"), usual),
        "minimax-1k": {**usual, "learning_rate": 0.1, "weight_decay": 1e-4, "batch_size": 128},
        "condensation-small": {**usual, "cutmix_share": 0.5, "augmentation": "siamese"},
    }
    assert set(differing) == {*NAMED, "short-150"}
    for name, settings in differing.items():
        recipe = dataclasses.asdict(protocol(name))
        assert {knob: recipe[knob] for knob in settings} == settings
        assert (recipe["momentum"], recipe["decay"], recipe["cutmix_beta"]) == (0.9, 0.2, 1.0)
        assert recipe["milestones"] == (2 / 3, 5 / 6)


@pytest.mark.parametrize(
    ("name", "side", "classes", "message"),
    [
        ("minimax-224", 256, 10, None),
        ("minimax-224", 224, 100, None),
        ("minimax-224", 128, 10, "'minimax-224' is for 224 to 1024 px, not 128; set `evaluate.protocol` to short-<steps>"),
        ("minimax-256", 224, 10, "'minimax-256' is for 256 to 1024 px, not 224"),
        ("minimax-224", 256, 101, "'minimax-224' is for 2 to 100 classes, not 101"),
        ("minimax-1k", 256, 1000, None),
        ("minimax-1k", 256, 100, "'minimax-1k' is for 101 to 1000000 classes, not 100"),
        ("condensation-small", 28, 10, None),
        ("condensation-small", 33, 10, "'condensation-small' is for 8 to 32 px, not 33"),
        ("short-5", 8, 2, None),
        ("short-5", 1024, 1000, None),
    ],
)
def test_a_protocol_is_refused_for_data_that_it_is_not_for(name, side, classes, message):
    found = protocol(name).misfit(side, classes)
    assert (found is None) if message is None else (message in found)


@pytest.mark.parametrize("name", ["short-0", "short--1", "short-07", "short-1e3", "short-10000000", "literature", ""])
def test_an_unknown_protocol_is_refused_with_the_known_ones(name):
    with pytest.raises(DiffstillError, match=r"is not known; use minimax-224, minimax-256, minimax-1k, condensation-small, or short-<steps>"):
        protocol(name)
