"""A child process that checks implementations which hang, crash, fail or are wrong.

tests/kernels/test_verdicts.py lets `verdicts` start it in place of `pallas_kernels.check`.
"""

import os
import time

import jax

from pallas_kernels import check
from pallas_kernels.attention import api, reference


def hang(*args, **options):
    time.sleep(1000)


def crash(*args, **options):
    os.abort()


def fail(*args, **options):
    raise RuntimeError("Too many resources requested for launch.\nMore lines follow.")


def wrong_gradient(q, k, v, mask, **options):
    v = 1.02 * v - 0.02 * jax.lax.stop_gradient(v)
    return reference.attention(q, k, v, mask, **options)


def not_a_number(q, k, v, lengths, **options):
    """Where a row sees no key."""
    out, lse = reference.decode(q, k, v, lengths, **options)
    return jax.numpy.where((lengths == 0)[:, None, None], jax.numpy.nan, out), lse


def wrong_decode(q, k, v, lengths, **options):
    out, lse = reference.decode(q, k, v, lengths, **options)
    return 1.02 * out, lse


def fake(attention=reference.attention, decode=reference.decode) -> api.Implementation:
    """It claims to be written for CPUs, and to support every call."""
    return api.Implementation(lambda call: None, attention, decode, platform="cpu")


FAKES = {
    "hangs": fake(decode=hang),
    "crashes": fake(decode=crash),
    "fails": fake(fail),
    "wrong": fake(decode=wrong_decode),
    "wrong_gradient": fake(wrong_gradient),
    "not_a_number": fake(decode=not_a_number),
    "good": fake(),
}
# Few and small, because most of the time is compilation.
CASES = {
    "window_attention": (check.Case(9, 9, 8, window=4, segments=True, lse=True),),
    "cross_attention": (check.Case(5, 9, 8, q_offset=4, lengths=True, lse=True),),
    "decode_window": (check.Case(1, 9, 8),),
    "decode_cross": (check.Case(1, 9, 8),),
}

if __name__ == "__main__":
    api._REGISTRY.update(FAKES)
    api.OPERATIONS = ("decode_window",)  # one is enough
    check.CASES.update(CASES)
    check.run()
