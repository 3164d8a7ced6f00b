"""The code in the documents runs, and the files, fields and commands that they name exist."""

import re
from pathlib import Path

import pytest

from tests import tiny
from yocou_jax import pretrained
from yocou_jax.config import FIELDS
from yocou_jax.data.tokenizer import Tokenizer
from yocou_jax.program import ARCHITECTURES

ROOT = Path(__file__).parent.parent
CURRENT = [
    *("README.md", "CONTRIBUTING.md", "pallas_kernels/README.md"),
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


def test_the_readme_has_every_architecture():
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", read("README.md"), re.MULTILINE)
    programs = {name: program.replace("\\|", "|") for name, program in rows}
    assert programs == {
        name: template.format(all="L", half="L/2") for name, template in ARCHITECTURES.items()
    }


@pytest.mark.parametrize("document", [d for d in CURRENT if "```python" in read(d)])
@pytest.mark.slow
def test_python_code_runs(document, tmp_path, monkeypatch):
    """It runs in a folder where runs/yocou_small is a trained tiny model."""
    blocks = re.findall(r"^```python\n(.*?)^```", read(document), re.MULTILINE | re.DOTALL)
    config, words = tiny.config(vocab_size=258), Tokenizer.from_json("bytes")
    trained = pretrained.Pretrained(
        tiny.params(config.model), config.model, config.compute, words, step=None
    )
    pretrained.export(tmp_path / "runs/yocou_small", trained)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        exec(compile(block, document, "exec"), namespace)
