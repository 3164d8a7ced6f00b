"""The figures that `--help` expects of a run agree with the accounting and the paper."""

import re

import numpy as np

from benchmarks import paper
from configs import yocou_1b
from experiments import profile_inference
from yocou_jax import accounting
from yocou_jax.config import Config

BIG = Config.from_dict(yocou_1b.get_config()).model


def _line(start: str) -> list[float]:
    """The figures in one line of the docstring of the module."""
    (line,) = [x for x in profile_inference.__doc__.splitlines() if x.strip().startswith(start)]
    return [float(word) for word in re.findall(r"\d+\.\d+", line)]


def test_figures_of_the_docstring_agree_with_the_accounting_and_the_paper():
    other = accounting.sibling(BIG, "transformer")
    flops, own = accounting.prefill_flops_per_token, BIG
    expected = [flops(other, n) / flops(own, n) for n in paper.LENGTHS]
    np.testing.assert_allclose(_line("prefill  "), expected, rtol=0, atol=0.00501)
    speeds = paper.TABLES["prefill"]
    measured = np.divide(speeds["yoco_u"], speeds["transformer"])
    np.testing.assert_allclose(_line("measured  "), measured, rtol=0, atol=0.00501)
    shapes = [(8192, 32), (16_384, 32), (65_536, 32), (262_144, 4), (262_144, 8), (262_144, 32)]
    for name in ("transformer", "yoco"):
        read = accounting.decode_bytes_per_step
        ratio = [read(accounting.sibling(BIG, name), b, n) / read(own, b, n) for n, b in shapes]
        np.testing.assert_allclose(_line(f"{name}  "), ratio, rtol=0, atol=0.00501)
