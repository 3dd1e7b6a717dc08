"""Training recipes as data: everything that decides what a run computes, except model and seed.

He et al. 2015, section 4.2: SGD with momentum 0.9 and weight decay 1e-4, batches of 128, learning
rate 0.1 divided by 10 at 32k and 48k iterations, end at 64k; the 110-layer net is warmed up at 0.01
for 400 iterations; 4 pixels of padding, a random 32x32 crop and a horizontal flip; 45k/5k split.

No command line reaches inside a recipe. An ablation is another named recipe, made with
`dataclasses.replace`, and its name and hash stand in every record of its runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a run, counted in iterations (optimizer steps) and never in epochs.

    Attributes:
        name: the name under which the command line and all records know it.
        iterations: optimizer steps in the whole run.
        batch_size: images in a step, over all processes together, at every step.
        learning_rate: before the first drop.
        drops: iterations from which the learning rate is divided by 10 once more.
        warmup_iterations: length of the warm-up of very deep nets.
        warmup_learning_rate: learning rate during the warm-up.
        warmup_min_depth: nets of at least this depth are warmed up.
        momentum: of SGD, torch's convention (the buffer holds gradients, not lr * gradients).
        weight_decay: on every parameter, biases and BatchNorm included.
        validation_divisor: one in so many training images is held out (10: 45k/5k); 0: none.
        normalisation: "channel" subtracts each channel's mean and divides by its deviation;
            "pixel-mean" subtracts the mean image, the paper's own preprocessing.
        padding: pixels of exact zeros around the normalised image, before the crop.
        flip: flip half of the images horizontally.
        batchnorm_group: images that BatchNorm normalises together, whatever the number of
            processes; divides batch_size.
    """

    name: str
    iterations: int = 64_000
    batch_size: int = 128
    learning_rate: float = 0.1
    drops: tuple[int, ...] = (32_000, 48_000)
    warmup_iterations: int = 400
    warmup_learning_rate: float = 0.01
    warmup_min_depth: int = 110
    momentum: float = 0.9
    weight_decay: float = 1e-4
    validation_divisor: int = 10
    normalisation: Literal["channel", "pixel-mean"] = "channel"
    padding: int = 4
    flip: bool = True
    batchnorm_group: int = 128

    def lr_at(self, iteration: int, *, depth: int) -> float:
        """Return the learning rate of one iteration, in closed form (paper, section 4.2).

        Args:
            iteration: counted from 0.
            depth: weighted layers of the net, which decides on the warm-up.

        Raises:
            ValueError: if the iteration is not one of this recipe's.
        """
        if not 0 <= iteration < self.iterations:
            raise ValueError(f"iteration {iteration} is outside 0..{self.iterations - 1}")
        if depth >= self.warmup_min_depth and iteration < self.warmup_iterations:
            return self.warmup_learning_rate
        drops_so_far = sum(iteration >= drop for drop in self.drops)
        divisor: int = 10**drops_so_far
        return self.learning_rate / divisor

    def num_val(self, num_images: int) -> int:
        """Return how many of `num_images` training images are held out for validation."""
        return num_images // self.validation_divisor if self.validation_divisor else 0

    def fields(self) -> dict[str, Any]:
        """Return all fields as plain JSON values, in order of declaration."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over all fields as canonical JSON."""
        canonical = json.dumps(self.fields(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def shortened(recipe: Recipe, divisor: int, *, name: str) -> Recipe:
    """Divide all that counts iterations, and nothing else, by `divisor`."""
    return dataclasses.replace(
        recipe,
        name=name,
        iterations=recipe.iterations // divisor,
        drops=tuple(drop // divisor for drop in recipe.drops),
        warmup_iterations=recipe.warmup_iterations // divisor,
    )


HE2015 = Recipe(name="he2015")

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        HE2015,
        dataclasses.replace(HE2015, name="he2015-50k", validation_divisor=0),
        dataclasses.replace(HE2015, name="he2015-pixelmean", normalisation="pixel-mean"),
        dataclasses.replace(HE2015, name="he2015-two-gpus", batchnorm_group=64),  # as the paper's
        shortened(HE2015, 8, name="he2015-eighth"),  # for laptops
        shortened(HE2015, 128, name="he2015-tiny"),  # the README's first command
        shortened(HE2015, 2000, name="he2015-smoke"),  # does this machine work at all?
    )
}
