"""A small data set that the project draws itself: ten shapes on coloured grounds, 32x32.

It stands in for CIFAR-10 where there is no network, so that the first command always works. Place,
size, angle and colours of a shape vary, so that a linear model cannot tell them apart and a
convolutional net can; none changes its class when mirrored.

Shapes of arrays: N images, H rows, W columns (32).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet_ddp.counter_rng import Stream, philox4x32
from resnet_ddp.datasets import Dataset, in_memory, write_dataset

Array = NDArray[Any]
Distance = Callable[[Array, Array], Array]

SIZE = 32
TRAIN_PER_CLASS, TEST_PER_CLASS = 1000, 200


def prepare_shapes(directory: Path) -> None:
    """Draw the data set into a prepared directory."""
    drawn = dataset(TRAIN_PER_CLASS, TEST_PER_CLASS)
    write_dataset(
        directory,
        name=drawn.name,
        source=drawn.source,
        classes=drawn.classes,
        train_images=drawn.train_images,
        train_labels=drawn.train_labels,
        test_images=drawn.test_images,
        test_labels=drawn.test_labels,
    )


def dataset(train_per_class: int, test_per_class: int) -> Dataset:
    """Return a data set of any size, in memory; the first images are the same at every size."""
    images, labels = draw(train_per_class + test_per_class)
    num_train = train_per_class * len(SHAPES)
    return in_memory(
        name="shapes",
        source="drawn by resnet_ddp.shapes",
        classes=tuple(SHAPES),
        train=(images[:num_train], labels[:num_train]),
        test=(images[num_train:], labels[num_train:]),
    )


def draw(per_class: int) -> tuple[Array, Array]:
    """Return images (N, 32, 32, 3) uint8 and labels (N,) int64, classes taking turns."""
    numbers = np.arange(per_class * len(SHAPES), dtype=np.uint64)
    labels = (numbers % len(SHAPES)).astype(np.int64)
    images = np.empty((len(numbers), SIZE, SIZE, 3), np.uint8)
    for label, distance in enumerate(SHAPES.values()):
        images[label :: len(SHAPES)] = _draw_class(numbers[label :: len(SHAPES)], distance)
    return images, labels


def _uniform(numbers: Array, purpose: int) -> tuple[Array, Array, Array, Array]:
    """Return four numbers in [0, 1) for each image, shaped (N, 1, 1) to go with its pixels."""
    zero = np.zeros_like(numbers)
    words = philox4x32((zero, numbers, zero + np.uint64(purpose), zero), (0, Stream.SHAPES))
    u0, u1, u2, u3 = ((word / 2**32)[:, None, None] for word in words)
    return u0, u1, u2, u3


def _draw_class(numbers: Array, distance: Distance) -> Array:
    """Draw one shape, given its distance function, once for each number: (N, 32, 32, 3) uint8."""
    u_radius, u_x, u_y, u_angle = _uniform(numbers, 0)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5  # pixel centres, (H, W)
    radius = 6 + 5 * u_radius
    x = (columns - (radius + (SIZE - 2 * radius) * u_x)) / radius
    y = (rows - (radius + (SIZE - 2 * radius) * u_y)) / radius
    cosine, sine = np.cos(2 * np.pi * u_angle), np.sin(2 * np.pi * u_angle)
    # In the shape's own frame, where it fills the unit disk; one pixel of soft edge.
    inside = np.clip(0.5 - radius * distance(cosine * x + sine * y, cosine * y - sine * x), 0, 1)
    ground, ink = _colours(numbers)
    stripes = _stripes(numbers, rows, columns)[..., None]
    image = ground + stripes + inside[..., None] * (ink - ground - stripes)
    pixels: Array = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return pixels


def _colours(numbers: Array) -> tuple[Array, Array]:
    """Return colours of ground and ink, each (N, 1, 1, 3), 80 grey levels apart in each channel."""
    *u_ground, _ = _uniform(numbers, 1)
    *u_step, _ = _uniform(numbers, 2)
    ground = 255 * np.stack(u_ground, axis=-1)
    return ground, (ground + 80 + 96 * np.stack(u_step, axis=-1)) % 256


def _stripes(numbers: Array, rows: Array, columns: Array) -> Array:
    """Return a wave over each image's ground, (N, H, W), in grey levels."""
    u_frequency, u_angle, u_phase, u_height = _uniform(numbers, 3)
    along = columns * np.cos(2 * np.pi * u_angle) + rows * np.sin(2 * np.pi * u_angle)
    wave: Array = np.sin((0.2 + 0.8 * u_frequency) * along + 2 * np.pi * u_phase)
    return 40 * u_height * wave


# Distance functions: (x, y) -> about how far outside the shape that point is, negative inside.


def _disk(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.8


def _ring(x: Array, y: Array) -> Array:
    return abs(_disk(x, y) + 0.05) - 0.18


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.7


def _frame(x: Array, y: Array) -> Array:
    return abs(_square(x, y) + 0.15) - 0.15


def _triangle(x: Array, y: Array) -> Array:
    outside: Array = np.maximum(-y, 0.75**0.5 * np.abs(x) + 0.5 * y)
    return outside - 0.5


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.22, np.maximum(x, y) - 0.95)


def _star(x: Array, y: Array) -> Array:
    edge: Array = 0.62 + 0.32 * np.cos(5 * np.arctan2(y, x))
    return 0.6 * (np.hypot(x, y) - edge)


def _bar(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x) - 0.97, np.abs(y) - 0.22)


def _pair(x: Array, y: Array) -> Array:
    return np.hypot(np.abs(x) - 0.6, y) - 0.36


def _crescent(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x, y) - 0.9, 0.75 - np.hypot(x - 0.45, y))


SHAPES: dict[str, Distance] = {
    "disk": _disk,
    "ring": _ring,
    "square": _square,
    "frame": _frame,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "bar": _bar,
    "pair": _pair,
    "crescent": _crescent,
}
