"""The names that others script against, and one line for whoever mistypes them."""

from __future__ import annotations

import dataclasses

import pytest

from resnet_ddp.options import Parser, TrainOptions, add_options, nearest, read_options
from resnet_ddp.recipe import Recipe


def parse(*arguments: str) -> TrainOptions:
    parser = Parser(prog="train.py")
    add_options(parser, TrainOptions)
    return read_options(parser.parse_args(arguments), TrainOptions)


def test_every_documented_option() -> None:
    command = (
        "resnet56 --seed 3 --data D --recipe he2015-eighth --runs R --grid G --precision fp32 "
        "--device cpu --no-compile --threads 2 --log-every 5 --eval-every 6 --save-every 7 "
        "--stop-after 8"
    )
    assert parse(*command.split()) == TrainOptions(
        model="resnet56",
        seed=3,
        data="D",
        recipe="he2015-eighth",
        runs="R",
        grid="G",
        precision="fp32",
        device="cpu",
        compile=False,
        threads=2,
        log_every=5,
        eval_every=6,
        save_every=7,
        stop_after=8,
    )
    assert parse("plain20", "--compile", "--seed=4294967295").seed == 2**32 - 1


def test_defaults() -> None:
    options = parse("resnet20")
    assert (options.seed, options.recipe, options.runs) == (0, "he2015", "runs")
    assert (options.device, options.precision, options.compile) == ("auto", None, None)


def test_no_option_reaches_inside_a_recipe() -> None:
    inside = {field.name for field in dataclasses.fields(Recipe)}
    assert not inside & {field.name for field in dataclasses.fields(TrainOptions)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("resnet21", "did you mean resnet20?"),
        ("resnet20 --recipe he2015tiny", "did you mean he2015-tiny?"),
        ("resnet20 --device gpu", "did you mean cpu?"),
        ("resnet20 --device tpu9000", "choose from auto, cuda, mps, cpu"),
        ("resnet20 --seeds 3", "did you mean --seed?"),
        ("resnet20 --stop-aftr=3", "did you mean --stop-after?"),
        ("resnet20 --prec fp32", "unknown argument --prec"),  # no abbreviations
        ("resnet20 --seed three", "'three' is not a whole number"),
        ("resnet20 --seed -1", "less than 0"),
        ("resnet20 --seed 4294967296", "does not fit in 32 bits"),
        ("resnet20 --threads 0", "less than 1"),
        ("resnet20 extra", "unknown argument extra"),
        ("", "MODEL"),
    ],
)
def test_a_mistake_gets_one_line_and_2(
    arguments: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(*arguments.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_nothing_near_is_nothing_said() -> None:
    assert nearest("xyz", ["resnet20", "plain20"]) == ""
