"""What others reported, to stand beside ours.

He et al. 2015, table 6 and Fig. 6 (errors of the plain nets are read off the figure).
nabla0001/resnet, its README: means of five runs on an M3 MacBook.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A test error in percent.

    Attributes:
        std: over the runs, where it was given.
        note: what else has to be known of the figure.
    """

    mean: float
    std: float | None = None
    note: str = ""

    def __str__(self) -> str:
        about = "about " if self.note else ""
        spread = "" if self.std is None else f" +- {self.std:.2f}"
        return f"{about}{self.mean:g}{spread}" if self.note else f"{self.mean:.2f}{spread}"


FROM_FIGURE = "read off Fig. 6"

HE_ET_AL = {
    "resnet20": Published(8.75),
    "resnet32": Published(7.51),
    "resnet44": Published(7.17),
    "resnet56": Published(6.97),
    "resnet110": Published(6.61, 0.16),  # 5 runs; the best 6.43
    "resnet1202": Published(7.93),
    "plain20": Published(9.0, note=FROM_FIGURE),
    "plain56": Published(13.0, note=FROM_FIGURE),
}
NABLA0001 = {
    "resnet20": Published(8.51, 0.22),
    "resnet56": Published(7.40, 0.27),
    "resnet110": Published(7.14, 0.20),
    "plain20": Published(9.78, 0.13),
    "plain56": Published(12.95, 0.22),
}
