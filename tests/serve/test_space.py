"""The template of a Space on the Hub: what it starts is a command that the command line knows."""

import json
import re

import yaml

from longlive_diffusers.cli.command_line import parse_arguments
from longlive_diffusers.cli.run_serve import check_access
from tests.support.paths import ROOT


SPACE = ROOT / "hub_cards" / "space"


def test_the_container_starts_a_server_that_may_be_reached() -> None:
    dockerfile = (SPACE / "Dockerfile").read_text()
    command = json.loads(re.findall(r"^CMD (.*)$", dockerfile, re.MULTILINE)[-1])
    assert command[0] == "longlive"
    args = parse_arguments(command[1:])
    check_access(args)
    card = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (card["sdk"], card["app_port"]) == ("docker", args.port)
    assert args.host == "0.0.0.0" and args.origin == ["https://huggingface.co"]


def test_the_extra_that_it_installs_exists() -> None:
    extra = re.search(r"longlive-diffusers\[(\w+)\]", (SPACE / "Dockerfile").read_text())
    assert extra and f"\n{extra[1]} =\n" in (ROOT / "setup.cfg").read_text()
