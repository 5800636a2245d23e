"""Scores of answers and statistics over questions, for quality_report.py.

Owns the definitions: F1 and exact match as the LongBench scorer has them, the share of the gap
between no recompute and full prefill, bootstrap intervals.  Pure functions over plain arrays;
knows no file.
"""
import re
import string
from collections import Counter

import numpy as np

N_RESAMPLE = 10_000


def normalise(text):
    """Lower case, no punctuation, no articles, single spaces (LongBench's normalize_answer)."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer, gold):
    """F1 of the bags of tokens (LongBench's qa_f1_score); nothing in common, or nothing at all, is 0."""
    got, want = normalise(answer).split(), normalise(gold).split()
    common = sum((Counter(got) & Counter(want)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(got), common / len(want)
    return 2 * precision * recall / (precision + recall)


def best_f1(answer, golds):
    return max((f1(answer, gold) for gold in golds), default=0.0)


def exact_match(answer, golds):
    return float(any(normalise(answer) == normalise(gold) for gold in golds))


def shares(kl, kl_none):
    """Recovered share of the gap, a question each: 1 - KL / KL of no recompute."""
    return 1 - np.asarray(kl, dtype=float) / np.asarray(kl_none, dtype=float)


def share_of_means(kl, kl_none, axis=None):
    return 1 - np.mean(kl, axis=axis) / np.mean(kl_none, axis=axis)


def bootstrap(statistic, *columns, seed=0, level=0.95):
    """Percentile interval of statistic(*columns, axis=1) over resampled questions, one resample a row.

    Columns are resampled together, so a statistic of several is a paired one.
    """
    columns = [np.asarray(column, dtype=float) for column in columns]
    n = len(columns[0])
    rows = np.random.default_rng(seed).integers(0, n, (N_RESAMPLE, n))
    values = statistic(*(column[rows] for column in columns), axis=1)
    return tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))

