"""Options of training: the command line, and files that it may name."""

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from objectives.error_recycling import RecyclingSettings
from objectives.teacher_forcing import TeacherForcingSettings
from run.arguments import parse_arguments
from run.distillation_arguments import parse_distillation_arguments
from run.optimizers import build_schedules
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
        ("learning_rate", "it holds a text"),
        ("", "it holds nothing"),
        ("a: [", "cannot be read as YAML"),
        ("seed: 1\n<<: {rank: 2}", "options that do not exist: <<"),
        ("[seed]: 1", "line 1: an option is a name, not a list"),
        ("seed: 1\nrank: 2\nseed: 3", "line 3: seed is set a second time"),
        # choices, as on the command line
        ("optimizer: AdamW", "line 1: .*--optimizer: invalid choice: 'AdamW'"),
        ("seed: 1\noptimizer: sgd", "line 2: .*--optimizer: invalid choice: 'sgd'"),
        ("lr_scheduler: piecewise_constant", "invalid choice: 'piecewise_constant'"),
        ("weighting_scheme: None", "invalid choice: 'None'"),
        # types
        ("max_train_steps: true", "invalid int value: 'true'"),
        ("max_train_steps: 4.0", "invalid int value: '4.0'"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("compile: maybe", "Truthy value expected: got maybe"),
        ("learning_rate: null", "learning_rate needs a value"),
        ("compile:", "compile needs a value"),
        ("learning_rate: [1]", "learning_rate takes one value, not a list"),
        ("output_dir: {a: b}", "output_dir takes one value, not a mapping"),
        ("hub_token: !!python/object/apply:os.getcwd []", "hub_token takes one value, not a list"),
        # lists
        ("validation_prompts: {a: b}", "takes a list of texts, not a mapping"),
        ("validation_prompts:\n  - a fox: red", "line 2: .* not of mappings; a text with ': ' in it needs quotes"),
        ("validation_prompts: [[a]]", "takes a list of texts, not of lists"),
        ("validation_prompts: &a [*a]", "takes a list of texts, not of lists"),
        ("validation_prompts: [null]", "takes a list of texts, not of nothing"),
        ("validation_prompts:", "validation_prompts needs a value"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        parse_arguments([*NEEDED, f"--config={file}"])
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("validation_prompts: ab c", ["ab c"]),
        ("validation_prompts: [1, 2.50, yes, '- a b']", ["1", "2.50", "yes", "- a b"]),
        ("validation_prompts: []", []),
        ("learning_rate: 1e-3", 1e-3),  # in YAML 1.1, a text
        ("learning_rate: '2'", 2.0),
        ("revision: 1.10", "1.10"),
        ("revision: 010", "010"),
        ("variant: no", "no"),
        ("hub_model_id: 0x1", "0x1"),
        ("rank: null", None),
        ("ema_decay: ~", None),
        ("compile: 1", True),
        ("cache_latents: No", False),
        ("report_to: none", None),
    ],
)
def test_a_value_in_a_file_is_what_it_would_be_on_the_command_line(tmp_path, content, value):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    groups = vars(parse_arguments([*NEEDED, "--config", str(file)])).values()
    settings = {name: setting for group in groups for name, setting in vars(group).items()}
    found = settings[content.split(":")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("learning_rate", "inf", "must be finite, got inf"),
        ("learning_rate", "-1", "must be positive, got -1"),
        ("max_grad_norm", "nan", "must be finite, got nan"),
        ("adam_beta1", "-0.1", r"must be in \[0, 1\), got -0.1"),
        ("adam_beta2", "1", r"must be in \[0, 1\), got 1"),
        ("adam_epsilon", "0", "must be positive, got 0"),
        ("adam_weight_decay", "-1", "must be at least 0, got -1"),
        ("lr_warmup_steps", "-1", "must be at least 0, got -1"),
        ("ema_decay", "1", r"must be in \[0, 1\), got 1"),
        ("seed", "-1", r"must be in \[0, 2\*\*32\).*, got -1"),
        ("seed", str(2**32), r"must be in \[0, 2\*\*32\).*, got 4294967296"),
        ("seed", str(2**63), r"must be below 2\*\*63, got 9223372036854775808"),
        ("max_train_steps", "1" + "0" * 30, "must be below 2"),
        ("max_train_steps", "0", "must be positive, got 0"),
        ("rank", "0", "must be positive, got 0"),
        ("fps", "1001", r"must be in \(0, 1000\], got 1001"),
        ("validation_num_inference_steps", "0", "must be positive, got 0"),
        ("validation_guidance_scale", "nan", "must be finite, got nan"),
        ("multi_shot_rope_offset", "-inf", "must be at least 0, got -inf"),
        ("multi_shot_rope_offset", "inf", "must be finite, got inf"),
        ("error_bucket_size", "0", "must be at least 1, got 0"),
        ("error_warmup_steps", "-1", "must be at least 0, got -1"),
        ("output_dir", " ", "must not be empty"),
        ("revision", "a\0b", "must not contain a null character"),
        ("hub_model_id", "///", "must be in the form 'repo_name' or 'namespace/repo_name'"),
        ("hub_model_id", "a/b/c", "must be in the form"),
        ("hub_model_id", "some one/x", "must use alphanumeric chars"),
        ("optimizer", "sgd", "invalid choice: 'sgd'"),
        ("no_such_option", "1", "there are no such options: --no_such_option=1"),
    ],
)
def test_what_a_setting_may_not_be(option, value, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_arguments([*NEEDED, f"--{option}={value}"])
    assert option in str(error.value)


def test_layers_are_a_regular_expression():
    with pytest.raises(ValueError, match=r"--lora_layers '\(' is no regular expression"):
        parse_arguments([*NEEDED, "--rank", "4", "--lora_layers", "("])


def test_a_missing_option_is_named():
    with pytest.raises(ValueError, match="required: --output_dir"):
        parse_arguments(["--pretrained_model_name_or_path", "model"])


@pytest.mark.parametrize(
    ("schedule", "warmup", "message"),
    [
        ("constant", 3, "has no warm-up: for 3 steps of it, use constant_with_warmup"),
        ("polynomial", 600, "--lr_warmup_steps is 600, --max_train_steps 600"),
        ("polynomial", 601, "needs fewer steps of warm-up than there are in all"),
        *[(name, warmup, None) for name in ("linear", "cosine", "constant_with_warmup") for warmup in (0, 600, 601)],
        ("polynomial", 599, None),
        ("constant", 0, None),
    ],
)
def test_schedules_that_can_be_computed_to_the_last_update(schedule, warmup, message):
    words = [*NEEDED, "--lr_scheduler", schedule, "--lr_warmup_steps", str(warmup)]
    if message is not None:
        with pytest.raises(ValueError, match=message):
            parse_arguments(words)
        return
    options = parse_arguments(words).optimization
    for step in (0, 1, 599, 600):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.learning_rate)
        (rates,) = build_schedules([optimizer], options, step)
        assert 0 <= rates.get_last_lr()[0] <= options.learning_rate


def test_only_checkpoints_can_wait_on_the_host():
    words = [*NEEDED, "--activation_offloading", "true"]
    with pytest.raises(ValueError, match="moves what --gradient_checkpointing keeps: set both"):
        parse_arguments(words)
    assert parse_arguments([*words, "--gradient_checkpointing", "true"]).optimization.activation_offloading


def test_a_polynomial_has_to_fall():
    with pytest.raises(ValueError, match="polynomial falls to 1e-07: --learning_rate must be higher, got 1e-07"):
        parse_arguments([*NEEDED, "--lr_scheduler", "polynomial", "--learning_rate", "1e-7"])


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"no-such\.yaml"):
        parse_arguments([*NEEDED, "--config", "no-such.yaml"])


# The others are accelerate's.
RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml") if "num_latent_frames" in path.read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_the_ready_made_recipes_are_valid(name):
    parse = parse_distillation_arguments if "dmd" in name else parse_arguments
    arguments = parse([*NEEDED, "--config", str(CONFIGS / name)])
    settings = yaml.safe_load((CONFIGS / name).read_text())
    assert arguments.data.num_latent_frames == settings["num_latent_frames"]
    assert len(RECIPES) == 8


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


def test_homes_are_found_where_no_shell_looks_for_them(tmp_path, monkeypatch):
    """In a file, and after a `=`; a repository and a file named ~x stay as they are."""
    monkeypatch.setenv("HOME", "/there")
    file = tmp_path / "run.yaml"
    file.write_text("data_cache_dir: ~/cache\ntrain_data_dir: ~nosuchuser/videos\noutput_dir: ~x\n")
    words = [
        "--config",
        str(file),
        "--pretrained_model_name_or_path=~/base",
        "--resume_from_checkpoint=~/run/checkpoint-1",
    ]
    arguments = parse_arguments(words)
    assert arguments.data.data_cache_dir == "/there/cache"
    assert arguments.data.train_data_dir == "~nosuchuser/videos"
    assert arguments.run.output_dir == "~x"
    assert arguments.model.pretrained_model_name_or_path == "/there/base"
    assert arguments.run.resume_from_checkpoint == "/there/run/checkpoint-1"
    assert parse_arguments(NEEDED).model.pretrained_model_name_or_path == "model"


def test_help_is_sentences_with_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "The learning rate after warm-up. (default: 1e-05)" in told
    assert "(default: None)" not in told
