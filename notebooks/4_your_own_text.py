# %% [markdown]
# # 4. Bring your own text
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)][colab]
#
# [colab]: https://colab.research.google.com/github/YOUR_NAME/yocou-jax/blob/main/notebooks/4_your_own_text.ipynb
#
# Train a small model on text of your own, in some minutes on 2 CPU cores: a tokenizer for it, bits
# per byte, a text that the model writes, and files that other programs can read.

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
# ## The text
#
# Put your files of text (`*.txt`) into the folder `runs/notebooks/text`, or upload them here, if
# this is Colab. If there are none, the cell makes a text: short stories of a farm, with chance in
# the place of an author.

# %%
import random

folder = Path("runs/notebooks/text")
folder.mkdir(parents=True, exist_ok=True)

if "google.colab" in sys.modules:
    from google.colab import files

    for name, content in files.upload().items():
        (folder / name).with_suffix(".txt").write_bytes(content)


def story(rng):
    """Some sentences. Who counts the animals, and how many there are, stays the same in a story."""
    animal, number = rng.choice(["geese", "goats", "hens", "cows"]), rng.randint(2, 99)
    who = rng.choice(["the old farmer", "her son", "the miller", "a child"])
    parts = [
        f"In the {rng.choice(['spring', 'summer', 'winter'])}, {who} had {number} {animal}.",
        f"One morning {who} went to the {rng.choice(['river', 'hill', 'wood'])}.",
        f"The {animal} were {rng.choice(['hungry', 'quiet', 'gone', 'loud'])}.",
        f"{who[0].upper()}{who[1:]} counted them again: {number} {animal}.",
        f"It was {rng.choice(['late', 'cold', 'a good day'])}, and they all went home.",
    ]
    return " ".join(parts[: rng.randint(3, 5)])


if not list(folder.glob("*.txt")):
    folder, rng = Path("runs/notebooks/farm"), random.Random(0)
    folder.mkdir(exist_ok=True)
    (folder / "farm.txt").write_text("\n".join(story(rng) for _ in range(3000)) + "\n")
first = sorted(folder.glob("*.txt"))[0]
print(first, f"{first.stat().st_size:,} bytes\n")
print(first.read_text("utf-8", "replace")[:400])

# %% [markdown]
# ## A tokenizer for it
#
# `tokenizer="bpe"` trains one on this text (byte-pair encoding): it joins the pairs of letters
# that occur most often. A fixed part of the text is held out for validation.

# %%
from configs import yocou_small
from yocou_jax.config import Config
from yocou_jax.data import load_data

fields = yocou_small.get_config("yoco_u")
fields.model.update(d_model=96, head_dim=24, d_ff=384, vocab_size=512, window=32)
fields.data.update(
    source=f"{folder}/*.txt", sequence_length=128, batch_size=8, validation_sequences=32
)
fields.optimizer.warmup_steps = STEPS // 10
fields.run.update(steps=STEPS, eval_every=max(1, STEPS // 5))
config = Config.from_dict(fields)

data = load_data(config.data)
print(f"{data.num_tokens:,} training tokens of {data.bytes_per_token:.2f} bytes")
sentence = first.read_text("utf-8", "replace")[:60]
print(" | ".join(data.tokenizer.decode([token]) for token in data.tokenizer.encode(sentence)))

# %% [markdown]
# ## Train
#
# `Console` shows what the command line shows.

# %%
from yocou_jax.training.console import Console
from yocou_jax.training.evaluators import Validation
from yocou_jax.training.loop import Run

WORKDIR = Path("runs/notebooks/your_own_text")
shutil.rmtree(WORKDIR, ignore_errors=True)  # without this line, a run goes on where it was
with Console() as console:
    summary = Run(config, WORKDIR, console, evaluators=[Validation]).train()

# %% [markdown]
# ## Bits per byte
#
# How many bits does the model need for a byte of text that it has not seen? A program that
# compresses files answers the same question, so it is a measure for comparison (xz compresses
# all of the text, and starts without knowledge of it).

# %%
import lzma

from yocou_jax import plots
from yocou_jax.training.metrics import read_metrics

content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.txt")))
xz = 8 * len(lzma.compress(content, preset=9)) / len(content)

rows = [row for row in read_metrics(WORKDIR / "metrics.jsonl") if "val_bpb" in row]
figure, axes = plots.subplots()
axes.plot([row["step"] for row in rows], [row["val_bpb"] for row in rows], "o-", label="model")
axes.axhline(xz, color="0.4", linestyle="--", label="xz")
axes.set(xlabel="updates", ylabel="bits per byte", ylim=(0, None))
axes.legend()
figure

# %% [markdown]
# ## The model writes
#
# A larger temperature is more random. 0 takes the most likely token each time.

# %%
from yocou_jax import inference, pretrained

trained = pretrained.load(WORKDIR)
words = trained.tokenizer
prompt = [words.eot_id, *words.encode(" ".join(sentence.split()[:3]))]
model = inference.prepare(trained.params, trained.config, trained.compute)
for temperature in (0.0, 0.8):
    sampling = inference.Sampling(temperature=temperature)
    out = inference.generate(model, [prompt], max_new_tokens=100, sampling=sampling)
    print(f"--- temperature {temperature}")
    print(words.decode([*prompt[1:], *out.tokens[0, : out.lengths[0]]]), "\n")

# %% [markdown]
# ## Export
#
# An export has the weights in the safetensors format, the sizes and the tokenizer.
# `pretrained.load` reads it like a workdir. An export overwrites nothing: its folder must be new.

# %%
exported = Path("exported/your_own_text")
shutil.rmtree(exported, ignore_errors=True)  # of an earlier run of this notebook
pretrained.export(exported, trained)
for path in sorted(exported.iterdir()):
    print(f"{path.name:20} {path.stat().st_size:>10,} bytes")

again = pretrained.load(exported)
model = inference.prepare(again.params, again.config, again.compute)
same = inference.generate(model, [prompt], max_new_tokens=100, sampling=sampling)
print("It writes the same text:", (same.tokens == out.tokens).all())
