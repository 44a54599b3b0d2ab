"""Files that come with the package: a tiny pipeline, so that everything can be tried without a download or a GPU, the
LoRAs that make it need fewer steps, and a decoder that is faster than its VAE."""

from importlib.resources import files
from pathlib import Path


_LORA_FOLDERS = {4: "4_steps", 2: "2_steps"}
TOY_LORA_STEPS = tuple(_LORA_FOLDERS)


def toy_pipeline_path() -> Path:
    """The folder of the tiny pipeline, for `DiffusionPipeline.from_pretrained`; its README.md says what it is."""
    return Path(str(files(__name__) / "toy"))


def toy_decoder_path() -> Path:
    """The folder of the decoder that may stand in for the tiny pipeline's VAE, for
    `TinyVideoDecoder.from_pretrained`."""
    return Path(str(files(__name__) / "toy_decoder"))


def toy_lora_path(num_inference_steps: int) -> Path:
    """The file of the LoRA that distills the tiny pipeline to so many steps without guidance (a guidance scale of 1),
    for `pipe.load_lora_weights`.

    Raises:
        ValueError: If there is none for that number of steps.
    """
    if num_inference_steps not in _LORA_FOLDERS:
        there_are = " and ".join(map(str, TOY_LORA_STEPS))
        raise ValueError(f"The embedded LoRAs are for {there_are} steps, there is none for {num_inference_steps!r}.")
    folder = Path(str(files(__name__) / "toy_loras")) / _LORA_FOLDERS[num_inference_steps]
    return folder / "pytorch_lora_weights.safetensors"
