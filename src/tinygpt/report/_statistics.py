"""The few statistics that the report's observations rest on: robust, vectorized, no opinion about runs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tinygpt.report._log import Floats

# From a median absolute deviation to the standard deviation of a normal distribution, and from that to the standard
# error of a median.
MAD_TO_SIGMA = 1.4826
MEDIAN_ERROR = 1.2533
# 97.5 % quantiles of Student's t by degrees of freedom; between two the larger one is taken.
_T_QUANTILES = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 10: 2.228, 12: 2.179}
_T_QUANTILES |= {15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980}
_ROWS_AT_ONCE = 8_192


class Line(NamedTuple):
    """A straight line fitted by least squares, with the half-width of the slope's 95 % interval."""

    slope: float
    error: float


def fit_line(x: Floats, y: Floats) -> Line:
    """Fit a line to three points or more; curvature counts as noise, so the interval is rather too wide."""
    centered = x - x.mean()
    spread = float((centered**2).sum())
    slope = float((centered * y).sum()) / spread
    residuals = y - y.mean() - slope * centered
    freedom = len(x) - 2
    quantile = _T_QUANTILES[max(known for known in _T_QUANTILES if known <= freedom)]
    return Line(slope, quantile * math.sqrt(float((residuals**2).sum()) / freedom / spread))


def rolling_median(values: Floats, window: int) -> Floats:
    """Return the median around each value; the first and last half window have those of the nearest whole one."""
    window = min(window, len(values) - 1 + len(values) % 2)
    return np.pad(_by_window(np.median, values, window), window // 2, mode="edge")


def _by_window(reduce: Callable[..., Floats], values: Floats, window: int) -> Floats:
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    # A few rows at a time: the median copies, and a window of a whole long run would be a large copy.
    parts = [reduce(windows[row : row + _ROWS_AT_ONCE], axis=1) for row in range(0, len(windows), _ROWS_AT_ONCE)]
    return np.concatenate(parts)


def robust_scores(values: Floats, *, window: int = 51) -> Floats:
    """Return each value's distance from its rolling median in robust standard deviations of its surroundings.

    The first half window is 0: where a run begins steeply nothing can be said about single values.
    """
    residuals = values - rolling_median(values, window)
    scale = MAD_TO_SIGMA * rolling_median(np.abs(residuals), 2 * window + 1)
    # A series without any noise has no scale; then what differs by a thousandth is already remarkable.
    scores: Floats = residuals / np.maximum(scale, 1e-4 * np.abs(values) + 1e-12)
    scores[: window // 2] = 0.0
    return scores


class Steps(NamedTuple):
    """For each place between two windows: how much higher the later median is, and that in standard errors."""

    rise: Floats
    score: Floats


def level_changes(values: Floats, window: int) -> Steps:
    """Compare the medians of `window` values before and after each place; entry `i` is that before `i + window`."""
    medians = _by_window(np.median, values, window)
    rise = medians[window:] - medians[:-window]
    jitter = np.abs(np.diff(values))
    # Differences of neighbours see noise and not the trend; theirs is that of one value times the root of two.
    noise = _by_window(np.median, jitter, 2 * window - 1) * MAD_TO_SIGMA / math.sqrt(2)
    error = noise * MEDIAN_ERROR * math.sqrt(2 / window)
    return Steps(rise, rise / np.maximum(error, 1e-12))


class Bins(NamedTuple):
    """A long series for drawing: the mean, lowest and highest value of consecutive values."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats
    size: int


def bin_series(x: Floats, y: Floats, most: int) -> Bins:
    """Put consecutive values together until there are at most `most`; values that are not finite are left out."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    size = max(1, -(-len(y) // most))
    starts = np.arange(0, len(y), size)
    if not len(y):
        return Bins(x, y, y, y, 1)
    counts = np.diff(np.append(starts, len(y)))
    mean = np.add.reduceat(y, starts) / counts
    middle = np.add.reduceat(x, starts) / counts
    return Bins(middle if size > 1 else x, mean, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts), size)


def smooth(values: Floats, window: int) -> Floats:
    """Return the mean of the last `window` values at each place, of fewer at the beginning."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
