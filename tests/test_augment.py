"""Normalise, pad, crop, flip: against plain NumPy, and against the distributions of the paper."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from resnet_ddp.augment import Draws, Normalisation, as_network_input, crop_and_flip, draw
from resnet_ddp.recipe import HE2015

CPU = torch.device("cpu")


def random_images(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8))


def many_draws(count: int = 50_000, seed: int = 0, pass_number: int = 0) -> Draws:
    samples = torch.arange(count)
    return draw(HE2015, seed=seed, passes=torch.full_like(samples, pass_number), samples=samples)


def test_crops_and_flips_are_uniform_and_independent() -> None:
    draws = many_draws()
    cells = (draws.dy * 9 + draws.dx) * 2 + draws.flip
    counts = torch.bincount(cells, minlength=162).double()
    assert len(counts) == 162  # 81 offsets, mirrored or not
    chi_square = ((counts - 50_000 / 162) ** 2 / (50_000 / 162)).sum().item()
    assert 100 < chi_square < 240  # 161 degrees of freedom, deviation 18
    offsets = counts.view(81, 2).sum(dim=1)
    assert 35 < ((offsets - 50_000 / 81) ** 2 / (50_000 / 81)).sum().item() < 140  # 80, 13
    assert abs(draws.flip.sum().item() - 25_000) < 450  # 4 deviations


def test_draws_differ_between_passes_and_seeds() -> None:
    first = many_draws()
    for other in (many_draws(pass_number=1), many_draws(seed=1)):
        same = (first.dy == other.dy) & (first.dx == other.dx) & (first.flip == other.flip)
        assert abs(same.double().mean().item() - 1 / 162) < 0.0015


def test_a_draw_depends_on_its_own_sample_only() -> None:
    whole, chosen = many_draws(1_000), torch.tensor([7, 999, 7, 0])
    few = draw(HE2015, seed=0, passes=torch.zeros_like(chosen), samples=chosen)
    for field in dataclasses.fields(Draws):
        assert torch.equal(getattr(few, field.name), getattr(whole, field.name)[chosen])


def test_flip_is_the_recipes_choice() -> None:
    unflipped = dataclasses.replace(HE2015, flip=False)
    samples = torch.arange(1_000)
    draws = draw(unflipped, seed=0, passes=torch.zeros_like(samples), samples=samples)
    assert draws.flip.sum() == 0
    assert torch.equal(draws.dx, many_draws(1_000).dx)  # all else stays


def test_crop_and_flip_equal_plain_numpy_bit_for_bit() -> None:
    images = random_images(200).float() - 100
    draws = many_draws(200)
    ours = crop_and_flip(images, draws, padding=4).numpy()
    for number, image in enumerate(images.numpy()):
        dy, dx = int(draws.dy[number]), int(draws.dx[number])
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        crop = padded[dy : dy + 32, dx : dx + 32]
        expected = crop[:, ::-1] if draws.flip[number] else crop
        np.testing.assert_array_equal(ours[number], expected)


def test_channel_normalisation_equals_float64() -> None:
    images = random_images(50)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    expected = (images.numpy() / 255.0 - np.array(mean)) / np.array(std)
    ours = Normalisation.channel(mean, std, CPU)(images)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_pixel_mean_normalisation_equals_float64() -> None:
    images = random_images(50)
    expected = (images.numpy() - images.numpy().mean(axis=0, dtype=np.float64)) / 255
    ours = Normalisation.pixel_mean(images)(images)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_a_constant_channel_stays_finite() -> None:
    normalise = Normalisation.channel((0.5, 0.5, 0.0), (0.2, 0.2, 0.0), CPU)
    assert torch.isfinite(normalise(random_images(2))).all()


@pytest.mark.parametrize("kind", ["channel", "pixel-mean"])
def test_padding_is_exactly_zero_after_normalisation(kind: str) -> None:
    images = random_images(3)
    normalise = (
        Normalisation.pixel_mean(images)
        if kind == "pixel-mean"
        else Normalisation.channel((0.3, 0.4, 0.5), (0.2, 0.2, 0.2), CPU)
    )
    zero = torch.zeros(3, dtype=torch.int64)
    corner = crop_and_flip(normalise(images), Draws(dy=zero, dx=zero + 8, flip=zero), padding=4)
    assert set(corner[:, :4].flatten().tolist()) == {0.0}
    assert set(corner[:, :, -4:].flatten().tolist()) == {0.0}
    assert torch.equal(corner[:, 4:, :-4], normalise(images)[:, :28, 4:])


def test_network_input_is_channels_last_without_a_copy() -> None:
    images = random_images(2).float()
    network_input = as_network_input(images)
    assert network_input.shape == (2, 3, 32, 32)
    assert network_input.is_contiguous(memory_format=torch.channels_last)
    assert network_input.data_ptr() == images.data_ptr()
