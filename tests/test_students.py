import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis
from sklearn.datasets import load_digits
from torch import nn

from diffstill import students
from diffstill.draws import Purpose, seeded
from diffstill.errors import DiffstillError
from diffstill.protocols import Protocol, protocol
from diffstill.students import (
    Mixed,
    PixelStatistics,
    accuracy,
    augment,
    batches,
    build_student,
    colour_jitter,
    cutmix,
    cutmix_loss,
    draw_beta,
    draw_boxes,
    evaluation_steps,
    lighting,
    mirror,
    padded_crop,
    pixel_statistics,
    resized_crop,
    siamese,
    standardise,
    train_student,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def parameters(student):
    return sum(weights.numel() for weights in student.parameters())


# Networks

CONVNET_BLOCK = 128 * 128 * 9 + 128 + 2 * 128  # weights, biases, norm
STAGE_64 = 2 * (64 * 64 * 9 + 2 * 64)  # two convolutions with their norms


def widening_block(width_in, width):
    """Two 3x3 convolutions and a 1x1 shortcut, without biases, each with a norm."""
    return 9 * width_in * width + 9 * width * width + width_in * width + 3 * 2 * width


def plain_block(width):
    return 2 * (9 * width * width + 2 * width)


@pytest.mark.parametrize(
    ("name", "classes", "channels", "side", "expected"),
    [
        # the first block sees `channels`; the linear layer sees 128 channels on what `depth` halvings leave of the side
        ("convnet-2", 10, 1, 8, (1 * 128 * 9 + 128 + 256) + CONVNET_BLOCK + (128 * 2 * 2 * 10 + 10)),
        ("convnet-3", 10, 1, 28, 317_706),  # as published for Fashion-MNIST: the first layer pads 28 px to 32
        ("convnet-3", 10, 3, 32, 320_010),  # as published for CIFAR-10
        ("convnet-6", 10, 3, 256, (3 * 128 * 9 + 128 + 256) + 5 * CONVNET_BLOCK + (128 * 4 * 4 * 10 + 10)),
        ("resnetap-10", 10, 3, 224, (3 * 64 * 49 + 128) + STAGE_64 + sum(widening_block(w, 2 * w) for w in (64, 128, 256)) + 5130),
        ("resnetap-10", 10, 1, 16, (1 * 64 * 9 + 128) + STAGE_64 + sum(widening_block(w, 2 * w) for w in (64, 128, 256)) + 5130),
        ("resnet-18", 1000, 3, 224, 11_689_512),  # as published for ImageNet, with batch norm
        ("resnet-18", 10, 3, 128, 11_173_962),  # as in Minimax's code: a 3x3 stem up to 128 px
        ("resnet-18", 10, 3, 32, 11_173_962),
        ("resnet-18", 10, 1, 28, 11_172_810),
        (
            "resnet-18",
            10,
            3,
            64,
            (3 * 64 * 9 + 128) + 2 * STAGE_64 + sum(widening_block(w, 2 * w) + plain_block(2 * w) for w in (64, 128, 256)) + 5130,
        ),
    ],
)
def test_parameter_counts_by_hand(name, classes, channels, side, expected):
    assert parameters(build_student(name, classes=classes, channels=channels, side=side, seed=0)) == expected


@pytest.mark.parametrize(
    ("name", "side", "sides"),
    [
        ("convnet-3", 8, [8, 4, 2]),
        ("convnet-3", 28, [32, 16, 8]),
        ("convnet-3", 30, [30, 15, 7]),
        ("resnetap-10", 16, [16, 16, 16, 16, 8, 8, 4, 4, 2]),
        ("resnetap-10", 96, [96, 48, 48, 48, 24, 24, 12, 12, 6]),
        ("resnetap-10", 160, [160, 40, 40, 40, 20, 20, 10, 10, 5]),
        ("resnet-18", 16, [16, 16, 16, 16, 16, 8, 8, 8, 8, 4, 4, 4, 4, 2, 2, 2, 2]),
        ("resnet-18", 96, [96, 48, 48, 48, 48, 24, 24, 24, 24, 12, 12, 12, 12, 6, 6, 6, 6]),
        ("resnet-18", 160, [80, 40, 40, 40, 40, 20, 20, 20, 20, 10, 10, 10, 10, 5, 5, 5, 5]),
    ],
)
def test_every_norm_sees_the_side_it_should(name, side, sides):
    student, seen = build_student(name, classes=7, channels=1, side=side, seed=0), []
    for own_name, module in student.named_modules():
        if isinstance(module, nn.GroupNorm) and "shortcut" not in own_name:
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1]))
    with torch.inference_mode():
        assert student(torch.zeros(2, 1, side, side)).shape == (2, 7)
    # a pooled block's first norm stands before its pool
    assert seen == sides


def test_convnet_against_its_formula():
    student = build_student("convnet-2", classes=3, channels=2, side=9, seed=4)
    images = torch.randn(5, 2, 9, 9, generator=generator())
    x = images.double()
    for convolution in [module.double() for module in student if isinstance(module, nn.Conv2d)]:
        x = nn.functional.conv2d(x, convolution.weight, convolution.bias, padding=1)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = nn.functional.avg_pool2d(x.clamp(min=0), 2)
    expected = x.flatten(1) @ student[-1].weight.double().T + student[-1].bias.double()
    torch.testing.assert_close(student.double()(images.double()), expected)


def test_instance_norm_removes_the_scale_and_mean_of_each_image():
    student = build_student("resnetap-10", classes=3, channels=1, side=16, seed=0).double()
    images = torch.randn(4, 1, 16, 16, generator=generator(), dtype=torch.float64)
    inside = student[:2](images)[:, :, 3:-3, 3:-3]
    torch.testing.assert_close(student[:2](images * 7)[:, :, 3:-3, 3:-3], inside, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "channels", "side", "classifier"),
    [("convnet-6", 3, 256, 0.0128), ("convnet-3", 1, 28, 0.0128), ("resnetap-10", 3, 224, 0.0255), ("resnet-18", 3, 32, 0.0255)],
)
def test_first_weights_are_those_of_the_published_students(name, channels, side, classifier):
    """Convolutions of ResNets N(0, sqrt(2 / fan_out)); all else torch's default, U(-b, b) with b = 1 / sqrt(fan_in)."""
    student = build_student(name, classes=10, channels=channels, side=side, seed=1)
    for module in student.modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("convnet"):
            deviation = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.06)
            assert kurtosis(module.weight.detach().flatten()) == pytest.approx(0, abs=0.25)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.99 * bound < module.weight.abs().max().item() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
            assert 0 < module.bias.abs().max().item() <= bound
        elif isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert student[-1].weight.std().item() == pytest.approx(classifier, rel=0.02)


@pytest.mark.parametrize(("name", "channels", "side"), [("convnet-3", 1, 28), ("resnetap-10", 3, 32), ("resnet-18", 3, 32)])
def test_a_fresh_student_knows_nothing(name, channels, side):
    """Its first loss is the logarithm of the number of classes, not several times as much."""
    student = build_student(name, classes=10, channels=channels, side=side, seed=0)
    images = torch.randn(64, channels, side, side, generator=generator())
    with torch.inference_mode():
        loss = nn.functional.cross_entropy(student(images), torch.arange(64) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.2)


@pytest.mark.parametrize("name", ["convnet-3", "resnetap-10", "test_resnet", "test_vit"])
def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone(name):
    def weights(seed):
        return torch.cat([value.flatten() for value in build_student(name, classes=5, channels=3, side=32, seed=seed).parameters()])

    state = torch.random.get_rng_state()
    first = weights(3)
    torch.rand(5)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))
    torch.random.set_rng_state(state)
    weights(3)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("name", "channels", "side"), [("test_vit", 1, 32), ("test_resnet", 3, 20), ("test_vit", 3, 48)])
def test_timm_students_take_any_channels_and_side(name, channels, side):
    student = build_student(name, classes=4, channels=channels, side=side, seed=0)
    assert student.training
    assert student(torch.zeros(2, channels, side, side)).shape == (2, 4)


def test_timm_students_train_without_the_dropout_that_would_use_the_global_generator():
    student = build_student("swin_tiny_patch4_window7_224", classes=4, channels=3, side=32, seed=0)  # drops paths by default
    images = torch.randn(2, 3, 32, 32, generator=generator())
    assert torch.equal(student(images), student(images))


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("convnet-4", 8, r"'convnet-4' needs images of at least 16 px, these have 8 px.*use convnet-3 or fewer"),
        ("convnet-5", 31, r"at least 32 px, these have 31 px.*use convnet-4"),
        ("resnet-18", 15, r"'resnet-18' needs images of at least 16 px, these have 15 px"),
        ("resnetap-10", 8, r"'resnetap-10' needs images of at least 16 px"),
        ("resnetap10", 32, r"'resnetap10' is not known; did you mean resnetap-10"),
        ("convnet-0", 32, r"'convnet-0' is not known; did you mean convnet-"),
        ("efficientnet_b00", 32, r"did you mean .*efficientnet_b0"),
        ("a network", 32, r"'a network' is not known; use convnet-<depth>"),
        ("hf-hub:somebody/model", 32, r"is not known"),
        ("test_vit", 8, r"'test_vit' \(timm\) does not take 3x8x8 images \(.*\); use another student or a larger side"),
    ],
)
def test_refused_students(name, side, message):
    with pytest.raises(DiffstillError, match=message):
        build_student(name, classes=10, channels=3, side=side, seed=0)


# Pixels


def test_pixel_statistics_against_numpy():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3, 5, 5), dtype=np.uint8)
    statistics = pixel_statistics([pixels])
    assert pixel_statistics(part for part in (pixels[:7], pixels[7:30], pixels[30:])) == statistics
    np.testing.assert_allclose(statistics.mean, (pixels / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, (pixels / 255).std((0, 2, 3)), rtol=1e-12)
    images = standardise(torch.from_numpy(pixels).double() / 255, statistics)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), unbiased=False), torch.ones(3, dtype=torch.float64))


def test_a_constant_channel_is_refused():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    pixels[:, 1] = 7
    with pytest.raises(DiffstillError, match="channel 1 of the training images has the value 7 everywhere"):
        pixel_statistics([pixels])


# Augmentation


def test_padded_crop_against_a_loop():
    images = torch.rand(6, 2, 5, 5, generator=generator())
    offsets = torch.randint(5, (6, 2), generator=generator(1))
    expected = torch.zeros_like(images)
    for image in range(6):
        for row in range(5):
            for column in range(5):
                source_row, source_column = row + int(offsets[image, 0]) - 2, column + int(offsets[image, 1]) - 2
                if 0 <= source_row < 5 and 0 <= source_column < 5:
                    expected[image, :, row, column] = images[image, :, source_row, source_column]
    assert torch.equal(padded_crop(images, offsets, 2), expected)


def test_padded_crop_in_the_middle_changes_nothing():
    images = torch.rand(3, 1, 8, 8, generator=generator())
    assert torch.equal(padded_crop(images, torch.full((3, 2), 4), 4), images)


def bilinear(image, row, column):
    """The value of one channel (S, S) at a point, the border being repeated."""
    side = image.shape[-1]
    top, left = math.floor(row), math.floor(column)
    value = 0.0
    for r, weight_r in ((top, 1 - (row - top)), (top + 1, row - top)):
        for c, weight_c in ((left, 1 - (column - left)), (left + 1, column - left)):
            value += weight_r * weight_c * float(image[min(max(r, 0), side - 1), min(max(c, 0), side - 1)])
    return value


def test_resized_crop_against_a_loop():
    images = torch.rand(4, 3, 6, 6, generator=generator())
    boxes = draw_boxes(4, generator(1))
    cropped = resized_crop(images, boxes)
    for image, (top, left, height, width) in enumerate(boxes.tolist()):
        for row in range(6):
            for column in range(6):
                at_row, at_column = 6 * (top + height * (row + 0.5) / 6) - 0.5, 6 * (left + width * (column + 0.5) / 6) - 0.5
                for channel in range(3):
                    assert cropped[image, channel, row, column].item() == pytest.approx(bilinear(images[image, channel], at_row, at_column), abs=1e-5)


def test_resized_crop_of_the_whole_changes_nothing():
    images = torch.rand(3, 3, 70, 70, generator=generator())
    torch.testing.assert_close(resized_crop(images, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4)), images, atol=1e-5, rtol=0)


def test_boxes_lie_inside_with_the_area_and_ratio_they_should_have():
    top, left, height, width = draw_boxes(5000, generator()).unbind(1)
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    area, ratio = height * width, width / height
    assert 0.5 - 1e-5 <= area.min() < 0.52
    assert 0.95 < area.max() <= 1
    assert 3 / 4 - 1e-5 <= ratio.min() < 0.76
    assert 1.31 < ratio.max() <= 4 / 3 + 1e-5
    assert ratio.log().mean().abs() < 0.02


def test_mirror_mirrors_the_chosen_only():
    images = torch.rand(4, 2, 3, 3, generator=generator())
    mirrored = mirror(images, torch.tensor([True, False, True, False]))
    for image in range(4):
        for column in range(3):
            assert torch.equal(mirrored[image, :, :, column], images[image, :, :, 2 - column if image % 2 == 0 else column])


def test_colour_jitter_against_torchvision_image_by_image():
    from torchvision.transforms.v2 import functional

    adjust = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    images = torch.rand(4, 3, 6, 6, generator=generator())
    factors = 0.6 + 0.8 * torch.rand(3, 4, generator=generator(1))
    images = 0.4 + 0.2 * images  # torchvision's functions clip, which the field's recipe does not
    orders = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1]])
    jittered = colour_jitter(images, orders, factors)
    for image, order in enumerate(orders.tolist()):
        expected = images[image]
        for kind in order:
            expected = adjust[kind](expected, factors[kind, image].item())
        torch.testing.assert_close(jittered[image], expected, atol=1e-5, rtol=0)


def test_colour_jitter_does_not_clip():
    images = torch.tensor([0.9, 0.8, 0.7]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    brighter = colour_jitter(images, torch.tensor([[0, 1, 2]]), torch.tensor([[1.4], [1.0], [1.0]]))
    torch.testing.assert_close(brighter, 1.4 * images)


def test_augmentation_changes_colours_in_an_order_of_each_image_its_own():
    """One grey-level image, many copies: brightness and contrast do not commute."""
    images = torch.rand(1, 3, 4, 4, generator=generator()).expand(300, -1, -1, -1)
    orders = []
    real = students.colour_jitter
    students.colour_jitter = lambda batch, order, factors: (orders.append(order), real(batch, order, factors))[1]
    try:
        augment(images, flip=False, generator=generator())
    finally:
        students.colour_jitter = real
    assert len({tuple(order) for order in orders[0].tolist()}) == 6


def test_colour_jitter_by_one_changes_nothing():
    images = torch.rand(4, 3, 6, 6, generator=generator())
    torch.testing.assert_close(colour_jitter(images, torch.tensor([[2, 1, 0]] * 4), torch.ones(3, 4)), images)


def test_lighting_against_a_loop():
    images, amounts = torch.rand(3, 3, 2, 2, generator=generator()), torch.randn(3, 3, generator=generator(1))
    lit = lighting(images, amounts)
    for image in range(3):
        for channel in range(3):
            shift = sum(students.EIGENVECTORS[channel][k] * students.EIGENVALUES[k] * float(amounts[image, k]) for k in range(3))
            torch.testing.assert_close(lit[image, channel], images[image, channel] + shift)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (1, 80), (3, 16)])
def test_images_are_never_mirrored_where_that_is_not_allowed(channels, side):
    bright_left = torch.zeros(400, channels, side, side)
    bright_left[..., : side // 2] = 1

    def share_left(flip):
        images = augment(bright_left, flip=flip, generator=generator())
        return (images[..., : side // 2].sum((1, 2, 3)) > images[..., side // 2 :].sum((1, 2, 3))).float().mean().item()

    assert share_left(False) == 1
    assert 0.4 < share_left(True) < 0.6


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 80), (3, 16)])
def test_augmentation_is_a_function_of_its_generator_and_differs_between_equal_images(channels, side):
    images = torch.rand(1, channels, side, side, generator=generator()).expand(8, -1, -1, -1)
    state = torch.random.get_rng_state()
    augmented = augment(images, flip=True, generator=generator(1))
    assert torch.equal(augmented, augment(images, flip=True, generator=generator(1)))
    assert not torch.equal(augmented, augment(images, flip=True, generator=generator(2)))
    assert len({image.numpy().tobytes() for image in augmented}) > 4
    assert torch.equal(torch.random.get_rng_state(), state)


def test_small_grey_images_are_shifted_by_at_most_an_eighth():
    images = torch.zeros(300, 1, 16, 16)
    images[:, :, 8, 8] = 1
    places = {tuple(place) for place in augment(images, flip=False, generator=generator()).nonzero()[:, 2:].tolist()}
    assert places == {(row, column) for row in range(6, 11) for column in range(6, 11)}


@pytest.mark.parametrize("way", [augment, siamese])
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 16)])
def test_batches_lie_in_the_fast_memory_layout(way, channels, side):
    """Channels-last strides of a one-channel batch are kept by `contiguous` and `clone`, and slow GroupNorm down."""
    images = torch.rand(5, channels, side, side, generator=generator())
    for seed in range(4):
        batch = way(images, flip=True, generator=generator(seed))
        mixed = cutmix(batch, beta=1.0, generator=generator(seed))
        assert batch.stride() == mixed.images.stride() == (channels * side**2, side**2, side, 1)


# Siamese augmentation


def test_siamese_scaling_and_turning_against_a_loop():
    """A point of the result comes from that point scaled, or turned, about the middle."""
    images, draws = torch.rand(3, 1, 7, 7, generator=generator()), torch.rand(3, 2, generator=generator(1))
    for maps in (students._scalings(draws), students._rotations(draws[:, 0])):
        grid = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
        moved = nn.functional.grid_sample(images, grid, align_corners=False)
        for image in range(3):
            scale_x, scale_y = (1 / 1.2 + (1.2 - 1 / 1.2) * draws[image]).tolist()
            angle = math.radians(15) * (2 * draws[image, 0].item() - 1)
            for row in range(2, 5):
                for column in range(2, 5):
                    x, y = (column - 3) / 3.5, (row - 3) / 3.5
                    if maps[image, 0, 1] == 0:
                        at_x, at_y = scale_x * x, scale_y * y
                    else:
                        at_x, at_y = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
                    expected = bilinear(images[image, 0], 3.5 * at_y + 3, 3.5 * at_x + 3)
                    assert moved[image, 0, row, column].item() == pytest.approx(expected, abs=1e-5)


def test_siamese_colours_have_the_published_strengths(monkeypatch):
    """Brightness within half a unit, contrast by 0.5 to 1.5, saturation by 0 to 2; geometry left out."""
    monkeypatch.setattr(students, "padded_crop", lambda images, _offsets, _padding: images)
    monkeypatch.setattr(students.F, "grid_sample", lambda images, _grid, **_: images)
    pattern = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).expand(2000, 1, 2, 2)
    grey = siamese(pattern, flip=False, generator=generator())
    shift, contrast = grey.mean((1, 2, 3)), grey[:, 0, 0, 1] - grey.mean((1, 2, 3))
    assert (-0.5 <= shift.min() < -0.49) and (0.49 < shift.max() <= 0.5)  # noqa: PT018  (a range)
    assert (0.5 <= contrast.min() < 0.51) and (1.49 < contrast.max() <= 1.5)  # noqa: PT018
    colours = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(2000, 3, 2, 2)
    spread = siamese(colours, flip=False, generator=generator())
    spread = (spread[:, 0] - spread[:, 2])[:, 0, 0] / 2
    assert spread.min() < 0.05
    assert 2.4 < spread.max() <= 3.0  # saturation 2 times contrast 1.5


def test_siamese_geometry_is_drawn_once_for_a_batch_and_all_kinds_come_up():
    images = torch.zeros(6, 1, 16, 16)
    images[:, :, 4:12, 4:12] = 1
    kinds = Counter()
    for seed in range(40):
        seen = []
        real = students.padded_crop
        students.padded_crop = lambda *given: (seen.append(given), real(*given))[1]  # noqa: B023
        try:
            siamese(images, flip=False, generator=generator(seed))
        finally:
            students.padded_crop = real
        kinds[bool(seen)] += 1
        assert not seen or seen[0][2] == 2
    assert 5 <= kinds[True] <= 22  # a third


def test_only_the_protocols_share_of_batches_is_mixed():
    images = torch.rand(4, 1, 8, 8, generator=generator())
    stream = generator()
    mixed = [students._perhaps_mixed(images, protocol("condensation-small"), stream) for _ in range(400)]
    assert 160 <= sum(one.share == 1.0 and one.images is images for one in mixed) <= 240
    assert all(students._perhaps_mixed(images, protocol("short-5"), stream).images is not images for _ in range(20))


def test_resized_images_against_pillow():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    smaller = students.resized(pixels, 28)
    assert students.resized(pixels, None) is pixels
    assert students.resized(pixels, 32) is pixels
    for image, small in zip(pixels, smaller, strict=True):
        expected = np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize((28, 28), Image.Resampling.BILINEAR))
        assert np.abs(small.transpose(1, 2, 0).astype(int) - expected).max() <= 1


def test_colours_change_as_much_as_they_should():
    """Images of one colour, which no crop changes: the variances that follow from the strengths, whatever the order of the changes."""
    rows = torch.tensor(((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203)))  # ImageNet's principal components
    lit = rows * torch.tensor((0.2175, 0.0188, 0.0045)) * 0.1

    def changed(*colour):
        images = augment(torch.tensor(colour).view(1, 3, 1, 1).expand(6000, 3, 16, 16), flip=True, generator=generator())
        return images[:, :, 8, 8]

    torch.testing.assert_close(changed(0.0, 0.0, 0.0).T.cov(), lit @ lit.T, rtol=0.07, atol=1e-7)  # black stays black but for the lighting
    grey, spread = changed(0.5, 0.5, 0.5), 0.8**2 / 12  # of a factor drawn from 0.6 to 1.4
    assert grey.mean().item() == pytest.approx(0.5, abs=0.01)
    assert grey[:, 0].var().item() == pytest.approx(0.5**2 * spread + lit[0].square().sum().item(), rel=0.05)  # brightness
    tint = changed(0.5, 0.4, 0.4)
    difference = tint[:, 0] - tint[:, 1]
    assert difference.mean().item() == pytest.approx(0.1, abs=0.002)
    lighting_of_both = (lit[0] - lit[1]).square().sum().item()
    assert difference.var().item() == pytest.approx(0.1**2 * ((1 + spread) ** 3 - 1) + lighting_of_both, rel=0.1)  # all three of them


# CutMix


@pytest.mark.parametrize("side", [5, 8])
def test_cutmix_shares_are_the_areas_pixel_by_pixel(side):
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, side, side)
    shares = set()
    for seed in range(40):
        mixed = cutmix(images, beta=1.0, generator=generator(seed))
        shares.add(mixed.share)
        for image, partner in enumerate(mixed.partner.tolist()):
            if image != partner:
                own = sum(mixed.images[image, 0, row, column].item() == image for row in range(side) for column in range(side))
                other = sum(mixed.images[image, 1, row, column].item() == partner for row in range(side) for column in range(side))
                assert own + other == side * side
                assert mixed.share == pytest.approx(own / side**2)
    assert len(shares) > 5


def test_cutmix_pastes_one_rectangle_of_the_partner():
    images = torch.rand(6, 3, 9, 9, generator=generator())
    mixed = cutmix(images, beta=1.0, generator=generator(5))
    changed = (mixed.images != images).any(1).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    box = (..., slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    assert torch.equal(mixed.images[box], images[mixed.partner][box])
    assert 1 - len(rows) * len(columns) / 81 == pytest.approx(mixed.share)


def test_cutmix_loss_against_a_loop_over_pixels():
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 6, 6)
    mixed = cutmix(images, beta=1.0, generator=generator(3))
    logits = torch.randn(6, 3, generator=generator())
    minus_log = -logits.log_softmax(1)
    total = sum(minus_log[image, labels[int(source)]].item() for image in range(6) for source in mixed.images[image].flatten())
    assert 0 < mixed.share < 1
    assert cutmix_loss(logits, labels, mixed).item() == pytest.approx(total / 6 / 36, rel=1e-5)


def test_an_unmixed_batch_has_the_ordinary_loss():
    logits, labels = torch.randn(4, 3, generator=generator()), torch.tensor([0, 1, 2, 1])
    loss = cutmix_loss(logits, labels, Mixed(torch.empty(0), torch.tensor([3, 2, 1, 0]), 1.0))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_beta_draws_have_the_mean_and_variance_of_the_beta_distribution(beta):
    stream = generator()
    draws = np.array([draw_beta(beta, stream) for _ in range(3000)])
    assert draws.mean() == pytest.approx(0.5, abs=0.02)
    assert draws.var() == pytest.approx(1 / (4 * (2 * beta + 1)), rel=0.08)


# Training


def test_batches_hold_every_image_once_per_epoch_in_a_new_order():
    drawn = list(islice(batches(150, 64, generator()), 6))
    assert [len(batch) for batch in drawn] == [64, 64, 22] * 2
    first, second = torch.cat(drawn[:3]).tolist(), torch.cat(drawn[3:]).tolist()
    assert sorted(first) == sorted(second) == list(range(150))
    assert first != second


def test_a_lone_last_image_gets_company():
    first, last = islice(batches(65, 64, generator()), 2)
    assert len(last) == 2
    assert last[1] == first[0]
    assert Counter(torch.cat([first, last]).tolist()).most_common(1)[0][1] == 2


@pytest.mark.parametrize(("steps", "evaluations", "expected"), [(200, 4, [50, 100, 150, 200]), (10, 3, [3, 6, 10]), (2, 5, [1, 2]), (7, 1, [7])])
def test_evaluations_are_even_and_the_last_is_the_end(steps, evaluations, expected):
    assert evaluation_steps(steps, evaluations) == expected


def test_the_learning_rate_falls_at_two_thirds_and_five_sixths():
    optimiser, schedule = students._optimiser(nn.Linear(1, 1), protocol("short-300"), 300)
    rates = []
    for _ in range(300):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([0.01] * 200 + [0.002] * 50 + [0.0004] * 50)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    pixels = np.rint(data.images * 255 / 16).astype(np.uint8)[:, None]
    return pixels, data.target.astype(np.int64)


def trained(digits, *, seed=0, images=100, recipe=Protocol("tiny", 12), evaluations=3, name="convnet-1"):  # noqa: B008
    pixels, labels = digits
    statistics = pixel_statistics([pixels])
    student = build_student(name, classes=10, channels=1, side=8, seed=seed)
    history = train_student(
        student,
        pixels[:images],
        labels[:images],
        protocol=recipe,
        classes=10,
        statistics=statistics,
        flip=False,
        seed=seed,
        evaluations=evaluations,
        evaluate=lambda one: {"accuracy": accuracy(one, pixels[1400:], labels[1400:], statistics)},
    )
    return history, torch.cat([weights.detach().flatten() for weights in student.parameters()])


def test_training_is_a_function_of_the_seed_also_in_threads_and_leaves_the_global_generator_alone(digits):
    state = torch.random.get_rng_state()
    alone = [trained(digits, seed=seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(lambda seed: trained(digits, seed=seed), (0, 1)))
    for (history, weights), (other_history, other_weights) in zip(alone, together, strict=True):
        assert history == other_history
        assert torch.equal(weights, other_weights)
    assert not torch.equal(alone[0][1], alone[1][1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_looking_at_a_student_does_not_change_its_training(digits):
    often, seldom = trained(digits, evaluations=6), trained(digits, evaluations=1)
    assert torch.equal(often[1], seldom[1])
    assert [look.step for look in often[0]] == [2, 4, 6, 8, 10, 12]
    assert often[0][-1] == seldom[0][-1]


def test_training_steps_against_plain_sgd_written_out(digits):
    pixels, labels = (torch.from_numpy(array[:40]) for array in digits)
    recipe, statistics = Protocol("tiny", 6), PixelStatistics((0.3,), (0.4,))
    student, slow = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_() for _ in range(2))
    for weights in student.parameters():
        nn.init.zeros_(weights)
    slow.load_state_dict(student.state_dict())
    train_student(
        student, pixels, labels, protocol=recipe, classes=10, statistics=statistics, flip=False, seed=9, evaluations=1, evaluate=lambda _student: {}
    )
    stream, velocity = seeded(Purpose.STUDENT_TRAINING, 9), [torch.zeros_like(weights) for weights in slow.parameters()]
    for step in range(6):
        order = torch.randperm(40, generator=stream)
        images = standardise(augment(pixels[order] / 255, flip=False, generator=stream), statistics)
        mixed = cutmix(images, beta=1.0, generator=stream)
        gradients = torch.autograd.grad(cutmix_loss(slow(mixed.images), labels[order], mixed), list(slow.parameters()))
        rate = 0.01 if step < 4 else 0.002 if step < 5 else 0.0004
        with torch.no_grad():
            for weights, gradient, moving in zip(slow.parameters(), gradients, velocity, strict=True):
                moving.mul_(0.9).add_(gradient + 5e-4 * weights)
                weights.sub_(rate * moving)
    for weights, expected in zip(student.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(weights, expected)


def test_what_step_done_raises_ends_the_training(digits):
    pixels, labels = digits
    seen = []

    def third_step():
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(
            build_student("convnet-1", classes=10, channels=1, side=8, seed=0),
            pixels[:20],
            labels[:20],
            protocol=protocol("short-20"),
            classes=10,
            statistics=pixel_statistics([pixels]),
            flip=False,
            seed=0,
            evaluations=1,
            evaluate=lambda _student: {},
            step_done=third_step,
        )
    assert len(seen) == 3


def test_accuracy_against_a_loop_and_the_mode_is_kept(digits, monkeypatch):
    pixels, labels = digits[0][:50], digits[1][:50]
    statistics = pixel_statistics([pixels])
    student = build_student("convnet-1", classes=10, channels=1, side=8, seed=0)
    hits = 0
    for image, label in zip(pixels, labels, strict=True):
        unit = (torch.from_numpy(image[None]).float() / 255 - statistics.mean[0]) / statistics.std[0]
        hits += int(student(unit)[0].argmax()) == label
    assert accuracy(student, pixels, labels, statistics) == hits / 50
    assert student.training
    monkeypatch.setattr(students, "_EVALUATED_PIXELS", 7 * 64)
    assert accuracy(student.eval(), pixels, labels, statistics) == hits / 50
    assert not student.training


def test_students_learn_digits(digits):
    history, _ = trained(digits, images=1000, recipe=protocol("short-200"), evaluations=2)
    assert [look.step for look in history] == [100, 200]
    assert history[-1].metrics["accuracy"] > 0.8


def test_a_batch_norm_student_trains_where_the_last_batch_would_hold_one_image():
    pixels = np.random.default_rng(0).integers(0, 256, (65, 3, 32, 32), dtype=np.uint8)
    history = train_student(
        build_student("test_resnet", classes=5, channels=3, side=32, seed=0),
        pixels,
        np.arange(65) % 5,
        protocol=Protocol("tiny", 4),
        classes=5,
        statistics=pixel_statistics([pixels]),
        flip=True,
        seed=0,
        evaluations=1,
        evaluate=lambda student: {"finite": float(all(weights.isfinite().all() for weights in student.parameters()))},
    )
    assert history[0].metrics == {"finite": 1.0}
