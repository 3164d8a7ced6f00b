"""Which configs benchmark_training times."""

from benchmarks import training
from configs import yocou_small


def test_a_config_is_timed_unchanged_next_to_its_transformer():
    fields = yocou_small.get_config()
    fields.model.update(architecture="window*6@2 | cross*6", num_loops=5)
    configs = training._configs(fields)
    programs = {name: str(config.model.program) for name, config in configs.items()}
    assert programs == {
        "transformer": "full*12",
        "window*6@2 | cross*6": "window*6@5 | cross*6",
    }
    fields.model.update(architecture="transformer", num_loops=None)
    assert training._configs(fields).keys() == {"transformer"}
