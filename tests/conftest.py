"""Eight virtual CPU devices for every test, and quick compilation, set before jax starts."""

import importlib.metadata
import os

# Compiling is most of what the tests cost, and none of them measures speed.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jax").startswith("0.10."):  # newer ones refuse to know the flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
