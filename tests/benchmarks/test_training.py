"""Which configs benchmark_training times, and what its first line says."""

from benchmarks import training
from configs import yocou_small


def test_a_config_is_timed_unchanged_next_to_its_transformer():
    fields = yocou_small.get_config()
    fields.model.update(architecture="window*6@2 | cross*6", num_loops=5)
    configs = training.compared(fields)
    programs = {name: str(config.model.program) for name, config in configs.items()}
    assert programs == {
        "transformer": "full*12",
        "window*6@2 | cross*6": "window*6@5 | cross*6",
    }
    fields.model.update(architecture="transformer", num_loops=None)
    assert training.compared(fields).keys() == {"transformer"}


def test_the_headline_compares_with_the_product():
    trained = {
        "matmul_gflops": 200.0,
        "yoco_u": {"tokens_per_s": 2811.4, "gflops": 91.0},
        "transformer": {"tokens_per_s": 1.0, "gflops": 1.0},
    }
    assert training.headline("yocou_small", "yoco_u", trained) == (
        "yocou_small trains at 2,811 tokens/s, 91 GFLOP/s: 46% of a 2048 x 2048 matrix product on "
        "this machine (200 GFLOP/s)."
    )
