"""Asking a network for an attention kernel."""

from diffusers.models.attention_dispatch import AttentionBackendName

from longlive_diffusers import LongLiveTransformer3DModel


def ask_for_kernel(transformer: LongLiveTransformer3DModel, name: AttentionBackendName) -> None:
    """What `set_attention_backend` does, without making it the one of all networks in this process."""
    for processor in transformer.attn_processors.values():
        processor._attention_backend = name
