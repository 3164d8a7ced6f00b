"""Does a model use a long prefix, and does YOCO-U use it better than its baselines?

    python -m experiments.compare --config=configs/studies/long_text.py

The source is Figure 4 of the paper: the perplexity of the last 512 tokens after prefixes of 2K to
8K tokens, on books and code. Here it is the model of configs/studies/language.py, trained with
1,024 tokens in a sequence. Then the loss of the last 256 tokens of the same held-out sequences is
measured when the model sees 256 (these tokens alone), 512, 1,024 and 2,048 tokens: the last is
twice as long as any sequence in training. Each of these sequences is inside one file. For enough of
them, 15% of the text is held out.

Figure 4 is about what a prefix is worth. A lower loss at 1,024 tokens says little about that: it
may be as much lower without a prefix. So gain_1024 is how much the loss falls from 256 to 1,024
tokens, and the claims of Figure 4 compare this. They were added when the results were known:
without a prefix, the transformer is behind by nearly as much.

Match: all entries have the same parameters (without embeddings) and tokens; d_ff is the free size.
The learning rate is that of configs/studies/language.py, and was not tried for any entry here.

Cost: 9 runs of 2 to 3 minutes of one CPU core, about 22 minutes in all.

Expected, written before the first run. The loss falls from 256 to 512 tokens by 0.05 to 0.3
nats/token, and from 512 to 1,024 by 0 to 0.1: code repeats the names of its own file, but a model
that has read 0.4M tokens copies little. At 1,024 tokens yoco_u is below yoco by 0.01 to 0.1
nats/token, as in Table 3. Beyond the trained length, the full layers of the transformer have
positions that it has never seen, while the cross layers of yoco_u have none: there yoco_u is lower,
by more than at 1,024 tokens.
"""

from configs.studies import language
from yocou_jax.study import NOT_IN_PAPER, Claim, Entry, Study


def get_config():
    c = language.get_config()
    c.data.update(batch_size=2, sequence_length=1024)
    c.data.update(validation_fraction=0.15, validation_sequences=64)
    c.run.update(steps=200, eval_every=100)
    return c


def nats(tokens: int) -> str:
    """The path of the loss of the last 256 tokens when the model sees so many."""
    return f"evaluation.perplexity.scalars.nats_seeing_{tokens}"


def falls(
    entry: str, tokens: int, expected: tuple[float, float], source: str = "Figure 4"
) -> Claim:
    """That the loss is lower with so many tokens than with half of them."""
    paths = {"metric": nats(tokens), "against": nats(tokens // 2)}
    return Claim(entry, entry, source, expected, least=0.01, **paths)


def gains_more(worse: str, tokens: int, source: str = "Figure 4") -> Claim:
    """That seeing so many tokens instead of 256 is worth more to yoco_u than to another entry."""
    path = f"evaluation.perplexity.scalars.gain_{tokens}"
    about = {"metric": path, "more": True, "added": True}
    return Claim("yoco_u", worse, source, (0.0, 1.0), 0.01, **about)


STUDY = Study(
    question="Does YOCO-U use a long text, and better than its baselines?",
    entries={
        "yoco_u": Entry(),
        "yoco": Entry({"model.architecture": "yoco"}),
        "transformer": Entry({"model.architecture": "transformer"}),
    },
    # All in nats per token.
    evaluations={"perplexity": ("--lengths=256,512,1024,2048", "--samples=256")},
    claims=(
        # Figure 4 begins with a prefix, and 256 tokens are only those that count.
        falls("yoco_u", 512, (0.05, 0.3), NOT_IN_PAPER),
        falls("yoco_u", 1024, (0.0, 0.1)),
        falls("yoco", 1024, (0.0, 0.1)),
        falls("transformer", 1024, (0.0, 0.1)),
        # These two are not Figure 4 by themselves: see above.
        Claim("yoco_u", "yoco", NOT_IN_PAPER, (0.01, 0.1), 0.01, metric=nats(1024)),
        Claim("yoco_u", "transformer", NOT_IN_PAPER, (-0.02, 0.1), 0.01, metric=nats(1024)),
        Claim("yoco_u", "transformer", NOT_IN_PAPER, (0.05, 1.0), 0.01, metric=nats(2048)),
        gains_more("yoco", 1024),
        gains_more("transformer", 1024),
        # Longer than in training, which Figure 4 has not.
        gains_more("transformer", 2048, NOT_IN_PAPER),
    ),
)
