"""Queries, keys and values of an attention layer by one matrix product; keys and values in cross-attention.

diffusers keeps the separate layers beside the fused one: all these weights twice, and what is learned by the fused
layer is lost when it is taken away. Here the weights are in one place at a time.
"""

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from ..fused.layers import is_undecorated
from .altered_layers import fused_projections


def check_can_be_fused(model: nn.Module) -> None:
    """Raise a ValueError if a projection is no plain linear layer: the weights of one in NVFP4 cannot be joined
    without rounding them again, and a LoRA, or what brings weights to another device or dtype for a call, would be
    left out."""
    special = []
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] not in ("to_q", "to_k", "to_v"):
            continue
        if type(layer) is not nn.Linear:
            special.append(f"{name} ({type(layer).__name__})")
        elif not is_undecorated(layer):
            special.append(f"{name} (with hooks)")
    if special:
        raise ValueError(
            f"{len(special)} projections are not plain linear layers, for instance {special[0]}: fuse projections "
            "before layers are quantized, offloaded or cast one by one, and without a LoRA that is not fused."
        )


def check_can_be_unfused(model: nn.Module) -> None:
    """Raise a ValueError if the fused projections of a model have become other layers since, which cannot be split."""
    for name in fused_projections(model):
        attn = model.get_submodule(name)
        assert isinstance(attn, WanAttention)  # this network has no other attention
        fused = getattr(attn, _fused_name(attn))
        if type(fused) is not nn.Linear or not is_undecorated(fused):
            raise ValueError(
                f"The fused projections of {name} were changed since, into {type(fused).__name__} or by hooks, and "
                "cannot be split: load the model again, or call `unfuse_qkv_projections()` before layers are changed."
            )


@torch.no_grad()
def fuse_projections(attn: WanAttention) -> None:
    """Give an attention layer `to_qkv`, or `to_kv` where it is cross-attention, in place of the projections that this
    stands for, which are None from then on."""
    if attn.fused_projections:
        return
    names = _separate_names(attn)
    layers = [getattr(attn, name) for name in names]
    weight, bias = (torch.cat([getattr(layer, part) for layer in layers]) for part in ("weight", "bias"))
    setattr(attn, _fused_name(attn), _linear(weight, bias, like=layers[0]))
    for name in names:
        setattr(attn, name, None)
    attn.fused_projections = True


@torch.no_grad()
def unfuse_projections(attn: WanAttention) -> None:
    """Give an attention layer its separate projections back, with the weights that the fused one has by now."""
    if not attn.fused_projections:
        return
    fused, names = getattr(attn, _fused_name(attn)), _separate_names(attn)
    parts = zip(names, fused.weight.chunk(len(names)), fused.bias.chunk(len(names)), strict=True)
    for name, weight, bias in parts:
        setattr(attn, name, _linear(weight.clone(), bias.clone(), like=fused))
    attn.unfuse_projections()


def _separate_names(attn: WanAttention) -> tuple[str, ...]:
    return ("to_k", "to_v") if attn.is_cross_attention else ("to_q", "to_k", "to_v")


def _fused_name(attn: WanAttention) -> str:
    return "to_kv" if attn.is_cross_attention else "to_qkv"


def _linear(weight: torch.Tensor, bias: torch.Tensor, like: nn.Linear) -> nn.Linear:
    """Make a linear layer of tensors, which is trained where `like` is."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
    layer.bias = nn.Parameter(bias, requires_grad=like.bias.requires_grad)
    return layer.train(like.training)
