"""What does each loop do: do the layers change less in each loop, with a spike at the hand-over?

    python -m experiments.compare --config=configs/studies/inside.py

The source is Figure 8 of the paper: the angular distances between the inputs and the outputs of all
layers of YOCO-U, 20 layers with three loops. They fall from loop to loop, and there is a spike
"where the self-decoder hands over to the cross-decoder (layer 30 of 40)". This is layer 10 of the
third loop, the last one before the cross-decoder; or the distance to the state after it, which the
first cross layer makes. The task `inside` reports both, and the claims take the first cross layer
as the spike: it is above the layer before it, and above the layer after it. In each loop, the
distances fall from layer to layer. The task also decodes the text after each loop (the lens).

Here it is the model of configs/studies/language.py with 4 and with 8 layers: yoco_u has 2 window
layers in each loop, and yoco_u_deep has 4, of 0.75 times the width.

Match: all entries have the same parameters (without embeddings) and tokens; d_ff is the free size.
The learning rate is that of configs/studies/language.py, and was not tried for any entry here.

Cost: 6 runs of 1 to 2 minutes of one CPU core, 9 minutes in all.

Expected, written before the first run. A model of `make train` (LOG.md) had the distances 0.213,
0.064 and 0.042 in the three loops and 0.079 at the hand-over, and 4.23, 3.90 and 3.84 nats/token
after the loops. So the mean distance falls by 0.05 to 0.2 from loop 1 to 2, and by 0 to 0.05 from
loop 2 to 3. The hand-over is above the layer before it and the layer after it by 0.01 to 0.1. The
loss falls by 0.1 to 1 nats/token from loop 1 to 2, and by 0.01 to 0.2 from loop 2 to 3. All this
is the same for both depths.

Added when the results of the first runs, on another text, were known: the claims about the first
and the last layer of a loop, and `beside`, the larger one of the layers before and after the
hand-over. For a time `beside` stood in the place of the two claims about these layers, because a
spike is above both. They came out like this: the layer before is below the hand-over (by 0.035 in
yoco_u and 0.011 in yoco_u_deep, reproduced), and for the layer after, this is not decided (0.008
and 0.001). If layer 30 is the last one before the cross-decoder, it is no spike at all: in yoco_u
it has 0.035, the layer before it 0.040, and the first cross layer 0.070.
"""

from configs.studies import language
from yocou_jax.study import NOT_IN_PAPER, Claim, Entry, Study


def get_config():
    c = language.get_config()
    c.run.update(steps=160)
    return c


def below(
    entry: str,
    lower: str,
    higher: str,
    expected: tuple[float, float] = (0.0, 1.0),
    source: str = "Figure 8",
    **about: bool,
) -> Claim:
    """That one number of the task `inside` is below another one of the same model."""
    paths = {"metric": f"evaluation.inside.scalars.{lower}"}
    paths["against"] = f"evaluation.inside.scalars.{higher}"
    return Claim(entry, entry, source, expected, least=0.005, **paths, **about)


def loops(entry: str) -> list[Claim]:
    """What each loop does."""
    return [
        below(entry, "distance_loop_2", "distance_loop_1", (0.05, 0.2)),
        below(entry, "distance_loop_3", "distance_loop_2", (0.0, 0.05)),
        *(
            below(entry, f"distance_last_loop_{k}", f"distance_first_loop_{k}", added=True)
            for k in (1, 2, 3)
        ),
        below(entry, "distance_before_hand_over", "distance_hand_over", (0.01, 0.1)),
        below(entry, "distance_after_hand_over", "distance_hand_over", (0.01, 0.1)),
        below(entry, "distance_beside_hand_over", "distance_hand_over", (0.01, 0.1), added=True),
        below(entry, "loss_loop_2", "loss_loop_1", (0.1, 1.0), NOT_IN_PAPER),
        below(entry, "loss_loop_3", "loss_loop_2", (0.01, 0.2), NOT_IN_PAPER),
    ]


STUDY = Study(
    question="Do the layers change less from loop to loop, with a spike at the hand-over?",
    entries={
        "yoco_u": Entry(),
        "yoco_u_deep": Entry(language.DEEP),
    },
    evaluations={"inside": ("--samples=16",)},
    notes="A spike must be above both neighbors: `beside` is the larger one of the layers before "
    "and after the hand-over. If the spike of Figure 8 is the last layer before the hand-over (its "
    "other reading), it must be above the first cross layer, which is the reverse of the claim "
    "that distance_before_hand_over is below distance_hand_over. The claims about the layer before "
    "and the layer after were written before the first runs, were absent at the revision of these "
    "runs, and were put back when their results were known.",
    claims=(
        # A spike is above the layer before it and above the layer after it. In yoco_u, the layer
        # after the hand-over is the last of the model. Last layers often turn the stream far.
        *loops("yoco_u"),
        *loops("yoco_u_deep"),
    ),
)
