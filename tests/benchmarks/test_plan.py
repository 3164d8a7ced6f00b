"""Plans, with this machine's virtual CPU devices in place of a pod, and with texts of compilers."""

import dataclasses
import json
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import hlo, plan_report, plan_search, scaling
from benchmarks import plan as planning
from benchmarks.plan_inference import plan_inference
from tests import tiny
from tests.test_sharding import config_on
from yocou_jax import accounting, hardware
from yocou_jax.device_memory import training_hints
from yocou_jax.errors import UserError

PROGRAM = "window*10@3 | cross*10"
STORED = sorted((Path(__file__).parents[2] / "results" / "plans").glob("*.json"))
assert STORED


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_plan_has_the_command_that_made_it(path):
    plan = json.loads(path.read_text(encoding="utf-8"))
    words = shlex.split(plan["command"])
    assert words[:3] == ["python", "-m", "experiments.plan"]
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words[3:])
    assert flags.pop("topology") == plan["topology"]
    assert flags.pop("json") == ""
    flags.pop("inference", None)
    config = flags.pop("config")
    assert plan["program"] == ("full*20" if config.endswith(":transformer") else PROGRAM)
    assert "_".join(path.stem.split("_")[:2]).replace("transformer", "yocou") in config
    for flag, value in flags.items():
        room, name = flag.removeprefix("config.").split(".")
        want = plan["mesh"].get(name, 1) if room == "mesh" else plan[name]
        assert value == str(want), flag


def test_collectives_count_the_runs_of_loops_in_loops():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def body(x):
        def inner(x, _):
            return jax.lax.psum(x, "x") / 4, None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, length=5)
            return jax.lax.ppermute(x, "y", [(0, 1), (1, 0)]), None

        return jax.lax.scan(outer, x, length=3)[0]

    run = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    )
    text = run.lower(jax.ShapeDtypeStruct((400, 6), jnp.float32)).compile().as_text()
    found = {one.kind: one for one in hlo.collectives(text, 8)}
    part = 100 * 6 * 4
    assert found["all-reduce"].times == 15
    assert found["all-reduce"].sent == 2 * part * 3 / 4
    assert found["collective-permute"].times == 3
    assert found["collective-permute"].sent == part


# Two fusions that run one gather beside other work, a gather that starts and ends, and a loop whose
# limit only its condition has; names and fields as libtpu writes them.
TPU = """HloModule jit_step, is_scheduled=true

%fused.1 (p: bf16[2,16]) -> bf16[2,64] {
  %p = bf16[2,16]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[2,64]{1,0:T(8,128)} all-gather(%p), channel_id=1, \
replica_groups=mesh['fsdp'=2,'context'=4] {'context'}, frontend_attributes={chain_id="6"}
}

%fused.2 (p: bf16[2,16]) -> bf16[2,64] {
  %p = bf16[2,16]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[2,64]{1,0:T(8,128)} all-gather(%p), channel_id=1, \
replica_groups=mesh['fsdp'=2,'context'=4] {'context'}, frontend_attributes={chain_id="6"}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = ((f32[2]{0}), (f32[8]{0}), u32[]) all-gather-start(%x), replica_groups=[2,4]<=[8]
  %sum = f32[8]{0} reduce-scatter(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (p: bf16[2,16]) -> bf16[2,64] {
  %a = bf16[2,64] fusion(%p), kind=kLoop, calls=%fused.1
  %b = bf16[2,64] fusion(%p), kind=kLoop, calls=%fused.2
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body
}
"""


def test_collectives_of_a_tpu():
    found = [(one.kind, one.axes, one.sent, one.times) for one in hlo.collectives(TPU, 8)]
    assert found == [
        ("all-gather", "context", 2 * 64 * 2 * 3 / 4, 1),
        ("all-gather", "4 devices", 8 * 4 * 3 / 4, 7),
        ("reduce-scatter", "2 devices", 8 * 4 * 2 / 2, 7),
    ]


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (
            "jvp(LanguageModel)/LanguageModel._run/stage_0_window/stage_0_window._loops/while/body/"
            "checkpoint/layers/attention/attention._attend/shard_map/ppermute",
            "keys and values of stage_0_window",
        ),
        (
            "jvp(LanguageModel)/LanguageModel._run/LanguageModel._begin_cross/shard_map/all_gather",
            "global K, V and order of rows",
        ),
        ("jvp(LanguageModel)/LanguageModel._output/shard_map/ppermute", "order of rows"),
        ("jvp(LanguageModel)/LanguageModel.embed/shard_map/all_to_all", "embedding"),
        (
            "jvp(LanguageModel)/stage_1_cross/while/body/layers/feed_forward/shard_map/all_gather",
            "experts of stage_1_cross",
        ),
        (
            "jvp(LanguageModel)/stage_1_cross/while/body/layers/feed_forward/down/dot_general",
            "parameters and gradients",
        ),
        ("", "joined by the compiler"),
    ],
)
def test_a_collective_says_what_it_is_for(path, part):
    named = TPU.replace('chain_id="6"}', f'chain_id="6"}}, metadata={{op_name="{path}"}}')
    assert named != TPU
    first = hlo.collectives(named, 8)[0]
    assert (first.part, first.dtype) == (part, "bf16")


def test_a_plan_of_a_split_sequence_says_what_moves():
    found = planning.plan(config_on((1, 2, 1, 4)), "cpu:8", jax.devices())
    parts = {row["part"] for row in found["collectives"]}
    assert {
        "keys and values of stage_0_window",
        "global K, V and order of rows",
        "parameters and gradients",
    } <= parts


def test_a_computation_that_is_called_twice_runs_twice():
    text = TPU.replace(
        "%loop = (s32[]", "%again = bf16[2,64] fusion(%p), calls=%body\n  %loop = (s32[]"
    )
    assert text != TPU
    found = [one.times for one in hlo.collectives(text, 8)]
    assert found == [1, 8, 8]


def test_a_loop_may_count_without_a_sign():
    text = TPU.replace("%limit = s32[]{:T(128)} constant(7)", "%limit = u32[]{:T(128)} constant(7)")
    assert text != TPU
    assert hlo.collectives(text, 8) == hlo.collectives(TPU, 8)


def test_a_plan_has_the_bytes_of_each_device():
    """float32 parameters and the two moments of AdamW, split eight ways where the mesh divides."""
    config = config_on((1, 4, 1, 2))
    found = planning.plan(config, "cpu:8", jax.devices())
    total = 4 * accounting.parameters(config.model).total
    assert total / 8 <= found["bytes"]["parameters"] < total / 6  # norm scales are whole
    scalars = found["bytes"]["optimizer"] - 2 * found["bytes"]["parameters"]
    assert 0 <= scalars < 100
    assert found["bytes"]["peak"] >= 3 * found["bytes"]["parameters"]
    assert found["mesh"] == {"fsdp": 4, "context": 2}
    tokens = config.data.batch_size * config.data.sequence_length
    assert found["flops"] == accounting.run_flops_per_token(config) * tokens / 8
    assert found["bytes"]["sent"] == sum(row["sent"] for row in found["collectives"]) > 0
    assert found["at_least"] == {"arithmetic": None, "links": None, "step": None, "mfu": None}
    assert found["whole"] == []


def test_the_estimate_is_the_slower_of_arithmetic_and_links():
    peaks = hardware.Peaks(flops=100.0, links=20.0)
    assert planning.estimate(50.0, 4.0, peaks) == {
        "at_least": {"arithmetic": 0.5, "links": 0.2, "step": 0.5, "mfu": 1.0}
    }
    slow = planning.estimate(50.0, 40.0, peaks)["at_least"]
    assert (slow["step"], slow["mfu"]) == (2.0, 0.25)


def test_too_large_is_a_sentence():
    sizes = {"parameters": 2**30, "optimizer": 2**31, "memory": 2**34}
    hints = training_hints(tiny.config(), devices=8, batch_ways=4)
    assert planning.too_large(33.25 * 2**30, sizes, hints) == (
        "A step needs 33.25 GiB, which is more than a device has; parameters and optimizer are "
        "3.0 GiB of it. It would help, in this order: compute.remat=full, a larger "
        "optimizer.accumulation_steps, a larger mesh.fsdp (state)."
    )
    hints = training_hints(tiny.config(remat="full", optimizer={"accumulation_steps": 2}), 8, 4)
    sentence = planning.too_large(None, sizes, hints)
    assert sentence.startswith("A step needs more than a device has; ")
    assert "in this order: a larger mesh.fsdp (state), a larger" in sentence
    one = training_hints(tiny.config(remat="full", data={"batch_size": 1}), 1, 1)
    assert one == ["a shorter data.sequence_length", "a smaller model"]


def test_a_plan_that_is_larger_than_the_memory_says_so(monkeypatch):
    """Also if its compiler does not refuse it, as those of a CPU and of a GPU."""
    peaks = hardware.Peaks(flops=1e12, memory=1000.0, links=1e9)
    monkeypatch.setattr(hardware, "peaks", lambda kind: peaks)
    found = planning.plan(config_on((1, 4, 1, 2)), "cpu:8", jax.devices())
    assert "A step needs 0.00 GiB, which is more than a device has" in found["error"]
    assert found["at_least"]["links"] == found["bytes"]["sent"] / 1e9


def test_collectives_of_all_branches_count():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def body(x):
        return jax.lax.cond(x.sum() > 0, lambda x: jax.lax.psum(x, "x"), lambda x: 8 * x, x)

    specs = {"in_specs": P("x"), "out_specs": P("x"), "check_vma": False}
    run = jax.jit(jax.shard_map(body, mesh=mesh, **specs))
    text = run.lower(jax.ShapeDtypeStruct((80,), jnp.float32)).compile().as_text()
    assert [one.kind for one in hlo.collectives(text, 8)] == ["all-reduce"]


LISTED = "replica_groups={{0,1,2,3},{4,5,6,7}}"
IOTA = "replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        (f"((f32[8]{{0}}), f32[2]{{0}}) reduce-scatter-start(%x), {IOTA}", 24),
        (f"f32[2]{{0}} reduce-scatter(%x), {LISTED}", 24),
        (f"((f32[8]{{0}}), f32[8]{{0}}) all-to-all-start(%x), {IOTA}", 24),
        (f"f32[8]{{0}} all-to-all(%x), {IOTA}", 24),
        (f"(f32[2]{{0}}, f32[8]{{0}}, u32[]{{:S(2)}}) all-gather-start(%x), {IOTA}", 24),
        (f"f32[8]{{0}} all-reduce-start(%x), {IOTA}", 48),
        ("(f32[8]{0}, bf16[4]{0}) all-reduce(%x, %y), replica_groups={}", 2 * (32 + 8) * 7 / 8),
        ("(bf16[8], bf16[8], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}", 16),
        (f"f8e4m3fn[8]{{0}} all-gather(%x), {IOTA}", 6),
        (f"pred[8]{{0}} all-gather(%x), {IOTA}", 6),
        (f"s4[8]{{0}} all-gather(%x), {IOTA}", 3),
    ],
)
def test_what_each_form_of_a_collective_sends(line, sent):
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %y = {line}\n}}\n"
    (one,) = hlo.collectives(text, 8)
    assert one.sent == sent


@pytest.mark.parametrize(
    "form", ["f32[{to},4]{{0}} {kind}", "((f32[9]), f32[9], u32[]) {kind}-start"]
)
@pytest.mark.parametrize(("rows", "to"), [(8, 64), (64, 8)])
def test_a_ragged_all_to_all_sends_the_rows_that_there_are(form, rows, to):
    """And not the room for the worst case, from which or to which it copies."""
    text = f"""ENTRY %main (p: f32[8]) -> f32[8] {{
  %x.1 = f32[{rows},4]{{1,0:T(8,128)}} parameter(0)
  %x = f32[{to},4]{{1,0}} broadcast(%zero)
  %y = {form.format(to=to, kind="ragged-all-to-all")}(%x.1, %x, %a, %b, /*index=5*/%c), {IOTA}
}}
"""
    (one,) = hlo.collectives(text, 8)
    assert (one.kind, one.sent) == ("ragged-all-to-all", 8 * 4 * 4 * 3 / 4)


def test_a_reduce_scatter_of_a_tpu_is_a_slice_of_an_all_reduce():
    """Only if the slice is all that is returned; names as libtpu writes them."""
    text = """%all-reduce-scatter (p: f32[8,4], i: s32[]) -> f32[2,4] {
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %dynamic-slice.1 = f32[2,4]{1,0} dynamic-slice(%all-reduce.1, %i, %zero)
}

ENTRY %main (p: f32[8,4]) -> f32[2,4] {
  ROOT %fusion = f32[2,4]{1,0} fusion(%p, %i), kind=kCustom, calls=%all-reduce-scatter
}
"""
    (one,) = hlo.collectives(text, 8)
    assert (one.kind, one.sent) == ("reduce-scatter", 8 * 4 * 4 * 3 / 4)
    (other,) = hlo.collectives(text.replace("dynamic-slice(", "negate("), 8)
    assert (other.kind, other.sent) == ("all-reduce", 2 * 8 * 4 * 4 * 3 / 4)


def test_a_program_that_is_not_understood_is_an_error():
    lost = "%other (p: f32[8]) -> f32[8] {\n  %y = f32[8] all-reduce(%p), replica_groups={}\n}\n"
    with pytest.raises(ValueError, match="How often does other run, which has %y"):
        hlo.collectives(f"{lost}ENTRY %main (p: f32[8]) -> f32[8] {{\n  ROOT %p\n}}\n", 8)
    endless = TPU.replace("constant(7)", "parameter(0)")
    with pytest.raises(ValueError, match="How often does body run, which has %start"):
        hlo.collectives(endless, 8)


def test_meshes_fit_the_devices_and_the_batch():
    config = tiny.config(data={"batch_size": 16, "sequence_length": 64})
    found = list(plan_search.meshes(config, 8, None))
    sizes = [dataclasses.astuple(one[0].mesh) for one in found]
    assert sizes[:3] == [(1, 8, 1, 1, 1), (4, 2, 1, 1, 1), (1, 4, 1, 2, 1)]
    assert len(set(sizes)) == len(sizes) > 6
    for options in found:
        assert (options[0].compute.remat, options[-1].compute.remat) == ("none", "full")
        for one in options:
            mesh = one.mesh
            assert mesh.data * mesh.fsdp * mesh.tensor * mesh.context == 8
            assert 16 % (mesh.data * mesh.fsdp * one.optimizer.accumulation_steps) == 0
    assert list(plan_search.meshes(config, 8, 100.0)) == []  # no memory for the state
    state = 12 * accounting.parameters(config.model).total
    some = plan_search.meshes(config, 8, 0.5 * state)  # for shards of it, but not for four copies
    assert {options[0].mesh.data for options in some} == {1}
    experts = tiny.config(**(tiny.MOE | {"num_experts": 8}))
    assert {one[0].mesh.expert for one in plan_search.meshes(experts, 8, None)} == {1, 4, 8}


def test_the_search_keeps_the_cheapest_plan_that_fits_on_each_mesh(monkeypatch):
    """Of equal times, the one with the least remat comes first."""
    config, said = tiny.config(data={"batch_size": 64}), []

    def plan(option, topology, devices):
        mesh, remat, parts = option.mesh, option.compute.remat, option.optimizer.accumulation_steps
        if mesh.tensor > 1:
            raise UserError("heads")
        found = {"mesh": mesh, "remat": remat, "parts": parts}
        needs = {"none": 8, "attention": 4, "full": 1}[remat] / parts * mesh.context
        step = {"at_least": {"step": 1.0 if mesh.context == 1 else 0.5}}
        return found | ({"error": "large"} if needs > 4 else step)

    monkeypatch.setattr(plan_search, "plan", plan)
    devices = jax.devices()[:8]

    def search(tries):
        said.clear()
        found = plan_search.search(config, "v5e:8", devices, tries, lambda *x: said.append(x))
        chosen = [x for x in found if "error" not in x]
        return [(x["mesh"].data, x["mesh"].context, x["remat"], x["parts"]) for x in chosen]

    # On fsdp=8: full with 16 parts fits, then none is too large, and attention fits.
    assert search(3) == [(1, 1, "attention", 1)]
    assert [isinstance(x, dict) for _, x in said] == [True] * 3
    found = search(100)
    assert found[0] == (1, 2, "attention", 4)
    assert found[-1] == (4, 1, "attention", 1)
    assert (1, 8, "full", 4) in found
    assert any(isinstance(x, UserError) for _, x in said)
    monkeypatch.setattr(plan_search, "meshes", lambda *_: [])
    with pytest.raises(UserError, match="No mesh of 8 devices fits"):
        search(3)


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v5e:16*16", "x:4", "a100:8", ""])
def test_topologies_that_are_refused(topology):
    with pytest.raises(UserError, match=r"must be a device and a shape, as v5e:16x16"):
        planning.find_target(topology)


def test_a_plan_of_inference(monkeypatch):
    """Two K/V heads and four parts of 16 slots: each device has an eighth of the global cache. The
    self-decoder has two loops of one layer, with rings whose positions are not split."""
    monkeypatch.setattr(hardware, "peaks", lambda kind: hardware.Peaks(1e12, 2**30, 1e9, 1e9))
    data = {"batch_size": 1, "sequence_length": 60}
    config = config_on((1, 1, 2, 4), "window*1@2 | cross*1", data=data, num_loops=None)
    found = plan_inference(config, "cpu:8", jax.devices())
    heads = 2 * 8 * 4  # bytes of a key and a value of one head of width 8
    assert found["bytes"]["caches"] == heads * (64 / 4 + 2 * config.model.window)
    step = found["programs"]["decode_step"]
    assert step["flops"] == accounting.decode_flops_per_token(config.model, 61) / 8
    read = accounting.decode_bytes_per_step(config.model, 1, 61, 4)
    assert step["at_least"]["reading"] == read / 8 / 1e9
    assert step["bytes"]["peak"] > found["bytes"]["caches"] + found["bytes"]["parameters"]
    assert found["programs"]["prefill_chunk"]["bytes"]["sent"] > 0
    (facts, *moved) = plan_report.inference(found)
    assert "decode_step: peak" in [name for name, _ in facts.rows]
    assert len(moved) == 4  # for each program, the parts and their collectives
    monkeypatch.setattr(hardware, "peaks", lambda kind: hardware.Peaks(1e12, 1000.0, 1e9, 1e9))
    small = plan_inference(config, "cpu:8", jax.devices())["programs"]["decode_step"]
    assert (
        "than a device has. It would help, in this order: a larger mesh.context" in small["error"]
    )


def test_scaling_keeps_the_tokens_of_all_devices_or_of_each():
    """Two devices: half of the state on each, and halos or parts of parameters are sent."""
    rows = {
        (row["axis"], row["scaling"], row["devices"]): row
        for row in scaling.measure(config_on((1, 1, 1)), counts=(1, 2))
    }
    for axis, size in (("fsdp", "batch_size"), ("context", "sequence_length")):
        one = rows[axis, "strong", 1]
        strong, weak = rows[axis, "strong", 2], rows[axis, "weak", 2]
        assert one["sent"] == 0 < min(strong["sent"], weak["sent"])
        assert strong["state"] < 0.6 * one["state"]
        assert (strong[size], weak[size]) == (one[size], 2 * one[size])


def test_scaling_needs_devices():
    with pytest.raises(UserError, match="--scaling needs 16 devices; there are 8"):
        scaling.measure(config_on((1, 1, 1)), counts=(1, 16))
