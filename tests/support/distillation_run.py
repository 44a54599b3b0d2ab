"""Runs of `train_dmd.py` on the tiny pipeline and a file of prompts."""

import json
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState

import train_dmd
from run.distillation_arguments import parse_distillation_arguments
from tests.support.paths import ROOT
from tests.support.training_run import command_words, launch_script, run_script


SCRIPT = ROOT / "training" / "train_dmd.py"
PROMPTS = [
    {"prompt": "a red circle moves right"},
    {
        "shots": [
            {"prompt": "a blue square moves up", "chunks": 2},
            {"prompt": "a green cross stays still", "chunks": 2},
        ]
    },
    {
        "shots": [
            {"prompt": "a white triangle moves down", "chunks": 1},
            {"prompt": "a yellow circle moves left", "chunks": 3, "cut": False},
        ]
    },
    {"prompt": "a pink square stays still over teal"},
    {"prompt": "a small blue cross moves left"},
]
LONG_RUN = {
    "max_train_steps": 20,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "ema_decay": 0.9,
    "ema_start_step": 1,
}


def write_prompts(path: Path) -> Path:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


@dataclass(frozen=True)
class DistillationWorkshop:
    """Where the tiny pipeline, the prompts and the caches are."""

    folder: Path

    def options(self, output: Path, **changed: object) -> list[str]:
        """The command line of a short run; `changed` options replace these, and None leaves one out."""
        settings = {
            "pretrained_model_name_or_path": self.folder / "pipeline",
            "prompts": self.folder / "prompts.jsonl",
            "data_cache_dir": self.folder / "dmd_cache",
            "output_dir": output,
            "num_latent_frames": 8,
            "max_sequence_length": 32,
            "num_inference_steps": 2,
            "score_guidance_scale": 2.0,
            "generator_interval": 2,
            "rank": 4,
            "train_batch_size": 2,
            "max_train_steps": 3,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
        }
        return command_words(settings | changed)

    def main(self, output: Path, **changed: object) -> None:
        """A run in this process."""
        try:
            train_dmd.main(parse_distillation_arguments(self.options(output, **changed)))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    def run(self, output: Path, num_processes: int = 1, **changed: object) -> None:
        """A run to its end in processes of its own, which has to succeed."""
        run_script(self.options(output, **changed), num_processes, SCRIPT)

    def launch(self, output: Path, num_processes: int, **changed: object) -> None:
        """The same, started as users start it, by `accelerate launch`."""
        launch_script(self.options(output, **changed), num_processes, SCRIPT)
