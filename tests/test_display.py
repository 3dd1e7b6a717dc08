"""The display is for people: on a terminal, in a log file, or not at all."""

from __future__ import annotations

import io
import re

import pytest

from resnet_ddp import display as displays
from resnet_ddp.display import make_display


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 5.0, 100.0, 101.0, 200.0])
    monkeypatch.setattr(displays.time, "monotonic", lambda: next(clock))
    display = make_display("resnet20 seed 0", start=1_000, total=3_000)
    for iteration in (1_050, 2_000, 2_010, 3_000):
        display.update(iteration, loss=1.25, lr=0.1, images_per_second=1234.4)
    display.close()
    one, two = capsys.readouterr().err.splitlines()
    assert one == (
        "resnet20 seed 0  iteration 2,000/3,000  1,234 images/s  loss 1.250  lr 0.1  0:01:40 left"
    )
    assert "iteration 3,000/3,000" in two


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    display = make_display("resnet20 seed 0", start=0, total=500)
    display.update(250, loss=1.25, lr=0.01, images_per_second=1234.4)
    display.note("runs/[a]/seed0: a line that stays")
    display.close()
    for part in ("resnet20", "250/500", "1,234 images/s", "loss 1.250", "lr 0.01", "left"):
        assert part in terminal.getvalue()
    assert "runs/[a]/seed0: a line that stays" in terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_colour_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for variable in ("", "1"):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setenv("NO_COLOR", variable)
        display = make_display("resnet20 seed 0", start=0, total=500)
        display.update(250, loss=1.25, lr=0.01, images_per_second=1234.4)
        display.close()
        shown[variable] = terminal.getvalue()
    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9\d)[\d;]*m")
    assert colour.search(shown[""])
    assert not colour.search(shown["1"])
    for part in ("250/500", "1,234 images/s", "loss 1.250", "lr 0.01"):
        assert part in shown["1"]


def test_a_log_of_a_day_gets_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = iter(range(24 * 3600 + 1))
    monkeypatch.setattr(displays.time, "monotonic", lambda: float(next(moments)))
    display = make_display("resnet110 seed 0", start=0, total=24 * 3600)
    for second in range(1, 24 * 3600 + 1):
        display.update(second, loss=1.25, lr=0.1, images_per_second=128.0)
    lines = capsys.readouterr().err.splitlines()
    assert 24 * 60 <= len(lines) <= 24 * 60 + 30
    assert "iteration 10/" in lines[0]  # the first soon


def test_quiet_shows_only_the_lines_that_matter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    display = make_display("resnet20 seed 0", start=0, total=500, quiet=True)
    display.update(500, loss=1.25, lr=0.01, images_per_second=1234.4)
    display.note("stopped by SIGTERM")
    display.close()
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
