"""Options that all commands call alike, and what became of the names that they had."""

import pytest
import torch

from longlive_diffusers.cli import main
from longlive_diffusers.cli.beginning import Beginning
from longlive_diffusers.cli.command_line import parse_arguments
from longlive_diffusers.cli.generation_request import GenerationRequest
from longlive_diffusers.cli.run_serve import settings_of
from longlive_diffusers.cli.shortcuts import kv_cache_dtype
from longlive_diffusers.models.layer_kv_cache import KV_CACHE_DTYPES, resolve_kv_cache_dtype
from longlive_diffusers.serve.settings import ServeSettings


def parse(*words: str):
    return parse_arguments(words)


@pytest.mark.parametrize("command", [("generate", "a fox"), ("bench",)], ids=["generate", "bench"])
def test_the_cache_has_the_same_options_everywhere(command):
    for dtype in ("auto", *KV_CACHE_DTYPES):
        args = parse(*command, "--window-size", "12", "--sink-size", "4", "--kv-cache-dtype", dtype)
        assert (args.window_size, args.sink_size) == (12, 4)
        assert args.kv_cache_dtype == dtype


def test_every_dtype_that_can_be_chosen_is_one_that_a_cache_takes():
    assert [resolve_kv_cache_dtype(name, head_dim=128) for name in KV_CACHE_DTYPES]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (("generate", "a fox", "--kv-cache", "fp8"), "kv_cache_dtype", "fp8"),
        (("bench", "--window", "12"), "window_size", 12),
        (("bench", "--sink", "0"), "sink_size", 0),
    ],
)
def test_former_names_still_work(words, name, value):
    assert vars(parse(*words))[name] == value


def test_a_former_name_that_cannot_work_says_the_new_one(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--kv-caches", "plain", "fp8"])
    assert exit_.value.code == 2
    assert "--kv-caches is now called --kv-cache-dtype" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "prompts"),
    [
        (["a", "--steps", "3", "b", "--stream", "c"], ["a", "b", "c"]),
        (["--steps", "3", "a", "b"], ["a", "b"]),
        (["a", "b", "--steps", "3"], ["a", "b"]),
        (["-5 degrees, snow", "--steps", "3", "b"], ["-5 degrees, snow", "b"]),
        (["a", "--steps", "3", "--nvfp4"], ["a"]),
        (["--steps", "3", "--", "--dashed"], ["--dashed"]),
        (["--steps", "3"], []),
    ],
)
def test_options_may_stand_between_prompts(line, prompts):
    args = parse("generate", *line)
    assert (args.prompts, args.steps) == (prompts, 3)


def test_an_option_that_is_given_twice_counts_twice():
    args = parse("generate", "x", "--lora", "a", "--lora-scale", "0.5", "y", "--lora", "b", "--lora-scale", "-1")
    assert (args.lora, args.lora_scale, args.prompts) == (["a", "b"], [0.5, -1.0], ["x", "y"])
    args = parse("generate", "x")
    assert (args.lora, args.lora_scale, args.nvfp4) == ([], None, None)


@pytest.mark.parametrize("command", [("generate", "x"), ("bench",)])
def test_four_bits_need_no_backend(command):
    assert parse(*command, "--nvfp4").nvfp4 == "auto"
    assert parse(*command, "--nvfp4", "w4a16").nvfp4 == "w4a16"


@pytest.mark.parametrize("value", ["plain", "int8"])
def test_a_dtype_that_does_not_exist_is_refused_with_those_that_do(value, capsys):
    with pytest.raises(SystemExit):
        parse("bench", "--kv-cache-dtype", value)
    told = capsys.readouterr().err
    assert all(name in told for name in ("auto", "nvfp4", "fp8", value))


@pytest.mark.parametrize("prompt", ["ein roter Käse", "一只猫", "\U0001f431", "plain"])
def test_prompts_are_utf_8_in_every_locale(prompt):
    """In the locale C without UTF-8 mode, every byte beyond ASCII arrives as a lone surrogate."""
    arrived = prompt.encode().decode("ascii", "surrogateescape")
    args = parse("generate", arrived, prompt, "--negative-prompt", arrived, "--guidance-scale", "3")
    assert (args.prompts, args.negative_prompt) == ([prompt, prompt], prompt)


@pytest.mark.parametrize("value", [0, 2**63, 2**64 - 1])
def test_every_seed_that_there_is_is_taken(value):
    torch.Generator().manual_seed(parse("generate", "a fox", "--seed", str(value)).seed)


@pytest.mark.parametrize("value", ["-1", str(2**64), str(10**400), "1.5", "nan", "x"])
def test_other_seeds_are_refused_in_one_line(value, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("generate", "a fox", "--seed", value)
    assert exit_.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "--seed" in told and value[:60] in told


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--compare", "--compile"], "--compile"),
        (["--compare=--compile"], "--compile"),
        (["--compare", "--dtype bfloat16", "--rounds", "3"], "--dtype bfloat16"),
        (["--compare", ""], ""),
        ([], None),
    ],
)
def test_options_to_compare_may_be_one_word(words, value):
    assert parse("bench", *words).compare == value


def test_options_to_compare_are_needed(capsys):
    with pytest.raises(SystemExit):
        parse("bench", "--compare")
    assert "argument --compare: expected one argument" in capsys.readouterr().err


SHORTCUTS = {"clean_pass": "last", "attention_density": 0.5, "split_first_chunk": True}
SHORTCUT_WORDS = ("--clean-pass", "last", "--attention-density", "0.5", "--split-first-chunk")


def test_shortcuts_reach_the_stream_and_are_off_by_default():
    request = GenerationRequest(
        [],
        Beginning(),
        None,
        0,
        0,
        torch.device("cpu"),
        kv_cache_dtype=None,
        embedded_lora=None,
        decoder=None,
        notes=[],
    )
    off = {"clean_pass": "full", "attention_density": 1.0, "split_first_chunk": False}
    for words, expected in ((SHORTCUT_WORDS, SHORTCUTS), ((), off)):
        arguments = off | request.stream_arguments(parse("generate", "a fox", *words))
        assert {name: arguments[name] for name in SHORTCUTS} == expected
        settings = settings_of(parse("serve", *words), torch.device("cpu"))
        assert {name: getattr(settings, name) for name in SHORTCUTS} == expected


@pytest.mark.parametrize("command", [("generate", "a fox"), ("serve",)], ids=["generate", "serve"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--clean-pass", "none"), "'none' (choose from "),
        *((("--attention-density", value), "above 0 and at most 1") for value in ("0", "-1", "1.5", "nan", "half")),
    ],
)
def test_shortcuts_that_cannot_be_are_refused(command, words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(*command, *words)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"clean_pass": "none"}, {"attention_density": 0}, {"split_first_chunk": "yes"}])
def test_a_server_refuses_them_as_well(changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}` must be "):
        ServeSettings(**changes)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), None),
        (("--speed", "exact"), None),
        (("--speed", "fast"), "fp8_attention"),
        (("--speed", "fastest"), "fp8_attention"),
        (("--speed", "fast", "--kv-cache-dtype", "nvfp4"), "nvfp4"),
        (("--speed", "fast", "--attention-backend", "flash"), None),
        (("--kv-cache-dtype", "fp8_attention"), "fp8_attention"),
    ],
)
@pytest.mark.parametrize("command", [("generate", "a fox"), ("serve",), ("bench",)], ids=lambda words: words[0])
def test_a_speed_chooses_the_cache_unless_it_is_named(monkeypatch, command, words, expected):
    monkeypatch.setattr("longlive_diffusers.pipelines.speed.has_cudnn_fp8", lambda device, head_dim: True)
    args = parse(*command, *words)
    assert kv_cache_dtype(args, torch.device("cuda"), 128) == expected
