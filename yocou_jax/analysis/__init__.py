"""What happens inside a model, and inside its loops: measurements of the forward pass.

`walk` runs a model layer by layer, for measurements of your own. `inside` makes those of this
package together. On several devices, call all of these inside `with jax.set_mesh(mesh)`.
"""

from yocou_jax.analysis.inside import (
    Application,
    Inside,
    Loop,
    angular_distance,
    inside,
    routing_overlap,
    step_norm,
)
from yocou_jax.analysis.jacobian import Radius, loop_radius, receptive_field
from yocou_jax.analysis.walk import Step, hidden_after, walk

__all__ = [
    "Application",
    "Inside",
    "Loop",
    "Radius",
    "Step",
    "angular_distance",
    "hidden_after",
    "inside",
    "loop_radius",
    "receptive_field",
    "routing_overlap",
    "step_norm",
    "walk",
]
