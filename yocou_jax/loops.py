"""What the training steps of a run draw their loop counts from, if `model.num_loops` is a text.

    "1,2,3,5"      these counts, each with the same probability
    "poisson(3)"   1 + Poisson(2), so about 3 on average; never more than 6, twice the mean

Each count is compiled once, so there must not be too many. That is why the Poisson draw has a
largest count: the probabilities of the others are scaled up to 1.
"""

import dataclasses
import hashlib
import math
import re

MAX_COUNTS = 32


@dataclasses.dataclass(frozen=True)
class LoopDraw:
    """Loop counts, their probabilities, and the mean that a Poisson draw was written with."""

    counts: tuple[int, ...]
    probabilities: tuple[float, ...]
    mean: int | None = None

    @classmethod
    def parse(cls, text: str) -> "LoopDraw | None":
        """Reads a text as above. None: it is none, or has too many counts, or one of them twice."""
        if match := re.fullmatch(r"\s*poisson\(\s*([0-9]{1,2})\s*\)\s*", text):
            mean = int(match[1])
            if not 2 <= mean <= MAX_COUNTS // 2:
                return None
            counts = range(1, 2 * mean + 1)
            rates = [(mean - 1) ** (n - 1) / math.factorial(n - 1) for n in counts]
            total = sum(rates)
            return cls(tuple(counts), tuple(rate / total for rate in rates), mean)
        parts = text.split(",")
        if not 2 <= len(parts) <= MAX_COUNTS:
            return None
        if not all(re.fullmatch(r"\s*[1-9][0-9]{0,3}\s*", part) for part in parts):
            return None
        counts = sorted({int(part) for part in parts})
        if len(counts) < len(parts):
            return None
        return cls(tuple(counts), (1 / len(counts),) * len(counts))

    def own_count(self, written: list[int]) -> int:
        """The count of the model itself, which inference and validation use by default.

        It is the mean of a Poisson draw. Of other counts it is that of the architecture, if it has
        one (`written`: all that it has) and it can be drawn; if not, the largest one.
        """
        if self.mean is not None:
            return self.mean
        return written[0] if len(written) == 1 and written[0] in self.counts else self.counts[-1]

    def draw(self, seed: int, step: int) -> int:
        """The count of step 1, 2, ... of a run with this seed.

        It depends on nothing else. So all processes draw the same count, and a resumed run draws
        those of a run that was not interrupted.
        """
        digest = hashlib.sha256(f"loops {seed} {step}".encode()).digest()
        rest = int.from_bytes(digest[:6], "big") / 2**48  # uniform in [0, 1)
        for count, probability in zip(self.counts, self.probabilities, strict=True):
            rest -= probability
            if rest < 0:
                return count
        return self.counts[-1]  # the probabilities may sum to a little less than 1
