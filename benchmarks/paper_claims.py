"""Claims that no study is about, for CLAIMS.md: of the paper, and one that was only tried."""

from benchmarks import paper
from configs import yocou_1b
from yocou_jax import accounting
from yocou_jax.config import Config

TITLE = "Claims without a study"
COLUMNS = ("claim", "the paper", "here", "command")
NOT_RUN = (
    (
        "Table 1: memory and time by the length of the text",
        "KV memory L N D for a transformer, (N + W T L) D for YOCO-U",
        "counted exactly by the accounting, and tested against the arrays of inference",
        "python -m experiments.account --config=configs/yocou_1b.py",
    ),
    (
        "Tables 8 and 9: speed of prefill and decode on one H100",
        "yoco_u 10.2 times the transformer in prefill at 256K, and 0.88 times at 8K; 2.2 times in "
        "decode at 256K (of other batches)",
        "not run: needs an H100",
        "python -m experiments.profile_inference --config=configs/yocou_1b.py",
    ),
    (
        "Table 2 and Figure 2: experts, 10B parameters, 300B tokens",
        "average 41.78 for YOCO, and for YOCO-U 46.23 at equal FLOPs and 47.08 at equal steps; 62% "
        "fewer tokens",
        "not run: needs a pod",
        "python -m experiments.train --config=configs/yocou_10b_moe.py",
    ),
    (
        "Figure 5: seven sizes",
        "YOCO-U as good as YOCO with 50% fewer parameters up to 6.4B; nearly a tie at 10B",
        "not run: needs a pod",
        "python -m experiments.train --config=configs/paper.py:1.3b,yoco_u",
    ),
    (
        "Tables 3 and 5: averages over downstream tasks",
        "Table 3: yoco_u and rins 48.3, universal_transformer 47.8, transformer 47.1, yoco 47.0, "
        "parscale 46.8. Table 5: deep yoco_u 48.59 (better than wide), upper_loop 47.34, "
        "upper_loop_unshared 46.41",
        "not run: needs a model of 1.3B parameters",
        "python -m experiments.evaluate --workdir=... --task=harness",
    ),
    (
        "Appendix B: fine-tuning on mathematics",
        "average of 11 benchmarks 42.7 for YOCO and 67.1 for YOCO-U",
        "not run: needs a trained model of that size",
        "-",
    ),
    (
        "A number that is found in two steps (needles of the kind `two_hop`)",
        "not in the paper",
        "tried with 10% to 30% of such documents and 500 to 1,000 updates, one seed each: not "
        "learned (LOG.md)",
        "python -m experiments.evaluate --workdir=... --task=needle "
        "--source='needle(kind=two_hop)'",
    ),
)


def rows() -> list[list[str]]:
    """Claims that no study is about. Table 10 is computed here, to the last digit that it has."""
    cells = right = 0
    for architecture, row in paper.TABLES["kv"].items():
        model = Config.from_dict(yocou_1b.get_config(architecture)).model
        for length, mib in zip(paper.LENGTHS, row, strict=True):
            cells += 1
            right += accounting.kv_bytes(model, length) == mib * 2**20
    exact = [
        "Table 10: bytes of the KV cache at 8K to 256K",
        "18.9 times less than the transformer at 256K",
        f"exact in {right} of {cells} cells",
        "python -m experiments.account --config=configs/yocou_1b.py",
    ]
    return [[*row[:3], "-" if row[3] == "-" else f"`{row[3]}`"] for row in (exact, *NOT_RUN)]
