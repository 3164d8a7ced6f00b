"""A trained model that continues texts, and reports on stderr how fast."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax

from experiments.terminal import Printer, note
from pallas_kernels import OPERATIONS, UnsupportedCall, choose_implementation
from yocou_jax import inference, pretrained
from yocou_jax.config import ModelConfig
from yocou_jax.device_memory import memory_errors
from yocou_jax.errors import UserError
from yocou_jax.inference import Generation, Sampling
from yocou_jax.inference.sampling import check as check_sampling
from yocou_jax.inference.text import TextRow

HINTS = (  # if the memory is used up
    "a smaller --max_new_tokens or --num_samples",
    "a smaller --chunk (for long prompts)",
    "more devices with --tensor or --context",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `experiments.generate` (see there), checked."""

    workdir: str
    step: int | None
    num_loops: int | None
    attention: str
    sampling: Sampling
    num_samples: int
    max_new_tokens: int
    seed: int
    stops: list[str]
    chunk: int | None


class Writer:
    """A loaded model and its options. A call continues texts on stdout."""

    def __init__(self, options: Options, mesh: jax.sharding.Mesh | None):
        check_sampling(options.sampling, 1)  # before a large model is read
        check_attention(options.attention)
        loaded = pretrained.load(options.workdir, mesh, options.step)
        config = loaded.config
        if options.num_loops is not None:
            config.program.with_loops(options.num_loops)  # checks the number
            config = dataclasses.replace(config, num_loops=options.num_loops)
            note_loops(loaded.config, options.num_loops)
        compute = dataclasses.replace(loaded.compute, attention=options.attention)
        self.options, self.tokenizer = options, loaded.tokenizer
        self.model = inference.prepare(loaded.params, config, compute)
        self.compiled: set[tuple[int, int, int]] = set()
        step = "" if loaded.step is None else f", step {loaded.step:,}"
        note(f"{options.workdir}: {config.program}{step}")

    def __call__(self, texts: list[str]) -> None:
        options = self.options
        what = (
            f"A batch of {len(texts)} prompts with {options.num_samples} samples of up to "
            f"{options.max_new_tokens:,} new tokens"
        )
        try:
            with memory_errors(what, HINTS):
                self._continue(texts)
        except UnsupportedCall as error:  # the kernel does not support these sizes
            raise UserError(f"--attention={options.attention}: {error}") from error

    def _continue(self, texts: list[str]) -> None:
        options, tokenizer = self.options, self.tokenizer
        prompts = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in texts]
        capacity, chunk = inference.default_sizes(
            len(prompts), max(map(len, prompts)), options.max_new_tokens, chunk=options.chunk
        )
        generate = functools.partial(
            inference.generate,
            self.model,
            num_samples=options.num_samples,
            sampling=options.sampling,
            stop_tokens=[tokenizer.eot_id],
            capacity=capacity,
            chunk=chunk,
        )
        compiled = self._compile(generate, (len(prompts), capacity, chunk))
        rows = [
            TextRow(tokenizer, options.max_new_tokens, options.stops)
            for _ in range(len(prompts) * options.num_samples)
        ]
        out = generate(
            prompts,
            max_new_tokens=options.max_new_tokens,
            seeds=options.seed,
            on_tokens=Printer(texts, rows),
        )
        note(speed(sum(map(len, prompts)), out, capacity) + compiled)

    def _compile(self, generate: Callable, sizes: tuple[int, int, int]) -> str:
        """Compiles the programs for these sizes before they are timed. Returns a note."""
        if sizes in self.compiled:
            return ""
        start, shortest = time.perf_counter(), [[self.tokenizer.eot_id]] * sizes[0]
        generate(shortest, max_new_tokens=1, on_tokens=lambda _: None)
        self.compiled.add(sizes)
        return f"; compiled in {time.perf_counter() - start:.1f} s"


def check_attention(name: str) -> None:
    """Raises UserError if there is no such kernel for this device."""
    try:
        for operation in OPERATIONS:
            choose_implementation(operation, implementation=name)
    except UnsupportedCall as error:
        raise UserError(f"--attention={name}: {error}") from error


def note_loops(trained: ModelConfig, num_loops: int) -> None:
    """Writes a note if the looped stages were trained with another number of loops."""
    counts, draw = trained.program.loop_counts, trained.loop_draw
    if num_loops not in draw.counts if draw else counts != [num_loops]:
        words = trained.num_loops if draw else " and ".join(map(str, counts))
        note(
            f"trained with {words} loops, now running with {num_loops}: the model was not trained "
            "for this number, so its text may be worse"
        )


def speed(read: int, out: Generation, capacity: int) -> str:
    """Tokens per second, and bytes of the cache. read: number of tokens of all prompts."""
    written, rows, nbytes = int(out.lengths.sum()), len(out.lengths), out.memory.nbytes
    return (
        f"prefill {read:,} tokens in {out.prefill_s:.3f} s ({read / out.prefill_s:,.0f} "
        f"tokens/s); decode {written:,} tokens in {out.decode_s:.3f} s "
        f"({written / out.decode_s:,.0f} tokens/s); KV cache {nbytes:,} bytes in "
        f"{jax.tree.leaves(out.memory)[0].dtype} ({nbytes // rows:,} for each of {rows} rows "
        f"of {capacity:,} positions)"
    )
