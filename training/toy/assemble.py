"""Put the toy pipeline together: python training/toy/assemble.py --text DIR --vae DIR --output DIR

The tokenizer and the text encoder come from `train_text.py`, the VAE comes from `train_vae.py`, and the transformer
has random weights, for `train_ar.py` to train. With `--trained DIR`, a folder that `train_ar.py` wrote, the
transformer is taken from there: the result is then the pipeline that comes with the package, in half precision, with
the model card that is already in the output folder.
"""

import argparse
import shutil
import sys

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5EncoderModel

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from longlive_diffusers.atomic_write import new_folder
from longlive_diffusers.user_path import user_path
from one_line import run
from outputs import check_replaceable


SEED = 4
CHUNK_SIZE = 2
# The shift of the noise levels, in training and in generation. These latents are very redundant (noise of 0.3 of their
# magnitude costs half a decibel), so what a chunk shows is decided where there is hardly anything but noise.
FLOW_SHIFT = 8.0
WRITTEN = ("README.md", "model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")
WINDOW_SIZE, SINK_SIZE = 16, 4  # in latent frames; the window is as long as the training clips


def build_transformer(vae: AutoencoderKLWan, text_dim: int, side: int) -> LongLiveTransformer3DModel:
    """
    Build a transformer with random weights.

    Args:
        vae: The VAE whose latents it takes.
        text_dim: The dimension of the text embeddings.
        side: The height and width of the latents; videos are square.
    """
    torch.manual_seed(SEED)
    transformer = LongLiveTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=text_dim,
        freq_dim=64,
        ffn_dim=512,
        num_layers=5,
        chunk_size=CHUNK_SIZE,
        sample_height=side,
        sample_width=side,
    )
    initialize(transformer)
    return transformer.eval()


@torch.no_grad()
def initialize(transformer: LongLiveTransformer3DModel) -> None:
    """Initialize as Wan does: Xavier for Linear layers, small weights for embeddings, zeros for the output layer."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    torch.nn.init.xavier_uniform_(transformer.patch_embedding.weight.flatten(1))
    embedder = transformer.condition_embedder
    for layer in (embedder.time_embedder.linear_1, embedder.time_embedder.linear_2):
        torch.nn.init.normal_(layer.weight, std=0.02)
    torch.nn.init.zeros_(transformer.proj_out.weight)


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the embedded pipeline together.")
    parser.add_argument("--text", type=user_path, required=True, help="The folder that train_text.py wrote.")
    parser.add_argument("--vae", type=user_path, required=True, help="The folder that train_vae.py wrote.")
    parser.add_argument(
        "--trained", type=user_path, help="The folder that train_ar.py wrote: make the embedded pipeline of it."
    )
    parser.add_argument(
        "--output", type=user_path, required=True, help="The folder to write; an earlier result is replaced."
    )
    arguments = parser.parse_args()
    needed = {
        "--text": arguments.text / "text_encoder" / "config.json",
        "--vae": arguments.vae / "config.json",
        "--trained": None if arguments.trained is None else arguments.trained / "transformer" / "config.json",
    }
    for option, file in needed.items():
        if file is not None and not file.is_file():
            parser.error(f"{option}: there is no file '{file}'")
    check_replaceable(arguments.output, WRITTEN)

    tokenizer = AutoTokenizer.from_pretrained(arguments.text / "tokenizer")
    text_encoder = UMT5EncoderModel.from_pretrained(arguments.text / "text_encoder")
    vae = AutoencoderKLWan.from_pretrained(arguments.vae)
    if arguments.trained is None:
        transformer = build_transformer(vae, text_encoder.config.d_model, 64 // vae.config.scale_factor_spatial)
    else:
        transformer = LongLiveTransformer3DModel.from_pretrained(arguments.trained, subfolder="transformer")
    pipe = LongLivePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=LongLiveScheduler(flow_shift=FLOW_SHIFT),
        window_size=WINDOW_SIZE,
        sink_size=SINK_SIZE,
    )
    if arguments.trained is not None:
        # Loading converts these two to float32, but a text encoder would keep the dtype in which it is stored.
        pipe.transformer.to(torch.float16)
        pipe.vae.to(torch.float16)
    card = arguments.output / "README.md"
    with new_folder(arguments.output, replace=True) as folder:
        pipe.save_pretrained(folder)
        if arguments.trained is not None and card.exists():  # it was written by hand, from measurements
            shutil.copyfile(card, folder / "README.md")
    parameters = {
        name: sum(p.numel() for p in model.parameters()) / 1e6
        for name, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
    }
    size = sum(file.stat().st_size for file in arguments.output.rglob("*") if file.is_file())
    described = ", ".join(f"{name} {millions:.2f} M" for name, millions in parameters.items())
    print(f"{arguments.output}: {described} parameters, {size / 2**20:.2f} MiB in all")


if __name__ == "__main__":
    sys.exit(run(main))
