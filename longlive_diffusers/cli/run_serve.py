"""Serve what `longlive serve` was asked for."""

import argparse
import logging
import re
import signal
import socket
import sys
from urllib.parse import quote

import torch

from ..assets import TOY_LORA_STEPS, toy_lora_path
from ..models.tiny_decoder import TinyVideoDecoder
from ..pipelines.chunk_step import is_guided
from ..pipelines.inputs import ModelSizes
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..serve.access import ORIGIN, Access, is_loopback, is_origin
from ..serve.app import LiveApp
from ..serve.model import ServedModel, default_size
from ..serve.server import listen, make_server, url_of
from ..serve.settings import ServeSettings
from ..user_path import user_path
from .decoders import choose_decoder, place_decoder
from .devices import start_ranks
from .embedded_lora import uses_embedded_lora
from .launched import Rank, own_rank
from .model_request import ModelRequest, check_model, load_model
from .shortcuts import kv_cache_dtype, shortcuts
from .termination import ends_cleanly


def serve(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; return 1 if the models have failed."""
    check_access(args)
    models, rank = check_model(args), own_rank()
    check_max_pixels(args, models.folder.sizes)
    decoder = choose_decoder(args, models.folder.sizes)
    if rank.count < args.devices:
        return start_ranks(args.argv, args.devices)
    if not rank.leads:
        for number in (signal.SIGINT, signal.SIGTERM):  # the first process's to act on
            signal.signal(number, signal.SIG_IGN)
        load_served(models, args, rank, decoder).sessions.follow()
        return 0
    listener = listen(args.host, args.port)
    for note in models.notes:
        print(f"longlive: {note}", file=sys.stderr)
    log_to_stderr()
    served = load_served(models, args, rank, decoder)
    app = LiveApp(
        served,
        settings_of(args, models.device),
        access=Access(args.host, args.token, tuple(args.origin)),
        on_failure=lambda: server.stop(),
    )
    server = make_server(app)
    print(f"longlive: {served.name} on {served.device}: {page_of(listener, args)} (Ctrl-C ends it)", flush=True)
    with ends_cleanly("all streams were ended"):
        server.run(sockets=[listener])
    return 1 if app.has_failed else 0


def page_of(listener: socket.socket, args: argparse.Namespace) -> str:
    """Return the address of the page, with the token that it needs."""
    token = f"/?token={quote(args.token, safe='')}" if args.token else ""
    return f"{url_of(listener)}{token}"


def check_access(args: argparse.Namespace) -> None:
    """
    Check who may use the server.

    Raises:
        ValueError: If other machines can reach it, and there is neither a token nor the wish for none.
    """
    if args.token is not None and args.no_token:
        raise ValueError("give either --token or --no-token, not both")
    if args.token is not None and not args.token.strip():
        raise ValueError("--token is empty; --no-token lets everybody make videos")
    if args.token is not None and not re.fullmatch(r"[!-~]+", args.token):
        raise ValueError("--token must be of letters, digits and signs of ASCII, without spaces")
    for origin in args.origin:
        if not is_origin(origin):
            raise ValueError(f"--origin must be {ORIGIN}, not {origin!r}")
    if not is_loopback(args.host) and args.token is None and not args.no_token:
        raise ValueError(
            f"--host {args.host} can be reached from other machines: give a --token, or --no-token to let everybody "
            "make videos"
        )


def check_max_pixels(args: argparse.Namespace, sizes: ModelSizes) -> None:
    """Raise a ValueError if the server is to allow less than a picture of the model's shape."""
    try:
        default_size(sizes, args.max_pixels)
    except ValueError as error:
        raise ValueError(f"--max-pixels {args.max_pixels}: {error}") from error


def settings_of(args: argparse.Namespace, device: torch.device) -> ServeSettings:
    """Return what the server allows, and its defaults, for streams that are made on this device."""
    return ServeSettings(
        max_sessions=args.max_sessions,
        max_queue=args.max_queue,
        max_minutes=args.max_minutes,
        max_pixels=args.max_pixels,
        steps=args.steps,
        max_steps=max(args.steps, args.max_steps),
        guidance_scale=args.guidance_scale,
        window_size=args.window_size,
        sink_size=args.sink_size,
        **shortcuts(args, device),
        split_first_chunk=args.split_first_chunk,
    )


def load_served(
    models: ModelRequest, args: argparse.Namespace, rank: Rank, decoder: TinyVideoDecoder | None
) -> ServedModel:
    """Load the pipelines that streams are made with: the embedded one also with its LoRA for each number of steps that
    there is one for."""
    pipelines: dict[str | None, LongLivePipeline] = {}
    loras = {f"{steps} steps": toy_lora_path(steps) for steps in TOY_LORA_STEPS} if uses_embedded_lora(args) else {}
    for name, lora in {None: None, **loras}.items():
        pipelines[name] = load_model(
            models, args, rank, fused_lora=lora, show_progress=False, announces=name is None and rank.leads
        )
    for pipe in pipelines.values():
        pipe.vae, pipe.text_encoder = pipelines[None].vae, pipelines[None].text_encoder  # all the same

    def choose(steps: int, guidance_scale: float) -> str | None:
        name = f"{steps} steps"
        return name if name in pipelines and not is_guided(guidance_scale) else None

    if decoder is not None:
        place_decoder(decoder, pipelines[None].transformer.device)
    shown = "the embedded model" if args.model is None else shown_name(args.model)
    chosen_dtype = kv_cache_dtype(args, models.device, models.folder.sizes.head_dim)
    return ServedModel(shown, pipelines, choose, decoder=decoder, kv_cache_dtype=chosen_dtype)


def shown_name(model: str) -> str:
    """Return what strangers are told about a model: a repository's name, or a folder's without where it is."""
    path = user_path(model)
    return path.resolve().name if path.is_dir() else model


def log_to_stderr() -> None:
    """Show what the server has to say, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("longlive_diffusers.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
