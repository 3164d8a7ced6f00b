"""Eight virtual CPU devices for every test, and quick compilation, set before jax starts."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# Most of the time of the tests is compilation, and none of them measures speed.
FLAGS = [
    *("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"),
    "--xla_cpu_parallel_codegen_split_count=1",  # several parts take a fifth more time
]
if importlib.metadata.version("jax").startswith("0.10."):  # newer versions do not have the flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

# The processes that tests start share a cache of compiled programs. The tests themselves have none,
# because some of them read the log of the compiler. So the variable is set (below) after jax has
# read its environment.
if "YOCOU_TESTS_COMPILED" not in os.environ:
    os.environ["YOCOU_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="yocou-compiled-")
    atexit.register(shutil.rmtree, os.environ["YOCOU_TESTS_COMPILED"], ignore_errors=True)
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

# What jax has traced is never freed. By default, Python's garbage collector looks through it after
# each 700 new objects, which takes a tenth of the time of the suite.
gc.set_threshold(100_000, 50, 100)

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

from tests import checked  # noqa: E402

# Every call checks shapes and types against the annotations, and no array gets new axes silently.
checked.install()
jax.config.update("jax_numpy_rank_promotion", "raise")

os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["YOCOU_TESTS_COMPILED"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# The longest files run first, so that parallel processes end at about the same time.
LONGEST = (
    *("test_end_to_end", "inference/test_inference", "model/test_model", "training/test_train"),
    *("experiments/test_generate", "training/test_loop", "test_oracle", "test_sharding"),
    *("kernels/test_tpu", "test_docs"),
)


def pytest_addoption(parser):
    parser.addoption(
        "--once",
        action="store_true",
        help="of each test with parameters, run only the first case; a test that not every Python "
        "can run keeps them all",
    )


def _first_cases(items):
    """One case of each test function, and all cases of tests that are skipped elsewhere."""
    seen = set()
    for item in items:
        name = item.path, item.originalname
        if item.get_closest_marker("skipif") or name not in seen:
            yield item
        seen.add(name)


def pytest_collection_modifyitems(config, items):
    order = {name: i for i, name in enumerate(LONGEST)}

    def place(item):
        name = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
        return order.get(name, len(order))

    items.sort(key=place)
    if config.getoption("--once"):
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        items[:] = _first_cases(items)


@pytest.fixture
def unchecked():
    """For a test that passes a wrong value on purpose: the code itself must refuse it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
