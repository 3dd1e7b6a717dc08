"""Signals ask, and the loop decides."""

from __future__ import annotations

import os
import signal

import pytest

from resnet_ddp import stop
from resnet_ddp.stop import StopRequest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_is_only_noted(name: str) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    with request.listening():
        assert request.reason is None
        os.kill(os.getpid(), signal.Signals[name])
        assert request.reason == name
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_only_a_second_ctrl_c_after_a_second_means_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([10.0, 10.5, 12.0, 12.0])
    monkeypatch.setattr(stop.time, "monotonic", lambda: next(times))
    with StopRequest().listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's copy of the same Ctrl-C
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
