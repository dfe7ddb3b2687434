"""Logistic regression on standardised features, as weights on the features as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from circuitvit.errors import DataError, OptionError

MOST_STEPS = 10_000
"""Steps after which the regression stops; it converges long before on standardised features."""

ROUNDING = 1e-6
"""A feature that varies less, relative to the largest of all, is a constant with rounding errors on it.

Standardised it would be as loud as any other, and images that ran in one batch share their errors.
"""


def check_fit(strength: object, folds: int, extra: str) -> None:
    """Refuse settings of a fit, or the lack of scikit-learn, before long work.

    Args:
        strength: see `logistic_fit`.
        folds: of the cross-validation.
        extra: the extra of this package that installs scikit-learn.

    Raises:
        OptionError: for fewer than two folds, or a strength that is no number above 0.
        DataError: if scikit-learn is missing.
    """
    if folds < 2:
        raise OptionError(f"cross-validation needs at least two folds, not {folds}")
    if not isinstance(strength, (int, float)) or not 0 < strength < float("inf"):
        raise OptionError(f"the strength of a fit is a number above 0, not {strength!r}")
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        what = "a head is" if extra == "heads" else "probes are"
        raise DataError(f"{what} fitted with scikit-learn: pip install circuitvit[{extra}]") from error


def logistic_fit(
    features: Float[NDArray[np.float64], "sample width"],
    targets: Int64[NDArray[np.int64], " sample"],
    strength: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight `(class, width)` and bias `(class,)` of the regression on at least two classes.

    With two classes the logits are equal but for their sign, and their difference is the log-odds.

    Args:
        features: `(sample, width)`, standardised for the fit.
        targets: numbers of the classes; the rows of the weight are those that occur, in rising order.
        strength: of the fit, against a penalty on squared weights (scikit-learn's `C`).
    """
    from sklearn.linear_model import LogisticRegression

    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > ROUNDING * np.abs(features).max(), spread, np.inf)
    regression: Any = LogisticRegression(C=strength, max_iter=MOST_STEPS)
    regression.fit((features - mean) / spread, targets)
    weight, bias = regression.coef_, regression.intercept_
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / spread
    return weight, bias - weight @ mean
