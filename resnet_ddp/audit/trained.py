"""A run, assertion by assertion: what was really trained, and by which recipe.

Nothing is trained or evaluated again: config.json, metrics.jsonl, result.json and the weights have
to agree with each other, with the recipe that they name, and with the paper's schedule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from resnet_ddp.audit.checks import Check, Deviation, Finding, equal, none_of, same_series, show
from resnet_ddp.audit.paper import (
    CHANNEL_STATISTICS,
    DIVISORS,
    FIXED_WARMUP,
    MOMENTUM_CONVENTION,
    ONE_BATCHNORM_GROUP,
    SECTION,
    depth_of,
    parameters_of,
)
from resnet_ddp.audit.records import Records
from resnet_ddp.recipe import RECIPES

RECORDS = "the run's own records"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# What config.json and result.json both say.
SHARED = ("grid", "model", "seed", "recipe", "recipe_hash", "data", "data_sha256")
LOSS, RATE, TEST, VAL = "train/loss", "lr", "test/error_rate", "val/error_rate"


@dataclass(frozen=True)
class Assertion:
    """What is asserted of a run, and the function that finds out.

    Attributes:
        needs_result: only a run that is done can be asked.
        needs_schedule: only a recipe of known length can be asked.
    """

    id: str
    claim: str
    source: str
    find: Callable[[Records], Finding]
    needs_result: bool = field(default=False, kw_only=True)
    needs_schedule: bool = field(default=False, kw_only=True)

    def check(self, records: Records) -> Check:
        """Find out."""
        finding = self.find(records)
        return Check(
            self.id, self.claim, self.source, finding.expected, finding.actual, finding.passed
        )


def _recipe(records: Records) -> Finding:
    name = records.config["recipe"]
    known = [known for known in DIVISORS if known in RECIPES]
    return Finding(f"one of {show(known)}", name, name in known)


def _recipe_hash(records: Records) -> Finding:
    recipe, actual = RECIPES.get(records.config["recipe"]), records.config["recipe_hash"]
    expected = recipe.hash if recipe else "a known recipe's"
    return Finding(expected[:16], actual[:16], actual == expected)


def _recipe_fields(records: Records) -> Finding:
    recipe = RECIPES.get(records.config["recipe"])
    expected, actual = recipe.fields() if recipe else {}, records.config["recipe_fields"]
    differing = [
        f"{name} {show(actual.get(name))} for {show(expected.get(name))}"
        for name in [*expected, *(name for name in actual if name not in expected)]
        if actual.get(name) != expected.get(name)
    ]
    return none_of(differing)


def _place(records: Records) -> Finding:
    config, parts = records.config, records.path.resolve().parts[-2:]
    return equal(f"{config['model']}/seed{config['seed']}", "/".join(parts))


def _progress(records: Records) -> Finding:
    total = len(records.rates)
    reached = max((line["iteration"] for line in records.metrics), default=0)
    if records.result is not None:
        return equal(f"{total:,} of {total:,}", f"{reached:,} of {total:,}")
    actual = f"{reached:,} of {total:,}: not done, audited as far as it goes"
    return Finding(f"at most {total:,}", actual, reached <= total)


def _learning_rate(records: Records) -> Finding:
    lines = records.lines(RATE)
    # A line speaks of the step before it: the first is iteration 0's.
    places = [line["iteration"] - 1 for line in lines]
    rates = records.rates
    expected = [rates[place] if 0 <= place < len(rates) else math.nan for place in places]
    return same_series(expected, [_number(line[RATE]) for line in lines])


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _logged(records: Records) -> Finding:
    return _spaced(records, LOSS, records.config["log_every"])


def _evaluated(records: Records) -> Finding:
    return _spaced(records, VAL, records.config["eval_every"])


def _spaced(records: Records, key: str, every: int) -> Finding:
    """Compare the iterations of the lines with fixed multiples, and the end."""
    total = len(records.rates)
    reached = [line["iteration"] for line in records.lines(key)]
    due = [*range(every, total, every), total]
    expected = due if records.result is not None else due[: len(reached)]
    wrong = next(
        (i for i, (a, b) in enumerate(zip(expected, reached, strict=False)) if a != b), None
    )
    actual = f"{len(reached):,} lines"
    if wrong is not None:
        actual += f", {reached[wrong]:,} in place of {expected[wrong]:,}"
    return Finding(f"{len(expected):,} lines", actual, reached == expected)


def _losses(records: Records) -> Finding:
    return none_of(
        [
            f"iteration {line['iteration']}: {line[LOSS]}"
            for line in records.lines(LOSS)
            if not math.isfinite(_number(line[LOSS]))
        ]
    )


def _tested_once(records: Records) -> Finding:
    at = [line["iteration"] for line in records.lines(TEST)]
    expected = [len(records.rates)] if records.result is not None else []
    is_last = not at or TEST in records.metrics[-1]
    shown = [f"after iteration {i:,}" for i in at]
    return Finding(
        show([f"after iteration {i:,}" for i in expected]) or "not yet",
        (show(shown) or "not yet") + ("" if is_last else ", and training went on"),
        at == expected and is_last,
    )


def _result_errors(records: Records) -> Finding:
    last = {
        name: records.lines(key)[-1][key] if records.lines(key) else "missing"
        for name, key in (("test_error_rate", TEST), ("val_error_rate", VAL))
    }
    result = records.result or {}
    return equal(last, {name: result.get(name, "missing") for name in last})


def _result_identity(records: Records) -> Finding:
    result = records.result or {}
    return none_of([name for name in SHARED if result.get(name) != records.config.get(name)])


def _parameters(records: Records) -> Finding:
    weights = records.weights
    num_classes = len(weights["linear.bias"]) if "linear.bias" in weights else 10
    expected = parameters_of(records.config["model"], num_classes)
    in_file = sum(array.size for name, array in weights.items() if not name.endswith(STATISTICS))
    return equal(
        {"weights": expected, "result": expected},
        {"weights": in_file, "result": (records.result or {}).get("num_parameters")},
    )


def _finite(records: Records) -> Finding:
    return none_of(
        [name for name, array in records.weights.items() if not np.isfinite(array).all()]
    )


def _steps(records: Records) -> Finding:
    counts = {
        int(tensor)
        for name, tensor in records.weights.items()
        if name.endswith("num_batches_tracked")
    }
    return equal([len(records.rates)], sorted(counts))


def _data(records: Records) -> Finding:
    config = records.config
    original = {True: "as published", False: "not as published", None: "unknown whether original"}
    flag = original.get(config.get("data_original"), "unknown whether original")
    return Finding(
        "a SHA-256",
        f"{config['data']}, {flag}, {config['data_sha256'][:16]}...",
        re.fullmatch("[0-9a-f]{64}", config["data_sha256"]) is not None,
    )


ASSERTIONS = (
    Assertion("run-recipe", "the run names a recipe of known schedule", RECORDS, _recipe),
    Assertion(
        "run-recipe-hash", "its hash is that of this version's recipe", RECORDS, _recipe_hash
    ),
    Assertion("run-recipe-fields", "hyperparameters that differ from it", RECORDS, _recipe_fields),
    Assertion("run-place", "the directory is that of its model and seed", RECORDS, _place),
    Assertion("run-data", "the images are recorded by their hash", RECORDS, _data),
    Assertion("run-progress", "iterations", SECTION, _progress, needs_schedule=True),
    Assertion(
        "run-learning-rate",
        "learning rate of all logged lines",
        SECTION,
        _learning_rate,
        needs_schedule=True,
    ),
    Assertion(
        "run-logged", "loss logged without gap or repetition", RECORDS, _logged, needs_schedule=True
    ),
    Assertion(
        "run-evaluated",
        "errors measured without gap or repetition",
        RECORDS,
        _evaluated,
        needs_schedule=True,
    ),
    Assertion("run-losses", "losses that are not finite", RECORDS, _losses),
    Assertion(
        "run-tested-once",
        "the test set was used once, at the end",
        SECTION,
        _tested_once,
        needs_schedule=True,
    ),
    Assertion(
        "run-result-errors",
        "the result's errors are those last measured",
        RECORDS,
        _result_errors,
        needs_result=True,
    ),
    Assertion(
        "run-result-identity",
        "what the result and the configuration say differently",
        RECORDS,
        _result_identity,
        needs_result=True,
    ),
    Assertion(
        "run-parameters",
        "number of parameters",
        "table 6, to the last parameter",
        _parameters,
        needs_result=True,
    ),
    Assertion("run-finite", "weights that are not finite", RECORDS, _finite, needs_result=True),
    Assertion(
        "run-steps",
        "training batches that each BatchNorm counted",
        SECTION,
        _steps,
        needs_result=True,
        needs_schedule=True,
    ),
)


def audit_run(path: str | Path) -> list[Check]:
    """Check the records of a run, as far as it went.

    Raises:
        UserError: there is no run, or a file of it is damaged.
    """
    records = Records.read(Path(path))
    return [
        assertion.check(records)
        for assertion in ASSERTIONS
        if (records.result is not None or not assertion.needs_result)
        and (records.config["recipe"] in DIVISORS or not assertion.needs_schedule)
    ]


def deviations_of(path: str | Path) -> list[Deviation]:
    """Return in what a run deviates from the paper, by its own records.

    Raises:
        UserError: there is no run, or a file of it is damaged.
    """
    config = Records.read(Path(path)).config
    name, divisor = config["recipe"], DIVISORS.get(config["recipe"], 1)
    deviations = [MOMENTUM_CONVENTION]
    if name != "he2015-pixelmean":
        deviations.append(CHANNEL_STATISTICS)
    if name != "he2015-two-gpus":
        deviations.append(ONE_BATCHNORM_GROUP)
    if depth_of(config["model"]) >= 110:
        deviations.append(FIXED_WARMUP)
    if divisor > 1:
        deviations.append(
            Deviation(
                f"{64_000 // divisor:,} iterations, the whole schedule divided by {divisor:,}",
                "64,000 iterations",
                "higher errors: not to be compared with the paper's",
            )
        )
    if name == "he2015-50k":
        deviations.append(
            Deviation(
                "Trained on all 50,000 images, none held out",
                "45,000 in training, 5,000 for validation",
                "slightly lower test errors",
            )
        )
    if config["precision"] != "fp32":
        deviations.append(
            Deviation(
                f"Multiplied in {config['precision']}; weights, momentum and statistics in fp32",
                "single precision",
                "rounding of activations and gradients; not the bits of fp32",
            )
        )
    if config.get("data_original") is not True:
        source = config.get("data_source", "not recorded")
        deviations.append(
            Deviation(
                f"The images are not known to be CIFAR-10 as published ({source})",
                "CIFAR-10",
                "errors that stand for these images only; a JPEG copy loses detail",
            )
        )
    return deviations
