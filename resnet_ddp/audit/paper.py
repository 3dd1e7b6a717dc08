"""What He et al. 2015 say, in literals: nothing here is computed from a recipe or a network."""

from __future__ import annotations

import re

from resnet_ddp.audit.checks import Deviation

SECTION = "section 4.2"
PYTORCH = "PyTorch default"
REFERENCE = "nabla0001/resnet"

DEPTHS = {"resnet20": 20, "resnet56": 56, "resnet110": 110, "plain20": 20, "plain56": 56}
# Option A and plain nets, ten classes.
PARAMETERS = {
    20: 269_722,
    32: 464_154,
    44: 658_586,
    56: 853_018,
    110: 1_727_962,
    1202: 19_421_274,
}
PROJECTIONS = 2_752  # parameters that option B adds at any depth
ITERATIONS = 64_000
BATCH_SIZE = 128
NUM_TRAIN, NUM_VAL, NUM_TEST = 45_000, 5_000, 10_000
PASSES = 182  # whole ones over the training images in 64,000 iterations
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4

# By how much a named recipe shortens the schedule.
DIVISORS = {
    "he2015": 1,
    "he2015-50k": 1,
    "he2015-pixelmean": 1,
    "he2015-two-gpus": 1,
    "he2015-eighth": 8,
    "he2015-tiny": 128,
    "he2015-smoke": 2000,
}


def depth_of(model: str) -> int:
    """Return the depth that a network's name states: 110 for resnet110-b."""
    return int(re.findall(r"\d+", model)[0])


def parameters_of(model: str, num_classes: int) -> int | None:
    """Return how many parameters a network has, None if the paper's family has no such depth."""
    count = PARAMETERS.get(depth_of(model))
    if count is None:
        return None
    projections = PROJECTIONS if model.endswith("-b") else 0
    return count + projections + 65 * (num_classes - 10)  # 64 weights and a bias each


def learning_rates(depth: int, divisor: int = 1) -> list[float]:
    """Return the learning rate of every iteration, the schedule shortened by `divisor`.

    0.1, divided by 10 at 32k and 48k iterations, end at 64k; the 110-layer net begins with 0.01,
    for about 400 iterations, and then goes back to 0.1.
    """
    warmup = 400 // divisor if depth >= 110 else 0
    first, second, end = 32_000 // divisor, 48_000 // divisor, 64_000 // divisor
    return (
        [0.01] * warmup
        + [0.1] * (first - warmup)
        + [0.01] * (second - first)
        + [0.001] * (end - second)
    )


MOMENTUM_CONVENTION = Deviation(
    "Momentum is torch's: the buffer holds gradients, and the learning rate multiplies it",
    "Caffe's buffer holds learning rate times gradient",
    "none at a constant learning rate; right after a drop by 10 Caffe's step is 9.1 times this "
    "one, after 20 iterations 2 times",
)
CHANNEL_STATISTICS = Deviation(
    "Each channel's mean is subtracted and its standard deviation divided by",
    "the mean of every pixel is subtracted",
    "another scale of each colour, most of which the first BatchNorm takes out again; "
    "he2015-pixelmean does as the paper does",
)
ONE_BATCHNORM_GROUP = Deviation(
    "BatchNorm normalises 128 images together, on any number of processes",
    "two GPUs, each of which normalised its 64",
    "slightly less noise in training; he2015-two-gpus does as the paper did",
)
FIXED_WARMUP = Deviation(
    "The 110-layer net is warmed up for exactly 400 iterations",
    "until the training error is below 80%, about 400 iterations",
    "a few dozen iterations of 64,000 at another learning rate; it makes the learning rate a "
    "function of the iteration alone",
)
DEVIATIONS = (MOMENTUM_CONVENTION, CHANNEL_STATISTICS, ONE_BATCHNORM_GROUP, FIXED_WARMUP)
