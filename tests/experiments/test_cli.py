"""The command line: one sentence for each mistake, in any terminal. Overrides change the config."""

import copy
import io
import json
import logging
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from absl import flags

from configs import yocou_small
from experiments import cli
from yocou_jax.config import Config
from yocou_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent
SMALL = "--config=configs/yocou_small.py"


def command(default=None) -> tuple[flags.FlagValues, flags.FlagHolder]:
    """The flags of a command, separate from those of the process."""
    flag_values = flags.FlagValues()
    holder = cli.config_file(copy.deepcopy(default), "What to train.", flag_values)
    flags.DEFINE_string("workdir", None, "A folder.", flag_values=flag_values)
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=flag_values)
    return flag_values, holder


def test_json_has_the_command_that_made_it(tmp_path):
    words = ["-m", "experiments.account", SMALL, "--lengths=64,128", "--json"]
    found = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(found.stdout)["command"] == " ".join(["python", *words])
    words = ["-m", "experiments.profile_inference", "--lengths=64", "--budget_s=0"]
    words.append(f"--out={tmp_path}/a b.json")
    subprocess.run([sys.executable, *words], capture_output=True, check=True, cwd=ROOT)
    written = json.loads((tmp_path / "a b.json").read_text())
    assert written["command"] == shlex.join(["python", *words])
    files = (ROOT / "experiments").glob("*.py")
    assert [p.name for p in files if "print(to_json" in p.read_text()] == ["cli.py"]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def parsed(*words: str, default=None) -> Config:
    flag_values, holder = command(default)
    assert cli.parse(["command", *words], flag_values) == ["command"]
    return Config.from_dict(holder.value)


def refusal(*words: str, default=None) -> str:
    with pytest.raises(UserError) as error:
        parsed(*words, default=default)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "group", "field", "value"),
    [
        (["--config.run.steps=700"], "run", "steps", 700),
        (["--config.run.steps", "700"], "run", "steps", 700),
        (["-config.run.steps=1_000"], "run", "steps", 1000),
        (["--config.run.steps=7", "--config.run.steps=900"], "run", "steps", 900),
        (["--config.optimizer.learning_rate=1"], "optimizer", "learning_rate", 1.0),
        (["--config.optimizer.learning_rate=2e-3"], "optimizer", "learning_rate", 0.002),
        (["--config.model.num_loops=5"], "model", "num_loops", 5),
        (
            ["--config.model.num_loops=5", "--config.model.num_loops=None"],
            "model",
            "num_loops",
            None,
        ),
        (["--config.model.num_loops=none"], "model", "num_loops", None),
        (["--config.model.num_loops=1,2,3"], "model", "num_loops", "1,2,3"),
        (["--config.data.packing"], "data", "packing", True),
        (["--config.data.packing=TRUE"], "data", "packing", True),
        (["--noconfig.compute.scan"], "compute", "scan", False),
        (["--config.data.source=a=b 'c'"], "data", "source", "a=b 'c'"),
        (["--config.run.sample_prompt="], "run", "sample_prompt", ""),
    ],
)
def test_an_override_is_applied(words, group, field, value):
    found = getattr(getattr(parsed(SMALL, *words), group), field)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--config.optimizer.learning-rate=1"], "Did you mean 'optimizer.learning_rate'?"),
        (["--config.data.source[0]=x"], "The config has no field 'data.source[0]'. Did you mean"),
        (["--config.data.source.upper=x"], "The config has no field 'data.source.upper'."),
        (["--config.model.=3"], "The config has no field 'model.'. It is a group: name one of"),
        (["--config.model={'window': 3}"], "The config has no field 'model'. It is a group: name"),
        (["--config.=3"], "The config has no field ''. configs/base.py lists every field."),
        (["--config.steps=3"], "The config has no field 'steps'. Did you mean 'run.steps'?"),
        (["--config.model.keys=3"], "The config has no field 'model.keys'."),
        (["--noconfig.run.steps"], "--noconfig is for fields that are true or false; run.steps is"),
        (["--noconfig.compute.scan=3"], "--noconfig.compute.scan=3 does not take an argument."),
        (["--config.run.steps=1e3"], "'--config.run.steps=1e3' is not possible: it must be"),
        (["--config.model.num_loops=1,,2"], "model.num_loops='1,,2' must be a whole number, 2 to"),
        (["--config.run.steps=none"], "run.steps=None must be of type int, not none."),
        (["--config.run.steps=" + "9" * 5000], "9999' is not possible: it must be a whole number"),
        (["--config.data.packing=maybe"], "is not possible: it must be true or false."),
        (["--config.optimizer.eps=small"], "is not possible: it must be a number such as 0.1"),
        (["--config.optimizer.learning_rate=inf"], "learning_rate=inf must be at most 1000."),
        (["--config.optimizer.learning_rate=nan"], "learning_rate=nan must be a number."),
        (["--config.run.steps"], "Missing value for flag --config.run.steps."),
        (["--workdir", "--config.run.steps=3"], "The flag '--workdir' has no value"),
        (["--config.run.steps", "--json"], "steps' has no value: '--json' follows it."),
        (["--undefok", "--config.run.steps=3"], "The flag '--undefok' has no value"),
        (["--workdr=x"], "There is no flag '--workdr'. Did you mean --workdir?"),
        (["--window=5"], "There is no flag '--window'. Did you mean --config.model.window?"),
        (["--model.window=5"], "'--model.window'. Did you mean --config.model.window?"),
        (["steps=3"], "The argument 'steps=3' is not possible here: every option is a --flag."),
        (["--flagfile=/no/such/file"], "Unable to open flagfile"),
        ([SMALL], "The flag --config is given 2 times, but there can be one config file."),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_a_sentence(words, sentence):
    found = refusal(SMALL, *words)
    assert sentence in found
    assert found.endswith((".", "?"))
    assert len(found) < 400


@pytest.mark.parametrize("value", ["workdir", "config", "seed", "init_from", "-", "-x"])
def test_a_value_may_look_like_a_flag(value):
    """`--workdir seed --init_from x`: seed is a folder here."""
    flag_values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=flag_values)
    flags.DEFINE_string("init_from", None, "", flag_values=flag_values)
    flags.DEFINE_integer("seed", 0, "", flag_values=flag_values)
    cli.parse(["x", "--workdir", value, "--init_from", "seed", "--seed", "3"], flag_values)
    given = flag_values.workdir, flag_values.init_from, flag_values.seed
    assert given == (value, "seed", 3)


def test_the_order_of_flags_and_a_missing_config():
    assert refusal("--config.run.steps=3", SMALL).startswith("--config must come before")
    assert refusal("--config.run.steps=3") == "The flag --config is missing."
    assert refusal("--config.run.stepz=3").endswith("Did you mean 'run.steps'?")


@pytest.mark.parametrize("default", ["configs/yocou_small.py", yocou_small.get_config()])
def test_overrides_of_a_default_config(default):
    """It is read when the line is parsed. Before that, overrides of its fields would fail."""
    assert parsed("--config.run.steps=700", default=default).run.steps == 700
    assert parsed(default=default) == Config.from_dict(yocou_small.get_config())
    assert "Did you mean 'run.steps'?" in refusal("--config.run.stepz=3", default=default)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "mine.py' does not exist."),
        ("def get_config(:", "in line 1: SyntaxError: invalid syntax"),
        ("x = 3", "has no function get_config()."),
        ("def get_config():\n    return 1 / 0", "in line 2: ZeroDivisionError: division by zero"),
        ("import no_such_module", "fails in line 1: ModuleNotFoundError: No module named"),
        ("def get_config():\n    pass", "returns None, not a ConfigDict."),
        ("def get_config(a, b):\n    pass", "needs a preset after a colon."),
        ("x = '\udce9'", "SyntaxError: (unicode error)"),
        ("from configs import base\ndef get_config():\n    c = base.get_config()\n    c.run.x = 1\n"
         "    return c", "The config has no field 'run.x'."),
        ("from configs import base\ndef get_config():\n    c = base.get_config()\n    del c.run\n"
         "    return c", "The config lacks the fields run."),
        ("from configs import base\ndef get_config():\n    c = base.get_config()\n"
         "    c.run.steps = 'x'\n    return c", "fails in line 4: TypeError"),
    ],
)  # fmt: skip
def test_a_config_file_that_cannot_be_used(tmp_path, text, sentence):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    found = refusal(f"--config={path}", "--config.run.steps=3")
    assert sentence in found
    assert "mine.py" in found or "The config " in found


def test_presets_and_paths_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from configs.yocou_small import get_config")
    assert parsed("--config=~/mine.py:rins").model.architecture == "rins"
    assert refusal("--config=~/mine.py:rinse").startswith("model.architecture='rinse' is neither")
    assert refusal("--config=configs/base.py:rins").endswith("takes no preset after a colon.")
    assert refusal(f"--config={tmp_path}") == f"The config file '{tmp_path}' does not exist."
    assert refusal("--config=") == "The config file '' does not exist."


def test_our_progress_lines_are_shown(monkeypatch):
    ours = logging.getLogger("yocou_jax")
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "propagate", True)
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    cli._quiet()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    logging.getLogger("yocou_jax.data").info("tokenizing %s", "x")
    logging.getLogger("yocou_jax.data").debug("not this")
    assert sys.stderr.getvalue() == "tokenizing x\n"


# --- How a command ends ---------------------------------------------------------------------------

CONFIG = """
    from configs import base

    def get_config(preset="plain"):
        if preset not in ("plain", "rins"):
            raise ValueError(f"There is no preset {preset!r}.")
        c = base.get_config()
        c.data.source = preset
        return c
"""

COMMAND = """
    import errno, os
    from absl import flags
    from experiments import cli
    from yocou_jax.config import Config
    from yocou_jax.errors import UserError

    CONFIG = cli.config_file(None, "What to train.")
    flags.mark_flag_as_required("config")
    ERRORS = {
        0.2: UserError("A batch of 7 sequences does not divide by 2."),
        0.3: KeyboardInterrupt(),
        0.4: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"),
        0.5: RuntimeError("a bug"),
    }

    def main(argv):
        config = Config.from_dict(CONFIG.value)
        decay = config.optimizer.weight_decay
        if decay in ERRORS:
            raise ERRORS[decay]
        print("ran", config.data.source, config.model.window)
        return 75 if decay == 0.6 else None

    cli.run(main)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.py").write_text(textwrap.dedent(CONFIG))
    (folder / "command.py").write_text(textwrap.dedent(COMMAND))

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "command.py", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config=config.py", "--config.model.windw=3"],
         "The config has no field 'model.windw'. Did you mean 'model.window'?"),
        (["--config=config.py", "--config.qqq=3"],
         "The config has no field 'qqq'. configs/base.py lists every field."),
        (["--config=config.py", "--config.model.window=abc"],
         "The value of '--config.model.window=abc' is not possible: it must be a whole number such "
         "as 1000, or none where there may be none."),
        (["--config=nowhere.py"], "The config file 'nowhere.py' does not exist."),
        (["--config=nowhere.py", "--config.run.steps=1"],
         "The config file 'nowhere.py' does not exist."),
        (["--config=config.py:rinz"],
         "The config file 'config.py' fails in line 6: ValueError: There is no preset 'rinz'."),
        (["--cnfig=config.py"], "There is no flag '--cnfig'. Did you mean --config?"),
        ([], "The flag --config is missing."),
        (["config.py"], "The flag --config is missing."),
        (["--config=config.py", "more"],
         "The argument 'more' is not possible here: every option is a --flag."),
        (["--config=config.py", "--config.optimizer.weight_decay=0.2"],
         "A batch of 7 sequences does not divide by 2."),
        (["--config=config.py", "--config.optimizer.weight_decay=0.4"],
         "No space left on device (runs/x). What was saved before is intact."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_code_2(run, arguments, sentence):
    result = run(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", sentence + "\n")


def test_the_other_exit_codes(run):
    decay = "--config.optimizer.weight_decay"
    result = run("--config=config.py:rins", "--config.model.window=3", f"{decay}=0.6")
    assert (result.returncode, result.stdout, result.stderr) == (75, "ran rins 3\n", "")
    result = run("--config=config.py", f"{decay}=0.3")
    assert (result.returncode, result.stderr) == (130, "Interrupted.\n")
    result = run("--config=config.py", f"{decay}=0.5")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "a bug" in result.stderr


# --- In any terminal ------------------------------------------------------------------------------

SHOW = """
import sys
from experiments import cli
from yocou_jax.errors import UserError
def main(_):
    print("caf\\u00e9 \\u2713 \\U0001f642 \\udcff")
    raise UserError("No file \\u4e2d\\udcff.")
cli.run(main)
"""


@pytest.mark.parametrize(
    "terminal",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "utf-8"},
    ],
    ids=str,
)
def test_a_character_that_the_terminal_lacks_is_escaped(terminal):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=ROOT,
        env=plain | terminal,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == cli.EXIT_USER_ERROR, done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout.startswith(b"caf")
    assert b"\\udcff" in done.stdout
    assert done.stderr.strip().endswith(b"\\udcff.")
