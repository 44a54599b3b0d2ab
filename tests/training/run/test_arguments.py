"""Options of training: the command line, and files that it may name."""

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from objectives.error_recycling import RecyclingSettings
from objectives.teacher_forcing import TeacherForcingSettings
from run.arguments import parse_arguments
from tests.support.paths import CONFIGS


NEEDED = ["--pretrained_model_name_or_path", "model", "--output_dir", "run"]


def test_a_file_gives_defaults_and_the_command_line_goes_first(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1.0e-3\ntrain_batch_size: 8\noutput_dir: there\nvalidation_prompts: [a, b]\n")
    words = ["--pretrained_model_name_or_path", "model", "--config", str(file), "--train_batch_size", "4"]
    arguments = parse_arguments(words)
    assert arguments.optimization.learning_rate == 1e-3
    assert arguments.optimization.train_batch_size == 4
    assert arguments.run.output_dir == "there"
    assert arguments.run.validation_prompts == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "options that do not exist: learning_rat"),
        ("- learning_rate", "it holds a list"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        parse_arguments([*NEEDED, f"--config={file}"])
    assert str(file) in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"no-such\.yaml"):
        parse_arguments([*NEEDED, "--config", "no-such.yaml"])


@pytest.mark.parametrize("name", ["toy_first_chunk.yaml", "toy.yaml", "longlive2_ar.yaml"])
def test_the_ready_made_recipes_are_valid(name):
    arguments = parse_arguments([*NEEDED, "--config", str(CONFIGS / name)])
    settings = yaml.safe_load((CONFIGS / name).read_text())
    assert arguments.data.num_latent_frames == settings["num_latent_frames"]


def test_the_papers_recipe_is_the_papers():
    arguments = parse_arguments([*NEEDED, "--config", str(CONFIGS / "longlive2_ar.yaml")])
    optimization = arguments.optimization
    assert (optimization.learning_rate, optimization.adam_beta1, optimization.adam_beta2) == (1e-5, 0.0, 0.999)
    assert (optimization.ema_decay, optimization.ema_start_step, optimization.max_train_steps) == (0.99, 100, 600)
    assert arguments.recycling.error_recycling and arguments.data.num_latent_frames == 96


@pytest.mark.parametrize(
    ("name", "processes", "groups"),
    [("one_gpu", 1, None), ("two_cpu_processes", 2, None), ("eight_gpus", 8, (2, 4)), ("several_nodes", 32, (8, 4))],
)
def test_accelerate_reads_the_ready_made_configurations(name, processes, groups):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes == processes
    if groups is not None:
        sizes = {key.removeprefix("parallelism_config_"): size for key, size in config.parallelism_config.items()}
        assert (sizes["dp_replicate_size"] * sizes["dp_shard_size"], sizes["cp_size"]) == groups
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == "LongLiveTransformerBlock"


def test_settings_are_their_options():
    """The dataclasses of the objective are what is parsed: each option is written once."""
    words = [*NEEDED, "--error_recycling", "true", "--error_num_buckets", "7", "--prompt_dropout", "0.5"]
    arguments = parse_arguments(words)
    assert arguments.recycling == RecyclingSettings(error_recycling=True, error_num_buckets=7)
    assert arguments.objective == TeacherForcingSettings(prompt_dropout=0.5)


@pytest.mark.parametrize("option", ["prompt_dropout", "image_probability", "error_context_probability"])
@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan"])
def test_a_probability_is_one(option, value):
    with pytest.raises(ValueError, match=rf"{option}.*\[0, 1\].*{value}"):
        parse_arguments([*NEEDED, f"--{option}", value])


def test_an_abbreviated_config_is_not_read_and_said_so(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1.0e-3\n")
    with pytest.raises(ValueError, match="write --config in full"):
        parse_arguments([*NEEDED, "--conf", str(file)])


def test_help_is_sentences_with_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "The learning rate after warm-up. (default: 1e-05)" in told
    assert "(default: None)" not in told
