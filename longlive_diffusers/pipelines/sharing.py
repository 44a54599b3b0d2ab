"""What a saved or pushed pipeline says about itself: its model card, and configurations without local paths.

diffusers' own card is a placeholder ("This model card has been automatically generated"), and it cannot name the
package that a reader must install to load these classes. The templates are the Markdown files in `hub_cards/`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from ..atomic_write import write_text


TAGS = ("diffusers", "longlive", "text-to-video", "image-to-video", "streaming", "multi-shot")
EXAMPLE_PROMPT = "A red fox runs along a snowy ridge at sunrise."
# The reference's code and weights have different licenses, and models tuned from these weights inherit theirs.
LONGLIVE_WEIGHTS = "longlive-2"
NVIDIA_OPEN_MODEL_LICENSE = {
    "license": "other",
    "license_name": "nvidia-open-model-license",
    "license_link": "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
}

# What the settings of distillation mean, for a reader of the card who has never seen the training script.
DISTILLATION_STARTS = {
    "direct": "direct: generator and fake score begin as the pipeline that the LoRA is for",
    "standalone": "standalone: generator and fake score begin as a base model, the LoRA is for one trained from it",
}
SCORE_CONTEXTS = {
    "clean": "clean: the roll-out itself, without noise",
    "noisy": "noisy: the roll-out, noised like the chunk itself",
}


def render_model_card(
    repo_id: str,
    *,
    height: int,
    width: int,
    chunk_size: int,
    num_inference_steps: int = 4,
    guidance_scale: float = 1.0,
    fps: int = 24,
    dtype: str = "bfloat16",
    prompt: str = EXAMPLE_PROMPT,
    base_model: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    origin: str | None = None,
    quantization: str | None = None,
    tags: Iterable[str] = (),
) -> ModelCard:
    """Render the model card of a LongLive pipeline.

    Args:
        repo_id: The repository on the Hub, `user/name`.
        height, width: The size in pixels that the pipeline was trained for.
        chunk_size: The number of latent frames that are made at a time.
        num_inference_steps, guidance_scale: What the pipeline was distilled for, used in the example.
        fps: The number of frames per second.
        dtype: The name of the dtype that the example loads the weights in.
        prompt: The example's prompt.
        base_model: The repository that these weights come from, if any.
        license: The license of the weights, by its Hub identifier. Unset, it is the NVIDIA Open Model License for
            weights that come from LongLive-2.0's, and is left open for all others.
        license_name, license_link: The name of a license that is "other" to the Hub, and where it is.
        origin: Where the parts come from, and their licenses; sentences.
        quantization: How the transformer's weights are stored, if not as plain numbers.
        tags: Further tags.
    """
    return _render(
        "pipeline.md",
        repo_id,
        base_model=base_model,
        license=license,
        license_name=license_name,
        license_link=license_link,
        tags=tags,
        prompt=prompt,
        origin=origin,
        quantization=quantization,
        height=height,
        width=width,
        chunk_size=chunk_size,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        fps=fps,
        dtype=dtype,
    )


def render_lora_card(
    repo_id: str,
    *,
    base_model: str | None = None,
    rank: int | None = None,
    num_inference_steps: int = 4,
    guidance_scale: float = 1.0,
    fps: int = 24,
    dtype: str = "bfloat16",
    prompt: str = EXAMPLE_PROMPT,
    license: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
) -> ModelCard:
    """Render the card of LoRA weights, like `render_model_card`; `base_model` is the pipeline on the Hub that they are
    loaded into, None if it is not there, and `settings` are arguments of a call that they were trained for, where the
    pipeline has others (`multi_shot_rope_offset`, ...)."""
    return _render(
        "lora.md",
        repo_id,
        base_model=base_model,
        license=license,
        tags=("lora", *tags),
        prompt=prompt,
        settings=settings or {},
        rank=rank,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        fps=fps,
        dtype=dtype,
    )


def render_distilled_lora_card(
    repo_id: str,
    *,
    num_inference_steps: int,
    start: str,
    score_context: str,
    base_model: str | None = None,
    trained_from: str | None = None,
    rank: int | None = None,
    teacher_guidance_scale: float | None = None,
    other_lora: str | None = None,
    other_num_inference_steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    fps: int = 24,
    dtype: str = "bfloat16",
    prompt: str = EXAMPLE_PROMPT,
    license: str | None = None,
    tags: Iterable[str] = (),
) -> ModelCard:
    """Render the card of a LoRA that distills a pipeline to a few steps without guidance, like `render_lora_card`.

    Args:
        repo_id: The repository on the Hub, `user/name`.
        num_inference_steps: The number of steps that it is distilled to.
        start: What training began from, "direct" or "standalone".
        score_context: What the scores see of earlier chunks, "clean" or "noisy".
        base_model: The pipeline on the Hub that it is loaded into, None if it is not there.
        trained_from: The model that training began from, if it is not `base_model`; a name, not a local folder.
        rank: The LoRA's rank.
        teacher_guidance_scale: The guidance scale of the real score.
        other_lora, other_num_inference_steps: The repository of a LoRA for another number of steps, for the example of
            switching; by default a placeholder, and 2 steps, or 4 where this one is for 2.
        settings: Arguments of a call that it was trained for, as in `render_lora_card`.
        fps, dtype, prompt, license, tags: As in `render_model_card`.

    Raises:
        ValueError: If `start` or `score_context` is none of these.
    """
    for name, value, known in (
        ("start", start, DISTILLATION_STARTS),
        ("score_context", score_context, SCORE_CONTEXTS),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
    return _render(
        "distilled_lora.md",
        repo_id,
        base_model=base_model,
        license=license,
        tags=("lora", "distillation", *tags),
        prompt=prompt,
        settings=settings or {},
        rank=rank,
        num_inference_steps=num_inference_steps,
        steps="1 step" if num_inference_steps == 1 else f"{num_inference_steps} steps",
        adapter=f"distilled-{num_inference_steps}",
        start_remark=DISTILLATION_STARTS[start],
        score_context_remark=SCORE_CONTEXTS[score_context],
        trained_from=trained_from,
        teacher_guidance_scale=teacher_guidance_scale,
        other_lora=other_lora,
        other_num_inference_steps=other_num_inference_steps or (4 if num_inference_steps == 2 else 2),
        fps=fps,
        dtype=dtype,
    )


def strip_local_paths(folder: str | os.PathLike, components: Iterable[str]) -> None:
    """Remove from a saved pipeline the folders that its components were loaded from, before it is shared.

    diffusers writes them into `model_index.json` and each component's configuration as `_name_or_path`. Only the
    pipeline's own files are touched: the folder may hold others'.

    Args:
        folder: The folder that the pipeline was saved in.
        components: The names of its subfolders.
    """
    folder = Path(folder)
    configs = (path for component in components for path in folder.glob(f"{component}/*config.json"))
    for path in (*folder.glob("model_index.json"), *configs):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_model_card(repo_id: str, *, token: str | None = None) -> ModelCard | None:
    """Load the card that is on the Hub; `None` if the repository has none. What its owner wrote is to be kept."""
    try:
        return ModelCard.load(repo_id, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None


def _render(
    template: str,
    repo_id: str,
    *,
    base_model: str | None,
    license: str | None,
    tags: Iterable[str],
    prompt: str,
    license_name: str | None = None,
    license_link: str | None = None,
    **values: Any,
) -> ModelCard:
    license_fields: dict[str, Any] = {"license": license, "license_name": license_name, "license_link": license_link}
    if license is None and base_model is not None and LONGLIVE_WEIGHTS in base_model.lower():
        license_fields = NVIDIA_OPEN_MODEL_LICENSE
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-video",
        base_model=base_model,
        tags=list(dict.fromkeys([*TAGS, *tags])),  # each once, in order
        **license_fields,
    )
    return ModelCard.from_template(
        data,
        template_str=(files("longlive_diffusers.hub_cards") / template).read_text(encoding="utf-8"),
        repo_id=repo_id,
        model_name=repo_id.split("/")[-1],
        prompt_literal=json.dumps(prompt, ensure_ascii=False),
        license_remark=_license_remark(data),
        **values,
    )


def _license_remark(data: ModelCardData) -> str:
    if data.license_name == NVIDIA_OPEN_MODEL_LICENSE["license_name"]:
        return (
            "The weights are not: they come from LongLive-2.0's, which are under the "
            f"[NVIDIA Open Model License]({data.license_link})."
        )
    if data.license is None:
        return "The weights' license is not stated here; ask their owner."
    name = f"`{data.license_name or data.license}`"
    return f"The weights' license is {f'[{name}]({data.license_link})' if data.license_link else name}."
