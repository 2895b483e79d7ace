"""What the pictures share."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure that belongs to no window.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError('drawing needs matplotlib: pip install "tinygpt[plot]".') from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", picture: str | Path) -> Path:
    """Write a figure in the format of the suffix, and return the path."""
    figure.savefig(picture, dpi=130)
    return Path(picture)


def plain_text(text: str) -> str:
    """Return text that matplotlib draws as it is: no formula between dollars, no label hidden by an underscore."""
    return re.sub(r"^_", "\u2009_", text.replace("$", r"\$"))


def plain_axes(axes: Any, *, grid: str = "both") -> None:
    """Give axes a light grid behind what is drawn."""
    axes.grid(axis=grid, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
