"""The built-in data set: too hard for a linear model, easy for ResNet-20."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

from resnet_ddp import shapes
from resnet_ddp.datasets import load_dataset


def test_ten_classes_of_equal_size() -> None:
    images, labels = shapes.draw(3)
    assert (images.shape, images.dtype) == ((30, 32, 32, 3), np.uint8)
    assert labels.tolist() == 3 * list(range(10))
    assert len({image.tobytes() for image in images}) == 30
    np.testing.assert_array_equal(shapes.draw(2)[0], images[:20])  # more only adds


def test_prepared_directory(tmp_path: Path) -> None:
    shapes.prepare_shapes(tmp_path / "shapes")
    data = load_dataset(tmp_path / "shapes")
    assert (data.name, data.num_classes) == ("shapes", 10)
    assert np.bincount(data.train_labels).tolist() == 10 * [1_000]
    assert np.bincount(data.test_labels).tolist() == 10 * [200]


def test_a_linear_model_errs_on_more_than_40_percent() -> None:
    images, labels = shapes.draw(1_200)
    x = (images.reshape(12_000, -1) / np.float32(255)).astype(np.float32) - np.float32(0.5)
    x = np.concatenate([x, np.ones((12_000, 1), np.float32)], axis=1)
    targets = np.eye(10, dtype=np.float32)[labels]
    train, test = slice(0, 10_000), slice(10_000, None)
    gram, moments = x[train].T @ x[train], x[train].T @ targets[train]
    errors = []
    for ridge in (1, 100, 10_000):  # the best of three
        weights = np.linalg.solve(gram + ridge * np.eye(len(gram), dtype=np.float32), moments)
        errors.append(np.mean((x[test] @ weights).argmax(axis=1) != labels[test]))
    assert min(errors) > 0.4


@pytest.mark.slow
def test_resnet20_errs_on_less_than_10_percent(start: Command, tmp_path: Path) -> None:
    command = "resnet20 --data shapes --recipe he2015-tiny --device cpu --runs"
    process = start("train.py", *command.split(), str(tmp_path / "runs"))
    _, error = process.communicate(timeout=900)
    assert process.returncode == 0, error
    (result,) = (tmp_path / "runs").glob("*/*/*/result.json")
    assert json.loads(result.read_text())["test_error_rate"] < 0.1
