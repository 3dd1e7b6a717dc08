"""torchvision, imported where it is used and also where its compiled half does not fit torch.

Its binaries are built for CUDA. With a torch built for the CPU alone, `import torchvision` stops at
an operator that was never registered, although data sets and transforms need none of its operators.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

# Kept for as long as the process lives: the declarations go when their library does.
_declarations: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Return torchvision with `datasets` and `transforms`.

    Raises:
        ImportError: it is not installed, or does not go with this torch at all.
    """
    try:
        return _import()
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise ImportError(f"torchvision does not go with this torch: {error}") from error
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for signature in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        library.define(signature)  # type: ignore[no-untyped-call]
    _declarations.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return _import()


def _import() -> ModuleType:
    importlib.import_module("torchvision.datasets")
    importlib.import_module("torchvision.transforms")
    return importlib.import_module("torchvision")
