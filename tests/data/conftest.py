"""A tiny corpus, a config for it (with the byte tokenizer if a test names no other one), and which
files are read."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from yocou_jax.data import sources


@pytest.fixture
def corpus(tmp_path):
    """60 different documents of 20 to 90 bytes. Returns their glob and texts."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = {}
    for i in range(60):
        words = "".join(f" naïve{i * 7919 + j * 104729:x}日" for j in range(1 + i * 7 % 5))
        texts[f"{i:02d}.txt"] = f"<{i:02d}>{words}"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return SimpleNamespace(source=f"{folder}/*.txt", folder=folder, texts=texts)


@pytest.fixture
def make_config(tmp_path, corpus):
    def make(**changes):
        fields = {
            "source": corpus.source,
            "text_field": "text",
            "bad_rows": "refuse",
            "tokenizer": "bytes",
            "end_of_text": "",
            "allow_lossy_tokenizer": False,
            "vocab_size": 300,
            "packing": False,
            "batch_size": 8,
            "sequence_length": 16,
            "validation_fraction": 0.2,
            "validation_sequences": 10,
            "seed": 0,
            "cache_dir": str(tmp_path / "cache"),
            "verify": False,
        }
        return SimpleNamespace(**(fields | changes))

    return make


@pytest.fixture
def sharding():
    """Sequences over all four devices of a 2 x 2 mesh."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "fsdp"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2
    )
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))


@pytest.fixture
def readings(monkeypatch):
    """The names of the files that are read. Files that changed just now are known, too."""
    names, read = [], sources.read_file

    def counted(name, *args, **kwargs):
        names.append(name)
        return read(name, *args, **kwargs)

    monkeypatch.setattr(sources, "read_file", counted)
    monkeypatch.setattr(sources, "YOUNG", -1.0)
    return names
