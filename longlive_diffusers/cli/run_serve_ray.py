"""Serve what `longlive serve --ray` was asked for: this machine's Ray, which runs and replaces the replicas."""

import argparse
import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Iterator

import ray  # pyright: ignore[reportMissingImports]
import ray.serve  # pyright: ignore[reportMissingImports]
import torch

from ..serve.access import Access
from ..serve.model import ServedModel
from ..serve.ray_deployment import live_application
from ..serve.replicas import Replicas
from ..serve.server import listen
from .decoders import choose_decoder
from .launched import Rank
from .model_request import check_model
from .replicas import replicas_here
from .run_serve import check_access, check_max_pixels, load_served, log_to_stderr, page_of, settings_of
from .termination import ends_cleanly


APPLICATION = "longlive"
QUIET = {"log_level": "WARNING", "enable_access_log": False}
OBJECT_STORE_BYTES = 100 * 2**20  # nothing large is kept in it


def serve(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    check_access(args)
    models = check_model(args)
    check_max_pixels(args, models.folder.sizes)
    choose_decoder(args, models.folder.sizes)  # checks it; each replica takes its own
    replicas = replicas_here(models.device, args)
    listener = listen(args.host, args.port)  # an address in use is known before anything starts
    (host, port), page = listener.getsockname()[:2], page_of(listener, args)
    listener.close()
    for note in models.notes:
        print(f"longlive: {note}", file=sys.stderr)
    with ray_with(replicas, host, port), ends_cleanly("all streams were ended"):  # in place of what Ray does
        ray.serve.run(application(args, models.device, replicas), name=APPLICATION, logging_config=QUIET)
        print(f"longlive: {replicas} on {models.device}: {page} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    return 0


def application(args: argparse.Namespace, device: torch.device, replicas: Replicas) -> ray.serve.Application:
    """Return the application that Ray runs, whose replicas make streams on devices of this kind."""
    access = Access(args.host, args.token, tuple(args.origin))
    return live_application(functools.partial(load_replica, args), settings_of(args, device), access, replicas)


def load_replica(args: argparse.Namespace) -> ServedModel:
    """Load the models, in the process of a replica and on the machine where it is."""
    log_to_stderr()
    models = check_model(args)
    check_max_pixels(args, models.folder.sizes)  # Ray's own tools may run where the model is not
    return load_served(models, args, Rank(), choose_decoder(args, models.folder.sizes))


@contextlib.contextmanager
def ray_with(replicas: Replicas, host: str, port: int) -> Iterator[None]:
    """Run a Ray of its own for the block, with what the replicas need, and a proxy that listens on this address. At
    its end, the streams end first: a proxy that stops would cut them off."""
    ray.init(
        address="local",
        num_cpus=replicas.most * replicas.num_cpus,
        num_gpus=replicas.most * replicas.num_gpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
    )
    with contextlib.ExitStack() as ends:  # each of them, whatever comes of the others
        ends.callback(ray.shutdown)
        ray.serve.start(http_options={"host": host, "port": port}, logging_config=QUIET)
        ends.callback(ray.serve.shutdown)
        ends.callback(ray.serve.delete, APPLICATION)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # in this process
        yield
