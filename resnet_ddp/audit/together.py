"""The same experiment on W processes and on one, measured on the user's own machine."""

from __future__ import annotations

from resnet_ddp import machine
from resnet_ddp.audit.checks import Check
from resnet_ddp.equivalence import Trial, differences, trace, trace_on

TOLERANCE = 1e-10  # relative to a tensor's norm, in float64 after three iterations
MODELS = ("resnet20", "plain20")


def run_together(num_processes: int, device: str, *, srun: bool = False) -> list[Check]:
    """Train three iterations in float64 on W processes and on one, and compare all that came out.

    Args:
        srun: the W processes are those of this Slurm job, on all its nodes.

    Raises:
        UserError: the machine has no room for so many.
        TemporaryError: the processes failed.
    """
    device = machine.pick_device(device)
    device = "cpu" if device == "mps" else device  # which has no float64
    checks = []
    for model in MODELS:
        trial = Trial(model, device=device)
        others = trace_on(num_processes, trial, srun=srun)
        reference = trace(trial)
        worst: dict[str, float] = {}
        for traced in others:
            for kind, difference in differences(reference, traced).items():
                worst[kind] = max(worst.get(kind, 0.0), difference)
        checks += [
            Check(
                id=f"{model}-{kind}",
                claim=f"{model}: {kind} on {num_processes} processes and on one, {device}",
                source="law of the global batch",
                expected=f"at most {TOLERANCE:g} apart",
                actual=f"{difference:.1e}",
                passed=difference <= TOLERANCE,
            )
            for kind, difference in worst.items()
        ]
    return checks
