"""Universal YOCO in JAX: programs of stages, exact accounting, one jitted training loop."""
