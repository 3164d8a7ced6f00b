"""Continues prompts with a trained model, and shows the text while it is generated.

    python -m experiments.generate --workdir=runs/yocou_small --prompt="def "
    python -m experiments.generate --workdir=runs/yocou_small --prompt="import " --prompt="class " --num_samples=2
    python -m experiments.generate --workdir=exported/yocou_small --prompt_file=prompt.py --temperature=0
    python -m experiments.generate --workdir=runs/yocou_small --interactive

--workdir is a workdir of `experiments.train` or a folder of `experiments.export`. Several prompts
run in one batch, and each text is printed when it ends. Texts are written to stdout. Speed
(without compilation) and bytes of the cache are written to stderr. Each prompt is the beginning of
a new text, and --prompt= (empty) lets the model write all of it. A text ends at the end-of-text
token, after --max_new_tokens, or before a --stop text. In bash, --stop=$'\\n\\n' is an empty line.
"""  # noqa: E501

import contextlib
import math

import jax
from absl import flags

from experiments import cli, process
from experiments.terminal import checked, read_prompt, talk
from yocou_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run, or an exported folder.")
STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint to read. Default: the newest.", lower_bound=0
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue. Several are possible.")
PROMPT_FILE = flags.DEFINE_multi_string(
    "prompt_file", [], "File with a text to continue; - is stdin. Several are possible."
)
INTERACTIVE = flags.DEFINE_bool("interactive", False, "Read one prompt per line, until Ctrl-D.")
NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 128, "New tokens of each text, at most.", lower_bound=1, upper_bound=2**30
)
STOP = flags.DEFINE_multi_string("stop", [], "A text ends before this. Several are possible.")
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples",
    1,
    "Texts for each prompt. The prompt is read once.",
    lower_bound=1,
    upper_bound=2**16,
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Divides the logits. 0 takes the most likely token."
)
TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k most likely tokens. 0: all.")
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Only the most likely tokens, until their probabilities sum to p. 1: all."
)
MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Only tokens at least min_p times as likely as the most likely one. 0: all."
)
PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: less repetition. 1: no penalty.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the first text. Text i uses seed + i.", lower_bound=0, upper_bound=2**31
)
NUM_LOOPS = flags.DEFINE_integer("num_loops", None, "Number of loops. Default: as in training.")
ATTENTION = flags.DEFINE_string("attention", "auto", "Name of a kernel. auto: the device decides.")
CHUNK = flags.DEFINE_integer(
    "chunk",
    None,
    "Positions of a prompt that one step of prefill reads.",
    lower_bound=1,
    upper_bound=2**20,
)
TENSOR = flags.DEFINE_integer(
    "tensor", 1, "Devices that share each matrix of the model.", lower_bound=1
)
CONTEXT = flags.DEFINE_integer(
    "context", 1, "Devices that share the positions of each text, if it is long.", lower_bound=1
)
flags.mark_flag_as_required("workdir")


def prompts() -> list[str]:
    texts = PROMPT.value + [read_prompt(name) for name in PROMPT_FILE.value]
    if bool(texts) == INTERACTIVE.value:
        raise UserError("Give --prompt or --prompt_file (or several of them), or --interactive.")
    return [checked(f"Prompt {i}", text) for i, text in enumerate(texts)]


def stops() -> list[str]:
    if "" in STOP.value:
        raise UserError("--stop= is empty: give the text at which a row ends, or leave it out.")
    return [checked("--stop", text) for text in STOP.value]


def mesh_of_flags() -> jax.sharding.Mesh | None:
    from yocou_jax.config import MeshConfig
    from yocou_jax.sharding import make_mesh

    sizes = {flag.name: flag.value for flag in (TENSOR, CONTEXT) if flag.value > 1}
    devices = math.prod(sizes.values())
    if not sizes:
        return None
    if devices > jax.device_count():
        asked = " ".join(f"--{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"{asked} needs {devices} devices, but jax finds {jax.device_count()} here."
        )
    return make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:devices])


def main(_):
    cli.refuse_empty(WORKDIR)
    process.check_kernels(ATTENTION.value)
    texts, ends, mesh = prompts(), stops(), mesh_of_flags()
    # These imports take seconds, so they come after the checks.
    from experiments.writer import Options, Writer
    from yocou_jax.inference import Sampling

    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, PENALTY.value)
    options = Options(
        workdir=WORKDIR.value,
        step=STEP.value,
        num_loops=NUM_LOOPS.value,
        attention=ATTENTION.value,
        sampling=sampling,
        num_samples=NUM_SAMPLES.value,
        max_new_tokens=NEW_TOKENS.value,
        seed=SEED.value,
        stops=ends,
        chunk=CHUNK.value,
    )
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        write = Writer(options, mesh)
        if INTERACTIVE.value:
            talk(write)
        else:
            write(texts)


if __name__ == "__main__":
    cli.run(main)
