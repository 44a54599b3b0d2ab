"""`longlive env`: the versions, the device and the backends that would be chosen, which a bug report needs."""

import argparse

from .arguments import add_device_option


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "env",
        help="show versions, device and chosen backends",
        description="Show the versions, the device and the backends that would be chosen. Paste it into bug reports.",
    )
    parser.set_defaults(run=run)
    add_device_option(parser, "The device to describe")


def run(args: argparse.Namespace) -> int:
    """Print the environment."""
    from ..benchmark.environment import describe_environment
    from .device import choose_device

    described = describe_environment(choose_device(args.device))
    width = max(map(len, described))
    for name, value in described.items():
        lines = [f"{key} {entry}" for key, entry in value.items()] if isinstance(value, dict) else [value]
        for index, line in enumerate(lines):
            print(f"{name if index == 0 else '':<{width}}  {line}")
    return 0
