"""Packages that only an extra installs: looked for, and asked for in a line where they are missing.

Nothing but `--data-path ffcv` and `bench data` imports ffcv.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.util import find_spec
from typing import Final

from resnet_ddp.exits import UserError

FFCV_MODULES: Final = ("ffcv", "ffcv.loader", "ffcv.fields.decoders", "ffcv.transforms")
# It is compiled against OpenCV and turbojpeg, which pip does not bring.
INSTALL_FFCV: Final = (
    "on Debian `apt-get install g++ pkg-config python3-dev libopencv-dev libturbojpeg0-dev`, with "
    "conda `conda install -c conda-forge cxx-compiler pkg-config opencv libjpeg-turbo`, and then "
    '`pip install -e ".[ffcv]"`'
)


def check_ffcv() -> None:
    """Look for ffcv without importing it.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("ffcv") is None:
        raise UserError(f"FFCV's Loader needs the package ffcv: {INSTALL_FFCV}")


def import_ffcv() -> None:
    """Import ffcv, which takes seconds and leaves torch with one thread.

    Raises:
        UserError: it is not installed, or does not work here.
    """
    check_ffcv()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it imports distutils
            for module in FFCV_MODULES:
                importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise UserError(f"ffcv is installed but does not work ({error}): {INSTALL_FFCV}") from error
