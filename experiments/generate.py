"""Text from a trained model: continues prompts, as it comes.

    python -m experiments.generate --workdir=runs/yocou_small --prompt="def "
    python -m experiments.generate --workdir=runs/yocou_small --prompt="import " --prompt="class " --num_samples=2
    python -m experiments.generate --workdir=exported/yocou_small --prompt_file=prompt.py --temperature=0
    python -m experiments.generate --workdir=runs/yocou_small --interactive

--workdir is one of `experiments.train` or a folder of `experiments.export`. Several prompts run in
one batch, and each text is printed when it ends. Text goes to stdout; speed and cache bytes, with
compilation left out, go to stderr. Each prompt begins a new text; --prompt= (empty) is one that has
nothing yet. A row ends with the end-of-text token, --max_new_tokens, or in front of a --stop text:
--stop=$'\\n\\n' in bash for an empty line.
"""  # noqa: E501

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from experiments import cli
from yocou_jax.errors import UserError
from yocou_jax.files import resolve

WORKDIR = flags.DEFINE_string("workdir", None, "Of a training run; or an exported folder.")
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; else the newest.", lower_bound=0)
PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue; may be given several times.")
PROMPT_FILE = flags.DEFINE_multi_string(
    "prompt_file", [], "A file whose text is to be continued; - is stdin."
)
INTERACTIVE = flags.DEFINE_bool("interactive", False, "Ask for prompts, a line each, until Ctrl-D.")
NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 128, "At most so many for each text.", lower_bound=1, upper_bound=2**30
)
STOP = flags.DEFINE_multi_string("stop", [], "A text before which a row ends; may be given often.")
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples",
    1,
    "Texts for each prompt, which is read once.",
    lower_bound=1,
    upper_bound=2**16,
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k likeliest tokens; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens with this mass; 1: all.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Only tokens this likely, relative to the likeliest.")
PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1 against repetition; 1: none.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Of the first text; the next one has the next.", lower_bound=0, upper_bound=2**31
)
NUM_LOOPS = flags.DEFINE_integer("num_loops", None, "Loops of the looped stage; else as trained.")
ATTENTION = flags.DEFINE_string("attention", "auto", "A kernel's name, or the device's best.")
CHUNK = flags.DEFINE_integer(
    "chunk",
    None,
    "Positions of a prompt that are read at once.",
    lower_bound=1,
    upper_bound=2**20,
)
TENSOR = flags.DEFINE_integer(
    "tensor", 1, "Devices that share each matrix of the model.", lower_bound=1
)
flags.mark_flag_as_required("workdir")


class Row:
    """The text of one row as its tokens come: whole characters, up to the first stop text.

    `text` is what can be shown: never the beginning of what may still become a stop text.
    """

    def __init__(self, tokenizer, limit: int, stops: Sequence[str] = ()):
        self.tokenizer, self.limit, self.stops = tokenizer, limit, stops
        self.text, self.ended = "", False
        self._ids: list[int] = []
        self._settled = ""  # the text of the ids before `_next`
        self._context, self._next = 0, 0

    def add(self, tokens: np.ndarray) -> None:
        """Takes new tokens [steps], -1 after the end of the row."""
        if self.ended:
            return
        new = tokens[tokens >= 0].tolist()
        self._ids += new
        self.ended = (
            len(new) < len(tokens)
            or len(self._ids) >= self.limit
            or self._ids[-1] == self.tokenizer.eot_id
        )
        text = self._decoded()
        # What was shown is no part of a stop text, so none begins before its end.
        found = [text.find(stop, len(self.text)) for stop in self.stops]
        if any(at >= 0 for at in found):
            self.ended = True
            self.text = text[: min(at for at in found if at >= 0)]
        else:
            self.text = text if self.ended else self._without_beginnings(text)

    def _decoded(self) -> str:
        """The text of all ids, without half a character at the end if more may come."""
        before = self.tokenizer.decode(self._ids[self._context : self._next])
        text = self.tokenizer.decode(self._ids[self._context :])
        whole = text if self.ended else text.rstrip("\ufffd")
        decoded = self._settled + whole[len(before) :]
        if whole == text:
            # Some ids stay as context, for decoders that treat the first of a text differently.
            self._settled = decoded
            self._context, self._next = self._next, len(self._ids)
        return decoded

    def _without_beginnings(self, text: str) -> str:
        """The text without what may be the beginning of a stop text at its end."""
        beginnings = {stop[:n] for stop in self.stops for n in range(1, len(stop))}
        for n in range(max(map(len, beginnings), default=0), 0, -1):
            if text.endswith(tuple(b for b in beginnings if len(b) == n)):
                return text[:-n]
        return text


class Printer:
    """Writes rows of text to stdout: a single row as it comes, several when each of them ends."""

    def __init__(
        self, tokenizer, texts: list[str], num_samples: int, limit: int, stops: Sequence[str] = ()
    ):
        self.texts, self.num_samples = texts, num_samples
        self.rows = [Row(tokenizer, limit, stops) for _ in range(len(texts) * num_samples)]
        self.begun = False

    def __call__(self, tokens: np.ndarray) -> list[bool]:
        """Takes a block of new tokens [rows, steps], -1 after the end of a row; which ended."""
        if len(self.rows) == 1:
            (row,) = self.rows
            start, shown = "" if self.begun else self.texts[0], len(row.text)
            row.add(tokens[0])
            self._write(start + row.text[shown:] + "\n" * row.ended)
            self.begun = True
        else:
            for i, row in enumerate(self.rows):
                before = row.ended
                row.add(tokens[i])
                if row.ended and not before:
                    text = self.texts[i // self.num_samples] + row.text
                    self._write(f"--- {self._title(i)} ---\n{text}\n")
        return [row.ended for row in self.rows]

    def _title(self, i: int) -> str:
        prompt, sample = divmod(i, self.num_samples)
        return f"prompt {prompt}" + (f", sample {sample}" if self.num_samples > 1 else "")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def checked(name: str, text: str) -> str:
    """The text without a byte-order mark, if it is UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a terminal that are no UTF-8
        raise UserError(f"{name} is not UTF-8 text.") from error
    return text.removeprefix("\ufeff")


def read_prompt(name: str) -> str:
    """The text of a file, or of stdin for "-"; its line ends stay, as in training."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else resolve(name).read_bytes()
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"The prompt file {name} cannot be read: {reason}.") from error


def prompts() -> list[str]:
    texts = PROMPT.value + [read_prompt(name) for name in PROMPT_FILE.value]
    if bool(texts) == INTERACTIVE.value:
        raise UserError("Give --prompt or --prompt_file (several are fine), or --interactive.")
    return [checked(f"Prompt {i}", text) for i, text in enumerate(texts)]


def stops() -> list[str]:
    if "" in STOP.value:
        raise UserError("--stop= is empty: give the text at which a row ends, or leave it out.")
    return [checked("--stop", text) for text in STOP.value]


def check_attention() -> None:
    """Whether there is such a kernel for this device, before a large model is read."""
    from pallas_kernels import OPERATIONS, UnsupportedCall, choose_implementation

    try:
        for operation in OPERATIONS:
            choose_implementation(operation, implementation=ATTENTION.value)
    except UnsupportedCall as error:
        raise UserError(f"--attention={ATTENTION.value}: {error}") from error


class Writer:
    """A loaded model and the options of this command; called with texts, it continues them."""

    def __init__(self, mesh):
        from yocou_jax import inference, pretrained
        from yocou_jax.inference import sampling

        self.inference = inference
        self.sampling = sampling.Sampling(
            TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, PENALTY.value
        )
        sampling.check(self.sampling, 1)  # before a large model is read
        check_attention()
        self.stops = stops()
        loaded = pretrained.load(WORKDIR.value, mesh, STEP.value)
        self.tokenizer = loaded.tokenizer
        config = loaded.config
        compute = dataclasses.replace(loaded.compute, attention=ATTENTION.value)
        if NUM_LOOPS.value is not None:
            config.program.with_loops(NUM_LOOPS.value)  # refuses what makes no sense
            config = dataclasses.replace(config, num_loops=NUM_LOOPS.value)
            note_loops(loaded.config.program, NUM_LOOPS.value)
        self.model = inference.prepare(loaded.params, config, compute)
        self.compiled: set[tuple] = set()
        step = "" if loaded.step is None else f", step {loaded.step:,}"
        _note(f"{WORKDIR.value}: {config.program}{step}")

    def __call__(self, texts: list[str]) -> None:
        from pallas_kernels import UnsupportedCall

        try:
            self._write(texts)
        except UnsupportedCall as error:  # a kernel that is not for these sizes
            raise UserError(f"--attention={ATTENTION.value}: {error}") from error
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            words = "RESOURCE_EXHAUSTED", "out of memory", "Out of memory"
            if not isinstance(error, MemoryError) and not any(w in str(error) for w in words):
                raise
            raise UserError(
                f"{len(texts)} prompts with {NUM_SAMPLES.value} samples of up to "
                f"{NEW_TOKENS.value:,} new tokens do not fit into the memory of the device."
            ) from error

    def _write(self, texts: list[str]) -> None:
        inference, tokenizer = self.inference, self.tokenizer
        ids = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in texts]
        capacity, chunk = inference.default_sizes(
            len(ids), max(map(len, ids)), NEW_TOKENS.value, chunk=CHUNK.value
        )
        options = {
            "num_samples": NUM_SAMPLES.value,
            "sampling": self.sampling,
            "stop_tokens": [tokenizer.eot_id],
            "capacity": capacity,
            "chunk": chunk,
        }
        start, compiled = time.perf_counter(), ""
        if (len(ids), capacity, chunk) not in self.compiled:
            short = [[tokenizer.eot_id]] * len(ids)
            inference.generate(
                self.model, short, max_new_tokens=1, on_tokens=lambda _: None, **options
            )
            self.compiled.add((len(ids), capacity, chunk))
            compiled = f"; compiled in {time.perf_counter() - start:.1f} s"
        printer = Printer(tokenizer, texts, NUM_SAMPLES.value, NEW_TOKENS.value, self.stops)
        out = inference.generate(
            self.model,
            ids,
            max_new_tokens=NEW_TOKENS.value,
            seeds=SEED.value,
            on_tokens=printer,
            **options,
        )
        read, written, nbytes = sum(map(len, ids)), int(out.lengths.sum()), out.memory.nbytes
        kept = jax.tree.leaves(out.memory)[0]
        _note(
            f"prefill {read:,} tokens in {out.prefill_s:.3f} s ({read / out.prefill_s:,.0f} "
            f"tokens/s); decode {written:,} tokens in {out.decode_s:.3f} s "
            f"({written / out.decode_s:,.0f} tokens/s); KV cache {nbytes:,} bytes in "
            f"{kept.dtype} ({nbytes // len(out.lengths):,} for each of {len(out.lengths)} rows "
            f"of {capacity:,} positions){compiled}"
        )


def _mesh():
    from yocou_jax.config import MeshConfig
    from yocou_jax.sharding import make_mesh

    if TENSOR.value == 1:
        return None
    if TENSOR.value > jax.device_count():
        raise UserError(
            f"--tensor={TENSOR.value} needs as many devices; {jax.device_count()} here."
        )
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=TENSOR.value), jax.devices()[: TENSOR.value])


def note_loops(trained, num_loops: int) -> None:
    """Says so when the looped stages of the program were trained with another loop count."""
    counts = sorted({stage.loops for stage in trained.stages if stage.loops is not None})
    if counts != [num_loops]:
        _note(
            f"trained at {' and '.join(map(str, counts))} loops; running {num_loops}: a model "
            "trained at one loop count is usually worse at any other"
        )


def talk(write: Writer) -> None:
    """Asks for prompts and continues them; Ctrl-C ends a text, or the command between texts."""
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text: `checked` says so
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        try:
            if text:
                write([checked("The prompt", text)])
        except UserError as error:
            _note(str(error))
        except KeyboardInterrupt:
            _note("\nInterrupted.")


def _note(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr)


def main(_):
    texts = prompts()
    mesh = _mesh()
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        write = Writer(mesh)
        if INTERACTIVE.value:
            talk(write)
        else:
            write(texts)


if __name__ == "__main__":
    cli.run(main)
