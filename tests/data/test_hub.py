"""Data sets of the Hugging Face Hub: a stand-in for the package `datasets` says what was asked. One
test has the real package."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from yocou_jax.data import hub as hub_module
from yocou_jax.data import load_data, tokens
from yocou_jax.data.shards import store
from yocou_jax.data.sources import open_corpus
from yocou_jax.errors import UserError

OLD, NEW = "0" * 40, "f" * 40
FILES = [
    ["first\n", "naïve 日本\n"],
    ["third", "first\n", "the first again is no document"],
    [],
    ["fourth " * 9],
]
TEXTS = ["first\n", "naïve 日本\n", "third", "the first again is no document", "fourth " * 9]


class Rows:
    """An IterableDataset. number: the only file that it has."""

    def __init__(self, hub, files, number=None):
        self.hub, self.files, self.number = hub, files, number
        self.num_shards = len(files) if number is None else 1

    def shard(self, num_shards, index):
        assert num_shards == len(self.files)
        return Rows(self.hub, self.files, index)

    def __iter__(self):
        numbers = range(len(self.files)) if self.number is None else [self.number]
        for number in numbers:
            self.hub.reads.append(number)
            for row in self.files[number]:
                if isinstance(row, Exception):
                    raise row
                yield row if isinstance(row, dict) else {"text": row, "id": 1}


class Hub:
    """The package `datasets`. commits: the files of each commit; the last one is the newest."""

    def __init__(self, **commits):
        self.commits = {name.lstrip("_"): files for name, files in commits.items()}
        self.asked, self.reads, self.kind, self.branches = [], [], "json", {}

    def load_dataset_builder(self, name, config, revision):
        self.asked.append((name, config, revision))
        commit = self.branches.get(revision, revision) or list(self.commits)[-1]
        files = self.commits[commit]
        at = f"hf://datasets/{name}@{commit}" if len(commit) == 40 else "/home/me"
        names = {"train": [f"{at}/{number}.parquet" for number in range(len(files))]}
        return SimpleNamespace(
            name=self.kind,
            config=SimpleNamespace(data_files=names),
            as_streaming_dataset=lambda split: {"train": Rows(self, files)}[split],
        )


@pytest.fixture
def hub(monkeypatch):
    def make(**commits):
        made = Hub(**commits)
        monkeypatch.setitem(sys.modules, "datasets", made)
        return made

    return make


def texts(corpus):
    return [document.text for document in corpus.documents()]


def test_names_and_configs(hub):
    asked = hub(_=FILES).asked
    for source in ("hf:org/name", "hf:org/name/some-config", "hf:org/name/a/b", "hf:name"):
        assert texts(open_corpus(source)) == TEXTS
    configs = [("org/name", None), ("org/name", "some-config"), ("org/name", "a/b"), ("name", None)]
    assert list(dict.fromkeys(asked)) == [(*pair, None) for pair in configs]
    for source in ("hf:", "hf:org/", "hf:/name", "hf:org//a", "hf:@main"):
        with pytest.raises(UserError, match=r"names no data set: write 'hf:org/name'"):
            open_corpus(source)
    with pytest.raises(UserError, match=r"Row 1 of the file 1 of .* 'org/name'.*'text', 'id'"):
        texts(open_corpus("hf:org/name", "body"))


def test_nothing_is_read_before_it_is_needed(hub, tmp_path):
    found = hub(**{f"_{OLD}": FILES})
    corpus = open_corpus("hf:org/name", known=tmp_path)
    assert found.reads == []
    assert len(corpus.shards) == 4
    assert next(corpus.documents()).text == "first\n"
    assert found.reads == [0]


def test_a_later_start_asks_and_reads_nothing(hub, tmp_path, monkeypatch, caplog):
    """Not even the package is needed. The commit stays, until the hub is asked again."""
    found = hub(**{f"_{OLD}": FILES})
    first = open_corpus("hf:org/name", known=tmp_path).summary
    assert found.reads == [0, 1, 2, 3]
    found.commits[NEW] = [["another text"]]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with caplog.at_level(logging.INFO):
        corpus = open_corpus("hf:org/name", known=tmp_path)
    assert corpus.summary == first
    assert f"hf:org/name is read as hf:org/name@{OLD}." in caplog.messages
    assert corpus.source == f"hf:org/name@{OLD}"

    monkeypatch.setitem(sys.modules, "datasets", found)
    del found.asked[:], found.reads[:]
    assert texts(corpus) == TEXTS  # as when a new tokenizer comes: of the same commit
    assert found.asked == [("org/name", None, OLD)]
    newest = open_corpus("hf:org/name", known=tmp_path, verify=True)
    assert texts(newest) == ["another text"]
    assert texts(open_corpus("hf:org/name", known=tmp_path)) == ["another text"]
    assert [commit for *_, commit in found.asked] == [OLD, None, NEW, NEW]


def test_a_commit_can_be_named(hub, tmp_path, caplog):
    """Or a branch. `known` has an answer for each."""
    found = hub(**{f"_{OLD}": FILES, f"_{NEW}": [["another text"]]})
    for known in (None, tmp_path, tmp_path):
        assert texts(open_corpus("hf:org/name/a", known=known)) == ["another text"]
        with caplog.at_level(logging.INFO):
            corpus = open_corpus(f"hf:org/name/a@{OLD}", known=known)
        assert "is read as" not in caplog.text  # it says nothing new
        assert texts(corpus) == TEXTS
        assert corpus.source == f"hf:org/name/a@{OLD}"
    found.branches["main"] = OLD
    assert open_corpus("hf:org/name@main", known=tmp_path).source == f"hf:org/name@{OLD}"
    assert {name for name, *_ in found.asked} == {"org/name"}


def test_all_processes_take_the_answer_of_the_first(hub, tmp_path, monkeypatch):
    """Although a newer commit comes between them, and if it cannot ask."""
    found = hub(**{f"_{OLD}": FILES})
    sent = []

    def broadcast(value):
        if hub_module.jax.process_index() == 0:
            sent.append(value)
            return value
        return sent.pop(0)

    monkeypatch.setattr(hub_module.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(hub_module.jax, "process_count", lambda: 2)

    def as_process(index, folder):
        monkeypatch.setattr(hub_module.jax, "process_index", lambda: index)
        return open_corpus("hf:org/name", known=tmp_path / folder, share=(index, 2))

    first = as_process(0, "a")
    found.commits[NEW] = [["another text"]]
    second = as_process(1, "b")
    assert second.source == first.source == f"hf:org/name@{OLD}"
    assert texts(second) == TEXTS
    assert as_process(0, "b").source == first.source  # it was stored there, too

    sent.clear()
    monkeypatch.setattr(found, "load_dataset_builder", None)
    for index in (0, 1):
        with pytest.raises(UserError, match="could not be loaded: 'NoneType' object is not"):
            as_process(index, "c")


def test_what_is_stored_may_be_damaged(hub, tmp_path):
    found = hub(**{f"_{OLD}": FILES})
    open_corpus("hf:org/name", known=tmp_path)
    (path,) = tmp_path.glob("hub-*.npz")
    for damage in (b"", b"nonsense", path.read_bytes()[:-30]):
        path.write_bytes(damage)
        assert len(open_corpus("hf:org/name", known=tmp_path).shards) == 4
    good = {"commit": OLD, "files": ["a"], "parquet": False}
    wrong = [{"files": 3}, {"files": [1]}, {"commit": 5}, {"more": 1}]
    wrong += [{"files": []}, {"files": "a"}]
    for answer in (*(good | change for change in wrong), [], 5, None, {"commit": OLD}):
        store(path, answer=json.dumps(answer))
        assert len(open_corpus("hf:org/name", known=tmp_path).shards) == 4
    assert len(found.asked) == 4 + 10


def test_a_set_without_a_commit_is_not_trusted(hub, tmp_path):
    """It may be a folder of this machine, or files of several commits."""
    found = hub(local=FILES)
    for _ in range(2):
        assert open_corpus("hf:org/name", known=tmp_path).summary.documents == len(TEXTS)
    assert found.reads == [0, 1, 2, 3] * 2
    assert not list(tmp_path.iterdir())

    found.commits[OLD] = FILES
    open_corpus("hf:org/name", known=tmp_path)
    assert list(tmp_path.glob("hub-*.npz"))
    del found.commits[OLD]  # the hub answers otherwise now: what it said before is forgotten
    open_corpus("hf:org/name", known=tmp_path, verify=True)
    assert not list(tmp_path.glob("hub-*.npz"))


def test_processes_read_different_files_and_a_start_after_a_break_goes_on(hub, tmp_path):
    rows = [[f"text {i} of {n}" * 20 for i in range(5)] for n in range(6)]
    good = rows[4][3]
    rows[4][3] = ConnectionError("the line broke\nmore lines")
    found = hub(**{f"_{OLD}": rows})
    said = (
        r"'org/name'.* be read \(file 4.parquet, 5 of 6\): the line broke more lines\. If the net"
    )
    with pytest.raises(UserError, match=said):
        _ = open_corpus("hf:org/name", known=tmp_path, share=(1, 2)).summary
    assert found.reads == [3, 4]
    rows[4][3] = good
    del found.reads[:]
    both = open_corpus("hf:org/name", known=tmp_path, share=(0, 2))
    whole = both.summary
    assert found.reads == [0, 1, 2, 5, 4]

    del found.reads[:]
    pieces = [list(replace(both).pieces(500, (index, 2))) for index in (0, 1)]
    found.reads.clear()
    mine = [[d for p in of if p.mine for d in p.documents()] for of in pieces]
    assert sorted(mine[0] + mine[1]) == sorted(both.documents())
    assert found.reads[:6] == [0, 1, 2, 3, 4, 5]
    assert whole.documents == 30


def test_a_data_set_is_tokenized_once(hub, make_config, monkeypatch):
    """A second load, with another batch, reads nothing: it does not need the package."""
    rows = [[f"a text, number {i} of file {n}. " * 30 for i in range(8)] for n in range(4)]
    found = hub(**{f"_{OLD}": rows})
    config = make_config(source="hf:org/name", sequence_length=64, validation_sequences=2)
    first = load_data(config)
    assert found.reads == [0, 1, 2, 3] * 2  # for the digests, and for the tokens
    monkeypatch.setattr(tokens, "_write_piece", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    second = load_data(make_config(**vars(config) | {"batch_size": 2}))
    assert second.fingerprint == first.fingerprint


def test_parquet_is_read_by_column_without_the_package(hub, tmp_path, monkeypatch):
    """Abandoned scanners of `datasets` keep a process from ending. The addresses are stored."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for number, rows in enumerate(FILES):
        with files.open(f"/{number}.parquet", "wb") as file:
            pq.write_table(pa.table({"text": pa.array(rows, "string"), "id": rows}), file)
    asked = []

    def url_to_fs(address):
        asked.append(address)
        return files, "/" + address.rpartition("/")[2]

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    found = hub(**{f"_{OLD}": FILES})
    found.kind = "parquet"
    corpus = open_corpus("hf:org/name", known=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for one in (corpus, open_corpus("hf:org/name", known=tmp_path)):
        assert texts(one) == TEXTS
    assert asked[:4] == [f"hf://datasets/org/name@{OLD}/{n}.parquet" for n in range(4)]
    assert [d.name for d in corpus.documents()][2] == "org/name/1.parquet:1"
    assert found.reads == []
    with pytest.raises(
        UserError, match=r"Row 1 of the file 0.parquet .* no field 'body'.*'text', 'id'"
    ):
        texts(open_corpus("hf:org/name", "body", known=tmp_path))
    files.pipe("/1.parquet", b"nonsense")
    with pytest.raises(UserError, match=r"could not be read \(file 1.parquet, 2 of 4\)"):
        texts(open_corpus("hf:org/name", known=tmp_path))


def test_rows_without_text(hub):
    hub(_=[[{"text": "a"}, {"text": None}, {"text": 5}, {"other": 1}, {"text": "b" * 100}]])
    with pytest.raises(UserError, match="Row 2 of the file 1 of the data set 'org/name' has null"):
        texts(open_corpus("hf:org/name"))
    corpus = open_corpus("hf:org/name", "text", "skip")
    assert texts(corpus) == ["a", "b" * 100]
    assert corpus.summary.skipped == 3
    assert texts(replace(corpus, piece_bytes=16))[-1] == "b" * 4


def test_offline_and_not_installed(monkeypatch):
    def load_dataset_builder(*_, **__):
        raise ConnectionError("no route to the hub\nmore lines")

    offline = SimpleNamespace(load_dataset_builder=load_dataset_builder)
    monkeypatch.setitem(sys.modules, "datasets", offline)
    with pytest.raises(UserError, match=r"'org/name'.*no route to the hub more lines\. Check"):
        open_corpus("hf:org/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_corpus("hf:org/name")


class FakeHub(BaseHTTPRequestHandler):
    """What huggingface_hub and `datasets` ask of a data set: its commit, its files, their bytes."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []

    def _send(self, status: int, body: bytes, **headers: str):
        self.send_response(status)
        headers |= {"X-Repo-Commit": OLD, "Accept-Ranges": "bytes"}
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = unquote(urlsplit(self.path).path)
        self.requests.append(path)
        _, *file = re.split(r"/resolve/(?:main|0{40})/", path)
        entries = [
            {"type": "file", "oid": OLD, "size": len(data), "path": name}
            for name, data in self.files.items()
        ]
        if not path.startswith(("/api/datasets/org/name", "/datasets/org/name")):
            self._send(404, b"", X_Error_Code="RepoNotFound")
        elif file and file[0] in self.files:
            data, status, size = self.files[file[0]], 200, len(self.files[file[0]])
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                data = data[int(found[1]) : int(found[2] or size) + 1]
                status = 206
            range_ = {"Content_Range": f"bytes {found[1]}-*/{size}"} if found else {}
            self._send(status, data, ETag=f'"{file[0]}"', **range_)
        elif file or "/tree/" in path.removesuffix(f"/tree/{OLD}"):
            self._send(404, b"", X_Error_Code="EntryNotFound")
        elif "/paths-info/" in path:
            known = [entry for entry in entries if entry["path"] in unquote(body)]
            self._send(200, json.dumps(known).encode(), Content_Type="application/json")
        elif path.endswith(f"/tree/{OLD}"):
            self._send(200, json.dumps(entries).encode(), Content_Type="application/json")
        else:
            facts = {"_id": "1", "id": "org/name", "sha": OLD, "private": False, "tags": []}
            facts |= {"disabled": False, "gated": False, "downloads": 0, "likes": 0}
            facts["siblings"] = [{"rfilename": name} for name in self.files]
            self._send(200, json.dumps(facts).encode(), Content_Type="application/json")

    do_GET = do_HEAD = do_POST = _answer

    def log_message(self, *_):
        pass


def test_the_real_package_reads_parquet_of_a_hub(tmp_path):
    """In a process of its own, which must end although it has read only the beginning."""
    pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number in range(2):
        rows = [f"{number} {row}" for row in range(1000)]
        table = pa.table({"text": rows, "noise": [os.urandom(500) for _ in rows]})
        pq.write_table(table, sink := io.BytesIO(), row_group_size=100)
        FakeHub.files[f"train-{number}.parquet"] = sink.getvalue()
    FakeHub.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path / "home"),
            "JAX_PLATFORMS": "cpu",
        }
        code = f"""
            from pathlib import Path
            from yocou_jax.data.sources import open_corpus
            corpus = open_corpus("hf:org/name", known=Path({str(tmp_path)!r}))
            print(corpus.source, corpus.summary.documents)
            documents = corpus.documents()
            print(*next(documents))
        """
        words = [sys.executable, "-c", textwrap.dedent(code)]
        for _ in range(2):
            found = subprocess.run(words, env=env, capture_output=True, text=True, timeout=100)
            said = [f"hf:org/name@{OLD} 2000", "org/name/train-0.parquet:1 0 0"]
            assert found.stdout.splitlines() == said, found.stderr
            asked = FakeHub.requests.copy()
            FakeHub.requests.clear()
        server.shutdown()
    # The second process knows the commit and the summary; it reads one file.
    assert "/api/datasets/org/name" not in asked
    read = {path for path in asked if path.endswith(".parquet")}
    assert read == {f"/datasets/org/name/resolve/{OLD}/train-0.parquet"}


def test_the_real_package_reads_a_folder(tmp_path, monkeypatch):
    """Two files, one shard each, in order. The hub itself is not asked."""
    pytest.importorskip("datasets")
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for number in range(2):
        rows = [json.dumps({"text": f"{number} {row}"}) for row in range(3)]
        (folder / f"train-{number}.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    corpus = open_corpus("hf:org/name")
    assert len(corpus.shards) == 2
    assert texts(corpus) == [f"{number} {row}" for number in range(2) for row in range(3)]
    assert [d.name for d in corpus.documents()][3:5] == ["org/name/2:1", "org/name/2:2"]
