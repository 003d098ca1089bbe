"""What ships: dependencies that agree with each other, commands that exist, a tree with the promised top level."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lingbot_nb.runs import PROJECT

FOLDERS = {"notebooks", "lingbot_nb", "papermill_runs", "data", "tests"}
FILES = {"environment.yml", "README.md", "pyproject.toml", "Makefile", "constraints.txt"}
NOT_INSTALLED = {"flash"}
"""Extras for GPU machines, which no set-up here installs."""


def project() -> dict:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def ranges() -> dict[str, Requirement]:
    """Every direct dependency of the base and of the extras that `make` installs."""
    extras = project()["optional-dependencies"]
    lines = [
        *project()["dependencies"],
        *(x for name, lines in extras.items() if name not in NOT_INSTALLED for x in lines),
    ]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pins() -> dict[str, Version]:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pairs = [re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines if line and not line.startswith("#")]
    assert all(pairs), "constraints.txt holds lines that are no exact pins"
    return {canonicalize_name(pair[1]): Version(pair[2]) for pair in pairs}


def environment() -> dict:
    return yaml.safe_load((PROJECT / "environment.yml").read_text())


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = ["make", "-s", "-C", str(PROJECT), *arguments, *(f"{name}={value}" for name, value in variables.items())]
    plain = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(command, capture_output=True, text=True, env=plain, timeout=60)


# ------------------------------------------------------------------------------------------------------ dependencies


def test_every_range_holds_its_pin():
    assert {name: str(r.specifier) for name, r in ranges().items() if name not in pins()} == {}
    assert {name for name, requirement in ranges().items() if pins()[name] not in requirement.specifier} == set()


def test_every_package_that_comes_along_is_pinned():
    """Walks the installed packages' own requirements: an unpinned one would float to another version tomorrow."""
    todo, seen = [(name, frozenset(requirement.extras)) for name, requirement in ranges().items()], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            wanted = [
                not requirement.marker,
                *(requirement.marker and requirement.marker.evaluate({"extra": e}) for e in ("", *extras)),
            ]
            if any(wanted):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    # The CUDA build of torch brings packages of its own, which go with its release.
    cuda = re.compile(r"nvidia-|cuda-|triton|setuptools$")
    assert {name for name, _ in seen if name not in pins() and not cuda.match(name)} == set()


def test_the_pins_are_what_is_installed():
    other = {}
    for name in ranges():
        installed = Version(importlib.metadata.version(name)).public
        if installed != str(pins()[name]):
            other[name] = (installed, str(pins()[name]))
    if other and sys.prefix != str(PROJECT / ".venv"):
        pytest.skip(f"not the environment that make sets up: {other}")
    assert other == {}


def test_torch_is_one_exact_release_without_torchvision_or_cuda():
    assert str(pins()["torch"]) == "2.13.0"
    assert not {
        name for name in pins() if name in ("torchvision", "torchaudio", "triton") or name.startswith("nvidia-")
    }


def test_no_torchvision_is_installed_and_diffusers_has_the_vae():
    assert importlib.util.find_spec("torchvision") is None
    diffusers = pytest.importorskip("diffusers")
    assert diffusers.AutoencoderKLWan


def test_flash_attention_stays_an_extra():
    extras = project()["optional-dependencies"]
    assert [Requirement(line).name for line in extras["flash"]] == ["flash-attn"]
    assert not {"flash-attn", "flash-attn-4"} & (set(ranges()) | set(pins()))
    text = (PROJECT / "environment.yml").read_text()
    assert "flash-attn" in text and "flash" not in str(environment()["dependencies"])


def test_conda_gets_the_same_environment():
    python, _, pip = environment()["dependencies"]
    assert environment()["name"] == project()["name"]
    assert python == f"python{project()['requires-python']}"
    assert environment()["dependencies"][1] == "pip"
    (editable,) = [line for line in pip["pip"] if line.startswith("-e ")]
    assert "-c constraints.txt" in pip["pip"]
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", editable)[1]
    assert set(extras.split(",")) == set(project()["optional-dependencies"]) - NOT_INSTALLED
    assert f"EXTRAS := {extras}" in (PROJECT / "Makefile").read_text()


def test_pip_installs_what_conda_installs_and_nothing_else():
    lines = environment()["dependencies"][2]["pip"]
    assert not [line for line in lines if not line.startswith(("-e ", "-c ", "--extra-index-url "))]


# ---------------------------------------------------------------------------------------------------------- commands


def test_python_check_takes_the_first_that_fits(tmp_path):
    fake_python(tmp_path / "old", (3, 10, 13))
    fake_python(tmp_path / "new", (3, 14, 0))
    fake_python(tmp_path / "fits", (3, 12, 1))
    done = make("check-python", PYTHONS=f"/nowhere/python {tmp_path}/old {tmp_path}/new {tmp_path}/fits")
    assert (done.returncode, done.stdout.strip()) == (0, f"{tmp_path}/fits")


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 14, 0), (2, 7, 18)])
def test_python_check_says_what_is_missing(tmp_path, version):
    fake_python(tmp_path / "python", version)
    done = make("check-python", PYTHONS=str(tmp_path / "python"))
    assert done.returncode != 0 and done.stdout == ""
    sentence = done.stderr.splitlines()[0]
    assert re.search(r"No Python from 3\.11 to 3\.13 found .*PYTHONS=", sentence) and str(tmp_path) in sentence


def fake_python(path, version: tuple[int, int, int]) -> None:
    """An executable that answers `-c CODE` as a Python of `version` would."""
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[2])"
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' \"$@\"\n")
    path.chmod(0o755)


def test_make_without_a_target_explains_itself():
    done = make()
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"run", "test", "lab", "clean", "help"}


def test_ci_calls_make_test():
    script = PROJECT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands == ['cd "$(dirname "$0")/.." && exec make test']


def test_commands_of_the_documents_exist():
    if not (readme := PROJECT / "README.md").exists():
        pytest.skip("README.md is not there")
    text = readme.read_text() + (PROJECT / "papermill_runs" / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?\bmake ([a-z-]+)`", text)) <= targets
    commands = set(re.findall(r"python -m lingbot_nb ([a-z]+)", text))
    known = subprocess.run([sys.executable, "-m", "lingbot_nb", "--help"], capture_output=True, text=True, cwd=PROJECT)
    assert commands <= set(re.findall(r"^    ([a-z]+) ", known.stdout, re.MULTILINE))


# -------------------------------------------------------------------------------------------------------------- tree


def listed() -> set[str]:
    """Top-level names that git keeps or would keep; without git, what lies there less what set-up makes."""
    command = ["git", "-C", str(PROJECT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True) if (PROJECT / ".git").exists() else None
    if done and done.returncode == 0:
        return {line.split("/")[0] for line in done.stdout.splitlines() if (PROJECT / line).exists()}
    return {path.name for path in PROJECT.iterdir() if path.suffix != ".egg-info"}


def test_top_level_is_as_promised():
    shown = {
        name for name in listed() if not name.startswith(".") and not re.match(r"(LICEN[CS]E|NOTICE|CITATION)", name)
    }
    assert shown - FOLDERS - FILES == set()


def test_folders_say_what_they_hold():
    for folder in ("data", "papermill_runs"):
        assert (PROJECT / folder / "README.md").read_text().startswith("# ")


def test_shipped_data_is_small_and_carries_its_notice():
    for folder, limit in (("clips", 25e6), ("weights", 60e6)):
        size = sum(path.stat().st_size for path in (PROJECT / "data" / folder).rglob("*") if path.is_file())
        assert 0 < size <= limit, f"data/{folder} holds {size / 1e6:.1f} MB"
    notice = re.sub(r"[\s>]+", " ", (PROJECT / "data" / "README.md").read_text())
    for part in ("Contributors to the Freedoom project", "Redistributions of source code must retain", "AS IS"):
        assert part in notice


def test_the_core_needs_no_simulator_widgets_or_codecs_to_be_imported():
    """It runs on machines that lack these: they are imported where they are used."""
    code = (
        "import sys\n"
        "for name in ('vizdoom', 'av', 'cv2', 'ipywidgets', 'ipyevents', 'diffusers', 'transformers', 'papermill'):\n"
        "    sys.modules[name] = None\n"
        "import pkgutil, importlib, lingbot_nb\n"
        "for module in pkgutil.walk_packages(lingbot_nb.__path__, 'lingbot_nb.'):\n"
        "    if not module.name.startswith(('lingbot_nb.__main__', 'lingbot_nb.stream.')):\n"
        "        importlib.import_module(module.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, timeout=120)
    assert done.returncode == 0, done.stderr
