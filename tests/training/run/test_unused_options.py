"""Options without what they belong to are refused; a recipe of which a part is switched off is not."""

import pytest

from objectives.error_recycling import RecyclingSettings
from run.arguments import parse_arguments
from run.distillation_arguments import parse_distillation_arguments
from tests.support.paths import CONFIGS


NEEDED = ["--pretrained_model_name_or_path", "model", "--output_dir", "run"]
SHARED = {
    "--revision main --pretrained_model_name_or_path .": "is of a repository of the Hub",
    "--tracker_name test": "needs --report_to",
    "--tracker_name test --report_to none": "needs --report_to",
    "--ema_start_step 5": "needs --ema_decay",
}
TEACHER_FORCING = {
    **SHARED,
    "--caption_column text": "needs a training set",
    "--lora_dropout 0.1": "needs a --rank",
    "--lora_alpha 8": "needs a --rank",
    "--lora_layers to_q": "needs a --rank",
    "--nvfp4_backend te": "needs --precision nvfp4",
    "--nvfp4_recipe nvfp4_pretrain": "needs --precision nvfp4",
    "--nvfp4_recipe nvfp4_pretrain --precision nvfp4 --rank 4": "under a LoRA",
    "--history_noise_max_timestep 200": "needs a --history_noise_probability above 0",
    "--dataset_config_name en": "needs --dataset_name",
    "--dataset_split test": "needs --dataset_name",
    "--vae_halo 4": "needs --cache_latents false",
    **{
        f"--{name} {value}": "needs --error_recycling true"
        for name, value in vars(RecyclingSettings(True, 0.5, 0.5, 0.5, 0.5, 0.5, 5, 5, 5)).items()
        if name != "error_recycling"
    },
}
DISTILLATION = {
    **SHARED,
    "--rank 64 --train_all_weights true": "--train_all_weights true trains none",
    "--lora_alpha 64 --train_all_weights true": "--train_all_weights true trains none",
    "--lora_layers to_q --train_all_weights true": "--train_all_weights true trains none",
    "--negative_prompt blurry --score_guidance_scale 1": "needs guidance",
    "--negative_prompt blurry --score_guidance_scale 0": "needs guidance",
    "--nvfp4_recipe nvfp4_pretrain --train_all_weights true": "needs --precision nvfp4",
    "--nvfp4_backend te --precision nvfp4": "needs --train_all_weights true",
}
CASES = [(parse_arguments, *case) for case in TEACHER_FORCING.items()]
CASES += [(parse_distillation_arguments, *case) for case in DISTILLATION.items()]


@pytest.mark.parametrize(("parse", "words", "message"), CASES, ids=[words for _, words, _ in CASES])
def test_an_option_that_would_be_passed_over_is_refused(tmp_path, parse, words, message):
    option, value, *_ = words.split()
    with pytest.raises(ValueError, match=rf"^{option} {value}(\.0)? .*{message}"):
        parse([*NEEDED, *words.split()])
    file, pairs = tmp_path / "recipe.yaml", zip(words.split()[::2], words.split()[1::2], strict=True)
    file.write_text("".join(f"{name[2:]}: {own}\n" for name, own in pairs))
    with pytest.raises(ValueError, match=rf"^{option} {value}(\.0)? .*{message}"):
        parse([*set_otherwise(NEEDED, words), "--config", str(file)])


def set_otherwise(options: list[str], words: str) -> list[str]:
    """Options without those that `words` has."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [part for pair in pairs if pair[0] not in words.split() for part in pair]


def test_a_token_that_would_be_passed_over_is_not_shown():
    with pytest.raises(ValueError, match=r"^--hub_token needs --push_to_hub true$"):
        parse_arguments([*NEEDED, "--hub_token", "hf_abc"])


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (parse_arguments, "--rank 4 --lora_alpha 8 --lora_dropout 0.1 --lora_layers to_q"),
        (parse_arguments, "--error_recycling true --error_context_probability 0.5"),
        (parse_arguments, "--ema_start_step 100 --error_warmup_steps 50 --dataset_split train"),  # as without them
        (parse_arguments, "--precision nvfp4 --nvfp4_recipe nvfp4_pretrain"),
        (parse_arguments, "--revision main --caption_column text --train_data_dir videos"),
        (parse_arguments, "--tracker_name test --report_to tensorboard --push_to_hub true --hub_token hf_abc"),
        (parse_distillation_arguments, "--rank 128 --train_all_weights true --ema_start_step 0"),
        (parse_distillation_arguments, "--negative_prompt blurry"),
    ],
)
def test_what_is_used_or_says_nothing_is_taken(parse, words):
    parse([*NEEDED, *words.split()])


@pytest.mark.parametrize(
    ("parse", "recipe", "words"),
    [
        (parse_arguments, "toy.yaml", "--error_recycling false"),
        (parse_arguments, "toy.yaml", "--history_noise_probability 0"),
        (parse_arguments, "toy_nvfp4.yaml", "--precision auto"),
        (parse_arguments, "toy_nvfp4.yaml", "--rank 4"),
        (parse_distillation_arguments, "toy_dmd4.yaml", "--train_all_weights true"),
    ],
)
def test_a_part_of_a_recipe_may_be_switched_off(parse, recipe, words):
    parse([*NEEDED, "--config", str(CONFIGS / recipe), *words.split()])


def test_what_is_given_on_top_of_a_part_that_is_switched_off_is_refused():
    words = "--error_recycling false --error_bucket_size 7"
    with pytest.raises(ValueError, match="--error_bucket_size 7 needs --error_recycling true"):
        parse_arguments([*NEEDED, "--config", str(CONFIGS / "toy.yaml"), *words.split()])
