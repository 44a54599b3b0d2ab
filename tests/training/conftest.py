"""What the tests of the scripts share: tiny videos, prompts, a tiny pipeline, and one uninterrupted run."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import train_ar
from run.arguments import parse_arguments
from tests.support.distillation_run import DistillationWorkshop, write_prompts
from tests.support.training_run import LONG_RUN, launch_script, options, run_script, save_pipeline, write_videos


@dataclass(frozen=True)
class Workshop:
    """Where the tiny videos, the pipeline and the caches are; `options` makes a command line for a run on them."""

    folder: Path

    def options(self, output: Path, **changed: object) -> list[str]:
        return options(self.folder / "pipeline", self.folder / "videos", self.folder / "cache", output, **changed)

    def main(self, output: Path, **changed: object) -> None:
        """A run in this process."""
        try:
            train_ar.main(parse_arguments(self.options(output, **changed)))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    def run(self, output: Path, num_processes: int = 1, **changed: object) -> None:
        """A run to its end in processes of its own, which has to succeed."""
        run_script(self.options(output, **changed), num_processes)

    def launch(self, output: Path, num_processes: int, **changed: object) -> None:
        """The same, started as users start it, by `accelerate launch`."""
        launch_script(self.options(output, **changed), num_processes)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    write_videos(folder / "videos")
    save_pipeline(folder / "pipeline")
    return Workshop(folder)


@pytest.fixture(scope="session")
def long_run(workshop, tmp_path_factory) -> Path:
    """The folder of a run of 30 updates that nothing interrupted."""
    output = tmp_path_factory.mktemp("long") / "run"
    prompts = ["a red circle moves right", "a blue square moves up | a green cross stays still over teal"]
    validation = {"validation_prompts": prompts, "validation_steps": 100, "validation_num_inference_steps": 2}
    workshop.run(output, **LONG_RUN, **validation)
    return output


@pytest.fixture(scope="session")
def studio(workshop) -> DistillationWorkshop:
    write_prompts(workshop.folder / "prompts.jsonl")
    return DistillationWorkshop(workshop.folder)
