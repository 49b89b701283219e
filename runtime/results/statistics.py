"""Means over tasks and their intervals."""
import math
import warnings
from typing import NamedTuple

import numpy as np
import scipy  # not scipy.stats, which is slow to import: it is imported when it is first used, which a training never does

RESAMPLES = 2000
LARGEST_DIGITS = 6  # before the point; larger numbers are written with an exponent
MOST_DIGITS = 8     # after the point; smaller numbers are written with an exponent
ROUNDING = 1e-6       # values of single precision that differ by no more than this part of them differ by rounding alone
NUMBERS_AT_A_TIME = 2 ** 24  # of resamples in memory; does not change the results
FAR_FROM_NORMAL = 1, 3  # skewness and excess kurtosis, each without its sign
LEAST_FOR_RANKS = 10  # differences for a signed-rank test


class Unit(NamedTuple):
    """How a metric is shown."""
    title: str
    factor: int                     # from the unit of the scores to the one that is shown
    digits: int                     # after the point
    higher_is_better: bool
    # Of the axis of a picture; None at the top: diverged values must be cut off; no limits: matplotlib's.
    limits: tuple[int, int | None] | None
    starts_with_support: bool = True  # the first column is of support rows, another quantity than the others


UNITS = {'accuracy': Unit('accuracy in %', 100, 2, True, (0, 100)), 'loss': Unit('mean squared error', 1, 4, False, (0, None)),
         'return': Unit('average return', 1, 2, True, None, starts_with_support=False)}


@np.errstate(all='ignore')  # adaptation diverged on some tasks
def statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over tasks, standard deviation, and half-width of the 95% interval of the mean, [...] in double precision, of values
    [tasks, ...].

    The standard deviation divides by the number of tasks; the half-width is 1.96 * std / sqrt(tasks), and nan of one task, which
    says nothing about others.
    """
    values = np.ascontiguousarray(values, np.float64)  # sums depend on the order in memory
    std = values.std(axis=0)
    return values.mean(axis=0), std, 1.96 * std / np.sqrt(len(values)) if len(values) > 1 else np.full_like(std, np.nan)


@np.errstate(all='ignore')  # adaptation diverged on some tasks
def over_tasks_and_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds and tasks, half-width of a 95% interval that covers other seeds and other tasks, and the p-value of a mean of 0.

    All are [...], of values [seeds, tasks, ...], two seeds or more, all on the same tasks. The half-width is the root of the sum
    of squares of those of two t-intervals, of the mean of the seeds and of the mean of the tasks. It counts what depends on both
    twice: in simulations 95 to 99.7% of the intervals hold the true mean. The p-value is the level whose interval ends at 0.
    """
    seeds, tasks = values.shape[:2]
    mean = values.mean(axis=(0, 1))
    errors = values.mean(axis=1).std(axis=0, ddof=1) / np.sqrt(seeds), values.mean(axis=0).std(axis=0, ddof=1) / np.sqrt(tasks)

    def half_width(level):
        return np.hypot(*(scipy.stats.t.isf(level / 2, count - 1) * error for count, error in zip((seeds, tasks), errors)))

    low, high = np.full(mean.shape, -300.0), np.zeros(mean.shape)  # logarithms of the level; halved until they meet
    for _ in range(50):
        middle = (low + high) / 2
        includes_zero = half_width(10 ** middle) >= np.abs(mean)
        low, high = np.where(includes_zero, middle, low), np.where(includes_zero, high, middle)
    p = np.where(low == -300.0, 0.0, 10 ** high)
    return mean, half_width(0.05), np.where(np.isfinite(mean + errors[0] + errors[1]), p, np.nan)


def bootstrap(values: np.ndarray) -> np.ndarray:
    """95% interval of the mean over tasks by the percentile bootstrap (Efron & Tibshirani, 1993, chapter 13): its ends, [columns,
    2], a function of the values, [tasks, columns]."""
    if len(values) < 2:
        return np.repeat(values.T, 2, axis=1)
    batch = min(max(NUMBERS_AT_A_TIME // values.size, 2), 100)
    with np.errstate(all='ignore'), warnings.catch_warnings():  # scipy warns of values that are not finite, or all alike
        warnings.simplefilter('ignore')
        interval = scipy.stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method='percentile', batch=batch,
                                         random_state=np.random.default_rng(0)).confidence_interval
    return np.stack([interval.low, interval.high], axis=1)


@np.errstate(all='ignore')
def difference(values: np.ndarray, base: np.ndarray) -> np.ndarray:
    """values - base, 0 where they are equal but for ROUNDING; nan or infinite, without a warning, where one of them is not finite."""
    return np.where(np.abs(values - base) < ROUNDING * np.maximum(np.abs(values), np.abs(base)), 0.0, values - base)


def number(value: float, digits: int) -> str:
    """Text: a number with some digits after the point, or if it is very large, as of diverged runs, or very small, with an exponent."""
    return f'{value:.{digits}f}' if not abs(value) >= 10 ** LARGEST_DIGITS and digits <= MOST_DIGITS else f'{value:.2e}'


def plus_minus(mean: float, half: float, digits: int) -> str:
    """Text: a mean and the half-width of its interval, if it has one; with more digits where the half-width needs them."""
    if ROUNDING * abs(mean) < half < 10.0 ** -digits:
        digits = math.ceil(1 - math.log10(half))
    return number(mean, digits) + (f' ± {number(half, digits)}' if math.isfinite(half) or not math.isfinite(mean) else '')


def figure(mean: float, half: float, metric: str) -> str:
    """Text: a mean and the half-width of its interval, both of UNITS[metric] before its factor, as tables show them."""
    unit = UNITS[metric]
    return plus_minus(mean * unit.factor, half * unit.factor, unit.digits)


def paired_test(values: np.ndarray, base: np.ndarray) -> tuple[float, bool]:
    """The p-value of a two-sided paired test on values [tasks], and whether it is Wilcoxon's signed-rank test instead of the t-test.

    It is where the differences are FAR_FROM_NORMAL: a few tasks then decide the mean, and the t-test's p-value may be far off.
    Equal values are ranked, and their ranks left out (Pratt, 1959). The p-value is 1 if all are equal but for ROUNDING; nan if one
    is not finite, or if the difference is the same for all tasks.
    """
    differences = difference(values, base)
    if not differences.any() or np.array_equal(values, base, equal_nan=True):
        return 1.0, False
    with np.errstate(all='ignore'), warnings.catch_warnings():  # scipy warns of values that are not finite, or all alike
        warnings.simplefilter('ignore')
        shape = np.abs([scipy.stats.skew(differences), scipy.stats.kurtosis(differences)])
        if len(differences) >= LEAST_FOR_RANKS and (shape > FAR_FROM_NORMAL).any():
            ranked = _sizes_as_numbers(differences, ROUNDING * np.maximum(np.abs(values), np.abs(base)))
            return float(scipy.stats.wilcoxon(ranked, zero_method='pratt').pvalue), True
        varies = np.ptp(differences) > ROUNDING * np.abs(differences).max()
        return float(scipy.stats.ttest_1samp(differences, 0).pvalue) if varies else math.nan, False


def _sizes_as_numbers(differences, rounding):
    """Differences, the sizes of which are replaced by their numbers in order, one number for sizes that are equal but for rounding."""
    sizes = np.abs(differences)
    order = np.argsort(sizes)
    is_larger = np.diff(sizes[order], prepend=0) > np.where(sizes[order] > 0, rounding[order], 0)
    numbers = np.empty(len(sizes))
    numbers[order] = np.cumsum(is_larger)
    return np.sign(differences) * numbers


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values corrected for their number: the chance that any of them is wrong stays below the level (Holm, 1979). nan are not counted."""
    p, order = np.ravel(p_values), np.argsort(p_values, axis=None)  # nan last
    factors = np.maximum(np.sum(~np.isnan(p)) - np.arange(p.size), 1)
    corrected = np.empty(p.size)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return corrected.reshape(np.shape(p_values))
