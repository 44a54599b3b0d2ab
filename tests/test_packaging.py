"""What pip installs is what the repository holds: every module, every asset, every card, and no more."""

import configparser
import email
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from longlive_diffusers.version import __version__
from tests.support.paths import ROOT


PACKAGE = ROOT / "longlive_diffusers"
CARDS = ROOT / "hub_cards"


def package_files() -> set[str]:
    """The files of the package as they are installed: the cards have a folder of their own in the repository."""
    cards = {f"longlive_diffusers/{path.relative_to(ROOT).as_posix()}" for path in files_below(CARDS)}
    return cards | {path.relative_to(ROOT).as_posix() for path in files_below(PACKAGE)}


def files_below(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    ]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    source = tmp_path_factory.mktemp("source") / "repository"  # a copy: a build leaves folders in its source
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in (PACKAGE, CARDS):
        shutil.copytree(folder, source / folder.name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


@pytest.fixture(scope="module")
def wheel(distributions) -> zipfile.ZipFile:
    (path,) = distributions.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    return email.message_from_bytes(wheel.read(f"longlive_diffusers-{__version__}.dist-info/METADATA"))


def test_the_version_is_written_in_one_place(wheel):
    assert setup_cfg()["metadata"]["version"] == "attr: longlive_diffusers.version.__version__"
    assignments = [path for path in PACKAGE.rglob("*.py") if re.search(r"^__version__ *=", path.read_text(), re.M)]
    assert assignments == [PACKAGE / "version.py"]
    assert "version" not in (ROOT / "pyproject.toml").read_text()
    assert metadata(wheel)["Version"] == __version__


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == package_files()
    assert {f"longlive_diffusers/hub_cards/{card}.md" for card in ("pipeline", "lora", "distilled_lora")} <= files
    assert "longlive_diffusers/py.typed" in files, "without it, type checkers ignore the annotations"
    info = {name.split("/", 1)[1] for name in wheel.namelist() if ".dist-info/" in name}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= info


def test_the_sdist_holds_the_whole_package_and_the_license(distributions):
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    in_repository = {name.replace("longlive_diffusers/hub_cards/", "hub_cards/") for name in package_files()}
    assert in_repository | {"LICENSE", "setup.cfg", "pyproject.toml"} <= names


def test_every_folder_with_modules_is_a_package():
    """setup.cfg names the packages one by one, and leaves out what it does not name without a word."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"longlive_diffusers.hub_cards"}
    assert set(setup_cfg()["options"]["packages"].split()) == expected


def test_the_installed_package_finds_its_cards(wheel, tmp_path):
    wheel.extractall(tmp_path)
    program = (
        "from longlive_diffusers.pipelines.sharing import __file__, render_model_card\n"
        "print(__file__)\n"
        "print(render_model_card('someone/foxes', height=64, width=64, chunk_size=8).data.library_name)\n"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    where, library = run.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert library == "diffusers"


def test_an_editable_install_finds_its_cards():
    """As README's test line installs it; the cards are not below the package's own folder then."""
    import longlive_diffusers.hub_cards

    assert Path(longlive_diffusers.hub_cards.__file__).with_name("pipeline.md").is_file()


def test_requirements_are_lower_bounds(wheel):
    """A plugin must never make pip replace a user's torch."""
    required = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist")]
    base = {requirement.name.lower(): requirement for requirement in required if requirement.marker is None}
    assert {"torch", "diffusers", "transformers", "peft", "accelerate", "av", "ftfy", "jinja2"} <= set(base)
    assert all(specifier.operator == ">=" for requirement in required for specifier in requirement.specifier)
    assert all(len(requirement.specifier) == 1 for requirement in required)
    assert "torchvision" not in {requirement.name for requirement in required}
    te = [requirement.name for requirement in required if 'extra == "te"' in str(requirement.marker)]
    assert te == ["transformer-engine"]  # where it is broken, `import peft` is too: so nobody gets it unasked


def test_constraints_pin_every_requirement_within_its_bounds():
    pins = {
        requirement.name.lower(): requirement for requirement in requirements((ROOT / "constraints.txt").read_text())
    }
    assert all([specifier.operator for specifier in pin.specifier] == ["=="] for pin in pins.values())
    options, extras = setup_cfg()["options"], setup_cfg()["options.extras_require"]
    for requirement in requirements("\n".join([options["install_requires"], extras["test"], extras["ray"]])):
        (pin,) = pins[requirement.name.lower()].specifier
        assert requirement.specifier.contains(pin.version), f"{requirement} against {pin}"


def test_the_command_line_is_installed(wheel):
    entry_points = wheel.read(f"longlive_diffusers-{__version__}.dist-info/entry_points.txt").decode()
    assert "longlive = longlive_diffusers.cli:main" in entry_points


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == setup_cfg()["metadata"]["license_expression"]
    assert "2605.18739" in citation["preferred-citation"]["journal"]


def test_the_workflows_run_what_contributors_run():
    ci, weekly = (
        yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text()) for name in ("ci", "weekly")
    )
    (job,) = ci["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    (job,) = weekly["jobs"].values()
    assert job["strategy"]["matrix"]["resolution"] == ["highest", "lowest-direct"]
    assert job["steps"][-1] == {"run": "pytest -n logical"}
    template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    assert any("longlive env" in field["attributes"]["label"] for field in template["body"])


def test_the_files_without_types_only_become_fewer():
    without_comments = re.sub(r"^\s*//.*$", "", (ROOT / "pyrightconfig.json").read_text(), flags=re.M)
    config = json.loads(without_comments)
    assert config["include"] == ["longlive_diffusers"] and config["typeCheckingMode"] == "basic"
    assert set(config["exclude"]) <= {
        "longlive_diffusers/models/streaming_vae.py",
        "longlive_diffusers/nvfp4/kernels.py",
        "longlive_diffusers/nvfp4/quantizer.py",
        "longlive_diffusers/nvfp4/transformer_engine.py",
    }
    assert all((ROOT / path).is_file() for path in config["exclude"])
