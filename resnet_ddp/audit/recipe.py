"""The recipe of He et al. 2015, assertion by assertion.

Expected values are literals from the paper; actual ones come from networks, optimizers and batches
that were built as a run builds them, and never from the recipe's fields.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch

from resnet_ddp.audit import data, networks, training
from resnet_ddp.audit.checks import Check, Finding
from resnet_ddp.audit.paper import DEPTHS, PYTORCH, REFERENCE, SECTION
from resnet_ddp.audit.subject import Subject


@dataclass(frozen=True)
class Assertion:
    """What is asserted, who says so, and the function that finds out."""

    id: str
    claim: str
    source: str
    find: Callable[[Subject], Finding]

    def check(self, subject: Subject) -> Check:
        """Find out; what cannot even be measured has failed."""
        try:
            finding = self.find(subject)
        except Exception as error:  # whatever a bug may raise is a finding, too
            finding = Finding("a value", f"{type(error).__name__}: {error}", passed=False)
        return Check(
            self.id, self.claim, self.source, finding.expected, finding.actual, finding.passed
        )


OPTION_A = "section 3.3, option A"
INITIAL = f"He et al. 2015a; fan_out: {REFERENCE}"

NETWORKS = (
    *(
        Assertion(
            f"parameters-{net}",
            f"{net}: number of parameters",
            "table 6, to the last parameter",
            partial(networks.parameters, net=net),
        )
        for net in DEPTHS
    ),
    Assertion(
        "parameters-others",
        "number of parameters of nets outside the grid",
        "table 6, to the last parameter",
        networks.parameters_of_others,
    ),
    Assertion("weighted-layers", "6n+2 weighted layers", SECTION, networks.weighted_layers),
    Assertion(
        "convolution-kind",
        "convolutions that are not 3x3, padding 1, without bias",
        SECTION,
        networks.convolution_kind,
    ),
    Assertion(
        "widths",
        "convolutions x channels @ size of map: 1+2n, 2n and 2n layers on 32, 16 and 8",
        f"{SECTION}, table",
        networks.widths,
    ),
    Assertion(
        "strides",
        "which convolutions halve the map: the first of the second and third stage",
        SECTION,
        networks.strides,
    ),
    Assertion(
        "layer-order",
        "places without BatchNorm right after a convolution, or ReLU before the next",
        "section 3.4",
        networks.layer_order,
    ),
    Assertion(
        "network-end",
        "nets that do not end in global average pooling and a linear layer to ten classes",
        SECTION,
        networks.network_end,
    ),
    Assertion(
        "shortcut-option-a",
        "blocks that do not add every second pixel, new channels zero and last, before the ReLU",
        f"{OPTION_A}; channels at the end: {REFERENCE}",
        networks.shortcuts,
    ),
    Assertion("plain-nets", "plain blocks with a shortcut", SECTION, networks.no_shortcuts),
    Assertion(
        "init-convolutions",
        "deviation of each layer's first weights is sqrt(2 / fan_out)",
        INITIAL,
        networks.initial_convolutions,
    ),
    Assertion(
        "init-normal",
        "share of first weights beyond two deviations: a normal distribution's",
        INITIAL,
        networks.initial_shape,
    ),
    Assertion(
        "init-linear",
        "last layer's first weights uniform in +-1/sqrt(64)",
        PYTORCH,
        networks.initial_linear,
    ),
    Assertion(
        "init-batchnorm",
        "BatchNorm begins with scale 1, shift 0, running mean 0, variance 1",
        PYTORCH,
        networks.initial_batchnorm,
    ),
    Assertion(
        "init-seeds", "five seeds begin with weights of their own", SECTION, networks.initial_seeds
    ),
    Assertion("batchnorm-constants", "eps and momentum", PYTORCH, networks.batchnorm_constants),
    Assertion(
        "batchnorm-batch",
        "error of normalising over all 128 images with their biased variance",
        "Ioffe and Szegedy 2015, algorithm 1",
        networks.batchnorm_batch,
    ),
    Assertion(
        "batchnorm-running",
        "error of running statistics: a tenth of the new, variance unbiased",
        f"Ioffe and Szegedy 2015, algorithm 2; {PYTORCH}",
        networks.batchnorm_running,
    ),
)

TRAINING = (
    Assertion("iterations", "iterations of a run", SECTION, data.iterations),
    *(
        Assertion(
            f"learning-rate-{net}",
            f"{net}: learning rate written at each of 64,000 iterations",
            SECTION,
            partial(training.written_rates, net=net),
        )
        for net in DEPTHS
    ),
    *(
        Assertion(
            f"lr-in-steps-{net}",
            f"{net}'s learning rate, measured by steps around each change",
            SECTION,
            partial(training.stepped_rates, net=net),
        )
        for net in ("resnet20", "resnet110")
    ),
    Assertion(
        "momentum", "settings of the optimizer's momentum", SECTION, training.momentum_setting
    ),
    Assertion(
        "momentum-behaviour",
        "steps at learning rate 1 with a gradient that stays 1",
        f"{SECTION}; {PYTORCH}",
        training.momentum_behaviour,
    ),
    Assertion("weight-decay", "setting of the optimizer", SECTION, training.decay_setting),
    Assertion(
        "weight-decay-behaviour",
        "parameters that do not shrink by 0.0001, biases and BatchNorm included",
        f"{SECTION}; on all parameters: {REFERENCE}",
        training.decay_behaviour,
    ),
    Assertion(
        "optimizer-coverage",
        "parameters that the optimizer does not hold exactly once",
        SECTION,
        training.coverage,
    ),
    Assertion(
        "gradient-coverage",
        "parameters without a gradient in a training step",
        SECTION,
        training.gradient_coverage,
    ),
    Assertion("step-input", "what a training step shows the network", SECTION, training.step_input),
    Assertion(
        "loss-scale",
        "loss of a step, as a multiple of the mean over 128 images",
        SECTION,
        training.loss_scale,
    ),
    Assertion(
        "gradient-scale",
        "gradient of a step, as a multiple of the mean over 128 images",
        SECTION,
        training.gradient_scale,
    ),
)

DATA = (
    Assertion("split-sizes", "images trained on, held out, tested", SECTION, data.split_sizes),
    Assertion(
        "split-covers", "how often a training image is in the split", SECTION, data.split_covers
    ),
    Assertion("split-seeds", "different splits among five seeds", SECTION, data.split_seeds),
    Assertion("batch-size", "images in each of all batches", SECTION, data.batch_size),
    Assertion("passes", "whole passes that see each of 45,000 images once", SECTION, data.passes),
    Assertion(
        "permutations",
        "distinct orders among the 182 whole passes of five seeds",
        SECTION,
        data.permutations,
    ),
    Assertion("held-out", "held-out images trained on", SECTION, data.held_out),
    Assertion("test-apart", "test images in training batches", SECTION, data.test_apart),
    Assertion("own-label", "images with another's label", SECTION, data.own_label),
    Assertion(
        "crop-distribution",
        "all 81 windows of the padded image equally likely",
        SECTION,
        data.crop_distribution,
    ),
    Assertion("flip-distribution", "share of mirrored images", SECTION, data.flip_distribution),
    Assertion(
        "augmentation-fresh",
        "share of images that look the same in two passes running",
        SECTION,
        data.fresh_augmentation,
    ),
    Assertion(
        "augmentation-applied",
        "images in training batches that are not the drawn window of themselves",
        SECTION,
        data.applied_augmentation,
    ),
    Assertion(
        "padding-value", "values of padded pixels after normalisation", SECTION, data.padding_value
    ),
    Assertion(
        "normalisation",
        "a channel's largest distance from mean 0 and deviation 1",
        REFERENCE,
        data.normalisation,
    ),
    Assertion("evaluation-count", "images evaluated", SECTION, data.evaluation_count),
    Assertion(
        "evaluation-error",
        "error rate of a network that errs on 1,234 of the 10,000 test images",
        SECTION,
        data.evaluation_error,
    ),
    Assertion(
        "evaluation-images",
        "evaluated images that were cropped, mirrored or otherwise changed",
        f"{SECTION}: single view of the original image",
        data.evaluation_images,
    ),
    Assertion(
        "evaluation-mode",
        "mode of the network in an evaluation, and after it",
        "Ioffe and Szegedy 2015, algorithm 2",
        data.evaluation_mode,
    ),
)

ASSERTIONS = (*NETWORKS, *TRAINING, *DATA)


def run_audit(
    recipe_name: str = "he2015",
    *,
    only: Collection[str] | None = None,
    subject: Subject | None = None,
) -> list[Check]:
    """Hold a recipe against the paper; where it departs from it, a check fails.

    Args:
        recipe_name: a key of `RECIPES`.
        only: ids of the assertions to check; None checks all.
        subject: what is built already.
    """
    torch.set_num_threads(1)  # much small work: more threads would only get in each other's way
    subject = subject or Subject(recipe_name)
    return [
        assertion.check(subject) for assertion in ASSERTIONS if only is None or assertion.id in only
    ]
