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

import jax
from absl import flags

from experiments import cli
from experiments.terminal import checked, read_prompt, talk
from yocou_jax.errors import UserError

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


def prompts() -> list[str]:
    texts = PROMPT.value + [read_prompt(name) for name in PROMPT_FILE.value]
    if bool(texts) == INTERACTIVE.value:
        raise UserError("Give --prompt or --prompt_file (several are fine), or --interactive.")
    return [checked(f"Prompt {i}", text) for i, text in enumerate(texts)]


def stops() -> list[str]:
    if "" in STOP.value:
        raise UserError("--stop= is empty: give the text at which a row ends, or leave it out.")
    return [checked("--stop", text) for text in STOP.value]


def tensor_mesh() -> jax.sharding.Mesh | None:
    from yocou_jax.config import MeshConfig
    from yocou_jax.sharding import make_mesh

    if TENSOR.value == 1:
        return None
    if TENSOR.value > jax.device_count():
        raise UserError(
            f"--tensor={TENSOR.value} needs as many devices; {jax.device_count()} here."
        )
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=TENSOR.value), jax.devices()[: TENSOR.value])


def main(_):
    texts = prompts()
    mesh = tensor_mesh()
    # After the checks above: these imports take seconds.
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
        stops=stops(),
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
