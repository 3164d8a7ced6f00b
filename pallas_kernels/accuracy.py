"""How the result of a kernel is judged: its error, compared with the error of the reference in the
same dtype. Both are errors against the reference in float32 on float32 inputs."""

import numpy as np

ERROR_RATIO = 1.5  # largest error that is accepted, over the reference's own


def relative_rms(x, y) -> float:
    """Root mean square of x - y, relative to that of y."""
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return float(np.sqrt(np.mean(np.square(x - y)) / np.mean(np.square(y))))


def error_ratio(rms: float, reference_rms: float, dtype) -> float:
    """The error over that of the reference. In float32 both are exact up to their order of sums: 8
    roundings are allowed. NaN if the error is NaN; so compare with `ratio <= ERROR_RATIO`."""
    allowed = 8 * np.finfo(np.float32).eps if np.dtype(dtype) == np.float32 else 0.0
    return rms / max(reference_rms, allowed)
