"""The events of a run, which TensorBoard shows.

They are files in the workdir itself, so TensorBoard names a run as its workdir. With --logdir=runs
it shows the runs side by side:

* Time series: the metrics in groups (GROUPS in metrics.py). The two groups X_TOKENS and X_GFLOPS
  have the losses again, with tokens and training GFLOPs on the axis where TensorBoard says "step".
  With them, programs that cost different amounts can be compared.
* Custom scalars: the losses by tokens and by GFLOPs, as two pages.
* HParams: a row per run. Names that begin with a number are facts about the run; they stand first,
  because TensorBoard sorts the names.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import summary as tb
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

X_TOKENS, X_GFLOPS = "x_tokens", "x_gflops"


class Events:
    """Appends to a new file in the workdir. Each event is written immediately and in this thread.

    restart: TensorBoard ignores what earlier files of this workdir have at this step and later.
    """

    def __init__(self, workdir: str | os.PathLike, restart: int | None = None):
        Path(workdir).mkdir(parents=True, exist_ok=True)
        # Without the suffix, two starts in the same second would write to one file. TensorBoard
        # reads the files of a run in the order of their names, so they begin with the same word.
        self._writer = EventsWriter(str(Path(workdir) / "events"), f".{time.time_ns()}")
        if restart is not None:
            self._write(restart, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by tag."""
        # Not with tensorboardX's `scalar`, which prints a warning for each NaN.
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step, summary=Summary(value=found))

    def text(self, tag: str, text: str, step: int) -> None:
        """Writes a text, indented: TensorBoard would read it as Markdown."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._write(step, summary=tb.text(tag, indented))

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """Writes the bytes of a PNG file."""
        image = Summary.Image(colorspace=4, encoded_image_string=png)
        self._write(step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def hparams(self, fields: Mapping[str, Any], metrics: list[str]) -> None:
        """Writes the row of this run in the HParams page: `fields`, and the last values of the
        scalars with the tags `metrics`."""
        plain = {k: v if isinstance(v, int | float | str) else repr(v) for k, v in fields.items()}
        for part in tb.hparams(plain, dict.fromkeys(metrics, 0.0)):
            self._write(0, summary=part)

    def layout(self, losses: list[str]) -> None:
        """Writes the pages of Custom scalars for these losses."""
        pages = {
            title: {name: ["Multiline", [f"{group}/{name}$"]] for name in losses}
            for title, group in (("Loss by tokens", X_TOKENS), ("Loss by GFLOPs", X_GFLOPS))
        }
        self._write(0, summary=tb.custom_scalars(pages))

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **fields) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **fields))
        self._writer.flush()
