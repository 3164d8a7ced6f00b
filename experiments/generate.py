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

from absl import flags

from experiments import cli
from yocou_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Of a training run; or an exported folder.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue; may be given several times.")
PROMPT_FILE = flags.DEFINE_multi_string("prompt_file", [], "A file whose text is to be continued.")
INTERACTIVE = flags.DEFINE_bool("interactive", False, "Ask for prompts, a line each, until Ctrl-D.")
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "At most so many for each text.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Texts for each prompt, which is read once.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k likeliest tokens; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens with this mass; 1: all.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Only tokens this likely, relative to the likeliest.")
PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1 against repetition; 1: none.")
SEED = flags.DEFINE_integer("seed", 0, "Of the first text; the next one has the next seed.")
NUM_LOOPS = flags.DEFINE_integer("num_loops", None, "Loops of the looped stage; else as trained.")
CHUNK = flags.DEFINE_integer("chunk", None, "Positions of a prompt that are read at once.")
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share each matrix of the model.")
flags.mark_flag_as_required("workdir")


class Printer:
    """Writes rows of text to stdout: a single row as it comes, several when each of them ends."""

    def __init__(self, tokenizer, texts: list[str], num_samples: int, limit: int):
        self.tokenizer, self.texts, self.limit = tokenizer, texts, limit
        self.titles = [
            f"prompt {i}" + (f", sample {j}" if num_samples > 1 else "")
            for i in range(len(texts))
            for j in range(num_samples)
        ]
        self.ids: list[list[int]] = [[] for _ in self.titles]
        self.ended = [False] * len(self.titles)
        self.shown = 0
        self.num_samples = num_samples
        if len(self.titles) == 1:
            self._write(texts[0])

    def __call__(self, tokens) -> None:
        """Takes a block of new tokens [rows, steps], -1 behind the end of a row."""
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
            text = self.tokenizer.decode(ids)
            if len(self.ids) > 1:
                if self.ended[row]:
                    prompt = self.texts[row // self.num_samples]
                    self._write(f"--- {self.titles[row]} ---\n{prompt}{text}\n")
                continue
            if not self.ended[row]:
                text = text.rstrip("\ufffd")  # half a character, so far
            self._write(text[self.shown :] + "\n" * self.ended[row])
            self.shown = len(text)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


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
    if "" in texts:
        raise UserError(f"Prompt {texts.index('')} is empty; it needs at least one character.")
    return texts


class Writer:
    """A loaded model and the options of this command; called with texts, it continues them."""

    def __init__(self, mesh):
        from yocou_jax import inference, pretrained, sampling
        from yocou_jax.program import Program

        self.inference = inference
        self.sampling = sampling.Sampling(
            TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, PENALTY.value
        )
        sampling.check(self.sampling, 1)  # before a large model is read
        loaded = pretrained.load(WORKDIR.value, mesh)
        self.tokenizer, config = loaded.tokenizer, loaded.config
        if NUM_LOOPS.value is not None:
            Program.with_loops(config.program, NUM_LOOPS.value)
            config = dataclasses.replace(config, num_loops=NUM_LOOPS.value)
        self.model = inference.prepare(loaded.params, config)
        self.compiled: set[tuple] = set()
        step = "" if loaded.step is None else f", step {loaded.step:,}"
        _note(f"{WORKDIR.value}: {config.program}{step}")

    def __call__(self, texts: list[str]) -> None:
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
        dtype = next(x for x in (out.cache.global_kv, out.cache.stages[0][0]) if x is not None)
        _note(
            f"prefill {read:,} tokens in {out.prefill_s:.3f} s ({read / out.prefill_s:,.0f} "
            f"tokens/s); decode {written:,} tokens in {out.decode_s:.3f} s "
            f"({written / out.decode_s:,.0f} tokens/s); KV cache {nbytes:,} bytes in "
            f"{dtype.k.dtype} ({nbytes // len(out.lengths):,} for each of {len(out.lengths)} rows "
            f"of {capacity:,} positions){compiled}"
        )


def _mesh():
    import jax

    from yocou_jax.config import MeshConfig
    from yocou_jax.sharding import make_mesh

    if TENSOR.value == 1:
        return None
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=TENSOR.value), jax.devices()[: TENSOR.value])


def _note(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr)


def main(_):
    import jax

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
                write([text])


if __name__ == "__main__":
    cli.run(main)
