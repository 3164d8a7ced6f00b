# %% [markdown]
# # 3. Inside the loops
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)][colab]
#
# [colab]: https://colab.research.google.com/github/YOUR_NAME/yocou-jax/blob/main/notebooks/3_inside_the_loops.ipynb
#
# The self-decoder of YOCO-U runs several times with the same weights. What does each run do? This
# notebook trains a small model for some minutes on 2 CPU cores, and looks inside it.

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
# ## Train, and measure on the way
#
# The evaluator `Analysis` measures what happens inside the model, on one batch of held-out text,
# at each validation. (It does nothing without `run.analysis`.)

# %%
from configs import yocou_small
from yocou_jax.config import Config
from yocou_jax.training.evaluators import Analysis, Validation
from yocou_jax.training.loop import Run

fields = yocou_small.get_config("yoco_u")
fields.model.update(d_model=96, head_dim=24, d_ff=384)
fields.data.validation_sequences = 32
fields.optimizer.warmup_steps = STEPS // 10
fields.run.update(steps=STEPS, eval_every=max(1, STEPS // 4), analysis=True)
config = Config.from_dict(fields)

WORKDIR = Path("runs/notebooks/inside")
shutil.rmtree(WORKDIR, ignore_errors=True)  # without this line, a run goes on where it was
summary = Run(config, WORKDIR, evaluators=[Validation, Analysis]).train()
print(config.model.program)
print(f"{summary['val_loss']:.3f} nats per token after {summary['wall_s']:.0f} s")

# %% [markdown]
# ## The loss after each loop, while the model learns
#
# The text is decoded after loop 1, 2 and 3: the cross-decoder reads the state there. The last loop
# is the whole model. If the lines come apart, the later loops have learned to do something.

# %%
from yocou_jax import plots
from yocou_jax.training.metrics import read_metrics

rows = [row for row in read_metrics(WORKDIR / "metrics.jsonl") if "inside/loss_loop_1" in row]
(count,) = config.model.program.loop_counts
figure, axes = plots.subplots()
for loop in range(1, count + 1):
    losses = [row[f"inside/loss_loop_{loop}"] for row in rows]
    axes.plot([row["step"] for row in rows], losses, "o-", label=f"after loop {loop}")
axes.set(xlabel="updates", ylabel="nats per token")
axes.legend()
figure

# %% [markdown]
# ## What each layer does (Figure 8 of the paper)
#
# The *angular distance* of the input and the output of a layer says how far the layer turns the
# residual stream: 0 is not at all, 0.5 is to a right angle. The figure has one point for each
# layer and loop, in the order in which they run. A vertical line is the beginning of a loop, and
# the dashed line is the beginning of the cross-decoder.

# %%
from yocou_jax.evaluation import results
from yocou_jax.evaluation.options import Options
from yocou_jax.evaluation.tasks import TASKS
from yocou_jax.sharding import make_mesh

report = results.evaluate("inside", Options(WORKDIR), make_mesh(config.mesh))
TASKS["inside"].draw(report)

# %% [markdown]
# In the paper, the distances become smaller from loop to loop, and there is a spike where the
# self-decoder hands over to the cross-decoder. Is it so here?
#
# ## What each loop does
#
# * `step`: how far the loop moves the residual stream: the norm of the change, divided by the norm
#   before.
# * `loss`, `kl`: the loss if the text is decoded after this loop, and how far its predictions are
#   from those of the whole model, both in nats per token.
# * `radius`: the *spectral radius* of the derivative (Jacobian) of the loop at some positions: the
#   mean and the largest. Near a state that the loop does not change, a radius below 1 says that
#   small changes die out in many runs of the loop. The state here is not such a state.

# %%
columns = ("distance", "step", "loss", "kl", "radius", "radius_max")
print("loop  " + "".join(f"{name:>11}" for name in columns))
for row in report["tables"]["after each loop"]:
    print(f"{row['loop']:<6}" + "".join(f"{row[name]:11.3f}" for name in columns))

# %% [markdown]
# ## How far the model sees
#
# A window layer sees W tokens: its own one and W - 1 before it. Layers and loops add up, so the
# last output of the self-decoder should see loops * layers * (W - 1) + 1 tokens. The *receptive
# field* measures it: how many input positions have a gradient that is not zero?

# %%
import jax
import numpy as np

from yocou_jax import analysis, pretrained
from yocou_jax.evaluation.options import with_loops
from yocou_jax.model import resolve_compute

trained = pretrained.load(WORKDIR)
how = resolve_compute(trained.compute)
text = Path(subprocess.__file__).read_text()
tokens = np.array([trained.tokenizer.encode(text)[:512]])  # [1, N], longer than in training
W, (_, stage) = trained.config.window, trained.config.program.self_decoder[0]

for loops in (1, 2, 3):
    model = with_loops(trained, loops)
    seen = analysis.receptive_field(model.params, model.config, how, tokens)
    print(f"{loops} loop(s): {int(seen)} tokens; computed: {loops * stage.layers * (W - 1) + 1}")

# %% [markdown]
# ## A measurement of your own
#
# `analysis.walk` runs the model layer by layer, and gives the residual stream before and after
# each one. For example: how long is the residual stream, as a mean over the tokens?

# %%
norms = {}
for step in analysis.walk(trained.params, trained.config, how, tokens):
    label = f"{step.visit.name} loop {step.visit.loop + 1} layer {step.visit.layer + 1}"
    norms[label] = float(np.linalg.norm(jax.device_get(step.y), axis=-1).mean())

figure, axes = plots.subplots()
axes.barh(list(norms), norms.values())
axes.invert_yaxis()
axes.set(xlabel="norm of the residual stream after the layer")
figure
