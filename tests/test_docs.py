"""The code in the documents runs, and the files, fields and commands that they name exist."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import yocou_small
from pallas_kernels import Call, api
from pallas_kernels.attention import gpu, triton
from pallas_kernels.device import Device
from tests import tiny
from yocou_jax import pretrained
from yocou_jax.config import END, FIELDS, FREE, resumable
from yocou_jax.data.tokenizer import Tokenizer
from yocou_jax.model.attention import attend_to_cache, attend_to_ring
from yocou_jax.model.memory import Cache, KeyValue, NewPositions, Ring
from yocou_jax.program import ARCHITECTURES

ROOT = Path(__file__).parent.parent
CURRENT = [
    *("README.md", "CLAIMS.md", "CONTRIBUTING.md", "pallas_kernels/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")),
]
DOCUMENTS = [*CURRENT, "CHANGELOG.md", "LOG.md"]  # these two may name files that were deleted


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)]+)\)", read(document))
    for link in (link for link in links if not link.startswith("https://")):
        assert ((ROOT / document).parent / link).exists(), link


@pytest.mark.parametrize("document", CURRENT)
def test_named_fields_commands_and_configs_exist(document):
    text = read(document)
    assert set(re.findall(r"--config\.(\w+\.\w+)", text)) <= FIELDS.keys()
    for command in re.findall(r"\bexperiments\.(\w+)", text):
        assert (ROOT / f"experiments/{command}.py").is_file(), command
    for config in re.findall(r"\bconfigs/(\w+)\.py", text):
        assert (ROOT / f"configs/{config}.py").is_file(), config


def test_all_notebooks_install_in_the_same_way():
    """In their first cell of code. Only the number of updates differs."""
    sources = [path.read_text() for path in sorted((ROOT / "notebooks").glob("[0-9]*.py"))]
    cells = [text.split("\n# %%\n", 2)[1].partition("STEPS =")[0] for text in sources]
    assert len(cells) == 4
    assert len(set(cells)) == 1
    assert "pip install" in cells[0]


def test_the_readme_has_every_architecture():
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", read("README.md"), re.MULTILINE)
    programs = {name: program.replace("\\|", "|") for name, program in rows}
    assert programs == {
        name: template.format(all="L", half="L/2") for name, template in ARCHITECTURES.items()
    }


def test_the_fields_that_may_change_on_resume_are_listed():
    text = read("docs/using.md").partition("These fields may change")[2]
    free, _, end = text.partition("\n\n")[0].partition("Some of them")
    assert set(re.findall(r"`(\w+\.\w+)`", free)) == set(resumable(FREE))
    assert set(re.findall(r"`(\w+\.\w+)`", end)) == set(resumable(END))


# What jax calls the devices that the table of kernels names.
KINDS = {
    **{"CPU": "cpu", "TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"},
    **{"tpu7x": "TPU7x", "TPU v4": "TPU v4", "H100": "NVIDIA H100 80GB HBM3"},
    **{"H200": "NVIDIA H200", "A100": "NVIDIA A100-SXM4-40GB", "L4": "NVIDIA L4"},
    **{"B200": "NVIDIA B200", "T4": "Tesla T4", "V100": "Tesla V100-SXM2-16GB"},
}
KERNELS = [
    (name, dtype, needs, kernels)
    for names, dtypes, needs, *kernels in re.findall(
        r"^\| (.+?) \| (any|bfloat16|float32) \| (.+?) \| `(\w+)` \| `(\w+)` \| `(\w+)` \|$",
        read("docs/using.md"),
        re.MULTILINE,
    )
    for name in names.split(", ")
    for dtype in (("bfloat16", "float32") if dtypes == "any" else (dtypes,))
]


def inference_calls(N: int) -> list[Call]:
    """The calls of a window layer and a full layer for N new positions: a chunk of a prompt, or one
    decode step."""
    calls, select = [], api._select

    def record(implementation, call):
        calls.append(call)
        return select(implementation, call)

    def attend():
        q, k = jnp.zeros((8, N, 4, 64)), jnp.zeros((8, N, 2, 64))
        ring, cache = jnp.zeros((8, 128, 2, 64)), jnp.zeros((8, 1024, 2, 64))
        new, at = KeyValue(k, k), NewPositions(jnp.zeros(8, int), jnp.full(8, N))
        return attend_to_ring(q, new, Ring(ring, ring), at), attend_to_cache(
            q, new, Cache(cache, cache), at
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_select", record)
        jax.eval_shape(attend)
    return calls


@functools.cache
def attention_calls() -> dict[str, list[Call]]:
    """The calls that the three columns of the table are about; their device and dtype do not
    matter."""
    shapes = {"q_shape": (8, 512, 4, 64), "k_shape": (8, 512, 2, 64)}
    training = [
        Call("window_attention", Device("cpu", "cpu"), window=128, **shapes),
        Call("cross_attention", Device("cpu", "cpu"), **shapes),
    ]
    return {"training": training, "prefill": inference_calls(512), "decode": inference_calls(1)}


def test_the_table_of_kernels_has_every_device():
    assert {name for name, *_ in KERNELS} == set(KINDS)
    assert [len(calls) for calls in attention_calls().values()] == [2, 3, 2]


@pytest.mark.parametrize(("name", "dtype", "needs", "kernels"), KERNELS)
def test_the_table_of_kernels_is_what_auto_chooses(name, dtype, needs, kernels, monkeypatch):
    """On a host that has this device, and this jax or the one that the row needs."""
    if needs.startswith("jax 0.11") and jax.version.__version_info__ < (0, 11):
        pytest.skip("needs jax 0.11")
    if needs.startswith("jax 0.10"):
        monkeypatch.delattr(gpu.plgpu, "InterpretGPUParams", raising=False)
    platform = {"CPU": "cpu", "TPU": "tpu"}.get(name[:3].upper(), "gpu")
    missing = "jax-triton is not installed." if "without jax-triton" in needs else None
    monkeypatch.setattr(triton, "_missing_triton", lambda: missing)
    monkeypatch.setattr(triton, "_misfit", lambda: None)
    monkeypatch.setattr("pallas_kernels.attention.cudnn.is_here", lambda device: True)
    facts = {"device": Device(platform, KINDS[name]), "dtype": jnp.dtype(dtype)}
    for (work, calls), kernel in zip(attention_calls().items(), kernels, strict=True):
        for call in calls:
            choice = api.choose_implementation(**call._replace(**facts)._asdict())
            assert choice.implementation == kernel, (work, choice)


@pytest.mark.parametrize("document", [d for d in CURRENT if "```python" in read(d)])
@pytest.mark.slow
def test_python_code_runs(document, tmp_path, monkeypatch):
    """With tiny sizes in yocou_small, and in a folder where runs/yocou_small is a trained model."""
    blocks = re.findall(r"^```python\n(.*?)^```", read(document), re.MULTILINE | re.DOTALL)
    config, words = tiny.config(vocab_size=258), Tokenizer.from_json("bytes")
    trained = pretrained.Pretrained(
        tiny.params(config.model), config.model, config.compute, words, step=None
    )
    pretrained.export(tmp_path / "runs/yocou_small", trained)
    monkeypatch.chdir(tmp_path)
    real = yocou_small.get_config

    def get_config(*preset):
        fields = real(*preset)
        fields.model.update(tiny.MODEL | {"vocab_size": 258, "num_layers": 2})
        fields.data.validation_sequences = 8
        fields.compute.unroll, fields.optimizer.name = 0, "adamw"  # these compile faster
        return fields

    monkeypatch.setattr(yocou_small, "get_config", get_config)
    namespace = {}
    for block in blocks:
        exec(compile(block, document, "exec"), namespace)
