"""The package installs what it needs, and every list of requirements exists once."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DYNAMIC = PROJECT["tool"]["setuptools"]["dynamic"]
LISTS = sorted(path.stem for path in (ROOT / "requirements").glob("*.txt"))
LIBRARY = ("yocou_jax", "pallas_kernels")
# Only one file imports each of them, and this file is imported only if a user names the kernel, or
# when a figure is drawn.
ONLY_WHEN_ASKED_FOR = {"triton", "matplotlib"}


def lines(path: str) -> list[str]:
    """The lines of a requirements file that are not comments."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def stated(name: str) -> dict[str, Requirement]:
    """The requirements of one list, by name."""
    found = [Requirement(line) for line in lines(f"requirements/{name}.txt")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_the_library_is_installed_and_nothing_else():
    where = PROJECT["tool"]["setuptools"]["packages"]["find"]
    found = find_packages(ROOT, include=where["include"])
    # All folders with code, so that the test finds one without an __init__.py.
    code = {path.parent for name in LIBRARY for path in (ROOT / name).rglob("*.py")}
    assert sorted(found) == sorted(".".join(path.relative_to(ROOT).parts) for path in code)
    assert where["namespaces"] is False


@pytest.mark.parametrize("package", LIBRARY)
def test_the_packages_ship_their_types(package):
    assert (ROOT / package / "py.typed").is_file()
    assert PROJECT["tool"]["setuptools"]["package-data"]["*"] == ["py.typed"]


def test_the_package_and_its_extras_read_the_lists_that_make_installs():
    assert DYNAMIC["dependencies"] == {"file": ["requirements/library.txt"]}
    extras = DYNAMIC["optional-dependencies"]
    assert extras == {
        name: {"file": [f"requirements/{name}.txt"]}
        for name in LISTS
        if name not in ("library", "lint")
    }
    assert PROJECT["project"]["dynamic"] == ["dependencies", "optional-dependencies"]
    assert "library" in LISTS


def test_requirements_files_only_include_the_lists():
    everything = [f"-r requirements/{name}.txt" for name in ("library", "plots", "test")]
    assert lines("requirements.txt") == everything
    for accelerator in ("gpu", "tpu"):
        expected = ["-r requirements.txt", f"-r requirements/{accelerator}.txt"]
        assert lines(f"requirements-{accelerator}.txt") == expected
    assert lines("requirements-aot.txt")[0] == "-r requirements.txt"


@pytest.mark.parametrize("name", LISTS)
def test_setuptools_can_read_each_list(name):
    """Unlike pip, it does not know -r, -c or a comment in the line of a requirement."""
    assert [Requirement(line).name for line in lines(f"requirements/{name}.txt")]


def _imported(package: str) -> set[str]:
    """First names of the modules that the files of the package import."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - set(LIBRARY) - ONLY_WHEN_ASKED_FOR


def test_an_install_brings_what_the_library_imports_and_no_more():
    brought_by = importlib.metadata.packages_distributions()
    modules = _imported("yocou_jax") | _imported("pallas_kernels")
    library = set(stated("library"))
    for module in modules:
        names = {canonicalize_name(name) for name in brought_by[module]}
        assert names & library, f"{module} is imported, but requirements/library.txt has none of it"
    needed = {canonicalize_name(name) for module in modules for name in brought_by[module]}
    assert library - needed == {"absl-py"}  # for the flags of the commands


@pytest.mark.parametrize("tested", ["oldest", "newest", "newest-gpu"])
def test_each_tested_set_pins_every_requirement_inside_its_range(tested):
    pins = {}
    for line in lines(f"constraints/{tested}.txt"):
        name, version = line.split("==")
        pins[canonicalize_name(name)] = version
    for name in ("library", "plots", "test"):
        for package, requirement in stated(name).items():
            assert requirement.specifier.contains(pins[package]), f"{package} in {tested}.txt"


def test_one_version_of_ruff():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"=={re.search(r'rev: v(.+)', hooks)[1]}" == str(stated("test")["ruff"].specifier)


def test_the_workflow_runs_the_ci_script():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"run: (.+)", workflow) == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o100
