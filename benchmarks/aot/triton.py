"""The kernels that Triton itself compiles."""

from benchmarks.aot.targets import MODELS, OTHERS, Target, cases
from benchmarks.timing import first_line
from pallas_kernels.attention import triton
from pallas_kernels.device import Device


def run_jobs(target: Target) -> list[dict]:
    """A job for each kernel of each model. If a model fails, it has one job with the error."""
    jobs, capability = [], Device("gpu", target.device_kind).compute_capability
    for model in (*MODELS, OTHERS):
        shapes = [case._asdict() for case in cases("triton") if case.model == model]
        try:
            kernels = triton.compile_report(capability, shapes)
        except Exception as error:
            jobs.append({"model": model, "operation": "all", "error": first_line(error)})
            continue
        for kernel in kernels:
            name, _, call = kernel["name"].partition(" ")
            found = {
                "kernel": name,
                "registers": kernel["registers"],
                "shared_bytes": kernel["shared_bytes"],
                "spilled_bytes": kernel["spills"],
            }
            job = {"model": model, "operation": call, "compile_s": kernel["seconds"]}
            jobs.append(job | {"error": None, "kernels": [found]})
    return jobs
