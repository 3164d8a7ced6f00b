"""What the compilers' files say, and a kernel that is compiled for a TPU without having one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from benchmarks.aot import logs, targets, verdict
from pallas_kernels import Call, api
from pallas_kernels.attention import triton
from pallas_kernels.device import Device

UTILIZATION = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 1
0 0 1 0 0 0 0 0 0 0
2 0 4 0 0 1 0 0 0 0
0 0 0 0 2 0 0 1 1 0
1 0 2 0 0 0 0 0 0 0
0 0 4 0 1 0 0 0 0 0
1 0 3 0 0 1 1 0 0 0
0 0 0 0 0 0 0 2 0 2
"""
BUNDLES = """= control target key start
LH: loop header
PF: predicated region fallthrough
= control target key end

     0   :  { %s1 = inlined_call_operand.vmem [shape: bf16[1,8], index: 0, kind: input] }
   0x1 LB: > { %2 = sst [smem:[#allocation14_spill]] %s9  ;;  %s4 = sadd.s32 1, %s9 }
   0x2   : > { %8327 = vmatpush3.bf16.xpose.msra.mxu0 %v1
hlo: a name that goes over lines
 */ }
   0x3   : > { %3 = vst [vmem:[#allocation2_spill]] %v1 }
   0x4   : >> { %4 = vmatmul.mubr.bf16.mxu0 %v2 }
   0x5 PF: > { %5 = vpow2.f32 %v3 } /* Start/End empty region */
   0x6   : > { %6 = vmatmul.mubr.bf16.mxu1 %v2 }
   0x7   :  { %7 = vst [vmem:[%s1]] %v4 } /* exit bundle */
"""


def test_schedule_is_counted_within_straight_code():
    stretches, slots = logs.parse_schedule(UTILIZATION, BUNDLES)
    assert [(s.cycles, s.bundles) for s in stretches] == [(3, 4), (1, 3)]
    assert stretches[0].busy["MXU"] == 3 / 6
    assert stretches[0].busy["VALU"] == 6 / 12
    assert stretches[1].busy["VLOAD:FILL"] == 1 / 3
    assert slots["VSTORE:SPILL"] == 1
    assert slots["VLOAD:FILL"] == 1


def test_cycles_are_scaled_to_the_tile_and_unknown_when_the_code_was_regrouped():
    stretches, _ = logs.parse_schedule(UTILIZATION, BUNDLES)
    of_tile = targets.TILE**2 // 1024

    def cycles(*pairs):
        return [tile["tile_cycles"] for tile in logs._tiles(stretches, list(pairs))]

    assert cycles(1024, 512) == [3 * of_tile, 2 * of_tile]
    assert cycles(512) == [6 * of_tile, 2 * of_tile]
    assert cycles(512, 512, 9) == [None, None]
    # The second one has a single instruction for exponentials, which makes 1024 of them.
    assert cycles(2048, 2048) == [1.5 * of_tile, None]


def test_pairs_come_from_the_exponentials_of_a_kernel():
    def kernel(q, k, v, out):
        def attend(keys):
            s = jnp.dot(q[...], k[:keys].T)
            p, correction = jnp.exp2(s - 1.0), jnp.exp2(s[:, :1])
            sums = jnp.dot(p, jnp.ones((keys, 4)))
            out[...] = out[...] * correction + jnp.dot(p.astype(v.dtype), v[:keys]) / sums

        pl.when(pl.program_id(0) == 0)(lambda: attend(32))
        attend(16)

    def run(q, k, v):
        return pl.pallas_call(kernel, out_shape=q, grid=(2,), name="a_forward")(q, k, v)

    q, k = jax.ShapeDtypeStruct((8, 4), jnp.float32), jax.ShapeDtypeStruct((32, 4), jnp.float32)
    assert logs.attention_kernels(run, [q, k, k]) == {"a_forward": [8 * 32, 8 * 16]}


def test_vmem_report():
    entry = {"blocks": [], "total_size": 2125824}
    data = {"global_info": {"vmem_capacity": 1}, "hlo_breakdowns": {"kernel.1": entry}}
    page = f"<script>\n const DATA ={json.dumps(data)};\n const heading = 1; </script>"
    assert logs.parse_vmem(page) == {"kernel.1": 2125824}


@pytest.mark.parametrize("spilled", [0, 24])
def test_ptxas_log(spilled):
    log = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'forward_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
    found = logs.parse_ptxas(log)
    assert found == {"registers": 168, "spilled_bytes": 2 * spilled, "wgmma_serialized": False}
    warning = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    assert logs.parse_ptxas(log + warning + "serialized due to ...")["wgmma_serialized"]
    job = {"model": "m", "operation": "o", "error": None, "kernels": [{"kernel": "f", **found}]}
    assert bool(verdict.failures(targets.TARGETS["h200"], [job], [])) == bool(spilled)


def test_kernels_of_a_gpu_program_are_matched_by_name(tmp_path):
    for name, size in (("a_dq_1", 2048), ("a_forward_0", 1024)):
        launch = f"gpu.launch threads(%x) dynamic_shared_memory_size %c{size}_i32 {{"
        (tmp_path / f"{name}.before_layout_inference.txt").write_text(launch)
    for name in ("a_dq_2", "a_forward_0"):
        (tmp_path / f"{name}.ptxas").write_text("ptxas info    : Used 168 registers")
    found = [(k["kernel"], k["shared_bytes"], k["registers"]) for k in logs.gpu_kernels(tmp_path)]
    assert found == [("a_dq", 2048, 168), ("a_forward", 1024, 168)]


def test_a_slower_tile_or_a_failed_program_fails_the_command():
    tile = {"tile_cycles": 800, "stretch_cycles": 900, "mxu": 0.5, "valu": 0.5}
    splash = [{"kernel": f"splash_{n}", "tiles": [tile]} for n in ("fwd", "dq", "dkv")]
    slow = tile | {"tile_cycles": 808}
    ours = [{"kernel": "x_forward_y", "tiles": [tile]}, {"kernel": "x_dq_y", "tiles": [tile, slow]}]
    jobs = [
        {"model": "tile", "operation": name, "error": None, "kernels": kernels}
        for name, kernels in (("splash", splash), ("pallas_tpu", ours))
    ]
    rows = verdict.compare_with_splash(jobs)
    assert [row["ratio"] for row in rows] == [1.0, 1.01, None]
    v6e = verdict.failures(targets.TARGETS["v6e"], jobs, rows)
    assert len(v6e) == 2
    assert "808 cycles" in v6e[0]
    assert "no cycles" in v6e[1]
    # A tile with unknown cycles may be the slowest one.
    ours[0]["tiles"] = [tile, tile | {"tile_cycles": None}]
    row = verdict.compare_with_splash(jobs)[0]
    assert (row["ratio"], row["unknown"]) == (1.0, 1)
    (sentence,) = verdict.failures(targets.TARGETS["v6e"], [], [row])
    assert sentence.startswith("tile, forward: the cycles of 1 of our tiles are unknown")
    failed = [{"model": "m", "operation": "o", "error": "Too much VMEM."}]
    assert verdict.failures(targets.TARGETS["v5e"], failed, []) == ["m, o: Too much VMEM."]
    decode = {"model": "m", "operation": "decode_cross", "error": None, "cache_bytes": 100}
    assert verdict.failures(targets.TARGETS["v5e"], [decode | {"bytes_accessed": 104}], []) == []
    (sentence,) = verdict.failures(targets.TARGETS["v5e"], [decode | {"bytes_accessed": 300}], [])
    assert sentence == "m, decode_cross: it accesses 3.00 times the bytes of the cache."


def test_cases_are_those_of_the_configs_and_a_few_others():
    by_platform = {platform: targets.cases(platform) for platform in ("tpu", "cuda", "triton")}
    cases = by_platform["tpu"]
    assert [case.model for case in cases[:12]] == ["yocou_125m"] * 6 + ["yocou_1b"] * 6
    first = cases[0]
    assert (first.model, first.N, first.Q, first.K, first.H) == ("yocou_125m", 2048, 12, 4, 64)
    assert {case.window for case in cases if case.operation == "decode_window"} == {512}
    others = {name: found[12:] for name, found in by_platform.items()}
    assert {case.model for found in others.values() for case in found} == {targets.OTHERS}
    assert {(case.dtype, case.H) for case in others["tpu"]} >= {("float32", 128), ("bfloat16", 256)}
    assert {case.dtype for case in others["cuda"]} == {"bfloat16", "float16"}
    assert any(c.lengths and c.q_offset for c in others["tpu"])
    assert any(c.lengths and c.segments for c in others["cuda"])
    assert not any(c.lengths or c.dtype != "bfloat16" for c in others["triton"])
    labels = [case.label for case in others["cuda"]]
    assert len(set(labels)) == len(labels)
    for case in (cases[0], cases[3], cases[5], *others["tpu"], *others["cuda"]):
        function, args = targets.program(case, "xla")
        jax.eval_shape(function, *args)


@pytest.mark.parametrize("name", ["v6e", "h200", "a100"])
def test_every_case_is_one_that_its_implementation_takes(name, monkeypatch):
    monkeypatch.setattr(triton, "_missing_triton", lambda: None)
    monkeypatch.setattr(triton, "_misfit", lambda: None)
    target = targets.TARGETS[name]
    device = Device("tpu" if target.platform == "tpu" else "gpu", target.device_kind)
    for case in targets.cases(target.platform):
        call = Call(
            case.operation,
            device,
            (case.B, case.Q, case.H) if case.decodes else (case.B, case.N, case.Q, case.H),
            (case.B, case.S, case.K, case.H),
            jnp.dtype(case.dtype),
        )
        reason = api.unsupported_reason(target.implementation, call)
        assert reason is None or "needs jax 0.11" in reason


def test_what_a_decoding_step_reads_is_printed_over_the_size_of_its_cache():
    case = next(case for case in targets.cases("tpu") if case.operation == "decode_cross")
    assert case.cache_bytes == 2 * 8 * 32_768 * 4 * 64 * 2
    job = {"cache_bytes": case.cache_bytes, "bytes_accessed": 3.0 * case.cache_bytes}
    assert verdict._cache_reads(job) == "3.00"
    assert verdict._cache_reads(job | {"bytes_accessed": None}) == "?"
    assert verdict._cache_reads({"bytes_accessed": 5.0}) == ""


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for target in targets.TARGETS.values():
        assert "requirements-" in targets.what_to_install(target)


TINY = """
import sys
from pathlib import Path
from benchmarks.aot.compile import compile_one
from benchmarks.aot.targets import TARGETS, mesh, splash_program
folder, target = Path(sys.argv[1]), TARGETS["v6e"]
result = compile_one(target, mesh(target), folder, *splash_program())
assert not list(folder.iterdir())
for kernel in result["kernels"]:
    (tile,) = kernel["tiles"]
    print(kernel["kernel"], tile["pairs"], tile["tile_cycles"], kernel["vmem_bytes"])
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_splash_compiles_for_a_tpu(tmp_path):
    """From compiling with libtpu to counting cycles, with splash, which the tile table needs."""
    environment = os.environ | targets.environment(targets.TARGETS["v6e"], tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", TINY, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0].split("_")[2] for row in rows] == ["fwd", "dq", "dkv"], done.stderr[-2000:]
    for _, pairs, cycles, vmem in rows:
        assert int(pairs) == targets.TILE**2
        assert 400 < int(cycles) < 2000
        assert 2**20 < int(vmem) < 2**24


def run_for_v5e(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs `code` in a process where libtpu compiles for a v5e. It has no TPU."""
    environment = os.environ | targets.environment(targets.TARGETS["v5e"], folder)
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "LIBTPU_INIT_ARGS": ""}
    words = [sys.executable, "-c", code]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


AUTO = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels import Partition, cross_attention, window_attention

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"))
sharding = NamedSharding(mesh, P("data", None, "tensor"))
x = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16, sharding=sharding)
partition = Partition(batch=("data",), heads=("tensor",))

def run(q, k, v, d_out):
    def attend(q, k, v):
        y = window_attention(q, k, v, window=100, partition=partition)
        return cross_attention(y, k, v, partition=partition)
    out, vjp = jax.vjp(attend, q, k, v)
    return out, vjp(d_out)

with jax.set_mesh(mesh):
    text = jax.jit(run).lower(x, x, x, x).compile().as_text()
print(*sorted(set(re.findall("attention_(?:full|window)_(?:forward|dq|dkv)_pallas_tpu", text))))
print(*re.findall("all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute", text))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_auto_for_a_tpu_topology_compiles_the_tpu_kernels_without_a_collective(tmp_path):
    """This host has no TPU. The program is for four of them, split by rows and heads."""
    done = run_for_v5e(AUTO, tmp_path)
    kernels, collectives = [*done.stdout.splitlines(), "", "none printed"][:2]
    assert kernels.split() == [
        f"attention_{what}_{kernel}_pallas_tpu"
        for what in ("full", "window")
        for kernel in ("dkv", "dq", "forward")
    ], done.stderr[-2000:]
    assert collectives == ""


SUMS = """
import re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from yocou_jax.config import MeshConfig
from yocou_jax.sharding import gather, make_mesh

devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=4), devices)
split = PartitionSpec(None, "context", None, None)
x, w = (
    jax.ShapeDtypeStruct((1, n, 4, 128), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    for n, spec in ((4096, split), (4 * 4096, split))
)

def local(x, w):
    return jnp.sum(gather(x.astype(jnp.float32), "context", 1, jnp.bfloat16) * w)[None]

def loss(x, w):
    specs = dict(in_specs=(split, split), out_specs=PartitionSpec("context"), check_vma=False)
    return jax.shard_map(local, **specs)(x, w).sum()

with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss)).lower(x, w).compile().as_text()
print(*re.findall(r"= \\(?(\\w+)\\[\\S* (?:all-reduce|reduce-scatter)(?:-start)?\\(", text))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_libtpu_sums_the_gradient_of_a_gather_in_float32(tmp_path):
    """Although the sum is cast to bfloat16 at once: libtpu would cast before it adds."""
    done = run_for_v5e(SUMS, tmp_path)
    assert done.stdout.split() == ["f32"], done.stderr[-2000:]
