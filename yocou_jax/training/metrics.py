"""The metrics of a run, and their files: metrics.jsonl, TensorBoard and summary.json.

The names below are an API: scripts and notebooks read them from metrics.jsonl.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yocou_jax import hardware
from yocou_jax.files import to_json, write_atomically
from yocou_jax.training import events

log = logging.getLogger(__name__)

STEP = "step"  # updates done
TOKENS = "tokens"  # targets trained on since step 0
LOSS = "loss"  # cross-entropy of the training batch, nats per token
BPB = "bpb"  # the same, in bits per byte of text
VAL_LOSS = "val_loss"  # on the fixed validation set, nats per token
VAL_BPB = "val_bpb"
LOOPS = "loops"  # runs of each looped stage in this step, if the run draws it (model.num_loops)
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
# With run.analysis: inside/NAME, with the names of `Inside.scalars` (yocou_jax/analysis/inside.py).
INSIDE = "inside"

KV_BYTES = "kv_bytes_per_sequence"  # of the caches, in summary.json and TensorBoard

LOSSES = (LOSS, BPB, VAL_LOSS, VAL_BPB)
# In TensorBoard, a metric is in a group. One that no group names is in the last one. The numbers
# are there because TensorBoard sorts the groups by name.
GROUPS = {
    "1 loss": (LOSS, BPB, Z_LOSS),
    "2 validation": (VAL_LOSS, VAL_BPB),
    "3 loop": (LOOPS, INSIDE),
    "4 speed": (TOKENS_PER_S, MFU, DATA_WAIT_FRACTION),
    "5 optimizer": (LR, GRAD_NORM, SKIPPED_UPDATES, TOKENS),
    "6 experts": (LOAD_BALANCE, ROUTER_Z, EXPERT_LOAD_MAX, EXPERT_LOAD_MIN),
    "7 memory": (KV_BYTES,),
    "8 other": (),
}


def tag(name: str) -> str:
    """The name of a metric in TensorBoard: "group/name"."""
    base = name.partition("/")[0].partition("_loops_")[0]  # inside/NAME, and see `at_loops`
    last = list(GROUPS)[-1]
    group = next((group for group, names in GROUPS.items() if base in names), last)
    return f"{group}/{name}"


def at_loops(name: str, count: int) -> str:
    """The name of a validation metric with this loop count, such as val_loss_loops_3. A run that
    draws its loop counts has val_loss and val_bpb with each of them, too."""
    return f"{name}_loops_{count}"


def mfu(flops_per_s: float, device_kind: str, devices: int) -> float | None:
    """Model FLOP/s divided by the peak of all devices. None if the peak is unknown (a CPU)."""
    peak = hardware.peaks(device_kind).flops
    return None if peak is None else flops_per_s / (peak * devices)


class MetricsWriter:
    """Writes metrics.jsonl, summary.json and TensorBoard events of a run. Only process 0 makes one.

    resume_step: the step of the checkpoint (None: a new run). Rows after this step are dropped,
    because the run repeats these steps. Write the row of a step before you save its checkpoint: in
    the other order, a kill between the two loses the row. Every call writes immediately and in this
    thread. So a kill loses nothing, and a full disk raises OSError here. (With tensorboardX's
    SummaryWriter, the run would hang.)

    gflops_per_token: mean training cost, for the losses by GFLOPs in TensorBoard; 0: without them.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int | None = None,
        gflops_per_token: float = 0.0,
    ):
        self.workdir, self._gflops = Path(workdir), gflops_per_token
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.path = self.workdir / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if resume_step and r[STEP] <= resume_step]
        write_atomically(self.path, "".join(to_json(row) + "\n" for row in kept))
        self._last_step = kept[-1][STEP] if kept else -1
        self._file = self.path.open("a", encoding="utf-8")
        self.events = events.Events(self.workdir, restart=self._last_step + 1)
        self.events.layout([*LOSSES])
        # TensorBoard drops what has the step `restart` or a larger one. In these two groups the
        # "step" is a number of tokens or GFLOPs, so rows that are kept were dropped as well.
        for row in kept:
            self._by_cost(row)

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
        numbers = {tag(name): value for name, value in row.items() if not isinstance(value, str)}
        self.events.scalars(step, numbers)
        self._by_cost(row)

    def _by_cost(self, row: Mapping[str, Any]) -> None:
        """Writes the losses of a row again, by tokens and by GFLOPs instead of steps."""
        if TOKENS not in row:
            return
        losses = {name: row[name] for name in LOSSES if row.get(name) is not None}
        axes = {events.X_TOKENS: row[TOKENS], events.X_GFLOPS: round(row[TOKENS] * self._gflops)}
        for group, x in axes.items():
            if losses and x:
                self.events.scalars(x, {f"{group}/{name}": v for name, v in losses.items()})

    def summary(self, values: Mapping) -> None:
        """Writes summary.json atomically."""
        write_atomically(self.workdir / "summary.json", to_json(dict(values), indent=1) + "\n")

    def close(self) -> None:
        self._file.close()
        self.events.close()


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
