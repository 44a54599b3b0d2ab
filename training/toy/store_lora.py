"""Store a distilled LoRA as it comes with the package, in half precision:

python training/toy/store_lora.py --trained runs/dmd4 --output longlive_diffusers/assets/toy_loras/4_steps
"""

import argparse
import sys
from pathlib import Path

import torch

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.atomic_write import new_folder
from longlive_diffusers.user_path import user_path
from one_line import run
from outputs import check_replaceable


LORA = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."


def store(trained: Path, output: Path) -> Path:
    """
    Write the LoRA that `train_dmd.py` left in a folder, in float16, with its settings.

    Returns:
        The file.

    Raises:
        ValueError: If there is no LoRA, or the folder holds anything but an earlier one.
    """
    check_replaceable(output, (LORA,))
    state_dict, metadata = LongLivePipeline.lora_state_dict(trained / LORA, return_lora_metadata=True)
    layers = {name.removeprefix(PREFIX): tensor.to(torch.float16) for name, tensor in state_dict.items()}
    settings = {name.removeprefix(PREFIX): value for name, value in (metadata or {}).items()}
    with new_folder(output, replace=True) as folder:
        LongLivePipeline.save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=settings
        )
    return output / LORA


def main() -> None:
    parser = argparse.ArgumentParser(description="Store a distilled LoRA in half precision.")
    parser.add_argument("--trained", type=user_path, required=True, help="The folder that train_dmd.py wrote.")
    parser.add_argument(
        "--output", type=user_path, required=True, help="The folder to write; an earlier result is replaced."
    )
    arguments = parser.parse_args()
    file = store(arguments.trained, arguments.output)
    print(f"{file}: {file.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    sys.exit(run(main))
