"""Text from a trained model: continues prompts, as it comes.

    python -m experiments.generate --workdir=runs/yocou_small --prompt="def "
    python -m experiments.generate --workdir=runs/yocou_small --prompt="import " --prompt="class " --num_samples=2
    python -m experiments.generate --workdir=exported/yocou_small --prompt_file=prompt.py --temperature=0
    python -m experiments.generate --workdir=runs/yocou_small --interactive

--workdir is one of `experiments.train` or a folder of `experiments.export`. Several prompts run in
one batch, and each text is printed when it ends. Text goes to stdout; speed and cache bytes, with
compilation left out, go to stderr.
"""  # noqa: E501

import contextlib
import dataclasses
import sys
import time
from pathlib import Path

import jax
from absl import flags

from experiments import cli
from yocou_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Of a training run; or an exported folder.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue; may be given several times.")
PROMPT_FILE = flags.DEFINE_multi_string("prompt_file", [], "A file whose text is to be continued.")
INTERACTIVE = flags.DEFINE_bool("interactive", False, "Ask for prompts, a line each, until Ctrl-D.")
NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 128, "At most so many for each text.", lower_bound=1
)
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "Texts for each prompt, which is read once.", lower_bound=1
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
    "chunk", None, "Positions of a prompt that are read at once.", lower_bound=1
)
TENSOR = flags.DEFINE_integer(
    "tensor", 1, "Devices that share each matrix of the model.", lower_bound=1
)
flags.mark_flag_as_required("workdir")


class Printer:
    """Writes rows of text to stdout: a single row as it comes, several when each of them ends."""

    def __init__(self, tokenizer, texts: list[str], num_samples: int, limit: int):
        self.tokenizer, self.texts, self.limit = tokenizer, texts, limit
        self.num_samples = num_samples
        self.ids: list[list[int]] = [[] for _ in range(len(texts) * num_samples)]
        self.ended = [False] * len(self.ids)
        self.context, self.shown = 0, 0  # ids before `shown` are on the screen
        self.begun = False

    def __call__(self, tokens) -> None:
        """Takes a block of new tokens [rows, steps], -1 behind the end of a row."""
        alone = len(self.ids) == 1
        if alone and not self.begun:
            self._write(self.texts[0])
            self.begun = True
        for row, ids in enumerate(self.ids):
            if self.ended[row]:
                continue
            new = tokens[row][tokens[row] >= 0].tolist()
            ids += new
            self.ended[row] = (
                len(new) < tokens.shape[1]
                or len(ids) >= self.limit
                or ids[-1] == self.tokenizer.eot_id
            )
            if alone:
                self._write(self._new_text(ids, self.ended[row]))
            elif self.ended[row]:
                self._write(f"--- {self._title(row)} ---\n{self._text(row)}\n")

    def _new_text(self, ids: list[int], ended: bool) -> str:
        """What the newest ids add; nothing while they end in half a character."""
        before = self.tokenizer.decode(ids[self.context : self.shown])
        text = self.tokenizer.decode(ids[self.context :])
        if text.endswith("\ufffd") and not ended:
            return ""
        # Some ids stay as context, for decoders that treat the first of a text differently.
        self.context, self.shown = self.shown, len(ids)
        return text[len(before) :] + "\n" * ended

    def _text(self, row: int) -> str:
        return self.texts[row // self.num_samples] + self.tokenizer.decode(self.ids[row])

    def _title(self, row: int) -> str:
        prompt, sample = divmod(row, self.num_samples)
        return f"prompt {prompt}" + (f", sample {sample}" if self.num_samples > 1 else "")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def check_text(i: int, text: str) -> str:
    if not text:
        raise UserError(f"Prompt {i} is empty; it needs at least one character.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a terminal that are no UTF-8
        raise UserError(f"Prompt {i} is not UTF-8 text.") from error
    return text


def prompts() -> list[str]:
    texts = list(PROMPT.value)
    for name in PROMPT_FILE.value:
        try:
            texts.append(Path(name).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"The prompt file {name} cannot be read: {reason}.") from error
    if bool(texts) == INTERACTIVE.value:
        raise UserError("Give --prompt or --prompt_file (several are fine), or --interactive.")
    return [check_text(i, text) for i, text in enumerate(texts)]


class Writer:
    """A loaded model and the options of this command; called with texts, it continues them."""

    def __init__(self, mesh):
        from yocou_jax import inference, pretrained, sampling

        self.inference = inference
        self.sampling = sampling.Sampling(
            TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, PENALTY.value
        )
        sampling.check(self.sampling, 1)  # before a large model is read
        loaded = pretrained.load(WORKDIR.value, mesh)
        self.tokenizer = loaded.tokenizer
        config = dataclasses.replace(loaded.config, attention=ATTENTION.value)
        if NUM_LOOPS.value is not None:
            config.program.with_loops(NUM_LOOPS.value)  # refuses what makes no sense
            config = dataclasses.replace(config, num_loops=NUM_LOOPS.value)
        self.model = inference.prepare(loaded.params, config)
        self.compiled: set[tuple] = set()
        step = "" if loaded.step is None else f", step {loaded.step:,}"
        _note(f"{WORKDIR.value}: {config.program}{step}")

    def __call__(self, texts: list[str]) -> None:
        try:
            self._write(texts)
        except ValueError as error:  # no such kernel, or not for this device
            if "implementation" not in str(error):
                raise
            raise UserError(f"--attention={ATTENTION.value}: {error}") from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                raise
            raise UserError(
                f"{len(texts)} prompts with {NUM_SAMPLES.value} samples of up to "
                f"{NEW_TOKENS.value:,} new tokens do not fit into the memory of the device."
            ) from error

    def _write(self, texts: list[str]) -> None:
        inference, tokenizer = self.inference, self.tokenizer
        ids = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in texts]
        capacity, chunk = inference.sizes(
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
        printer = Printer(tokenizer, texts, NUM_SAMPLES.value, NEW_TOKENS.value)
        out = inference.generate(
            self.model,
            ids,
            max_new_tokens=NEW_TOKENS.value,
            seeds=SEED.value,
            on_tokens=printer,
            **options,
        )
        read, written, nbytes = sum(map(len, ids)), int(out.lengths.sum()), out.cache.nbytes
        kept = next(x for x in (out.cache.global_kv, out.cache.stages[0][0]) if x is not None)
        _note(
            f"prefill {read:,} tokens in {out.prefill_s:.3f} s ({read / out.prefill_s:,.0f} "
            f"tokens/s); decode {written:,} tokens in {out.decode_s:.3f} s "
            f"({written / out.decode_s:,.0f} tokens/s); KV cache {nbytes:,} bytes in "
            f"{kept.k.dtype} ({nbytes // len(out.lengths):,} for each of {len(out.lengths)} rows "
            f"of {capacity:,} positions){compiled}"
        )


def _mesh():
    from yocou_jax.config import MeshConfig
    from yocou_jax.sharding import make_mesh

    if TENSOR.value == 1:
        return None
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=TENSOR.value), jax.devices()[: TENSOR.value])


def _note(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr)


def main(_):
    sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal has no such character
    texts = prompts()
    mesh = _mesh()
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        write = Writer(mesh)
        if texts:
            write(texts)
        while INTERACTIVE.value:
            try:
                text = input("> ")
            except EOFError:
                break
            if text:
                write([check_text(0, text)])


if __name__ == "__main__":
    cli.run(main)
