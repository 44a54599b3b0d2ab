"""`longlive quantize`: a pipeline in; the same with its transformer in NVFP4 out."""

import argparse
import warnings
from typing import TYPE_CHECKING

from .arguments import add_device_option
from .choices import DTYPES, KEPT_MODULES, NVFP4_BACKENDS, RECIPES, SCALE_RULES, WEIGHT_BLOCKS
from .termination import ends_cleanly


if TYPE_CHECKING:
    from ..nvfp4.quantizer import NVFP4Config

RECIPE_SAYS = ("weight_rule", "activation_rule", "block", "keep")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "quantize",
        help="store a pipeline's transformer in 4 bits",
        description="Store the linear layers of a pipeline's transformer in NVFP4: a third of the size of bfloat16. "
        "The folder loads, and is shared, like any other.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="DIR_OR_REPO", help="A LongLive pipeline: folder or Hub repository.")
    parser.add_argument("--output", required=True, metavar="DIR", help="The folder to write; new or empty.")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="For a model that was trained in NVFP4: take the rules, blocks and kept modules of this recipe.",
    )
    parser.add_argument(
        "--weight-rule", choices=SCALE_RULES, help="How the scales of weights are chosen (default: mse)."
    )
    parser.add_argument(
        "--activation-rule", choices=SCALE_RULES, help="How the scales of activations are chosen (default: mse)."
    )
    parser.add_argument(
        "--block", choices=WEIGHT_BLOCKS, help="The numbers of a weight that share a scale (default: 1x16)."
    )
    parser.add_argument(
        "--backend",
        choices=("auto", *NVFP4_BACKENDS),
        default="auto",
        help="How products are computed (default: the best that the device can run).",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        metavar="MODULE",
        help="The modules that are not quantized either, by name or part of a name between dots, such as blocks.0 or "
        f"attn2 (always kept: {', '.join(KEPT_MODULES)}).",
    )
    parser.add_argument("--lora", metavar="FILE_OR_REPO", help="A LoRA to add to the transformer first, for good.")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="The dtype of what is not quantized (default: as stored).",
    )
    add_device_option(parser, "The device to quantize on")


def run(args: argparse.Namespace) -> int:
    """Quantize the pipeline's transformer."""
    with ends_cleanly():
        return quantize(args)


def quantize(args: argparse.Namespace) -> int:
    """Quantize the pipeline's transformer, without regard to signals."""
    import torch

    from ..benchmark.measure import as_size, weights_bytes
    from ..conversion.cards import origin_details
    from ..conversion.output_folder import prepare_output, save_atomically
    from ..conversion.pipeline_folder import PipelineFolder, check_lora_file
    from ..models.transformer_longlive import LongLiveTransformer3DModel
    from ..nvfp4.linear import nvfp4_layers
    from ..nvfp4.quantizer import layers_to_convert, quantize_model
    from .backends import check_nvfp4_backend
    from .device import choose_device

    device = choose_device(args.device)
    destination = prepare_output(args.output)
    if args.lora is not None:
        check_lora_file(args.lora)
    own = [f"--{name.replace('_', '-')}" for name in RECIPE_SAYS if vars(args)[name] is not None]
    if args.recipe is not None and own:
        raise ValueError(f"--recipe {args.recipe} says what {', '.join(own)} would")
    folder = PipelineFolder.find(args.model)
    config = requested_config(args, folder.transformer["num_layers"])
    check_nvfp4_backend(
        "--backend",
        config.backend,
        folder.transformer,
        device,
        weight_rule=config.weight_scale_rule,
        activation_rule=config.activation_scale_rule,
    )
    with torch.device("meta"):  # the names of kept modules are checked before anything is loaded
        layers_to_convert(LongLiveTransformer3DModel(**folder.transformer), config)
    pipe = folder.load_stored(dtype=args.dtype, lora=args.lora)
    transformer = pipe.transformer.to(device)
    before = weights_bytes(transformer)
    quantize_model(transformer, config)
    after, layers = weights_bytes(transformer), nvfp4_layers(transformer)
    with warnings.catch_warnings():
        # A backend of the device does not run on the CPU, where the weights only wait to be written.
        warnings.filterwarnings("ignore", "NVFP4: ")
        transformer.to("cpu")
    save_atomically(pipe, destination, pipe.model_card(destination.name, **origin_details(args.model)))
    first = next(iter(layers.values()))
    print(f"layers in NVFP4:     {len(layers)}, such as {next(iter(layers))}: {first}")
    print(f"kept as they were:   {', '.join(config.modules_to_not_convert)}")
    print(f"transformer:         {as_size(before)} -> {as_size(after)} ({before / after:.2f} times smaller)")
    print(f"output:              {args.output}")
    return 0


def requested_config(args: argparse.Namespace, num_blocks: int) -> "NVFP4Config":
    """Return the configuration that the options ask for, for a transformer of `num_blocks` blocks."""
    from ..nvfp4 import recipes
    from ..nvfp4.quantizer import NVFP4Config

    if args.recipe is not None:
        return NVFP4Config.from_recipe(recipes.RECIPES[args.recipe], num_blocks, args.backend)
    return NVFP4Config(
        weight_scale_rule=args.weight_rule or "mse",
        activation_scale_rule=args.activation_rule or "mse",
        weight_block=WEIGHT_BLOCKS[args.block or "1x16"],
        backend=args.backend,
        modules_to_not_convert=[*KEPT_MODULES, *(args.keep or ())],
    )
