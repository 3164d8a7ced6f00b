"""Compiles every attention kernel for an accelerator that this machine does not have.

    python -m experiments.compile_kernels --target=v5e|v5p|v6e|tpu7x|h200|a100 [--json]

It needs requirements-aot.txt. pallas_kernels/README.md explains the words tile, dq, dkv, splash,
VMEM, spilled register and wgmma.

The shapes are those of configs/yocou_125m.py and configs/yocou_1b.py. A few small shapes, "others",
have what these do not use: other dtypes and head widths, lengths, queries after a cache. As in
training, a program of attention contains the forward and the backward kernels. Exit code 1: a
program does not compile, a GPU kernel spills registers or serializes its wgmma, a TPU tile takes
more cycles than splash's or an unknown number of cycles, or a step of decode_cross on a TPU
accesses more than 1.05 times the bytes of the cache.

TPU. libtpu compiles on any host. With --xla_jf_dump_to and --xla_jf_dump_llo_text it writes the
final schedule of each kernel, with one row per VLIW bundle. A bundle is one instruction for all
units of the core; each unit has slots in it. It takes one cycle if nothing stalls. The schedule
contains the latencies that the scheduler knows, as empty bundles. It does not contain the copies
between HBM and VMEM, which run at the same time. The cycles of a tile are

    the bundles from the first to the last that uses a matrix unit, both included,

within one stretch: a piece of straight code between two labels of *final_bundles.txt. So the body
of a loop counts once, and a tile has two entries, one without and one with a mask. The cycles are
scaled to 512 x 512 pairs of query and key. The kernel's jaxpr shows how many pairs a stretch
handles: it has one exponential per pair, of which the result goes into a matrix product. If the
schedule has fewer exponentials than that, the table has a question mark. The columns:

* stretch: all bundles of the stretch, also those before the first and after the last product.
* MXU, VALU: the share of the slots of the matrix units and of the vector units that is filled.
* spilled, filled: how many instructions store vector registers to VMEM and load them back. They are
  in the schedule, so the cycles include them. Therefore they are not a failure: the scores of a
  512 x 512 tile are four times the register file, and splash spills 558 times.
* bytes / cache, for decode: the bytes that the step accesses, by XLA's count, over the bytes of
  both caches. 1 means that every key and value is read once. A copy of the caches before the kernel
  adds 2, and more if it pads them. A small cache may be copied to VMEM as a whole; that is not a
  failure.

The tile table compiles splash (blocks of 512, head width 128, LocalMask of the same window) and our
kernels (one head of 128) in the same process. With libtpu 0.0.50.1 splash takes 734, 890 and 1167
cycles on v6e for forward, dq and dkv.

GPU. The ptxas (NVIDIA's assembler) in jaxlib's CUDA plugin assembles the kernels of pallas_gpu for
a description of an H200 (in benchmarks/aot/targets.py). Registers, spills and warnings are from the
ptxas log of each kernel. Triton compiles its own kernels (compile_report of
pallas_kernels/attention/triton.py), here for bf16 without lengths only: float16 and lengths are not
compiled for a100.
"""

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
        cli.print_json(result)
    else:
        show(name, result)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    cli.run(main)
