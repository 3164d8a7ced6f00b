"""The host side of a training run: data, state, checkpoints, evaluation, what is reported.

The host dispatches step n, and then waits for the metrics of step n-1. So one step is always in
flight, and the device does not wait for the host. Before an evaluation, a sample or a checkpoint,
the host waits for the newest step too.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from yocou_jax import accounting
from yocou_jax.checkpoint import Checkpointer, params_sha256
from yocou_jax.config import PROFILE_FROM, Config
from yocou_jax.data.pipeline import DataBundle, load_data
from yocou_jax.device_memory import memory_errors, training_hints
from yocou_jax.errors import UserError
from yocou_jax.files import expand_path, write_atomically
from yocou_jax.manifest import CODE, check_resume, describe
from yocou_jax.manifest import read as read_manifest
from yocou_jax.manifest import write as write_manifest
from yocou_jax.sharding import batch_sharding, batch_ways
from yocou_jax.training import metrics
from yocou_jax.training.banner import attention_choices, banner
from yocou_jax.training.evaluators import Analysis, Evaluator, Sample, Validation
from yocou_jax.training.events import Events
from yocou_jax.training.lock import WorkdirLock
from yocou_jax.training.preemption import StopRequest
from yocou_jax.training.reporter import Reporter
from yocou_jax.training.resume import END_FIELDS, FREE_FIELDS, compare_starts, load_source
from yocou_jax.training.step import Setup, TrainState, set_up
from yocou_jax.trees import flat

log = logging.getLogger(__name__)


class Stopwatch:
    """Measures the wall time of training between two logged steps. Paused time does not count."""

    def __init__(self):
        self._since = time.perf_counter()
        self.tokens, self.flops, self.waited = 0, 0.0, 0.0
        self.total_tokens, self.total_seconds = 0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def lap(self) -> tuple[float, float, float]:
        """(tokens per second, model FLOP/s, share of the time spent waiting for data) since the
        last lap."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        result = self.tokens / seconds, self.flops / seconds, self.waited / seconds
        self.total_tokens += self.tokens
        self.total_seconds += seconds
        self._since, self.tokens, self.flops, self.waited = now, 0, 0.0, 0.0
        return result


class Run:
    """One training run in its workdir. `train()` does all of it. Every process makes one.

    reporter: receives the events of the run. None: they are not shown.
    evaluators: each makes an Evaluator from this run, after the data was read.
    init_from: a workdir or an exported folder. A new run starts with its parameters, and with a
    fresh optimizer and step count (fine-tuning). A run that has a checkpoint resumes from that.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        reporter: Reporter | None = None,
        evaluators: Sequence[Callable[["Run"], Evaluator]] = (Validation, Analysis, Sample),
        init_from: str | Path | None = None,
    ):
        self.config, self.workdir = config, expand_path(workdir)
        self.reporter, self._make_evaluators = reporter or Reporter(), evaluators
        try:
            str(self.workdir).encode()
        except UnicodeEncodeError as error:  # Orbax takes no others
            raise UserError(f"The workdir {str(workdir)!a} must be valid Unicode.") from error
        self.init_from = None if init_from is None else expand_path(init_from).resolve()
        self.setup: Setup = set_up(config)
        with jax.set_mesh(self.setup.mesh):  # "auto" depends on its devices
            self.attention = attention_choices(config)  # before any work: a name may be wrong
        self.is_main = jax.process_index() == 0
        self.sharding = batch_sharding(self.setup.mesh)
        self.tokens_per_step = config.data.batch_size * config.data.sequence_length
        self.kv_bytes = accounting.kv_bytes(
            config.model, config.data.sequence_length, self.setup.compute.dtype.itemsize
        )
        self.loop_draw = config.model.loop_draw
        counts = self.loop_draw.counts if self.loop_draw else (None,)
        self.flops_per_token = {n: accounting.run_flops_per_token(config, n) for n in counts}
        self._steps: dict[int | None, Callable] = {}  # the compiled train step for each loop count
        self.started = time.perf_counter()
        self.stopwatch = Stopwatch()
        self._at_end, self._tracing = contextlib.ExitStack(), False
        self.writer: metrics.MetricsWriter | None = None
        self.values: dict[str, float] = {}  # of the newest step that was read

    def train(self) -> dict | None:
        """Trains until run.steps. If the workdir has a checkpoint, the run resumes from it.

        Returns the summary, or None if the run was asked to stop (SIGTERM) and saved its state.
        Raises UserError for a mistake that the user can correct. Older checkpoints stay intact.
        """
        run = self.config.run
        hints = training_hints(self.config, self.setup.mesh.size, batch_ways(self.setup.mesh))
        with (
            memory_errors("Training", hints),
            WorkdirLock(self.workdir) as self.lock,
            jax.set_mesh(self.setup.mesh),
            Checkpointer(self.workdir / "checkpoints", keep=run.keep_checkpoints) as checkpointer,
            self._at_end,
        ):
            self._load_data()
            state, first = self._begin(checkpointer)
            with (
                StopRequest() as stop,
                contextlib.closing(self.data.train(self.sharding, first)) as batches,
            ):
                state, done = self._loop(state, first, batches, checkpointer, stop)
                if done < run.steps:
                    checkpointer.close()
                    self.reporter.notice(
                        f"Stopped on request; step {done} is saved, the same command resumes."
                    )
                    return None
                checkpointer.close()  # first, so that a summary exists only if its checkpoint does
                summary = self._finish(state)
                if self.writer:
                    self.writer.summary(summary)
        return summary

    def _load_data(self) -> None:
        config = self.config
        self.data: DataBundle = load_data(config.data)
        needed, rows = self.data.tokenizer.vocab_size, config.model.vocab_size
        if needed > rows:
            raise UserError(
                f"The tokenizer has {needed} entries, but model.vocab_size={rows}; "
                f"set --config.model.vocab_size={needed} or more."
            )
        self.evaluators = [make(self) for make in self._make_evaluators]

    def _begin(self, checkpointer: Checkpointer) -> tuple[TrainState, int]:
        """The state (restored or fresh) and its step. Every check comes before the first write, so
        that a run that is refused changes nothing."""
        config, data = self.config, self.data
        manifest = describe(
            config.to_dict(),
            corpus=data.fingerprint,
            tokenizer=data.tokenizer.fingerprint,
            program=str(config.model.program),
            init_from=None,
        )
        notices: list[str] = []
        newest = checkpointer.newest_undamaged()
        before = None if newest is None else read_manifest(self.workdir)
        if before:
            check_resume(self.workdir, before, manifest, FREE_FIELDS + END_FIELDS)
            notices, exact = compare_starts(self.workdir, before, config, newest, self.init_from)
            resume = {"time": manifest["created"], "step": newest, "changes": notices}
            resume |= {"exact": exact, "before": {key: before.get(key) for key in CODE}}
            manifest |= {key: before.get(key) for key in ("created", "init_from")}
            manifest["resumes"] = [*before.get("resumes", []), resume]
        restored = checkpointer.restore_latest(self.setup.abstract_state)
        if restored:
            state, first = restored
            resumed = f"Resumed from the checkpoint of step {first} in {self.workdir}."
            notices = [resumed, *notices]
        else:
            state, first = self._fresh(manifest, notices), 0
        write_manifest(self.workdir, manifest)
        if self.is_main:
            if first < config.run.steps:  # a run with a summary counts as finished
                (self.workdir / "summary.json").unlink(missing_ok=True)
            self.writer = metrics.MetricsWriter(
                self.workdir,
                resume_step=first if restored else None,
                gflops_per_token=accounting.run_flops_per_token(config) / 1e9,
            )
            self._at_end.callback(self.writer.close)
            # Stored with the checkpoints: the cache may be deleted, and another Python may train
            # another tokenizer.
            write_atomically(self.workdir / "tokenizer.json", data.tokenizer.to_json())
            self._describe(self.writer.events, first)
        self.reporter.banner(
            f"YOCO-U in JAX: {config.model.program}",
            banner(config, data, self.setup.mesh, self.attention, self.workdir),
        )
        left = config.run.steps - first
        if config.run.profile_steps and left <= PROFILE_FROM:
            notices.append(
                f"No profile: it begins after {PROFILE_FROM} steps, and {left} are left."
            )
        for notice in notices:
            self.reporter.notice(notice)
        self.reporter.start(config.run.steps)
        return state, first

    def _describe(self, events: Events, step: int) -> None:
        """Tells TensorBoard what this run is: its config as text, its row in the HParams page."""
        config = self.config
        events.text("config", _as_text(config), step)
        events.scalars(step, {metrics.tag(metrics.KV_BYTES): self.kv_bytes})
        fields = {k: v for k, v in flat(config.to_dict()).items() if k not in FREE_FIELDS}
        shown = (metrics.VAL_BPB, metrics.VAL_LOSS, metrics.TOKENS_PER_S, metrics.KV_BYTES)
        events.hparams(facts(config) | fields, [*map(metrics.tag, shown)])

    def _fresh(self, manifest: dict, notices: list[str]) -> TrainState:
        """The state at step 0, with the parameters of `init_from` if there is one."""
        if self.init_from is None:
            return self.setup.init()
        setup, tokenizer = self.setup, self.data.tokenizer
        source = load_source(self.init_from, setup, self.config, tokenizer)
        manifest["init_from"] = {"path": str(self.init_from), "step": source.step}
        notices += source.notices
        return dataclasses.replace(setup.init(), params=source.params)

    def _loop(self, state, first, batches, checkpointer, stop) -> tuple[TrainState, int]:
        run = self.config.run
        pending, done = None, first
        self.stopwatch = Stopwatch()
        while done < run.steps:
            step = self._compiled(self.num_loops(done + 1), state)
            with self.stopwatch.waiting():
                batch = next(batches)
            if done - first == PROFILE_FROM:
                self._start_trace(state)
            state, out = step(state, batch)
            if pending is not None:
                self._report(*pending)
            done += 1
            pending = (done, out)
            stopping = stop.reached(done)
            ending = done == run.steps
            if done - first == PROFILE_FROM + run.profile_steps or ending:
                self._stop_trace(out)
            due = [e for e in self.evaluators if ending or done % e.every == 0]
            saving = stopping or ending or done % run.checkpoint_every == 0
            if due or saving:
                # The stopwatch must count this step, and not what comes after it.
                jax.block_until_ready(out)
                # Rows are written before the checkpoint of their step, or a kill could lose them.
                self._report(done, out, self._evaluate(due, state.params, done))
                pending = None
                with self.stopwatch.paused():
                    if saving:
                        self.lock.check()
                        checkpointer.save(done, state)
                    for evaluator in () if stopping else due:
                        self._try_show(evaluator, state.params, done)
            if stopping:
                break
        return state, done

    def num_loops(self, step: int) -> int | None:
        """The loop count of step 1, 2, ... if the run draws it. None: as the program says."""
        return self.loop_draw.draw(self.config.run.seed, step) if self.loop_draw else None

    def _compiled(self, num_loops: int | None, state: TrainState) -> Callable:
        """The train step with this loop count. Its first call compiles it; the stopwatch waits."""
        if num_loops not in self._steps:
            jax.block_until_ready(state)  # the stopwatch counts the steps before this one
            with self.stopwatch.paused():
                start, batch = time.perf_counter(), self.data.abstract_batch(self.sharding)
                self._steps[num_loops] = self.setup.step.lower(state, batch, num_loops).compile()
            loops = "" if num_loops is None else f" with loops={num_loops}"
            seconds = time.perf_counter() - start
            self.reporter.notice(f"Compiled the train step{loops} in {seconds:.1f} s.")
        return self._steps[num_loops]

    def _report(self, step: int, out: dict[str, jax.Array], evaluated: dict | None = None) -> None:
        """Waits for the metrics of a step, shows them, and writes a row if one is due."""
        values = {name: value.item() for name, value in jax.device_get(out).items()}
        in_a_row = int(values.pop(metrics.SKIPPED_IN_A_ROW))
        if in_a_row >= self.config.optimizer.max_skipped_updates:
            raise UserError(
                f"The gradient was not finite for {in_a_row} updates in a row, the last one at "
                f"step {step}; all of them were skipped and the run stops. The newest checkpoint "
                "is intact; try a lower optimizer.learning_rate or more optimizer.warmup_steps in "
                "another --workdir."
            )
        bits = self.data.bytes_per_token * math.log(2)
        values[metrics.BPB] = values[metrics.LOSS] / bits
        num_loops = self.num_loops(step)
        values |= {} if num_loops is None else {metrics.LOOPS: num_loops}
        self.stopwatch.tokens += self.tokens_per_step
        self.stopwatch.flops += self.tokens_per_step * self.flops_per_token[num_loops]
        logged = step % self.config.run.log_every == 0 or step == self.config.run.steps
        if logged or evaluated:
            rate, flops, waited = self.stopwatch.lap()
            values[metrics.TOKENS_PER_S], values[metrics.DATA_WAIT_FRACTION] = rate, waited
            share = metrics.mfu(flops, jax.devices()[0].device_kind, jax.device_count())
            values |= {} if share is None else {metrics.MFU: share}
            values[metrics.TOKENS] = step * self.tokens_per_step
            self.values = values | (evaluated or {})
            if self.writer:
                self.writer.write(step, self.values)
        self.reporter.update(step, self.values | values)
        if evaluated:
            self.reporter.evaluated(step, evaluated)

    def _evaluate(self, evaluators: Sequence[Evaluator], params, step: int) -> dict[str, float]:
        """The metrics of all evaluators together."""
        with self.stopwatch.paused():
            found = [evaluator.measure(params, step) for evaluator in evaluators]
        return {name: value for metrics in found for name, value in metrics.items()}

    def _try_show(self, evaluator: Evaluator, params, step: int) -> None:
        """Calls `show` of an evaluator. An error in it is logged, and the run continues."""
        try:
            evaluator.show(params, step)
        except Exception as error:
            if jax.process_count() > 1:  # the other processes may still wait inside `show`
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            log.warning("No %s at step %d: %s", evaluator.name, step, reason)

    def _start_trace(self, state: TrainState) -> None:
        """Starts the trace of run.profile_steps steps for TensorBoard. It begins after the first
        PROFILE_FROM steps of this process."""
        if self.is_main and self.config.run.profile_steps:
            jax.block_until_ready(state)  # or the end of the step before would be in the trace
            with self.stopwatch.paused():
                jax.profiler.start_trace(str(self.workdir))
            self._tracing = True
            self._at_end.callback(self._stop_trace)  # after an error, or a stop on request

    def _stop_trace(self, out: dict[str, jax.Array] | None = None) -> None:
        """out: metrics of the last step of the trace."""
        if self._tracing:
            self._tracing = False
            try:
                jax.block_until_ready(out)
            finally:
                with self.stopwatch.paused():
                    jax.profiler.stop_trace()

    def _finish(self, state: TrainState) -> dict:
        """The summary. tokens_per_s and wall_s count this process only, also after a resume."""
        config, stopwatch = self.config, self.stopwatch
        tokens = config.run.steps * self.tokens_per_step
        steps = collections.Counter(map(self.num_loops, range(1, config.run.steps + 1)))
        sha256 = params_sha256(state.params)
        if not stopwatch.total_tokens:  # resumed at the last step: there was nothing left to train
            with contextlib.suppress(OSError, ValueError, AttributeError):
                before = json.loads((self.workdir / "summary.json").read_text(encoding="utf-8"))
                if (before.get("tokens"), before.get("final_params_sha256")) == (tokens, sha256):
                    return before
            self.values |= self._evaluate(self.evaluators, state.params, config.run.steps)
        return {
            "program": str(config.model.program),
            "params": accounting.parameters(config.model).total,
            "tokens": tokens,
            "train_flops": sum(
                count * self.tokens_per_step * self.flops_per_token[num_loops]
                for num_loops, count in steps.items()
            ),
            **{name: self.values.get(name) for name in (metrics.VAL_LOSS, metrics.VAL_BPB)},
            **{name: value for name, value in self.values.items() if name.startswith("val_")},
            "tokens_per_s": stopwatch.total_tokens / max(stopwatch.total_seconds, 1e-9),
            "wall_s": time.perf_counter() - self.started,
            metrics.KV_BYTES: self.kv_bytes,
            "final_params_sha256": sha256,
        }


def facts(config: Config) -> dict[str, str | int | float]:
    """What tells runs apart. TensorBoard sorts the names, and its table shows the first five."""
    model = config.model
    tokens = config.run.steps * config.data.batch_size * config.data.sequence_length
    return {
        "1 program": str(model.program),
        "2 loops": model.num_loops
        if model.loop_draw
        else max(stage.num_loops for stage in model.program.stages),
        "3 learning rate": config.optimizer.learning_rate,
        "4 FLOPs": tokens * accounting.run_flops_per_token(config),
        "5 tokens": tokens,
        "6 parameters": accounting.parameters(model).total,
    }


def _as_text(config: Config) -> str:
    lines = []
    for group, fields in config.to_dict().items():
        lines += [f"{group}.{name} = {value!r}" for name, value in fields.items()]
    return "\n".join(lines)
