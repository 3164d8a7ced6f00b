"""Compiles every attention kernel for an accelerator that this machine does not have.

    python -m experiments.compile_kernels --target=v5e|v5p|v6e|tpu7x|h200|a100 [--json]

The shapes are those of configs/yocou_125m.py and configs/yocou_1b.py, and a few small ones of what
those do not use ("others"): other dtypes and head widths, lengths, late queries. The attention
programs hold the forward and the backward kernels, as in training. Exit code 1: a compile failed, a
GPU kernel spills registers or serialises its wgmma, or on v6e a tile takes more cycles than jax's
splash attention or an unknown number of them. It needs requirements-aot.txt.

TPU. libtpu compiles on any host and, asked by --xla_jf_dump_to and --xla_jf_dump_llo_text, writes
the final schedule of each kernel: one row per VLIW bundle with the slots that it fills. A bundle is
a cycle if nothing stalls; the latencies that the scheduler knows are in it as empty bundles, copies
between HBM and VMEM, which overlap with it, are not. Cycles of a tile are

    the bundles from the first to the last that uses a matrix unit, both included,

within one stretch of straight code (between two labels of *final_bundles.txt), so that a loop's
body counts once, and a tile's two variants, without and with a mask, are two entries. They are
scaled to 512 x 512 pairs of query and key. How many pairs a stretch handles is read off the
kernel's jaxpr, as the exponentials that end in a matrix product, and not believed (a question mark)
if the schedule holds fewer. `stretch` is all of its bundles, so that nothing can hide before the
first or behind the last product. MXU and VALU are the share of their slots that the tile's bundles
fill. `spilled` and `filled` count instructions that store vector registers to VMEM and load them
back: they are part of the schedule and so of the cycles (the scores of a 512 x 512 tile are four
times the register file, and splash spills 558 times), and for that reason no failure.

The tile table compiles splash (blocks of 512, head width 128, LocalMask of the same window) and our
kernels (one head of 128) in this same process. With libtpu 0.0.50.1 splash takes 734, 890 and 1167
cycles on v6e for forward, dq and dkv.

`bytes / cache`, for decoding: what XLA says that the step accesses over the bytes of both caches. 1
is every key and value read once; a copy of the caches before the kernel adds 2, more if it pads
them; a small cache may only be brought into VMEM. It fails nothing.

GPU. Mosaic GPU kernels are assembled by the ptxas in jaxlib's CUDA plugin against a written-down
target (H200 in benchmarks/aot/targets.py); registers, spills and warnings are those of each
kernel's own ptxas log.
Triton kernels are compiled by Triton itself (compile_report of pallas_kernels/attention/triton.py),
which is asked for bf16 without lengths only: float16 and lengths are not compiled for a100.
"""

import json

from absl import flags

from benchmarks.aot import compile as aot
from benchmarks.aot import verdict
from benchmarks.aot.targets import TARGETS, what_to_install
from benchmarks.report import console, table
from experiments import cli
from yocou_jax.errors import UserError

TARGET = flags.DEFINE_enum("target", None, list(TARGETS), "What to compile for.", required=True)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


def show(name: str, result: dict) -> None:
    out = console(190)
    kernels = table(verdict.kernel_grid(name, result))
    kernels.columns[3].no_wrap = True  # its name
    out.print(kernels)
    if result["tiles"]:
        out.print(table(verdict.tile_grid(result["tiles"])))
    out.print(", ".join(f"{k} {v}" for k, v in result["versions"].items()))
    out.print(f"{len(result['jobs'])} programs in {result['seconds']:.0f} s")
    for failure in result["failures"]:
        out.print(f"FAILED: {failure}", markup=False)


def main(_):
    name = TARGET.value
    if missing := what_to_install(TARGETS[name]):
        raise UserError(missing)
    result = aot.measure(name)
    if JSON.value:
        print(json.dumps(result))
    else:
        show(name, result)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    cli.run(main)
