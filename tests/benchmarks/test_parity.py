"""Two training runs are judged by how far a third differs from the first."""

import numpy as np

from benchmarks import parity


def test_parity_judges_by_its_control():
    base = np.linspace(5.0, 3.0, 20)
    control = parity.compare(base + 1e-4, base)
    assert parity.tolerance(control) == 5 * control["largest"]
    assert parity.within(parity.compare(base - 4e-4, base), control)
    assert not parity.within(parity.compare(base - 6e-4, base), control)
    assert not parity.within(parity.compare(base * np.nan, base), control)
    same = parity.compare(base, base)
    assert parity.tolerance(same) == parity.FLOOR
