"""Which decoders consist of diffusers' modules and nothing else, so that their parameters say all that they do."""

from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import nn

from ...fused.layers import is_compiled_in_place, is_undecorated


_PUBLISHED = {
    nn.Conv2d,
    nn.Dropout,
    nn.Identity,
    nn.ModuleList,
    nn.Sequential,
    nn.SiLU,
    wan.DupUp3D,
    wan.WanAttentionBlock,
    wan.WanCausalConv3d,
    wan.WanDecoder3d,
    wan.WanMidBlock,
    wan.WanResample,
    wan.WanResidualBlock,
    wan.WanResidualUpBlock,
    wan.WanRMS_norm,
    wan.WanUpBlock,
    wan.WanUpsample,
}


def is_as_published(decoder: nn.Module) -> bool:
    """
    Whether all that calling the decoder would do is what diffusers' modules do with plain parameters.

    It is not, if a module is of another class (a subclass, a LoRA layer, what `torch.compile` returns), has hooks, or
    has another `forward` (as offloading by layers or groups gives it), if a part of the decoder is compiled by itself,
    if a parameter is a tensor made of others (quantized or sharded), or if dropout is active. Such a decoder has to be
    called.
    """
    return all(
        _is_plain(module) and (module is decoder or not is_compiled_in_place(module)) for module in decoder.modules()
    )


def _is_plain(module: nn.Module) -> bool:
    is_active_dropout = isinstance(module, nn.Dropout) and module.training and module.p > 0
    return type(module) in _PUBLISHED and is_undecorated(module) and not is_active_dropout
