"""Build a latent cache, and never come back from the second sample: python build_latent_cache.py ROOT FOLDER

Prints the name of each file when it is written. The test that runs this kills it.
"""

import sys
import time
from pathlib import Path

import torch

from data import latent_cache
from tests.support.tiny_vae import tiny_vae
from tests.support.training_caches import build, dataset


def main(root: Path, folder: Path, z_dim: int) -> None:
    torch.set_num_threads(1)
    save, written = latent_cache.save_tensor, []

    def save_and_tell(path: Path, tensor: torch.Tensor) -> None:
        save(path, tensor)
        written.append(path)
        print(path.name, flush=True)
        if len(written) == 2:
            time.sleep(600)

    latent_cache.save_tensor = save_and_tell
    build(dataset(root), tiny_vae(z_dim), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
