"""The metrics of a run, and their files: metrics.jsonl, TensorBoard and summary.json.

The names below are an API: scripts and notebooks read them from metrics.jsonl.
"""

import json
import logging
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
from yocou_jax.files import to_json, write_atomically
from yocou_jax.trees import flat

log = logging.getLogger(__name__)

STEP = "step"  # updates done
TOKENS = "tokens"  # targets trained on since step 0
LOSS = "loss"  # cross-entropy of the training batch, nats per token
BPB = "bpb"  # the same, in bits per byte of text
VAL_LOSS = "val_loss"  # on the fixed validation set, nats per token
VAL_BPB = "val_bpb"
GRAD_NORM = "grad_norm"  # of all gradients together, before clipping
LR = "lr"
TOKENS_PER_S = "tokens_per_s"  # over all devices, since the last logged step
MFU = "mfu"  # model FLOP/s divided by the peak of the devices; absent if the peak is unknown
DATA_WAIT_FRACTION = "data_wait_fraction"  # share of the time spent waiting for batches
SKIPPED_UPDATES = "skipped_updates"  # since step 0, because their gradient was not finite
SKIPPED_IN_A_ROW = "skipped_in_a_row"  # since the last update that was not skipped
Z_LOSS = "z_loss"  # mean of logsumexp(logits)^2
# With experts, means over layers and microbatches:
LOAD_BALANCE = "load_balance"  # the auxiliary loss; 1 if all experts get the same share
ROUTER_Z = "router_z"  # mean of logsumexp(router logits)^2
# The load of an expert is its tokens divided by those of the mean expert, so 1 if all get the same.
EXPERT_LOAD_MAX = "expert_load_max"  # of the expert with the most tokens, in any layer
EXPERT_LOAD_MIN = "expert_load_min"  # of the expert with the fewest tokens, in any layer


def mfu(
    tokens_per_s: float, flops_per_token: float, device_kind: str, devices: int
) -> float | None:
    """Model FLOP/s divided by the peak of all devices. None if the peak is unknown (a CPU)."""
    peak = hardware.peak_flops(device_kind)
    return None if peak is None else tokens_per_s * flops_per_token / (peak * devices)


class MetricsWriter:
    """Writes metrics.jsonl, summary.json and TensorBoard events of a run. Only process 0 makes one.

    resume_step: the step of the checkpoint (None: a new run). Rows after this step are dropped,
    because the run repeats these steps. Write the row of a step before you save its checkpoint: in
    the other order, a kill between the two loses the row. Every call writes immediately and in this
    thread. So a kill loses nothing, and a full disk raises OSError here. (With tensorboardX's
    SummaryWriter, the run would hang.)
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int | None = None):
        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.path, self.tensorboard = self.workdir / "metrics.jsonl", self.workdir / "tensorboard"
        self.tensorboard.mkdir(exist_ok=True)
        kept = [r for r in read_metrics(self.path) if resume_step and r[STEP] <= resume_step]
        write_atomically(self.path, "".join(to_json(row) + "\n" for row in kept))
        self._last_step = kept[-1][STEP] if kept else -1
        self._file = self.path.open("a", encoding="utf-8")
        # Without the suffix, two starts in the same second would write to one file.
        self._events = EventsWriter(str(self.tensorboard / "events"), f".{time.time_ns()}")
        # TensorBoard then ignores this step and later ones in earlier files of the run.
        first = self._last_step + 1
        self._write_event(first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row: numbers (or 0-d arrays) by name, without None. Steps must increase."""
        if step <= self._last_step:
            raise ValueError(f"Step {step} is written after step {self._last_step}.")
        self._last_step = step
        known = {k: v for k, v in values.items() if v is not None}
        row = {k: v if isinstance(v, int | str) else float(v) for k, v in known.items()}
        # A loss that is not finite is null here. In TensorBoard it is NaN.
        self._file.write(to_json({STEP: step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            if not isinstance(value, str):
                self._write_event(step, summary=_scalars({name: value}))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Writes a sample or the config, indented: TensorBoard would read it as Markdown."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._write_event(step, summary=tb.text(tag, indented))

    def hparams(self, config: Mapping) -> None:
        """Writes the config for TensorBoard's HPARAMS tab, with val_loss and val_bpb."""
        numbers_or_text = {
            k: v if isinstance(v, int | float | str) else repr(v) for k, v in flat(config).items()
        }
        for part in tb.hparams(numbers_or_text, {VAL_LOSS: 0.0, VAL_BPB: 0.0}):
            self._write_event(0, summary=part)

    def summary(self, values: Mapping) -> None:
        """Writes summary.json atomically."""
        write_atomically(self.workdir / "summary.json", to_json(dict(values), indent=1) + "\n")

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def _write_event(self, step: int, **fields) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **fields))
        self._events.flush()


def _scalars(values: Mapping[str, float]) -> Summary:
    """Not with tensorboardX's `scalar`, which prints a warning for each NaN."""
    return Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])


def write_scalars(folder: Path, step: int, values: Mapping[str, float]) -> None:
    """Writes numbers by name to a new file of TensorBoard events in `folder`, which is made.

    Not in the folder of a run: TensorBoard reads only the newest file of a folder, and would see
    nothing new of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
    events.write_event(Event(wall_time=time.time(), step=step, summary=_scalars(values)))
    events.close()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The rows of a metrics.jsonl, without a last line that a kill cut off. No file: no rows."""
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
