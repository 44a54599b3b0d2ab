"""A training set of a few toy videos, a pipeline of a few thousand parameters, and runs of `train_ar.py` on them."""

import json
import os
import random
from pathlib import Path

import torch
from safetensors.torch import load_model
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from assemble import initialize
from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from tests.support import processes
from tests.support.paths import PROGRAMS, ROOT, WEIGHTS
from tests.support.tiny_tokenizer import tiny_tokenizer
from train_vae import build_vae
from world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, draw_sample, write_sample


SCRIPT = ROOT / "training" / "train_ar.py"
NUM_CHUNKS = 4
LONG_RUN = {
    "max_train_steps": 30,
    "learning_rate": 3e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "checkpointing_steps": 4,
    "checkpoints_total_limit": 2,
    "error_recycling": True,
    "error_warmup_steps": 3,
    "error_update_probability": 1.0,
    "error_bucket_size": 3,
}


def write_videos(folder: Path, count: int = 6) -> Path:
    """Videos of 8 latent frames, some with cuts, and one that is a chunk short, thus padded."""
    rng = random.Random(0)
    for index in range(count):
        length = NUM_CHUNKS - 1 if index == count - 1 else NUM_CHUNKS
        write_sample(folder, f"{index:03d}", draw_sample(rng, length, 2), 2)
    return folder


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the toy world."""
    words = f"{' '.join([*COLORS, *SHAPES, *SIZES, *MOTIONS, *BACKGROUNDS])} a and that over above below moves".split()
    return tiny_tokenizer(words, lowercase=True)


def save_pipeline(folder: Path) -> Path:
    """An untrained pipeline of the toy's kind, for 64x64 pixels, with 4 heads."""
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = LongLiveTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=128,
        num_layers=2,
        chunk_size=2,
        sample_height=8,
        sample_width=8,
    )
    initialize(transformer)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)  # as zero, it would hide all other gradients
    text_encoder, vae = UMT5EncoderModel(config), build_vae(8)
    load_model(text_encoder, WEIGHTS / "training_text_encoder.safetensors")
    load_model(vae, WEIGHTS / "training_vae.safetensors")
    pipe = LongLivePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=LongLiveScheduler(),
        window_size=8,
        sink_size=2,
    )
    pipe.save_pretrained(folder)
    return folder


def options(pipeline: Path, videos: Path, cache: Path, output: Path, **changed: object) -> list[str]:
    """The command line of a short run; `changed` options replace these, and None leaves one out."""
    settings = {
        "pretrained_model_name_or_path": pipeline,
        "train_data_dir": videos,
        "data_cache_dir": cache,
        "output_dir": output,
        "num_latent_frames": 2 * NUM_CHUNKS,
        "max_sequence_length": 32,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "adam_beta1": 0.9,
        "image_probability": 0.5,
        "prompt_dropout": 0.2,
        "history_noise_probability": 0.5,
        "ema_decay": 0.9,
        "ema_start_step": 2,
    }
    settings |= changed
    if settings["ema_decay"] is None:  # the step that it begins at says nothing then, which is refused
        settings["ema_start_step"] = None
    return command_words(settings)


def command_words(settings: dict[str, object]) -> list[str]:
    """The words of a command line; a setting that is None is left out."""
    words = []
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def environment() -> dict[str, str]:
    """One thread, so that sums are made in one order; and the package from this checkout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run_script(words: list[str], num_processes: int = 1, script: Path = SCRIPT) -> None:
    """A run to its end, which has to succeed; without the seconds that imports and `accelerate launch` take."""
    run = processes.start([script, *words], environment(), num_processes)
    assert run.wait() == 0, run.errors[-4000:]


def launch_script(words: list[str], num_processes: int, script: Path = SCRIPT) -> None:
    """The same, started as users start it, by `accelerate launch`; only that its ranks are forked."""
    launch = f"--multi_gpu --num_processes {num_processes} --num_machines 1 --mixed_precision no --dynamo_backend no"
    port = ("--main_process_port", processes.free_port())
    launcher = [*processes.forking_launcher(num_processes), "accelerate.commands.launch", *launch.split(), *port]
    run = processes.start([*launcher, script, *words], environment())
    assert run.wait() == 0, run.errors[-4000:]


def run_with_fsdp2(folder: Path, runs: list[dict]) -> None:
    """Run scripts with FSDP2 on gloo ranks, as `train_with_fsdp2.py` takes them; all have to succeed."""
    (folder / "runs.json").write_text(json.dumps(runs))
    run = processes.start([PROGRAMS / "train_with_fsdp2.py", folder / "runs.json"], environment())
    assert run.wait(900) == 0, run.errors[-8000:]
