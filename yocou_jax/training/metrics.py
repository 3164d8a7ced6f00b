"""What a run reports, in files: metrics.jsonl, TensorBoard and summary.json.

The names below are an API: scripts, notebooks and later studies read them from metrics.jsonl.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import summary as tb
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from yocou_jax import hardware
from yocou_jax.files import write_atomically
from yocou_jax.trees import flat

log = logging.getLogger(__name__)

STEP = "step"  # updates done
TOKENS = "tokens"  # targets trained on since step 0
LOSS = "loss"  # cross-entropy of the training batch, nats per token
BPB = "bpb"  # the same in bits per byte of text
VAL_LOSS = "val_loss"  # on the fixed validation set, nats per token
VAL_BPB = "val_bpb"
GRAD_NORM = "grad_norm"  # global, before clipping
LR = "lr"
TOKENS_PER_S = "tokens_per_s"  # over all devices, since the last logged step
MFU = "mfu"  # share of the peak FLOP/s; absent where the peak is unknown
DATA_WAIT_FRACTION = "data_wait_fraction"  # share of the time spent waiting for batches
SKIPPED_UPDATES = "skipped_updates"  # non-finite updates since step 0
SKIPPED_IN_A_ROW = "skipped_in_a_row"  # of those, the latest ones without a good one between
Z_LOSS = "z_loss"  # mean logsumexp(logits)^2
LOAD_BALANCE = "load_balance"  # of the routers: 1 is uniform, experts / experts per token the worst
ROUTER_Z = "router_z"
EXPERT_LOAD_MAX = "expert_load_max"  # of the busiest expert, 1 is uniform
EXPERT_LOAD_MIN = "expert_load_min"


def mfu(
    tokens_per_s: float, flops_per_token: float, device_kind: str, devices: int
) -> float | None:
    """Model FLOP/s over the peak of all devices; None where the peak is unknown (a CPU)."""
    peak = hardware.of(device_kind).peak_flops
    return None if peak is None else tokens_per_s * flops_per_token / (peak * devices)


class MetricsWriter:
    """metrics.jsonl, summary.json and TensorBoard events of one run; only process 0 makes one.

    `resume_step` (None: from the start) drops what a killed run wrote after that checkpoint, so no
    step appears twice. Write the row of a step before saving its checkpoint: a kill between the
    two would lose it. All is written at once and in this thread, so a kill loses nothing, and a
    full disk raises its OSError here (tensorboardX's SummaryWriter would hang on it instead).
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int | None = None):
        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.path, self.tensorboard = self.workdir / "metrics.jsonl", self.workdir / "tensorboard"
        self.tensorboard.mkdir(exist_ok=True)
        kept = [r for r in read_metrics(self.path) if resume_step and r[STEP] <= resume_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._last_step = kept[-1][STEP] if kept else -1
        self._file = self.path.open("a", encoding="utf-8")
        # The suffix: two starts within one second would write the same file.
        self._events = EventsWriter(str(self.tensorboard / "events"), f".{time.time_ns()}")
        # TensorBoard forgets what earlier files of the run say of this step and later ones.
        first = self._last_step + 1
        self._event(first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One row: numbers (or 0-d arrays) by name; None is left out. Steps must rise."""
        if step <= self._last_step:
            raise ValueError(f"Step {step} is written after step {self._last_step}.")
        self._last_step = step
        known = {k: v for k, v in values.items() if v is not None}
        row = {k: v if isinstance(v, int | str) else float(v) for k, v in known.items()}
        # JSON has no NaN: a loss that is not finite is null there, and NaN in TensorBoard.
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._file.write(json.dumps({STEP: step, **clean}) + "\n")
        self._file.flush()
        for name, value in row.items():
            if not isinstance(value, str):
                # By hand: tensorboardX prints a warning of its own for each value that is NaN.
                scalar = Summary.Value(tag=name, simple_value=value)
                self._event(step, summary=Summary(value=[scalar]))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """A sample or the config, shown as typed (TensorBoard would read it as Markdown)."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._event(step, summary=tb.text(tag, indented))

    def hparams(self, config: Mapping) -> None:
        """The config for TensorBoard's HPARAMS tab, beside val_loss and val_bpb."""
        numbers_or_text = {
            k: v if isinstance(v, int | float | str) else repr(v) for k, v in flat(config).items()
        }
        for part in tb.hparams(numbers_or_text, {VAL_LOSS: 0.0, VAL_BPB: 0.0}):
            self._event(0, summary=part)

    def summary(self, values: Mapping) -> None:
        """Writes summary.json, all or nothing."""
        write_atomically(self.workdir / "summary.json", json.dumps(dict(values), indent=1) + "\n")

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def _event(self, step: int, **fields) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **fields))
        self._events.flush()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The rows of a metrics.jsonl (no file: none), without a last line that a kill cut off."""
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and STEP in row:
            rows.append(row)
    return rows
