"""What the pictures of the Explanation pages share: colours, axes, and the list of them all."""

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

GRAY, BLUE, ORANGE, GREEN, PURPLE = "#7d8590", "#2f81c7", "#d9822b", "#3a9d5d", "#9a6dd7"

FIGURES: dict[str, Callable[[], Figure]] = {}


def figure(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Register a picture under the name of its function."""
    FIGURES[draw.__name__] = draw
    return draw


def panels(columns: int, height: float = 2.7, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of page width and its axes in one row."""
    page = Figure(figsize=(8, height), layout="constrained")
    axes = page.subplots(1, columns, squeeze=False, **options)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return page, axes


def heatmap(axes: Any, values: Tensor, color: str = BLUE) -> None:
    """Draw a matrix of values from 0 (nothing) to 1 (the colour)."""
    image = torch.ones(*values.shape, 4)
    image[..., :3] = torch.tensor(mpl.colors.to_rgb(color))
    image[..., 3] = values
    axes.imshow(image.numpy(), interpolation="nearest")


STYLE: Any = {
    "svg.hashsalt": "tinygpt",  # the same picture is the same file
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.titlecolor": GRAY,
    "axes.titlesize": 10,
    "text.color": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "font.size": 9,
}
