"""A trained model that continues texts, and says on stderr how fast it is."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax

from experiments.terminal import Printer, note
from pallas_kernels import OPERATIONS, UnsupportedCall, choose_implementation
from yocou_jax import inference, pretrained
from yocou_jax.errors import UserError
from yocou_jax.foreign import out_of_memory
from yocou_jax.inference import Generation, Sampling
from yocou_jax.inference.sampling import check as check_sampling
from yocou_jax.inference.text import TextRow
from yocou_jax.program import Program


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags of `experiments.generate` say: which model, how it runs, how texts go on."""

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
    """A loaded model with its options; called with texts, it continues them on stdout."""

    def __init__(self, options: Options, mesh: jax.sharding.Mesh | None):
        check_sampling(options.sampling, 1)  # before a large model is read
        check_attention(options.attention)
        loaded = pretrained.load(options.workdir, mesh, options.step)
        config = loaded.config
        if options.num_loops is not None:
            config.program.with_loops(options.num_loops)  # refuses what makes no sense
            config = dataclasses.replace(config, num_loops=options.num_loops)
            note_loops(loaded.config.program, options.num_loops)
        compute = dataclasses.replace(loaded.compute, attention=options.attention)
        self.options, self.tokenizer = options, loaded.tokenizer
        self.model = inference.prepare(loaded.params, config, compute)
        self.compiled: set[tuple[int, int, int]] = set()
        step = "" if loaded.step is None else f", step {loaded.step:,}"
        note(f"{options.workdir}: {config.program}{step}")

    def __call__(self, texts: list[str]) -> None:
        options = self.options
        try:
            self._continue(texts)
        except UnsupportedCall as error:  # a kernel that is not for these sizes
            raise UserError(f"--attention={options.attention}: {error}") from error
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                f"{len(texts)} prompts with {options.num_samples} samples of up to "
                f"{options.max_new_tokens:,} new tokens do not fit into the memory of the device."
            ) from error

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
        """Runs what compiles for these sizes, so that it is not timed; how long that took."""
        if sizes in self.compiled:
            return ""
        start, shortest = time.perf_counter(), [[self.tokenizer.eot_id]] * sizes[0]
        generate(shortest, max_new_tokens=1, on_tokens=lambda _: None)
        self.compiled.add(sizes)
        return f"; compiled in {time.perf_counter() - start:.1f} s"


def check_attention(name: str) -> None:
    """Whether there is such a kernel for this device, before a large model is read."""
    try:
        for operation in OPERATIONS:
            choose_implementation(operation, implementation=name)
    except UnsupportedCall as error:
        raise UserError(f"--attention={name}: {error}") from error


def note_loops(trained: Program, num_loops: int) -> None:
    """Says so when the looped stages of the program were trained with another loop count."""
    counts = sorted({stage.loops for stage in trained.stages if stage.loops is not None})
    if counts != [num_loops]:
        note(
            f"trained at {' and '.join(map(str, counts))} loops; running {num_loops}: a model "
            "trained at one loop count is usually worse at any other"
        )


def speed(read: int, out: Generation, capacity: int) -> str:
    """Tokens per second and bytes of the cache; the prompts have `read` tokens."""
    written, rows, nbytes = int(out.lengths.sum()), len(out.lengths), out.memory.nbytes
    return (
        f"prefill {read:,} tokens in {out.prefill_s:.3f} s ({read / out.prefill_s:,.0f} "
        f"tokens/s); decode {written:,} tokens in {out.decode_s:.3f} s "
        f"({written / out.decode_s:,.0f} tokens/s); KV cache {nbytes:,} bytes in "
        f"{jax.tree.leaves(out.memory)[0].dtype} ({nbytes // rows:,} for each of {rows} rows "
        f"of {capacity:,} positions)"
    )
