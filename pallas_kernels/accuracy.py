"""How the result of a kernel is judged: its error, compared with the error of the reference in the
same dtype. Both are errors against the reference in float32 on float32 inputs."""

import numpy as np

ERROR_RATIO = 1.5  # largest error that is accepted, over the reference's own


def relative_rms(x, y) -> float:
    """Root mean square of x - y, relative to that of y. x and y have one shape, any."""
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return float(np.sqrt(np.mean(np.square(x - y)) / np.mean(np.square(y))))


def error_ratio(rms: float, reference_rms: float, floor: float = 0.0) -> float:
    """The error over that of the reference, or over `floor` if that is larger. NaN if the error is
    NaN; so compare with `ratio <= ERROR_RATIO`."""
    return rms / max(reference_rms, floor)
