"""`longlive serve`: a page, and a WebSocket, on which prompts become video while one watches."""

import argparse
import importlib.util

from .arguments import (
    add_cache_options,
    add_decoder_option,
    add_model_options,
    add_shortcut_options,
    add_solver_options,
    add_split_option,
    integer,
    number,
    text,
)
from .choices import MAX_MINUTES, MAX_PIXELS, MAX_PORT, MAX_QUEUE, MAX_REPLICAS, MAX_SESSIONS, MAX_STEPS


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "serve",
        help="make videos live, on a web page",
        description="Serve a web page on which one types, and the video follows; other programs use its WebSocket. "
        "Ctrl-C ends it. It needs the extra: pip install 'longlive-diffusers[demo]'.",
    )
    parser.set_defaults(run=run)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host",
        type=text,
        default="127.0.0.1",
        help="The address to listen on (default: %(default)s, for this machine alone). Any other needs a --token.",
    )
    network.add_argument(
        "--port", type=integer(0, MAX_PORT), default=7860, help="The port; 0 for a free one (default: %(default)s)."
    )
    network.add_argument(
        "--token",
        type=text,
        help="What clients have to send: /?token=... for the page and /ws, or a header 'Authorization: Bearer ...'.",
    )
    network.add_argument(
        "--no-token", action="store_true", help="Let everybody who can reach --host make videos, without a token."
    )
    network.add_argument(
        "--origin",
        action="append",
        default=[],
        type=text,
        metavar="URL",
        help="The origin of a page elsewhere that may use it, such as https://example.com; may be repeated.",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-sessions",
        type=integer(1, MAX_SESSIONS),
        default=2,
        help="How many streams are made at once, a chunk of each in turn (default: %(default)s).",
    )
    limits.add_argument(
        "--max-queue",
        type=integer(0, MAX_QUEUE),
        default=16,
        help="How many more may wait for one of them to end (default: %(default)s).",
    )
    limits.add_argument(
        "--max-minutes",
        type=number(0, MAX_MINUTES, above=True),
        default=30.0,
        help="How long a stream may last (default: %(default)g).",
    )
    limits.add_argument(
        "--max-steps",
        type=integer(1, MAX_STEPS),
        default=50,
        help="The most solver steps that a client may ask for; --steps counts as well (default: %(default)s).",
    )
    limits.add_argument(
        "--max-pixels",
        type=integer(1, MAX_PIXELS),
        help="The largest picture, height times width (default: as many as the model's own has).",
    )
    sampling = parser.add_argument_group("sampling, where a client does not ask for something else")
    add_solver_options(sampling)
    add_cache_options(sampling)
    add_shortcut_options(sampling)
    add_split_option(sampling)
    models = parser.add_argument_group("models")
    add_model_options(models)
    add_decoder_option(models)
    replicas = parser.add_argument_group("replicas")
    replicas.add_argument(
        "--ray",
        action="store_true",
        help="Serve with Ray: replicas, each with the models on a GPU of its own, or on its part of the CPU's cores. "
        "What is said above of streams holds for each of them. It needs the extra ray.",
    )
    replicas.add_argument(
        "--replicas", type=integer(1, MAX_REPLICAS), metavar="N", help="How many there are (default: 1)."
    )
    replicas.add_argument(
        "--max-replicas",
        type=integer(1, MAX_REPLICAS),
        metavar="N",
        help="How many there are at most: as many as clients are connected for, and one at least.",
    )


def run(args: argparse.Namespace) -> int:
    """
    Serve until it is told to end.

    Raises:
        ValueError: If the packages of the extra are not installed.
    """
    packages = {"starlette": "demo", "uvicorn": "demo", "websockets": "demo"}
    if args.ray:
        packages = {"ray": "ray", "fastapi": "ray"}  # ray itself may be there without what serves
    for package, extra in packages.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"longlive serve needs the package {package}: pip install 'longlive-diffusers[{extra}]'")
    from .replicas import check_replica_options

    check_replica_options(args)
    if args.ray:
        from .run_serve_ray import serve
    else:
        from .run_serve import serve

    return serve(args)
