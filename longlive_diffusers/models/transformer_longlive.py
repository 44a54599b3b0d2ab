"""LongLiveTransformer3DModel: Wan2.2's network, made causal over chunks of latent frames."""

import inspect
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanTimeTextImageEmbedding,
    WanTransformer3DModel,
)
from peft import PeftConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..dtypes import float64_device
from ..fp8.rows import FP8Rows
from ..fused.layers import is_plain
from ..loaders.diffusers_models import check_all_weights_loaded, check_plain_wan
from ..loaders.original import load_original_transformer
from ..number_checks import check_booleans
from ..nvfp4.linear import nvfp4_layers
from ..nvfp4.lora import adopt_lora_layers, check_no_magnitudes, check_takes_adapter
from ..nvfp4.optimized_layers import check_not_optimized
from ..parallel.head_exchange import HeadExchange
from ..parallel.layout import check_heads
from ..parallel.stream_config import resolve_stream_config
from ..parallel.stream_ranks import StreamRanks
from ..setting_types import check_setting_types
from .altered_layers import check_can_be_saved, check_takes_lora
from .attention import LongLiveAttnProcessor
from .attention_kwargs import lora_scale
from .chunk_history import ChunkHistory
from .chunk_mask import ChunkMask
from .fused_projections import check_can_be_fused, check_can_be_unfused, fuse_projections, unfuse_projections
from .kv_cache import KVCache
from .layer_kv_cache import ChunkSlots, LayerCacheBase
from .lean_feed_forward import feed_forward
from .lean_norms import add, norm, remade_in_backward
from .lora_scaling import Turns, in_turn, with_lora_scale, with_present_scales
from .norms_of_inputs import add_and_norm_for, norm_for
from .rotary import axis_frequencies, rotary_embedding


ROPE_THETA = 10000.0
TIME_THETA = 10000.0


class LongLiveTransformerBlock(nn.Module):
    """Self-attention over frames, cross-attention to the prompt and feed-forward, modulated by each frame's own
    timestep."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float):
        super().__init__()
        head_dim = dim // num_heads
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = WanAttention(dim, num_heads, head_dim, eps, processor=LongLiveAttnProcessor())
        self.attn2 = WanAttention(
            dim, num_heads, head_dim, eps, cross_attention_dim_head=head_dim, processor=LongLiveAttnProcessor()
        )
        self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb: torch.Tensor,
        rotary_emb: torch.Tensor,
        attention_mask: ChunkMask | None = None,
        layer_cache: LayerCacheBase | ChunkHistory | None = None,
        chunk: ChunkSlots | None = None,
        sp_mesh: DeviceMesh | None = None,
        exchange: HeadExchange | None = None,
        attends_to_text: bool = True,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: The hidden states of the tokens, `[B, frames * tokens, dim]`.
            encoder_hidden_states: The projected prompt embeddings; None where `layer_cache` already holds their keys
                and values.
            attends_to_text: Whether there is cross-attention.
            temb: The projected timestep embeddings, `[B, frames, 6, dim]`; the modulation is computed once for each
                frame, never for each token.
            rotary_emb, attention_mask, layer_cache, chunk, sp_mesh, exchange: See [`LongLiveAttnProcessor`].
        """
        modulation = (self.scale_shift_table[:, None] + temb.float()).unsqueeze(3)  # [B, frames, 6, 1, dim]
        shift_msa, scale_msa, gate_msa, shift_ffn, scale_ffn, gate_ffn = modulation.unbind(2)

        # Layers run in `dtype`; within the block, the residual stream is in float32.
        dtype, eps = hidden_states.dtype, self.norm1.eps
        weight, bias = 1 + scale_msa, shift_msa
        normed = norm_for(self.attn1, hidden_states, weight, bias, eps=eps)
        with remade_in_backward(normed, hidden_states, weight, bias, eps=eps):
            update = self.attn1(
                normed,
                None,
                attention_mask,
                rotary_emb,
                layer_cache=layer_cache,
                chunk=chunk,
                sp_mesh=sp_mesh,
                exchange=exchange,
            )
        gate: torch.Tensor | None = gate_msa
        if attends_to_text:
            hidden_states, normed, remade = self._add_and_norm2(hidden_states, update, gate_msa)
            with remade:
                update = self.attn2(normed, encoder_hidden_states, attention_mask, layer_cache=layer_cache)
            gate = None

        weight, bias = 1 + scale_ffn, shift_ffn
        hidden_states, normed = add_and_norm_for(self.ffn, hidden_states, update, gate, weight, bias, eps=eps)
        with remade_in_backward(normed, hidden_states, weight, bias, eps=eps):
            update = feed_forward(self.ffn, normed)
        return add(hidden_states, update, gate_ffn, dtype=dtype)

    def _add_and_norm2(
        self, hidden_states: torch.Tensor, update: torch.Tensor, gate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | FP8Rows, AbstractContextManager[None]]:
        """[`add_and_norm_for`] with the norm before cross-attention, which is a module with weights, or none at all;
        and what is to be entered while its result is used."""
        norm2 = self.norm2
        if is_plain(norm2, FP32LayerNorm, hidden_states.device):
            parts = hidden_states, update, gate, norm2.weight, norm2.bias
            hidden_states, normed = add_and_norm_for(self.attn2, *parts, eps=norm2.eps)
            return hidden_states, normed, remade_in_backward(normed, *parts, eps=norm2.eps)
        hidden_states = add(hidden_states, update, gate, dtype=torch.float32)
        return hidden_states, norm2(hidden_states).to(update.dtype), nullcontext()


class LongLiveTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    r"""
    Wan2.2-TI2V-5B as a chunk-causal network: the parameters of `WanTransformer3DModel`, name for name and shape for
    shape, with a timestep for every latent frame, a KV cache for streaming, and the teacher-forcing and block-causal
    forwards that train it (LongLive-2.0, arXiv 2605.18739).

    Args:
        patch_size: The latent frames, height and width that a token spans; the first must be 1.
        num_attention_heads, attention_head_dim: The number of attention heads and the channels of each; their product
            is the width of the network.
        in_channels, out_channels: The number of latent channels of the input and the output.
        text_dim: The number of channels of the text encoder's output.
        freq_dim: The number of channels of the sinusoidal embedding of the timestep.
        ffn_dim: The inner width of the feed-forward layers.
        num_layers: The number of blocks.
        cross_attn_norm: Whether hidden states are normalized before cross-attention.
        qk_norm: The normalization of queries and keys; must be `"rms_norm_across_heads"`.
        eps: Added to variances by the normalization layers.
        image_dim, added_kv_proj_dim, pos_embed_seq_len: Settings of Wan's image-conditioned 14B models; must be None.
        rope_max_seq_len: Kept so that Wan's configurations load; positions are not limited here.
        chunk_size: The number of latent frames that are denoised together.
        sample_height, sample_width: The default size of a video, in latents.
    """

    config: Any  # diffusers' FrozenDict, whose entries are also attributes
    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "norm"]
    _no_split_modules = ["LongLiveTransformerBlock"]
    _keep_in_fp32_modules = ["time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]
    _repeated_blocks = ["LongLiveTransformerBlock"]
    _skip_keys = ["kv_cache", "layer_cache", "chunk", "sp_mesh", "exchange"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        in_channels: int = 48,
        out_channels: int = 48,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 14336,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        chunk_size: int = 8,
        sample_height: int = 44,
        sample_width: int = 80,
    ):
        super().__init__()
        check_config(self.config)
        dim = num_attention_heads * attention_head_dim
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim=dim, time_freq_dim=freq_dim, time_proj_dim=dim * 6, text_embed_dim=text_dim
        )
        self.blocks = nn.ModuleList(
            LongLiveTransformerBlock(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps)
            for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self.stream_ranks: StreamRanks | None = None  # set by `enable_parallelism`
        self.lora_turns = Turns()

    @with_lora_scale
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        kv_cache: KVCache | None = None,
        clean_hidden_states: torch.Tensor | None = None,
        clean_timestep: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        frame_positions: torch.Tensor | None = None,
        sp_mesh: DeviceMesh | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Predict the flow velocity. The kind of forward depends on the arguments alone: with `kv_cache`, one chunk of a
        stream; with `clean_hidden_states`, teacher forcing over a whole clip; with neither, block causal.

        Args:
            hidden_states: The noisy latents, `[B, C, F, h, w]`.
            timestep: The timestep in [0, 1000], `[B]`, or one for each latent frame, `[B, F]`.
            encoder_hidden_states: The prompt embeddings, `[B, L, text_dim]`, or one prompt for each chunk,
                `[B, F / chunk_size, L, text_dim]`. With `kv_cache`, None leaves cross-attention out.
            kv_cache: A cache from [`create_kv_cache`], after its `begin_chunk(F)`. Text keys and values are kept in it
                for as long as `encoder_hidden_states` is the same, unmodified tensor. With gradients enabled, these
                flow through the chunk itself; what is cached is detached, and may be overwritten before the backward.
            clean_hidden_states: The clean latents of the same clip, the history that noisy chunks see,
                `[B, C, F, h, w]`.
            clean_timestep: The timestep of the clean latents, `[B]` or `[B, F]`; 0 by default.
            attention_kwargs: `{"scale": s}` scales the LoRA of this forward.
            return_dict: Whether to return a `Transformer2DModelOutput` instead of a tuple.
            frame_positions: The time positions of the frames, `[F]` or `[B, F]`; 0, 1, 2, ... by default. With a
                cache, the cache decides.
            sp_mesh: One dimension of a device mesh, over whose N ranks the clip is split (Balanced SP, see
                `longlive_diffusers.parallel`). All other arguments are then of this rank's own part of the clip: F of
                its N F frames, with their timesteps, the prompts of their chunks and, where given, their positions; by
                default, these are counted from the start of the whole clip. Every rank of the mesh runs the forward,
                with the same shapes.

        Returns:
            The velocity of the noisy latents, `[B, C, F, h, w]`.

        Raises:
            ValueError: For shapes that do not fit the network, each other or the cache; for an `sp_mesh` of several
                dimensions, or whose number of ranks does not divide the number of heads.
        """
        check_booleans(return_dict=return_dict)
        batch, _, frames, height, width = self._check_latents(hidden_states)
        grid = self._token_grid(height, width)
        timestep = per_frame(timestep, batch, frames, "timestep")
        encoder_hidden_states = self._check_text(encoder_hidden_states, batch, frames, kv_cache)

        has_clean = clean_hidden_states is not None
        mask, chunk, text = None, None, None
        if kv_cache is not None:
            chunk = self._check_cache(kv_cache, batch, frames, grid, clean_hidden_states)
        self._check_clean(clean_hidden_states, clean_timestep, hidden_states)
        check_positions(frame_positions, batch, frames, kv_cache)
        num_ranks = check_sp_mesh(sp_mesh, self.config.num_attention_heads, kv_cache)

        # Latents and text are converted here, where FSDP has gathered the weights. It must convert nothing by itself:
        # rounded to bfloat16, timesteps and positions would be others.
        dtype = get_parameter_dtype(self.patch_embedding)
        exchange = None
        if self.stream_ranks is not None:
            exchange = None if kv_cache is None else self.stream_ranks.exchange(frames)
            self.stream_ranks.shares_tokens = exchange is not None
        if exchange is not None:
            hidden_states, timestep = exchange.own_frames(hidden_states, 2), exchange.own_frames(timestep, 1)
        tokens = self._embed_patches(hidden_states.to(dtype))
        if has_clean:
            clean_timestep = torch.zeros_like(timestep) if clean_timestep is None else clean_timestep
            clean_timestep = per_frame(clean_timestep, batch, frames, "clean_timestep")
            timestep = torch.cat([clean_timestep, timestep], dim=1)
            tokens = torch.cat([self._embed_patches(clean_hidden_states.to(dtype)), tokens], dim=1)
        if chunk is not None:
            rotary_emb = chunk.rotary
        else:
            first_frame = 0 if sp_mesh is None else sp_mesh.get_local_rank() * frames
            if frame_positions is None:
                frame_positions = torch.arange(first_frame, first_frame + frames)
            mask = ChunkMask(
                num_chunks=num_ranks * frames // self.config.chunk_size,
                chunk_tokens=self.config.chunk_size * math.prod(grid),
                has_clean=has_clean,
                num_ranks=num_ranks,
            )
            rotary_emb = self._rotate_clip(frame_positions, grid, has_clean, tokens.device)

        temb, modulation = self._embed_time(timestep, tokens.dtype)
        # Cached text has no graph, or one that an earlier backward has used up: with gradients, it is projected again.
        text_cache = kv_cache if not torch.is_grad_enabled() else None
        scale_of_loras = lora_scale(attention_kwargs)
        new_text = encoder_hidden_states
        if new_text is not None and text_cache is not None and text_cache.has_text(new_text, scale_of_loras):
            new_text = None
        if new_text is not None:
            text = self.condition_embedder.text_embedder(new_text.to(dtype))
            if text_cache is not None:
                text_cache.clear_text()

        # With gradients, blocks attend to what the cache holds now, which can be read again in the backward. Not so
        # where the whole network is compiled: it reads copies, and a block that ran twice would write twice.
        is_remembered = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        layer_caches = kv_cache.histories() if kv_cache is not None and is_remembered else kv_cache
        has_text = encoder_hidden_states is not None
        for index, block in enumerate(self.blocks):
            layer_cache = None if layer_caches is None else layer_caches[index]
            if layer_cache is not None:
                layer_cache.load()
            has_history = isinstance(layer_cache, ChunkHistory)
            run = partial(layer_cache.run, block) if has_history else block
            arguments = (tokens, text, modulation, rotary_emb, mask, layer_cache, chunk, sp_mesh, exchange, has_text)
            is_repeatable = layer_cache is None or has_history
            if self.gradient_checkpointing and torch.is_grad_enabled() and is_repeatable:
                run = run if scale_of_loras == 1 else with_present_scales(block, run)
                tokens = self._gradient_checkpointing_func(run, *arguments)  # pyright: ignore[reportOptionalCall]
            else:
                tokens = run(*arguments)
            if layer_cache is not None and chunk is not None:
                layer_cache.store(chunk)
        if new_text is not None and text_cache is not None:  # not before: an error leaves none, to be computed again
            text_cache.cache_text(new_text, scale_of_loras)

        if has_clean:
            tokens, temb = tokens[:, tokens.shape[1] // 2 :], temb[:, frames:]
        shift, scale = (self.scale_shift_table[:, None] + temb.unsqueeze(2)).unsqueeze(3).unbind(2)
        tokens = self.proj_out(norm(tokens, 1 + scale, shift, eps=self.norm_out.eps))
        sample = self._unpatchify(tokens, hidden_states.shape[2], grid)
        if exchange is not None:
            sample = exchange.all_frames(sample)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def create_kv_cache(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        window_size: int,
        sink_size: int,
        multi_shot_sink: bool,
        relative_rope: bool = False,
        num_frames: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        attention_density: float = 1.0,
    ) -> KVCache:
        """
        Create a cache for streaming one batch of videos; the caller owns it.

        Args:
            batch_size: The number of videos in the batch.
            height, width: The size of the latents.
            window_size, sink_size: How many latent frames the cache holds, and how many of the video's first frames it
                never evicts; see [`KVCache`].
            multi_shot_sink: Whether the frames that opened the current shot are kept as well.
            relative_rope: Whether time positions are counted from the cached frames, for endless video.
            num_frames: The length of the video in latent frames, where it is known: a shorter video than the window
                takes memory for its own frames only.
            dtype: What keys and values are stored as: `torch.float32`, `torch.bfloat16`, `torch.float16`, "nvfp4" or
                "fp8", "fp8_attention"; by default the dtype of the network.
            device: The device they are stored on; by default that of the network.
            attention_density: The part of the history, besides sinks and pins, that is attended to.
        """
        grid_height, grid_width = self._token_grid(height, width)
        return KVCache(
            self.config.num_layers,
            batch_size,
            self._num_own_heads,
            self.config.attention_head_dim,
            grid_height,
            grid_width,
            window_size=window_size,
            sink_size=sink_size,
            chunk_size=self.config.chunk_size,
            multi_shot_sink=multi_shot_sink,
            relative_rope=relative_rope,
            num_frames=num_frames,
            dtype=dtype or self.dtype,
            compute_dtype=self.dtype,
            device=device or self.device,
            theta=ROPE_THETA,
            attention_density=attention_density,
        )

    @classmethod
    def from_wan(cls, wan: WanTransformer3DModel, **config) -> "LongLiveTransformer3DModel":
        """Build a LongLive network from the weights of a Wan network (shared, not copied); `config` sets what Wan has
        no setting for, for instance `chunk_size`.

        Raises:
            ValueError: If the Wan network is quantized (GGUF, Quanto, ...), carries a LoRA, or is of another kind.
        """
        own = inspect.signature(cls.__init__).parameters
        inherited = {name: value for name, value in wan.config.items() if name in own}
        with torch.device("meta"):
            model = cls(**{**inherited, **config})
        check_plain_wan(wan, model)
        model.load_state_dict(wan.state_dict(), assign=True)
        return model.train(wan.training)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        output_loading_info: bool = False,
        parallel_config: Any = None,
        **kwargs,
    ) -> Any:
        """
        Like diffusers' own `from_pretrained`, which only warns where weights are missing or left over. With
        `parallel_config`, the network is given to [`enable_parallelism`] when it is loaded.

        Raises:
            ValueError: If the checkpoint is not of this network (its blocks are not `num_layers`, for instance), a
                setting has a wrong type, or the path is that of a single file.
        """
        check_booleans(output_loading_info=output_loading_info)
        source = pretrained_model_name_or_path
        if os.path.isfile(source):
            raise ValueError(f"'{source}' is a single file: open it with {cls.__name__}.from_original.")
        if parallel_config is not None:
            resolve_stream_config(parallel_config, None, num_heads=0)  # what can be known before it is loaded
        loaded: Any = super().from_pretrained(source, output_loading_info=True, **kwargs)
        model, info = loaded
        check_all_weights_loaded(info, model, source)
        if parallel_config is not None:
            model.enable_parallelism(config=parallel_config)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict, **options) -> "LongLiveTransformer3DModel":
        """Load one weight file that is on disk: diffusers' name for [`from_original`], which describes `options`;
        `dtype` is another name of `torch_dtype`."""
        if "dtype" in options:
            options["torch_dtype"] = options.pop("dtype")
        return cls.from_original(pretrained_model_link_or_path_or_dict, **options)

    @classmethod
    def from_original(
        cls, path_or_state_dict, *, device=None, torch_dtype: torch.dtype | None = None, **config
    ) -> "LongLiveTransformer3DModel":
        """
        Load a checkpoint in the layout that LongLive-2.0 is published in (`.pt`).

        Args:
            path_or_state_dict: The path of the file, or its state dict. Wrappers (`generator`, `generator_ema`, ...)
                and key prefixes of FSDP and `torch.compile` are removed; pickle is never loaded unrestricted.
            device, torch_dtype: The device and the dtype of the loaded weights.
            **config: Overrides what is inferred from the shapes, for instance `attention_head_dim`, `chunk_size`;
                `use_ema=True` prefers the averaged weights. For a packed NVFP4 checkpoint, which stays packed,
                `weight_scale_rule` names the rule if the file does not.

        Raises:
            ValueError: If the file is truncated, or of another model; the message says which.
        """
        return load_original_transformer(path_or_state_dict, cls, device=device, torch_dtype=torch_dtype, **config)

    @wraps(ModelMixin.save_pretrained)  # a pipeline looks at its arguments
    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Like diffusers' own `save_pretrained`.

        Raises:
            ValueError: If layers are in FP8 (see `LongLivePipeline.optimize`), of which there is no file format, have
                a LoRA, or fused projections.
        """
        check_can_be_saved(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    set_adapter = in_turn(PeftAdapterMixin.set_adapter)
    set_adapters = in_turn(PeftAdapterMixin.set_adapters)
    enable_adapters = in_turn(PeftAdapterMixin.enable_adapters)
    disable_adapters = in_turn(PeftAdapterMixin.disable_adapters)
    enable_lora = in_turn(PeftAdapterMixin.enable_lora)
    disable_lora = in_turn(PeftAdapterMixin.disable_lora)
    unfuse_lora = in_turn(PeftAdapterMixin.unfuse_lora)
    unload_lora = in_turn(PeftAdapterMixin.unload_lora)
    delete_adapters = in_turn(PeftAdapterMixin.delete_adapters)

    @in_turn
    def add_adapter(self, adapter_config: PeftConfig, adapter_name: str = "default") -> None:
        """Like diffusers' own `add_adapter`.

        Raises:
            ValueError: If the network was optimized, or projections are fused, of which a LoRA would be left out; if
                layers are stored in 8 bits; for a DoRA, or another adapter that reads the weights, on layers in NVFP4.
        """
        check_takes_lora(self)
        check_takes_adapter(self, adapter_config)
        super().add_adapter(adapter_config, adapter_name)

    @in_turn
    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs,
    ) -> None:
        """Like diffusers' own `load_lora_adapter`.

        Raises:
            ValueError: If the network was optimized, or projections are fused, of which a LoRA would be left out; if
                layers are stored in 8 bits; for a dictionary with a DoRA, on layers in NVFP4.
        """
        check_takes_lora(self, is_there=hotswap)
        lora = pretrained_model_name_or_path_or_dict
        if isinstance(lora, Mapping):
            start = "" if prefix is None else f"{prefix}."
            check_no_magnitudes((key.removeprefix(start) for key in lora if key.startswith(start)), nvfp4_layers(self))
        # None is for keys without a prefix; diffusers' annotation, made of the default, says less.
        super().load_lora_adapter(lora, prefix, hotswap, **kwargs)  # pyright: ignore[reportArgumentType]

    def compile(self, *args, **kwargs) -> None:
        """Like PyTorch's own `compile`.

        Raises:
            ValueError: If the network was optimized for a CPU before: the compiler cannot look into its layers.
        """
        check_not_optimized(self, "be compiled")
        super().compile(*args, **kwargs)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Like diffusers' own `compile_repeated_blocks`.

        Raises:
            ValueError: If the network was optimized for a CPU before: the compiler cannot look into its layers.
        """
        check_not_optimized(self, "be compiled")
        super().compile_repeated_blocks(*args, **kwargs)

    @in_turn
    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Fuse LoRA like diffusers does, also into NVFP4 weights, which are rounded again and cannot be unfused.

        Raises:
            ValueError: If the network was optimized, or an adapter cannot be fused into NVFP4 weights: because it is
                no plain LoRA, has infinities or NaN, or has a bias where the layer has none. Nothing is fused then.
        """
        check_not_optimized(self, "have a LoRA fused into them")
        adopt_lora_layers(self, adapter_names)
        super().fuse_lora(lora_scale, safe_fusing, adapter_names)

    def fuse_qkv_projections(self) -> None:
        """
        Compute queries, keys and values of each layer by one product, and keys and values of the text, with weights
        that take the place of the separate ones (diffusers keeps both).

        Raises:
            ValueError: If the network was optimized, or a projection is no plain linear layer: quantized, offloaded by
                itself, or with a LoRA.
        """
        check_not_optimized(self, "be fused")
        check_can_be_fused(self)
        for attn in self._attention_layers():
            fuse_projections(attn)

    def unfuse_qkv_projections(self) -> None:
        """
        Undo [`fuse_qkv_projections`]; what the fused weights have learned stays.

        Raises:
            ValueError: If the fused projections were quantized or optimized since.
        """
        check_can_be_unfused(self)
        for attn in self._attention_layers():
            unfuse_projections(attn)

    def _attention_layers(self) -> list[WanAttention]:
        return [layer for layer in self.modules() if isinstance(layer, WanAttention)]

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """
        Share every stream with the other ranks of a process group: forwards with a `kv_cache` then run on all of them
        together, each with 1/N of the chunk's frames, of the heads, and of the cache. Called by every rank, with the
        same weights, after `torch.distributed.init_process_group`; `from_pretrained(..., parallel_config=config)`
        does the same. Forwards without a cache are not changed.

        Args:
            config: A `ContextParallelConfig(ulysses_degree=N)` or, for more choices, a
                [`~longlive_diffusers.StreamParallelConfig`].
            cp_plan: Must be None.

        Raises:
            ValueError: For other kinds of parallelism, a number of ranks that does not divide the number of heads or
                the world, without a process group, or if it was called before.
            RanksParted: If one of the ranks has failed before, with this network or another: start all of them again.
        """
        if self.stream_ranks is not None:
            raise ValueError(
                f"This {type(self).__name__} is shared by {self.stream_ranks.size} ranks already, and cannot be again."
            )
        resolved = resolve_stream_config(config, cp_plan, self.config.num_attention_heads)
        self.stream_ranks = StreamRanks(resolved)
        for layer in nvfp4_layers(self).values():
            layer.share_amax = self.stream_ranks.share_amax

    @property
    def _num_own_heads(self) -> int:
        """The number of heads that this rank attends with, and caches."""
        num_heads = self.config.num_attention_heads
        return num_heads if self.stream_ranks is None else num_heads // self.stream_ranks.heads_size

    def _embed_patches(self, latents: torch.Tensor) -> torch.Tensor:
        """Embed latents `[B, C, F, h, w]` as tokens `[B, F * grid_height * grid_width, dim]`."""
        return self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()

    def _unpatchify(self, tokens: torch.Tensor, frames: int, grid: tuple[int, int]) -> torch.Tensor:
        """Turn tokens `[B, F * grid_height * grid_width, patch * C]` into latents `[B, C, F, h, w]`."""
        tokens = tokens.unflatten(1, (frames, *grid)).unflatten(-1, (*self.config.patch_size[1:], -1))
        return tokens.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _embed_time(self, timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed timesteps `[B, F]`: return the embedding `[B, F, dim]` and the modulation `[B, F, 6, dim]`."""
        embedder = self.condition_embedder
        # With layerwise casting, this is the dtype that the embedder computes in, not the one it is stored in.
        waves = sinusoidal_embedding(timestep, self.config.freq_dim).to(get_parameter_dtype(embedder.time_embedder))
        temb = embedder.time_embedder(waves).to(dtype)
        return temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(-1, (6, -1))

    def _rotate_clip(
        self, positions: torch.Tensor, grid: tuple[int, int], has_clean: bool, device: torch.device
    ) -> torch.Tensor:
        """Return the rotations of a training clip's tokens; a clean half has the positions of the noisy one."""
        if has_clean:
            positions = torch.cat([positions, positions], dim=-1)
        positions = positions.to(float64_device(device))
        return rotary_embedding(positions, *grid, self.config.attention_head_dim, theta=ROPE_THETA).to(device)

    def _token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the number of tokens along the height and the width of latents of this size."""
        _, patch_height, patch_width = self.config.patch_size
        if height % patch_height or width % patch_width or min(height, width) < 1:
            raise ValueError(f"Latents of {height}x{width} do not split into {patch_height}x{patch_width} patches.")
        return height // patch_height, width // patch_width

    def _check_latents(self, latents: torch.Tensor) -> torch.Size:
        if latents.ndim != 5 or latents.shape[1] != self.config.in_channels:
            raise ValueError(
                f"Expected latents [B, {self.config.in_channels}, F, h, w], got shape {tuple(latents.shape)}."
            )
        return latents.shape

    def _check_text(
        self, text: torch.Tensor | None, batch: int, frames: int, kv_cache: KVCache | None
    ) -> torch.Tensor | None:
        if text is None:
            if kv_cache is None:
                raise ValueError("`encoder_hidden_states` may be None only with a `kv_cache`.")
            return None
        chunks = -(-frames // self.config.chunk_size)
        shapes = [(batch,), (batch, chunks)]
        if text.ndim not in (3, 4) or tuple(text.shape[:-2]) not in shapes or text.shape[-1] != self.config.text_dim:
            raise ValueError(
                f"Expected text [{batch}, L, {self.config.text_dim}] or, one for each of {chunks} chunks, [{batch}, "
                f"{chunks}, L, {self.config.text_dim}], got shape {tuple(text.shape)}."
            )
        if kv_cache is not None and text.ndim == 4:
            raise ValueError(f"A stream has one text at a time, [{batch}, L, D]; got shape {tuple(text.shape)}.")
        if kv_cache is None and frames % self.config.chunk_size:
            raise ValueError(f"{frames} latent frames are not whole chunks of {self.config.chunk_size}.")
        return text

    def _check_clean(
        self, clean: torch.Tensor | None, clean_timestep: torch.Tensor | None, noisy: torch.Tensor
    ) -> None:
        if clean is None and clean_timestep is not None:
            raise ValueError("`clean_timestep` is the timestep of `clean_hidden_states`, and there are none.")
        if clean is not None and clean.shape != noisy.shape:
            raise ValueError(
                f"`clean_hidden_states` {tuple(clean.shape)} and `hidden_states` {tuple(noisy.shape)} must have the "
                "same shape."
            )
        if clean_timestep is not None:
            per_frame(clean_timestep, noisy.shape[0], noisy.shape[2], "clean_timestep")

    def _check_cache(
        self,
        kv_cache: KVCache,
        batch: int,
        frames: int,
        grid: tuple[int, int],
        clean_hidden_states: torch.Tensor | None,
    ) -> ChunkSlots:
        if clean_hidden_states is not None:
            raise ValueError("`kv_cache` (streaming) and `clean_hidden_states` (teacher forcing) exclude each other.")
        chunk = kv_cache.chunk
        if self.stream_ranks is not None and torch.is_grad_enabled():
            raise ValueError("A stream that several ranks share has no gradients: call this under `torch.no_grad()`.")
        heads = (self._num_own_heads, self.config.attention_head_dim)
        expected = (len(kv_cache), kv_cache.num_heads, kv_cache.head_dim, kv_cache.batch_size)
        expected += (chunk.num_frames, kv_cache.grid_height, kv_cache.grid_width)
        got = (len(self.blocks), *heads, batch, frames, *grid)
        if expected != got:
            raise ValueError(
                "The KV cache and its open chunk are for (layers, heads, head_dim, batch, frames, grid height, grid "
                f"width) = {expected}, this forward has {got}."
            )
        return chunk


def sinusoidal_embedding(timestep: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the cosines and sines, `[..., channels]`, of a timestep `[...]` at `channels / 2` frequencies.

    Float64, like the reference: in float32, the fastest waves of timestep 999 are already wrong in the fifth digit.
    """
    device = float64_device(timestep.device)
    angles = timestep.to(device, torch.float64)[..., None] * axis_frequencies(channels, TIME_THETA, device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(timestep.device, torch.float32)


def per_frame(timestep: torch.Tensor, batch: int, frames: int, name: str) -> torch.Tensor:
    """Expand a timestep of shape `[]`, `[B]` or `[B, F]` to `[B, F]`."""
    if timestep.ndim == 1 and timestep.shape[0] in (1, batch):
        return timestep[:, None].expand(batch, frames)
    if timestep.ndim == 0:
        return timestep.expand(batch, frames)
    if timestep.shape != (batch, frames):
        raise ValueError(f"`{name}` must be [{batch}] or [{batch}, {frames}], got shape {tuple(timestep.shape)}.")
    return timestep


def check_positions(positions: torch.Tensor | None, batch: int, frames: int, kv_cache: KVCache | None) -> None:
    if positions is None:
        return
    if kv_cache is not None:
        raise ValueError("`frame_positions` cannot be given: the `kv_cache` decides the positions of its frames.")
    if tuple(positions.shape) not in ((frames,), (batch, frames)):
        raise ValueError(f"`frame_positions` must be [{frames}] or [{batch}, {frames}], got {tuple(positions.shape)}.")


def check_sp_mesh(sp_mesh: DeviceMesh | None, num_heads: int, kv_cache: KVCache | None) -> int:
    """Check a device mesh, and return the number of ranks that share the clip."""
    if sp_mesh is None:
        return 1
    if kv_cache is not None:
        raise ValueError(
            f"`kv_cache` and `sp_mesh` (of {sp_mesh.size()}) exclude each other: ranks share a stream after "
            "`enable_parallelism`."
        )
    if sp_mesh.ndim != 1:
        raise ValueError(f"`sp_mesh` must be one dimension of a device mesh, got one of shape {tuple(sp_mesh.shape)}.")
    check_heads(num_heads, sp_mesh.size())
    return sp_mesh.size()


def check_config(config) -> None:
    """Raise a ValueError for settings of a wrong type or that no network can have, and for Wan configurations of other
    models than text-and-image-to-video."""
    check_setting_types(config, LongLiveTransformer3DModel)
    sizes = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim")
    sizes += ("ffn_dim", "num_layers", "chunk_size", "sample_height", "sample_width")
    if too_small := [f"`{name}` must be at least 1, got {config[name]}" for name in sizes if config[name] < 1]:
        raise ValueError(f"{'; '.join(too_small)}.")
    if min(config.patch_size) < 1:
        raise ValueError(f"`patch_size` has sizes of at least 1, got {tuple(config.patch_size)}.")
    if config.patch_size[0] != 1:
        raise ValueError(f"A token must span one latent frame, got `patch_size` {tuple(config.patch_size)}.")
    if config.qk_norm != "rms_norm_across_heads":
        raise ValueError(f"`qk_norm` must be 'rms_norm_across_heads', got {config.qk_norm!r}.")
    if config.image_dim is not None or config.added_kv_proj_dim is not None or config.pos_embed_seq_len is not None:
        raise ValueError(
            "Image cross-attention (image_dim, added_kv_proj_dim, pos_embed_seq_len) belongs to Wan's 14B models and "
            f"not to LongLive; got {config.image_dim}, {config.added_kv_proj_dim}, {config.pos_embed_seq_len}."
        )
