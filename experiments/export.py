"""Exports a trained model: one folder with its parameters (safetensors), sizes and tokenizer.

python -m experiments.export --workdir=runs/yocou_small --folder=exported/yocou_small
"""

import jax
from absl import flags

from experiments import cli
from yocou_jax import pretrained
from yocou_jax.checkpoint import params_sha256
from yocou_jax.files import expand_path

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run, or an exported folder.")
STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint to read. Default: the newest.", lower_bound=0
)
FOLDER = flags.DEFINE_string("folder", None, "Folder to write. It must not exist, or be empty.")
flags.mark_flags_as_required(["workdir", "folder"])


def main(_):
    cli.refuse_empty(WORKDIR, FOLDER)
    # Only copies arrays. On the CPU, a model that is too large for one accelerator fits too.
    jax.config.update("jax_platforms", "cpu")
    model, folder = pretrained.load(WORKDIR.value, step=STEP.value), expand_path(FOLDER.value)
    pretrained.export(folder, model)
    files = [folder / name for name in pretrained.FILES]
    rows = {str(file): f"{file.stat().st_size:,} bytes" for file in files}
    rows |= {
        "program": str(model.config.program),
        "step": "unknown" if model.step is None else f"{model.step:,}",
        "parameters": f"{sum(x.size for x in jax.tree.leaves(model.params)):,}",
        "params_sha256": params_sha256(model.params),
    }
    for name, value in rows.items():
        print(f"{name:<{max(map(len, rows))}}  {value}")


if __name__ == "__main__":
    cli.run(main)
