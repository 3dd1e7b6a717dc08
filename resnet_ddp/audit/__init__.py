"""The proof of the recipe: `resnet-ddp audit`, and the same for the records of a run."""

from resnet_ddp.audit.checks import Check, Deviation, as_json, render, verdict
from resnet_ddp.audit.paper import DEVIATIONS
from resnet_ddp.audit.recipe import run_audit
from resnet_ddp.audit.trained import audit_run, deviations_of

__all__ = [
    "DEVIATIONS",
    "Check",
    "Deviation",
    "as_json",
    "audit_run",
    "deviations_of",
    "render",
    "run_audit",
    "verdict",
]
