# %% [markdown]
# # 2. Compare two programs in TensorBoard
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)][colab]
#
# [colab]: https://colab.research.google.com/github/YOUR_NAME/yocou-jax/blob/main/notebooks/2_compare_in_tensorboard.ipynb
#
# YOCO-U is YOCO with loops. Is it better with the same parameters? This notebook trains both on
# the same text, and shows their losses side by side: by tokens, and by computation. The paper has
# this comparison in Table 3 and Figure 2. Here are one seed and a few minutes on 2 CPU cores, so
# this shows how to compare, and proves nothing.

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
STEPS = int(os.environ.get("NOTEBOOK_STEPS", 150))  # updates; fewer take less time and learn less

# %matplotlib inline
# %config InlineBackend.figure_format = "retina"

# %% [markdown]
# ## Two programs at equal parameters
#
# A *study* names programs, and `twins` makes them equal: it changes a size of each program until
# its parameters and its training tokens are those of the first one. Other programs are as easy: add
# an entry with any architecture of the README.

# %%
from configs import yocou_small
from yocou_jax import accounting
from yocou_jax.config import Config
from yocou_jax.study import Entry, Study, ratios, twins

fields = yocou_small.get_config()
fields.model.update(d_model=96, head_dim=24, d_ff=384)
fields.data.validation_sequences = 32
fields.optimizer.warmup_steps = STEPS // 10
fields.run.update(steps=STEPS, eval_every=max(1, STEPS // 6))
study = Study(
    question="Do loops help at equal parameters?",
    entries={"yoco_u": Entry(), "yoco": Entry({"model.architecture": "yoco"})},
    match=("parameters", "tokens"),
)
configs = twins(study, Config.from_dict(fields))

for name, config in configs.items():
    print(f"{name}: {config.model.program}")
print("\nyoco_u divided by yoco:")
for axis, ratio in ratios(configs["yoco_u"], configs["yoco"]).items():
    print(f"  {axis:14} {ratio:.2f}")

# %% [markdown]
# So the parameters and the tokens are equal, but YOCO-U computes more, and it needs a larger KV
# cache for its loops.
#
# ## Train both
#
# They see the same batches in the same order.

# %%
from yocou_jax.training.evaluators import Validation
from yocou_jax.training.loop import Run

FOLDER = Path("runs/notebooks/compare")
shutil.rmtree(FOLDER, ignore_errors=True)  # without this line, the runs go on where they were
for name, config in configs.items():
    summary = Run(config, FOLDER / name, evaluators=[Validation]).train()
    print(f"{name:7} {summary['val_bpb']:.4f} bits per byte, {summary['wall_s']:.0f} s")

# %% [markdown]
# ## TensorBoard
#
# The next cell shows both runs in TensorBoard. (It is what `%tensorboard` does. In a terminal:
# `tensorboard --logdir=runs/notebooks/compare`.)
#
# * *Time series*: the losses come first. The groups `x_tokens` and `x_gflops`, at the end, have
#   the losses again with tokens and GFLOPs (10^9 floating-point operations) instead of updates.
# * *Custom scalars*: these two next to each other.
# * *HParams*: a table with one row for each run.

# %%
from tensorboard import notebook

if "NOTEBOOK_STEPS" not in os.environ:  # a test of this notebook has no browser
    os.environ["PATH"] += f"{os.pathsep}{os.path.dirname(sys.executable)}"  # it may be only there
    notebook.start(f"--logdir {FOLDER}")

# %% [markdown]
# ## The same curves with matplotlib
#
# `metrics.jsonl` in the workdir of each run has the same numbers.

# %%
from yocou_jax import plots
from yocou_jax.training.metrics import read_metrics

figure, panels = plots.subplots(2)
style = plots.styles(configs)
for name, config in configs.items():
    rows = [row for row in read_metrics(FOLDER / name / "metrics.jsonl") if "val_bpb" in row]
    bits = [row["val_bpb"] for row in rows]
    tokens = [row["tokens"] for row in rows]
    flops = accounting.run_flops_per_token(config)
    panels[0].plot(tokens, bits, label=name, **style[name])
    panels[1].plot([n * flops for n in tokens], bits, label=name, **style[name])
panels[0].set(xlabel="training tokens", ylabel="validation, bits per byte")
panels[1].set(xlabel="training FLOPs", ylabel="validation, bits per byte")
panels[0].legend()
figure

# %% [markdown]
# Left: by tokens. Right: by computation. Only the last point of each run counts: before it, the
# learning rate has not fallen. The last points have equal tokens, but not equal computation. So the
# right figure compares nothing at equal computation. For this, YOCO must train for more updates: an
# entry with `match=("parameters", "flops")` does so.
#
# One seed says little: another seed may change the order. `experiments.compare` trains several
# seeds, and gives each difference an interval. docs/using.md has more, in the section "Compare
# architectures".
