"""The application for Ray's own tools: `serve run longlive_diffusers.cli.ray_app:app token=... steps=4`."""

import contextlib
import io
from collections.abc import Iterator, Mapping

import ray.serve  # pyright: ignore[reportMissingImports]
import torch

from .command_line import parse_arguments
from .replicas import check_replica_options, replicas_on
from .run_serve import check_access
from .run_serve_ray import application


OF_RAY = ("host", "port")  # options that the proxies have instead


def app(options: Mapping[str, object]) -> ray.serve.Application:
    """
    Build the application.

    Args:
        options: Those of `longlive serve`, by their names without dashes: `{"max_sessions": 2}`. A replica takes a
            GPU, unless `device` is "cpu". Because other machines may reach the proxies, there is a `token`, or
            `no_token` is true.

    Raises:
        ValueError: For options that are not there, or contradict each other.
    """
    for name in OF_RAY:
        if name in options:
            raise ValueError(f"{name} is an option of Ray's proxies: --http-{name} of `serve start`, or http_options")
    argv = ["serve", "--ray", "--host=0.0.0.0", *as_arguments({"device": "cuda", **options})]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parse_arguments(argv)
    except SystemExit:  # argparse's, which has said why
        raise ValueError(said.getvalue().strip().rpartition("error: ")[2]) from None
    check_access(args)
    check_replica_options(args)
    device = torch.device(args.device)
    return application(args, device, replicas_on(device, args))


def as_arguments(options: Mapping[str, object]) -> Iterator[str]:
    """Yield options of a command line: a true one is there, a false one is not, and one with a list is repeated."""
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, list) else [value]:
            if str(each).lower() == "true":
                yield option
            elif str(each).lower() != "false":
                yield f"{option}={each}"
