"""A card's front matter is what the Hub reads, and its program is one that a reader can run."""

import ast
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from longlive_diffusers.pipelines.sharing import render_distilled_lora_card, render_lora_card, render_model_card


LONGLIVE = "Efficient-Large-Model/LongLive-2.0-5B"
WAN = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


def pipeline_card(**changes) -> ModelCard:
    return render_model_card("someone/foxes", **{"height": 704, "width": 1280, "chunk_size": 8, **changes})


def distilled_card(**changes) -> ModelCard:
    required = {"num_inference_steps": 4, "start": "direct", "score_context": "clean"}
    return render_distilled_lora_card("someone/foxes-4-steps", **{**required, **changes})


def programs(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.content, flags=re.DOTALL)


def arguments(program: str, function: str) -> dict[str, object]:
    """The literal keyword arguments of the one call of `function` in `program`."""
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if ast.unparse(call.func) == function]
    literal = [keyword for keyword in call.keywords if isinstance(keyword.value, ast.Constant)]
    return {keyword.arg: keyword.value.value for keyword in literal}


def test_front_matter():
    card = pipeline_card(base_model=WAN, license="apache-2.0", tags=["foxes", "longlive"])
    front_matter = yaml.safe_load(card.content.split("---")[1])
    tags = front_matter.pop("tags")
    assert front_matter == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "base_model": WAN,
        "license": "apache-2.0",
    }
    assert {"diffusers", "longlive", "text-to-video", "foxes"} <= set(tags)
    assert len(tags) == len(set(tags))
    assert card.data.to_dict()["pipeline_tag"] == "text-to-video"


def test_the_values_reach_table_and_program():
    prompt = "He said: \"C'est l'été\".\n\\o/ {{ 7 * 7 }}"
    card = pipeline_card(
        height=64, width=96, chunk_size=5, num_inference_steps=2, guidance_scale=3.0, fps=12, prompt=prompt
    )
    expected = {"prompt": prompt, "height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 3.0}
    call, stream = programs(card)
    assert arguments(call, "pipe") == expected
    assert arguments(stream, "pipe.stream") == expected
    assert arguments(call, "encode_video") == {"fps": 12, "output_path": "video.mp4"}
    assert 'from_pretrained("someone/foxes", dtype=torch.bfloat16)' in call
    assert call.index("import longlive_diffusers") < call.index("from_pretrained")
    assert "pip install longlive-diffusers" in card.content
    assert "| resolution | 96x64 (width x height), 12 frames per second |" in card.content
    assert "| chunk | 5 latent frames |" in card.content
    assert card.content.startswith("---\n") and "# foxes\n" in card.content


@pytest.mark.parametrize(
    ("base_model", "license", "fields", "remark"),
    [
        (LONGLIVE, None, ("other", "nvidia-open-model-license"), "NVIDIA Open Model License"),
        ("someone/longlive-2.0-tuned", None, ("other", "nvidia-open-model-license"), "NVIDIA Open Model License"),
        (LONGLIVE, "mit", ("mit", None), "license is `mit`"),
        (WAN, None, (None, None), "not stated"),
        (WAN, "apache-2.0", ("apache-2.0", None), "license is `apache-2.0`"),
        (None, None, (None, None), "not stated"),
    ],
)
def test_the_weights_license_is_not_the_codes(base_model, license, fields, remark):
    card = pipeline_card(base_model=base_model, license=license)
    assert (card.data.license, card.data.license_name) == fields
    section = card.content.split("## License")[1]
    assert "`longlive-diffusers`, is under Apache-2.0" in section
    assert remark in section
    assert (f"huggingface.co/{base_model}" in card.content) == (base_model is not None)


def test_no_blank_is_left_open():
    cards = (pipeline_card(), render_lora_card("someone/foxes-lora", base_model=LONGLIVE), distilled_card())
    for card in cards:
        assert "None" not in card.content
        assert "{{" not in card.content and "{%" not in card.content
        for program in programs(card):
            compile(program, "card", "exec")


def test_lora_card():
    card = render_lora_card("someone/foxes-lora", base_model=LONGLIVE, rank=128, num_inference_steps=2, tags=["foxes"])
    (program,) = programs(card)
    assert program.index(f'from_pretrained("{LONGLIVE}"') < program.index('load_lora_weights("someone/foxes-lora")')
    assert arguments(program, "pipe")["num_inference_steps"] == 2
    assert "of rank 128" in card.content
    assert {"lora", "foxes", "longlive"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.license_name) == (LONGLIVE, "nvidia-open-model-license")


@pytest.mark.parametrize("render", [render_lora_card, distilled_card], ids=["lora", "distilled lora"])
def test_a_lora_is_used_with_the_settings_that_it_was_trained_for(render):
    settings = {"multi_shot_rope_offset": 0.0, "multi_shot_sink": False, "window_size": 6}
    name = [] if render is distilled_card else ["someone/foxes-lora"]
    calls = [
        arguments(program, call)
        for program, call in zip(programs(render(*name, settings=settings)), ("pipe", "pipe.stream"), strict=False)
    ]
    assert len(calls) == 1 + (render is distilled_card)
    assert all(settings.items() <= call.items() for call in calls)


@pytest.mark.parametrize(("steps", "other", "words"), [(4, 2, "4 steps"), (2, 4, "2 steps"), (1, 2, "1 step")])
def test_a_distilled_lora_is_used_with_its_steps_and_without_guidance(steps, other, words):
    card = distilled_card(base_model=LONGLIVE, num_inference_steps=steps)
    call, stream = programs(card)
    assert arguments(call, "pipe")["num_inference_steps"] == steps and arguments(call, "pipe")["guidance_scale"] == 1.0
    assert arguments(stream, "pipe.stream")["num_inference_steps"] == steps
    assert arguments(call, "pipe.load_lora_weights") == {"adapter_name": f"distilled-{steps}"}
    assert call.index(f'from_pretrained("{LONGLIVE}"') < call.index('load_lora_weights("someone/foxes-4-steps"')
    assert f"session.num_inference_steps = {other}" in stream
    assert f"makes a chunk in {words}, without guidance" in card.content
    assert f"| steps, guidance | {steps}, none |" in card.content


def test_a_distilled_lora_says_how_it_was_made():
    card = distilled_card(
        base_model=LONGLIVE,
        start="standalone",
        score_context="noisy",
        trained_from=WAN,
        rank=16,
        teacher_guidance_scale=4.0,
        other_lora="someone/foxes-2-steps",
        tags=["foxes"],
    )
    section = card.content.split("## How it was made")[1]
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", section, re.M))
    assert rows["start"].startswith("standalone: generator and fake score begin as a base model")
    assert rows["what the scores see of earlier chunks"].startswith("noisy: ")
    assert (rows["trained from"], rows["guidance scale of the teacher"]) == (WAN, "4.0")
    assert "of rank 16" in card.content and 'load_lora_weights("someone/foxes-2-steps"' in card.content
    assert {"lora", "distillation", "foxes", "longlive"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.license_name) == (LONGLIVE, "nvidia-open-model-license")
    short = distilled_card().content.split("## How it was made")[1]
    assert "trained from" not in short and "teacher" not in short and "direct: " in short


@pytest.mark.parametrize("changes", [{"start": "Direct"}, {"score_context": "none"}, {"start": ""}])
def test_a_distillation_that_does_not_exist_raises(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"`{name}` must be one of "):
        distilled_card(**changes)
