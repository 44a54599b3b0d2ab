"""What distillation starts from: generator, fake score and real score, on one copy of the weights where that is
possible."""

import copy

import torch
from peft import get_peft_model_state_dict

from longlive_diffusers import LongLivePipeline, LongLiveTransformer3DModel
from longlive_diffusers.loaders.lora import check_lora_fits
from longlive_diffusers.loaders.lora_export import original_lora_state_dict
from longlive_diffusers.nvfp4.linear import weights_of
from objectives.distillation_networks import DistillationNetworks, Role
from run.arguments import OptimizationArguments
from run.distillation_arguments import NetworkArguments
from run.lora_settings import lora_settings
from run.network import add_lora, set_computation, use_nvfp4
from run.saving import load_transformer


ADAPTERS = {Role.GENERATOR: "generator", Role.FAKE_SCORE: "fake_score"}


def build_networks(
    transformer: LongLiveTransformer3DModel,
    model: NetworkArguments,
    optimization: OptimizationArguments,
    *,
    frozen_dtype: torch.dtype,
) -> DistillationNetworks:
    """
    Make the three networks of a loaded transformer.

    Args:
        transformer: The model to start from; it becomes a part of the result.
        model, optimization: The settings of the run.
        frozen_dtype: The dtype of networks that are not trained.

    Raises:
        ValueError: If the network or this machine does not support a setting, or a teacher or a LoRA does not fit.
    """
    if model.rank is None:
        networks = _separate_networks(transformer, model, optimization, frozen_dtype)
    else:
        networks = _shared_network(transformer, model, optimization, frozen_dtype)
    if model.save_original_lora:
        _check_original_lora(transformer)
    for network in networks.values():
        set_computation(network.eval(), optimization)  # no dropout: roll-outs are what will be generated
    return DistillationNetworks(networks, {} if model.rank is None else ADAPTERS)


def _shared_network(
    transformer: LongLiveTransformer3DModel,
    model: NetworkArguments,
    optimization: OptimizationArguments,
    frozen_dtype: torch.dtype,
) -> dict[Role, LongLiveTransformer3DModel]:
    """Add a LoRA for the generator and one for the fake score to the network, which is also the real score, unless
    there is another teacher."""
    if optimization.precision == "nvfp4":
        use_nvfp4(transformer, optimization, trains_lora=True)
    if model.generator_lora is None:
        add_lora(transformer, model, tuple(ADAPTERS.values()))
    else:
        _load_generator_lora(transformer, model.generator_lora)
        add_lora(transformer, model, (ADAPTERS[Role.FAKE_SCORE],))
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:  # PEFT freezes all adapters but the one that was added last
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    networks = dict.fromkeys(Role, transformer)
    if model.teacher_model_name_or_path is not None:
        networks[Role.REAL_SCORE] = _load_teacher(model.teacher_model_name_or_path, transformer, frozen_dtype)
    return networks


def _separate_networks(
    transformer: LongLiveTransformer3DModel,
    model: NetworkArguments,
    optimization: OptimizationArguments,
    frozen_dtype: torch.dtype,
) -> dict[Role, LongLiveTransformer3DModel]:
    """Copy the network, for all weights of generator and fake score to be trained."""
    if model.teacher_model_name_or_path is None:
        own = {"revision": model.revision, "variant": model.variant}
        teacher = _load_teacher(model.pretrained_model_name_or_path, transformer, frozen_dtype, **own)
    else:
        teacher = _load_teacher(model.teacher_model_name_or_path, transformer, frozen_dtype)
    if optimization.precision == "nvfp4":
        use_nvfp4(transformer, optimization, trains_lora=False)
    return {
        Role.GENERATOR: transformer,
        Role.FAKE_SCORE: copy.deepcopy(transformer),
        Role.REAL_SCORE: teacher,
    }


def _load_teacher(
    source: str, student: LongLiveTransformer3DModel, dtype: torch.dtype, **options: str | None
) -> LongLiveTransformer3DModel:
    """Load the network that is the real score, and check that it takes what the generator makes; `options` are
    `revision` and `variant`, which are those of the model to start from."""
    chunk_size = student.config.chunk_size
    teacher = load_transformer(source, dtype, chunk_size, **options).requires_grad_(False)
    for name in ("in_channels", "out_channels", "text_dim", "patch_size"):
        ours, theirs = student.config[name], teacher.config[name]
        if list(ours) != list(theirs) if isinstance(ours, tuple | list) else ours != theirs:
            raise ValueError(
                f"The teacher '{source}' cannot see what the generator makes: {name} is {theirs} there and {ours} here"
            )
    return teacher


def _check_original_lora(transformer: LongLiveTransformer3DModel) -> None:
    """Raise a ValueError unless the generator's LoRA can be saved as the reference does, which has no DoRA, one rank
    for all layers, and no LoRA on some of them."""
    name = ADAPTERS[Role.GENERATOR]
    layers = get_peft_model_state_dict(transformer, adapter_name=name)
    try:
        original_lora_state_dict(layers, lora_settings(transformer.peft_config[name]))
    except ValueError as error:
        raise ValueError(f"--save_original_lora true is not possible: {error}") from error


def _load_generator_lora(transformer: LongLiveTransformer3DModel, source: str) -> None:
    """Add the generator's LoRA from a file, with the rank that it has there."""
    state_dict, metadata = LongLivePipeline.lora_state_dict(source, return_lora_metadata=True)
    check_lora_fits(state_dict, weights_of(transformer))
    transformer.load_lora_adapter(
        state_dict, prefix="transformer", adapter_name=ADAPTERS[Role.GENERATOR], metadata=metadata
    )
