# %% [markdown]
# # 1. Quick start: train, plot, write
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)][colab]
#
# [colab]: https://colab.research.google.com/github/YOUR_NAME/yocou-jax/blob/main/notebooks/1_quick_start.ipynb
#
# A small YOCO-U learns Python from the source code of Python's own standard library. It takes some
# minutes on 2 CPU cores. Nothing is downloaded, except on Colab: there, the code and the packages
# that it needs.

# %%
import os
import shutil
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules and not os.path.isdir("yocou_jax"):  # only on Colab: install
    subprocess.check_call(
        "test -d yocou-jax || git clone --depth=1 https://github.com/YOUR_NAME/yocou-jax;"
        "pip install -q -r yocou-jax/requirements/library.txt -r yocou-jax/requirements/plots.txt",
        shell=True,
    )
    os.chdir("yocou-jax")
if not os.path.isdir("yocou_jax"):  # a notebook starts in its own folder
    os.chdir("..")
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 200))  # updates; fewer take less time and learn less

import absl.logging

absl.logging.set_verbosity("error")  # Orbax warns when it reads a checkpoint

# %matplotlib inline
# %config InlineBackend.figure_format = "retina"

# %% [markdown]
# ## Settings
#
# A config has every setting. This one is `configs/yocou_small.py` with a narrower model. The first
# line of the output is the architecture, a *program*: some window layers that run three times (the
# *self-decoder*), and then cross layers (the *cross-decoder*). `configs/base.py` explains each
# field.

# %%
from configs import yocou_small
from yocou_jax import accounting
from yocou_jax.config import Config

fields = yocou_small.get_config("yoco_u")
fields.model.update(d_model=96, head_dim=24, d_ff=384)
fields.data.validation_sequences = 32
fields.optimizer.warmup_steps = STEPS // 10
fields.run.update(steps=STEPS, eval_every=max(1, STEPS // 5))
config = Config.from_dict(fields)

sizes = accounting.parameters(config.model)
print("program:   ", config.model.program)
print(f"parameters: {sizes.total:,}, of which {sizes.non_embedding:,} are not embeddings")
print(f"tokens:     {STEPS * config.data.batch_size * config.data.sequence_length:,}")

# %% [markdown]
# ## Train
#
# `Run` trains, and writes metrics and checkpoints to its *workdir*. Its *evaluators* measure on the
# way: here only the loss on text that is held out.
# It tells a *reporter* what happens. This reporter draws the loss while the model learns.

# %%
from IPython.display import display

from yocou_jax import plots
from yocou_jax.training.evaluators import Validation
from yocou_jax.training.loop import Run
from yocou_jax.training.reporter import Reporter


class LiveCurve(Reporter):
    """Draws the loss. It is drawn again after a twentieth of the run, and at each validation."""

    def start(self, total_steps):
        self.total, self.train, self.validation = total_steps, {}, {}
        self.picture = display(display_id=True)

    def update(self, step, values):
        self.train[step] = values["loss"]
        if step % max(1, self.total // 20) == 0:
            self.draw()

    def evaluated(self, step, values):
        self.validation[step] = values["val_loss"]
        self.draw()

    def draw(self):
        figure, axes = plots.subplots()
        axes.plot(self.train.keys(), self.train.values(), color="0.6", label="training")
        axes.plot(self.validation.keys(), self.validation.values(), "o-", label="validation")
        axes.set(xlabel="updates", ylabel="nats per token", xlim=(0, 1.02 * self.total))
        axes.legend()
        self.picture.update(figure)


WORKDIR = Path("runs/notebooks/quick_start")
shutil.rmtree(WORKDIR, ignore_errors=True)  # without this line, a run goes on where it was
summary = Run(config, WORKDIR, LiveCurve(), evaluators=[Validation]).train()

# %%
print(f"{summary['val_loss']:.3f} nats per token, {summary['val_bpb']:.3f} bits per byte")
print(f"{summary['tokens_per_s']:,.0f} tokens per second, {summary['wall_s']:.0f} s in all")

# %% [markdown]
# Bits per byte are the loss per byte of text, so models with different tokenizers can be compared.
#
# ## The depth curve
#
# The loops use the same weights, so a trained model can run with any number of loops. How good is
# it then? (Figure 6 of the paper is about the number of loops too. But there, each point is a
# model that was trained with this number.)

# %%
from yocou_jax.evaluation import results
from yocou_jax.evaluation.options import Options
from yocou_jax.evaluation.tasks import TASKS
from yocou_jax.sharding import make_mesh

mesh = make_mesh(config.mesh)
report = results.evaluate("loops", Options(WORKDIR, loops=(1, 2, 4)), mesh)
TASKS["loops"].draw(report)

# %% [markdown]
# The star is the number of loops in training. The bars are the standard errors of the differences
# from it.
#
# ## The model writes
#
# `pretrained.load` reads a workdir. Here the model continues the same beginning with the number of
# loops of its training, and with one loop only. The random numbers are the same in both.

# %%
from yocou_jax import inference, pretrained
from yocou_jax.evaluation.options import with_loops

trained = pretrained.load(WORKDIR)
words = trained.tokenizer
prompt = [words.eot_id, *words.encode("def ")]  # training puts this token before each document

for count in (3, 1):
    model = with_loops(trained, count)
    model = inference.prepare(model.params, model.config, model.compute)
    out = inference.generate(
        model, [prompt], max_new_tokens=80, sampling=inference.Sampling(temperature=0.8), seeds=1
    )
    print(f"--- {count} loop(s)")
    print(words.decode([*prompt[1:], *out.tokens[0, : out.lengths[0]]]), "\n")

# %% [markdown]
# ## What the run has left
#
# `metrics.jsonl` has one JSON object for each logged update, `events.*` is the same for
# TensorBoard (notebook 2), and `evaluate`, `generate` and `export` of the command line read the
# workdir too.

# %%
for path in sorted(WORKDIR.iterdir()):
    print(path.name)
