"""Does a model learn the same with a kernel as with xla? It does the same training run three times.

    python -m experiments.kernel_parity --implementation=pallas_tpu [--steps=200] [--json]

The three runs start from the same parameters, get the same batches and use the train step of
yocou_jax: one with xla, one with the implementation named, and one, the control, with xla in other
block sizes. The model is yocou_small with heads of 64 (which every kernel takes), two layers and
rows of 256 bytes. If the machine does not have the kernel's device, the kernel runs in Pallas's
interpreter; this takes minutes for pallas_tpu.

The command compares the loss of each step. Two runs that only sum in another order differ too,
because a difference in the last bit grows from step to step. The control shows by how much. The
tolerance is TIMES the control's largest difference, because one control is only one sample. It is
at least FLOOR nats. (Both are in benchmarks/parity.py.) It holds for each step and for the mean of
the last tenth of the steps. Exit code 1: the difference is larger.

On a CPU, in 200 steps, the control differed by 7e-7, pallas_tpu by 2e-6, and a window that is one
key too short by 2.6e-2 (3e-5 in the first step). Fields can be changed: --config.data.packing
trains with segment ids.
"""

import functools
import sys

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from benchmarks import parity
from configs import yocou_small
from experiments import cli
from pallas_kernels import api


def default_config() -> ConfigDict:
    """yocou_small with so few layers, heads, positions and tokens that an interpreter is enough."""
    c = yocou_small.get_config()
    c.model.update(num_layers=2, d_model=64, num_heads=2, num_kv_heads=1, head_dim=64, d_ff=128)
    c.model.update(vocab_size=512, window=64)
    c.data.update(tokenizer="bytes", batch_size=2, sequence_length=256, validation_sequences=2)
    return c


IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, api.IMPLEMENTATIONS[1:], "What is compared with xla.", required=True
)
STEPS = flags.DEFINE_integer("steps", 200, "Training steps of each run.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
CONFIG = cli.config_file(default_config(), "What to train. Default: a small model.")


def main(_):
    name = IMPLEMENTATION.value
    say = functools.partial(print, file=sys.stderr)
    result = parity.measure(CONFIG.value, name, STEPS.value, say)
    if JSON.value:
        cli.print_json(result)
        return 0 if result["passed"] else 1
    how = "interpreted" if result["interpreted"] else "on its device"
    console, losses = Console(highlight=False), result["losses"]["xla"]
    console.print(f"{result['device']}, jax {result['jax']}; {name} {how}, {result['steps']} steps")
    console.print(f"loss with xla: {losses[0]:.4f} at first, {losses[-1]:.4f} at the end")
    for label, values in ((name, result["difference"]), ("control", result["control"])):
        console.print(
            f"{label} and xla: largest difference {values['largest']:.2e}, of the last tenth "
            f"{values['final']:.2e}, of the first step {values['first']:.2e} nats per token; "
            f"{result['seconds'][label]:.0f} s (xla {result['seconds']['xla']:.0f} s)"
        )
    verdict = "within" if result["passed"] else "FAILED: beyond"
    console.print(
        f"{verdict} the tolerance of {result['tolerance']:.2e} ({parity.TIMES:g} x control)"
    )
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    cli.run(main)
