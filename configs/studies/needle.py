"""Does a model find what a long text says, and does YOCO-U find it more often than its baselines?

    python -m experiments.compare --config=configs/studies/needle.py

The source is Table 4 of the paper: S-NIAH-1 and S-NIAH-2 of RULER, in which one sentence of a long
text gives a number to a key. In the first (`single`), the rest of the text is one noise sentence;
in the second (`text`), it is essays, and here lines of Python's source code. The model must write
the number. The share of right answers is measured at 256, 512, 1,024 and 2,048 tokens.

A model that is trained on text alone for a few minutes writes no number. So the training text is
such tasks: most documents are short (up to 480 characters, about 100 tokens), because only the
number teaches to look back, and one in five tokens is of documents of up to 1,600 characters. The
documents are packed: attention stays inside each of them. 512 tokens are about the longest in
training; 1,024 and 2,048 tokens are beyond it.

Match: all entries have the same parameters (without embeddings) and tokens; d_ff is the free size.
A claim is that one entry has a lower accuracy than another. The learning rate is that of
configs/studies/language.py, and was not tried for any entry here.

Cost: 9 runs of 2 to 3 minutes on 2 idle CPU cores, about 23 minutes in all. This is an estimate
before any whole run: 2.7e13 FLOPs at 30 GFLOP/s, and 50 seconds to start, to validate and to
evaluate each run.

Expected, written before the first run. Three sizing runs of yoco_u (LOG.md; short documents alone,
1.8M to 2.5M tokens) wrote no whole number right. But one of them, packed and with the vocabulary of
this study, had learned half of the task: it copied the tokens of one digit, and of the 16 nats of a
number 8.2 were left. So it is open whether any entry writes whole numbers after 2.0M tokens; if
none does, nothing is said about Table 4. If they do, yoco_u is above yoco and the transformer by 0
to 30 points at 256 tokens, and by more at 1,024, where the positions of full layers are new. In the
paper the transformer has 0.87 and 0.82, YOCO 1.00 and 0.86, and YOCO-U 1.00 and 0.95.
"""

from configs.studies import language
from yocou_jax.study import Claim, Entry, Study


def get_config():
    c = language.get_config()
    c.model.update(num_layers=2, vocab_size=1024, d_model=64, head_dim=16, d_ff=192, window=32)
    c.data.update(
        source="0.4*needle(kind=single,length=480,documents=20000)"
        " + 0.1*needle(kind=single,length=1600,documents=2000,seed=1)"
        " + 0.4*needle(kind=text,length=480,documents=20000)"
        " + 0.1*needle(kind=text,length=1600,documents=2000,seed=1)",
        packing=True,
        sequence_length=512,
        validation_sequences=64,
    )
    c.run.update(steps=500, eval_every=125)
    return c


def accuracy(kind: str, tokens: int) -> str:
    """The path of the share of right answers at so many tokens."""
    return f"evaluation.needle.scalars.accuracy_{kind}_length{tokens}"


PAPER = {
    "yoco_u": {"single": "1.00", "text": "0.95"},
    "yoco": {"single": "1.00", "text": "0.86"},
    "transformer": {"single": "0.87", "text": "0.82"},
}

STUDY = Study(
    question="Does YOCO-U find a number in a long text more often than its baselines?",
    entries={
        "yoco_u": Entry(),
        "yoco": Entry({"model.architecture": "yoco"}),
        "transformer": Entry({"model.architecture": "transformer"}),
    },
    evaluations={"needle": ("--lengths=256,512,1024,2048", "--samples=12")},
    claims=tuple(
        Claim(
            *(lower, "yoco_u", "Table 4", expected),
            least=0.05,
            metric=accuracy(kind, tokens),
            paper=f"{PAPER[lower][kind]} and {PAPER['yoco_u'][kind]}",
        )
        for tokens, expected in ((256, (0.0, 0.3)), (1024, (0.0, 0.6)))
        for kind in ("single", "text")
        for lower in ("yoco", "transformer")
    ),
)
