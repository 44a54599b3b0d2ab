"""What the READMEs promise: links that lead somewhere, pictures that are there, programs that run."""

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.cli.command_line import parse_arguments as parse_command
from longlive_diffusers.video.reader import read_video
from run.arguments import parse_arguments
from tests.support.paths import ROOT


README = (ROOT / "README.md").read_text()
ROOMS = [path for path in ROOT.rglob("*.md") if path.relative_to(ROOT).parts[0] in ("longlive_diffusers", "training")]


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def repository() -> str:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    urls = dict(line.split(" = ") for line in parser["metadata"]["project_urls"].strip().splitlines())
    return urls["Repository"]


def test_links_of_the_readme_are_absolute_and_lead_to_files():
    """PyPI shows the README as well, where a relative link leads nowhere."""
    own = repository(), repository().replace("//github.com/", "//raw.githubusercontent.com/")
    assert links(README)
    inside = 0
    for link in links(README):
        assert link.startswith("https://"), link
        for address in own:
            if link.startswith(address):
                path = re.sub(r"^/(blob/|tree/)?main/", "", link.removeprefix(address))
                assert (ROOT / path).exists(), link
                inside += 1
    assert inside >= 5


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_a_room_lead_to_files(path):
    for link in links(path.read_text()):
        if not link.startswith("https://"):
            assert (path.parent / link.split("#")[0]).exists(), link


def test_the_first_screen_moves():
    picture = next(link for link in links(README) if link.endswith(".webp"))
    assert picture in README[:600]
    path = ROOT / "training" / "toy" / Path(picture).name
    assert path.stat().st_size < 500_000
    with Image.open(path) as image:
        assert image.n_frames > 20 and image.width <= 900


def test_it_is_short_and_has_two_lines_of_set_up():
    assert len(README.splitlines()) <= 200
    assert README.count("pip install") == 2
    first, second = re.findall(r"^pip install .*$", README, re.M)
    assert "[demo]" in first and "longlive generate" in first and "video.mp4" in first
    assert second.endswith('".[test]" && pytest -n logical')


def test_the_places_in_its_map_exist():
    block = README[README.index("## Where things are") :].split("```")[1]
    places = re.findall(r"(?:^| )([a-z_]+(?:/[a-z_]+)*/)(?= |$)", block, re.M)
    assert len(places) >= 14
    for place in places:
        assert any((ROOT / parent / place).is_dir() for parent in ("", "longlive_diffusers", "training", "tests")), (
            place
        )


def shell_lines(text: str) -> list[str]:
    """The lines of all shell blocks, with continued lines joined and comments removed."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


ALL_LINES = [line for path in (ROOT / "README.md", *ROOMS) for line in shell_lines(path.read_text())]


@pytest.mark.parametrize("line", [line for line in ALL_LINES if line.startswith("longlive ")])
def test_the_command_line_takes_the_options_that_are_shown(line):
    parse_command(shlex.split(line)[1:])


@pytest.mark.parametrize("line", [line for line in ALL_LINES if "training/train_ar.py" in line])
def test_training_takes_the_options_that_are_shown(line):
    words = shlex.split(line)
    words = [str(ROOT / word) if word.startswith("training/") else word for word in words]
    parse_arguments(words[words.index(str(ROOT / "training" / "train_ar.py")) + 1 :])
    for config in (word for word in words if word.endswith(".yaml")):
        assert Path(config).is_file()


@pytest.mark.parametrize("line", [line for line in ALL_LINES if line.startswith("python ")])
def test_the_scripts_that_are_shown_exist(line):
    assert (ROOT / line.split()[1]).is_file()


def test_its_programs_run(tmp_path):
    """The two programs, one after the other as they stand there, on the embedded pipeline."""
    programs = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(programs) == 2 and programs[0].count("\n") <= 11
    program = "\n".join(programs).replace('"path/or/repo"', repr(str(toy_pipeline_path())))
    program = program.replace('.to("cuda")', "").replace("torch.bfloat16", "torch.float32")
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lighthouse, street = (read_video(tmp_path / name)[0] for name in ("lighthouse.mp4", "street.mp4"))
    assert lighthouse.shape == (125, 64, 64, 3)
    assert street.shape == (125, 64, 64, 3)  # 16 chunks
