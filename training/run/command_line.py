"""A command line that is read into settings dataclasses, with a YAML file for defaults.

A value in the file is read exactly as if it stood on the command line: the text that is written there goes through the
same parser, so that it has the same types, choices and messages, and what YAML would make of it by itself ("no" a
boolean, 1.10 the number 1.1, 1e-5 a text) does not matter.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from longlive_diffusers.user_path import user_path
from run.unused_options import Need, check_needs


NULL = "tag:yaml.org,2002:null"
PATH = "a path, or a name that may be one"  # written beside the type of a setting: `~` in it is the user's home


def parse_groups(
    groups: Sequence[type], argv: list[str], *, description: str, needs: Sequence[Need] = ()
) -> tuple[Any, ...]:
    """
    Read a command line into settings dataclasses; `--config FILE.yaml` anywhere in it gives defaults, which other
    options override.

    Args:
        groups: The dataclasses; each field is an option.
        argv: The arguments of the command line.
        description: What `--help` begins with.
        needs: What options need besides; see `check_needs`.

    Raises:
        ValueError: If an option does not exist, is missing, has a value that it does not take, or lacks what it needs,
            on the command line or in the file; if the file cannot be read; or if `--config` is abbreviated.
    """
    before = _Parser(add_help=False, allow_abbrev=False)
    before.add_argument(
        "--config", type=user_path, help="A YAML file of options; options of the command line override it."
    )
    file = before.parse_known_args(argv)[0].config
    parser = _GroupsParser(groups, description=description, parents=[before], formatter_class=_HelpFormatter)
    defaults = {action.dest: parser.get_default(action.dest) for action in parser._actions}
    recipe = {} if file is None else _read_defaults(file, groups)
    for action in parser._actions:
        if action.dest in recipe:
            action.required = False
    parser.set_defaults(**recipe)
    *settings, rest, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"there are no such options: {' '.join(unknown)}")
    if rest.config != file:
        raise ValueError(f"write --config in full: '{rest.config}' was not read")
    for group in settings:
        _expand_paths(group)
    check_needs(needs, defaults, defaults | recipe, vars(parser.parse_args(argv)))
    return tuple(settings)


def _expand_paths(group: Any) -> None:
    """Replace `~` as a shell does, which does so neither in a YAML file nor after a `=`."""
    for name, hint in get_type_hints(type(group), include_extras=True).items():
        path = vars(group)[name]
        if PATH in get_args(hint) and path is not None:
            setattr(group, name, os.path.expanduser(path))


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong, instead of printing it after a page of options and ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _GroupsParser(HfArgumentParser, _Parser):
    pass


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, unless it is None or the help already states it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        return text if action.default is None or "(default:" in text else super()._get_help_string(action)


# ------------------------------------------------------------------------------------------------------- the YAML file
def _read_defaults(file: Path, groups: Sequence[type]) -> dict[str, Any]:
    """Return the values that a file gives to options, as the command line would read them."""
    parser = _GroupsParser(groups, add_help=False)
    options = {action.dest: action for action in parser._actions}
    for action in parser._actions:
        action.required = False
    settings = _settings(file)
    unknown = sorted(set(settings) - set(options))
    if unknown:
        raise ValueError(f"'{file}' sets options that do not exist: {', '.join(unknown)}")
    values = {}
    for name, node in settings.items():
        try:
            words = _words(options[name], node)
            if words:
                values[name] = vars(parser.parse_args(words))[name]
        except ValueError as error:
            raise ValueError(f"'{file}', line {node.start_mark.line + 1}: {error}") from error
    return values


def _settings(file: Path) -> dict[str, yaml.Node]:
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"'{file}' cannot be read as YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"'{file}' must hold `option: value` lines, it holds {_kind(root)}")
    settings: dict[str, yaml.Node] = {}
    for key, node in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"'{file}', line {key.start_mark.line + 1}: an option is a name, not {_kind(key)}")
        if key.value in settings:
            raise ValueError(f"'{file}', line {key.start_mark.line + 1}: {key.value} is set a second time")
        settings[key.value] = node
    return settings


def _words(option: argparse.Action, node: yaml.Node) -> list[str]:
    """Return what one would write on the command line; nothing for the value that the option has without it."""
    name, takes_several = option.dest, option.nargs == "+"
    if node.tag == NULL:
        if option.default is not None:
            raise ValueError(f"{name} needs a value")
        return []
    if isinstance(node, yaml.ScalarNode):
        return [f"--{name}={node.value}"]  # also if the value begins with a dash
    if not isinstance(node, yaml.SequenceNode) or not takes_several:
        raise ValueError(f"{name} takes {'a list of texts' if takes_several else 'one value'}, not {_kind(node)}")
    for item in node.value:
        if not isinstance(item, yaml.ScalarNode) or item.tag == NULL:
            hint = "; a text with ': ' in it needs quotes" if isinstance(item, yaml.MappingNode) else ""
            raise ValueError(f"{name} takes a list of texts, not of {_kind(item).removeprefix('a ')}s{hint}")
    return [f"--{name}", *(item.value for item in node.value)] if node.value else []


def _kind(node: yaml.Node | None) -> str:
    if node is None or node.tag == NULL:
        return "nothing"
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a text"
