"""Eight virtual CPU devices for every test, and quick compilation, set before jax starts."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# Compiling is most of what the tests cost, and none of them measures speed.
FLAGS = [
    *("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"),
    "--xla_cpu_parallel_codegen_split_count=1",  # each part compiled apart costs a fifth more
]
if importlib.metadata.version("jax").startswith("0.10."):  # newer ones refuse to know the flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

# The commands that tests start share what they compile. Set after jax has read its environment:
# the tests themselves compile afresh, because some look into what the compiler says.
if "YOCOU_TESTS_COMPILED" not in os.environ:
    os.environ["YOCOU_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="yocou-compiled-")
    atexit.register(shutil.rmtree, os.environ["YOCOU_TESTS_COMPILED"], ignore_errors=True)
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

# What jax has traced lives as long as its process: to look through it at each 700 new objects, as
# Python would, is a tenth of the suite's time.
gc.set_threshold(100_000, 50, 100)

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

from tests import checked  # noqa: E402

# What is wrong in a way that nobody would see: shapes and types against their annotations, arrays
# that get axes without being asked.
checked.install()
jax.config.update("jax_numpy_rank_promotion", "raise")

os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["YOCOU_TESTS_COMPILED"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# The longest files first, so that no process has one left when the others are done.
LONGEST = (
    *("test_end_to_end", "inference/test_inference", "model/test_model", "training/test_train"),
    *("experiments/test_generate", "training/test_loop", "test_oracle", "test_sharding"),
)


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(LONGEST)}

    def place(item):
        name = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
        return order.get(name, len(order))

    items.sort(key=place)


@pytest.fixture
def unchecked():
    """For a test that hands over what is wrong on purpose, to read the sentence of our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
