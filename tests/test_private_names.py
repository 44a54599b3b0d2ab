"""Names of other packages that may change without notice: which, who uses them, and what to do when one goes.

Two kinds are listed: names with a leading underscore, and names that have none but that no documentation promises.
When a new release of diffusers, torch or accelerate breaks this package, a failing test here says where to look.
"""

import argparse
import ast
import contextlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.loaders import WanLoraLoaderMixin
from peft import LoraConfig

import longlive_diffusers
from tests.support.paths import ROOT
from tests.support.tiny_vae import tiny_vae


@dataclass(frozen=True)
class PrivateName:
    """
    Args:
        path: `module:attribute.attribute` of the name; or, if `exists` is given, "name of owner" in words.
        users: The files that use it, below the repository.
        when_gone: What to do when a release no longer has it.
        exists: Whether the installed packages have it, for what cannot be looked up by `path`.
    """

    path: str
    users: tuple[str, ...]
    when_gone: str
    exists: Callable[[], bool] | None = None

    @property
    def name(self) -> str:
        return self.path.split(" of ")[0].rsplit(":", 1)[-1].rsplit(".", 1)[-1]

    def is_there(self) -> bool:
        if self.exists is not None:
            return self.exists()
        module, attributes = self.path.split(":")
        owner = importlib.import_module(module)
        for attribute in attributes.split("."):
            if not hasattr(owner, attribute):
                return False
            owner = getattr(owner, attribute)
        return True


PACKAGE = "longlive_diffusers/"
TRANSFORMER = PACKAGE + "models/transformer_longlive.py"
PIPELINE = PACKAGE + "pipelines/pipeline_longlive.py"
ATTEND = PACKAGE + "models/attend.py"
FP8_LINEAR = PACKAGE + "nvfp4/fp8_linear.py"
PACKED_LINEAR = PACKAGE + "fused/packed_linear.py"
ONEDNN = PACKAGE + "fused/onednn.py"
FEED_FORWARD = PACKAGE + "fused/feed_forward.py"
FUSED_LAYERS = PACKAGE + "fused/layers.py"
SAVED_RECIPES = PACKAGE + "models/saved_recipes.py"
STREAMING_VAE = PACKAGE + "models/streaming_vae.py"
QUANTIZER = PACKAGE + "nvfp4/quantizer.py"
LINEAR = PACKAGE + "nvfp4/linear.py"
TRAIN_VAE = "training/toy/train_vae.py"
BENCH_DMD_MEMORY = "training/benchmarks/bench_dmd_memory.py"
WAN_DECODER = "longlive_diffusers/models/wan_decoder/"
MEMORY_LEDGER = "training/benchmarks/memory_ledger.py"
MODEL_MIXIN = "diffusers.models.modeling_utils:ModelMixin."
WAN_VAE = "diffusers.models.autoencoders.autoencoder_kl_wan:"

PRIVATE_NAMES = [
    # -- diffusers: registration and loading -------------------------------------------------------------------------
    PrivateName(
        "diffusers.pipelines.pipeline_loading_utils:LOADABLE_CLASSES",
        (PACKAGE + "registration.py",),
        "Find how DiffusionPipeline resolves the library of a component; without it `from_pretrained` of a saved "
        "pipeline needs `trust_remote_code` or LongLivePipeline by name.",
    ),
    PrivateName(
        "diffusers.models.attention_dispatch:_check_attention_backend_requirements",
        (PACKAGE + "cli/backends.py",),
        "Find how set_attention_backend checks that a package is installed; without it, the models are loaded first.",
    ),
    PrivateName(
        "diffusers.quantizers.auto:AUTO_QUANTIZER_MAPPING",
        (QUANTIZER,),
        "Register NVFP4Quantizer as diffusers' new documentation says.",
    ),
    PrivateName(
        "diffusers.quantizers.auto:AUTO_QUANTIZATION_CONFIG_MAPPING",
        (QUANTIZER,),
        "Register NVFP4Config as diffusers' new documentation says.",
    ),
    PrivateName(
        "diffusers.quantizers.base:DiffusersQuantizer._process_model_before_weight_loading",
        (QUANTIZER,),
        "Override what diffusers calls before weights are loaded: there, linear layers become NVFP4Linear.",
    ),
    PrivateName(
        "diffusers.quantizers.base:DiffusersQuantizer._process_model_after_weight_loading",
        (QUANTIZER,),
        "Override what diffusers calls after weights were loaded: there, layers choose their backend.",
    ),
    PrivateName(
        "diffusers.quantizers.base:DiffusersQuantizer._dequantize",
        (QUANTIZER,),
        "Override what ModelMixin.dequantize() calls.",
    ),
    PrivateName(
        "_internal_dict of a configured model",
        (QUANTIZER,),
        "Take `quantization_config` out of a dequantized model's configuration as diffusers' own quantizers then do.",
        lambda: "_internal_dict" in vars(AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1])),
    ),
    PrivateName(
        "_pipeline of WanLoraLoaderMixin.load_lora_into_transformer",
        (PIPELINE,),
        "Find how load_lora_weights takes the hooks of offloading off a network while it adds LoRA layers to it.",
        exists=lambda: "_pipeline" in inspect.signature(WanLoraLoaderMixin.load_lora_into_transformer).parameters,
    ),
    PrivateName(
        "diffusers.utils.hub_utils:PushToHubMixin._upload_folder",
        (PIPELINE,),
        "Override push_to_hub and save_pretrained instead: the card and the cleaned configurations go up with them.",
    ),
    PrivateName(
        "diffusers.pipelines.pipeline_utils:DiffusionPipeline._optional_components",
        (PIPELINE,),
        "Declare text encoder and VAE as parts that may be None the new way.",
    ),
    PrivateName(
        "diffusers.pipelines.pipeline_utils:DiffusionPipeline._execution_device",
        (PIPELINE,),
        "Use the device of the transformer's hook, or its own.",
    ),
    PrivateName(
        "is_lora_variant of the fields of LoraConfig",
        (PACKAGE + "nvfp4/lora.py",),
        "Name the settings with which PEFT's LoRA layer does something else than adding B A: `use_dora` and others.",
        exists=lambda: any("is_lora_variant" in field.metadata for field in fields(LoraConfig)),
    ),
    # -- diffusers: what a model declares ----------------------------------------------------------------------------
    *(
        PrivateName(MODEL_MIXIN + name, (TRANSFORMER, *others), "Declare it as diffusers' WanTransformer3DModel does.")
        for name, others in (
            ("_supports_gradient_checkpointing", ()),
            ("_skip_layerwise_casting_patterns", ()),
            ("_no_split_modules", ("training/objectives/distillation_networks.py",)),
            (
                "_keep_in_fp32_modules",
                (
                    PACKAGE + "benchmark/models.py",
                    PACKAGE + "loaders/original.py",
                    PACKAGE + "pipelines/speed.py",
                    BENCH_DMD_MEMORY,
                ),
            ),
            ("_repeated_blocks", ()),
            ("_skip_keys", ()),
        )
    ),
    PrivateName(
        "_gradient_checkpointing_func of a model",
        (TRANSFORMER,),
        "Call what diffusers' WanTransformer3DModel calls for a block when gradient checkpointing is on.",
        lambda: "_gradient_checkpointing_func" in source_of("diffusers.models.transformers.transformer_wan"),
    ),
    PrivateName(
        "_attention_backend of an attention processor",
        (PACKAGE + "models/attention.py", PACKAGE + "pipelines/speed.py"),
        "Look at what set_attention_backend writes.",
        lambda: "processor._attention_backend = " in source_of("diffusers.models.modeling_utils"),
    ),
    PrivateName(
        "torch.distributed.distributed_c10d:_get_default_store",
        (PACKAGE + "parallel/stream_ranks.py",),
        "Ranks need another place to leave word of their errors, which does not end with any one of them.",
    ),
    PrivateName(
        "_parallel_config of an attention processor",
        (PACKAGE + "models/attention.py",),
        "Look at what enable_parallelism writes.",
        lambda: "processor._parallel_config = " in source_of("diffusers.models.modeling_utils"),
    ),
    PrivateName(
        "diffusers.models.attention_dispatch:_AttentionBackendRegistry",
        (ATTEND, PACKAGE + "benchmark/environment.py"),
        "Find out which attention backend is active another way; attend() may then always call the dispatcher.",
    ),
    *(
        PrivateName(
            f"diffusers.models.attention_dispatch:AttentionBackendName.{name}",
            (PACKAGE + "models/sdpa_kernels.py", *others),
            "Look at what diffusers calls this kernel of PyTorch then.",
        )
        for name, others in (
            ("_NATIVE_FLASH", (PACKAGE + "cli/backends.py",)),
            ("_NATIVE_CUDNN", ()),
            ("_NATIVE_EFFICIENT", ()),
            ("_NATIVE_MATH", (PACKAGE + "cli/backends.py",)),
        )
    ),
    # -- Python ------------------------------------------------------------------------------------------------------
    PrivateName(
        "threading:_register_atexit",
        (PACKAGE + "pipelines/prefetch.py",),
        "Find what concurrent.futures ends its threads by; without it, a session that is still open when the "
        "interpreter ends makes two more chunks.",
    ),
    # -- diffusers: what callbacks write -----------------------------------------------------------------------------
    PrivateName(
        "_guidance_scale of a pipeline",
        (PIPELINE,),
        "Take what SDCFGCutoffCallback writes then.",
        lambda: "pipeline._guidance_scale = " in inspect.getsource(SDCFGCutoffCallback),
    ),
    PrivateName(
        "_interrupt of a pipeline",
        (PIPELINE,),
        "Take what diffusers' documentation tells a callback to write in order to stop a pipeline.",
        lambda: "_interrupt" in inspect.getsource(WanPipeline),
    ),
    PrivateName(
        "_callback_tensor_inputs of a pipeline",
        (PIPELINE,),
        "Look at what PipelineCallback checks its tensors against.",
        lambda: "_callback_tensor_inputs" in vars(WanPipeline),
    ),
    # -- diffusers: offloading ---------------------------------------------------------------------------------------
    PrivateName(
        "diffusers.hooks.group_offloading:_is_group_offload_enabled",
        (PIPELINE,),
        "Find another sign that hooks move a model, or let vae_device be the transformer's device for any offloading.",
    ),
    PrivateName(
        "_hf_hook of a module that accelerate hooked",
        (PIPELINE,),
        "Find another sign that accelerate's hooks move a model.",
        lambda: "_hf_hook" in vars(add_hook_to_module(torch.nn.Identity(), ModelHook())),
    ),
    # -- diffusers: the inside of Wan's VAE --------------------------------------------------------------------------
    PrivateName(
        "_cached_conv_counts of Wan's VAE",
        (STREAMING_VAE, TRAIN_VAE),
        "Count the causal convolutions: a stream needs a cache for each.",
        lambda: "_cached_conv_counts" in vars(tiny_vae()),
    ),
    *(
        PrivateName(
            f"{name} of Wan's encoder and decoder",
            (STREAMING_VAE, TRAIN_VAE),
            "Decode and encode frame by frame the way AutoencoderKLWan._decode does then.",
            lambda name=name: name in inspect.signature(type(tiny_vae().decoder).forward).parameters,
        )
        for name in ("feat_cache", "feat_idx", "first_chunk")
    ),
    PrivateName(
        WAN_VAE + "WanCausalConv3d",
        (TRAIN_VAE, WAN_DECODER + "cached_convolutions.py", WAN_DECODER + "published_modules.py"),
        "Find the causal convolutions by their new class.",
    ),
    PrivateName(
        WAN_VAE + "WanResample",
        (
            TRAIN_VAE,
            WAN_DECODER + "cached_convolutions.py",
            WAN_DECODER + "published_modules.py",
            WAN_DECODER + "upsample.py",
        ),
        "Find the layers that change the frame rate by their new class.",
    ),
    *(
        PrivateName(
            WAN_VAE + name,
            tuple(f"{WAN_DECODER}{user}.py" for user in users),
            "Compute in models/wan_decoder what the decoder's modules compute then, or call them by leaving their new "
            "classes out of published_modules.py.",
        )
        for name, users in {
            "DupUp3D": ("published_modules", "upsample"),
            "WanAttentionBlock": ("decode_frames", "published_modules"),
            "WanDecoder3d": ("cached_convolutions", "decode_frames", "history", "published_modules"),
            "WanMidBlock": ("published_modules",),
            "WanResidualBlock": ("cached_convolutions", "decode_frames", "published_modules"),
            "WanResidualUpBlock": ("cached_convolutions", "decode_frames", "published_modules"),
            "WanRMS_norm": ("published_modules",),
            "WanUpBlock": ("cached_convolutions", "decode_frames", "published_modules"),
            "WanUpsample": ("published_modules",),
        }.items()
    ),
    PrivateName(
        "_padding of WanCausalConv3d",
        (TRAIN_VAE,),
        "Take the spatial padding of a causal convolution from where it is then.",
        lambda: any("_padding" in vars(module) for module in tiny_vae().modules()),
    ),
    # -- torch -------------------------------------------------------------------------------------------------------
    PrivateName(
        "_convolution_pointwise of torch.ops.mkldnn",
        (WAN_DECODER + "convolve.py",),
        "Call F.conv3d, if it has oneDNN convolve small frames in float32 by then; else aten.mkldnn_convolution.",
        lambda: hasattr(torch.ops.mkldnn, "_convolution_pointwise"),
    ),
    *(
        PrivateName(
            f"{name} of torch.ops.aten",
            (PACKAGE + "models/sdpa_kernels.py",),
            "Refuse this attention backend while a session decodes in another thread, and leave it to diffusers else.",
            lambda name=name: hasattr(torch.ops.aten, name),
        )
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_attention_math",
        )
    ),
    PrivateName(
        "torch:_C._autograd._top_saved_tensors_default_hooks",
        (SAVED_RECIPES,),
        "Without it histories can be joined again in the backward only outside gradient checkpointing: drop the outer "
        "hooks, and let attend() keep joined histories while another pair of hooks is active.",
    ),
    PrivateName(
        "torch:_C._autograd._saved_tensors_hooks_is_enabled",
        (SAVED_RECIPES,),
        "Catch the RuntimeError that saved_tensors_hooks raises where hooks are forbidden.",
    ),
    PrivateName(
        "_cdata of a storage",
        (SAVED_RECIPES,),
        "Identify a storage by `data_ptr()`, which does not tell apart those of the meta device.",
        lambda: isinstance(torch.zeros(1).untyped_storage()._cdata, int),
    ),
    PrivateName(
        "_version of a tensor",
        (PACKAGE + "models/kv_cache.py",),
        "Project a prompt's keys and values again whenever prompt_embeds is another object.",
        lambda: torch.zeros(1).add_(1)._version == 1,
    ),
    PrivateName(
        "torch.nn:Module._apply",
        (LINEAR, FP8_LINEAR, PACKED_LINEAR),
        "Override `to`, `cuda` and `half`: `.to(dtype)` must leave packed weights as they are.",
    ),
    PrivateName(
        "torch.nn:Module._load_from_state_dict",
        (LINEAR, PACKED_LINEAR),
        "Register a load_state_dict pre-hook that gives `weight_amax` its dimension, and one that packs the weight.",
    ),
    # -- argparse ----------------------------------------------------------------------------------------------------
    PrivateName(
        "argparse:_SubParsersAction",
        tuple(
            f"{PACKAGE}cli/{command}.py" for command in ("bench", "convert", "env", "generate", "quantize", "serve")
        ),
        "An annotation only: leave it out.",
    ),
    PrivateName(
        "argparse:_ActionsContainer",
        (PACKAGE + "cli/arguments.py",),
        "An annotation only: leave it out.",
    ),
    PrivateName(
        "_actions of a parser",
        ("training/run/command_line.py",),
        "Take the names of the options from the dataclasses' fields.",
        lambda: "_actions" in vars(argparse.ArgumentParser()),
    ),
    PrivateName(
        "torch._subclasses.fake_tensor:FakeTensorMode",
        (MEMORY_LEDGER,),
        "Simulate on the meta device, to whose tensors autocast does nothing, or measure on a GPU only.",
    ),
    PrivateName(
        "torch.utils._python_dispatch:TorchDispatchMode",
        (MEMORY_LEDGER,),
        "Take torch.cuda.max_memory_allocated on a GPU, which does not know what memory is for.",
    ),
    PrivateName(
        "torch.utils._pytree:tree_leaves",
        (MEMORY_LEDGER,),
        "Look for the tensors in an operator's arguments, which are at most in lists.",
    ),
    PrivateName(
        "os:_exit",
        ("training/run/interruption.py",),
        "Documented in spite of its name: it ends a process at once, from a signal handler too.",
    ),
    PrivateName(
        "argparse:ArgumentDefaultsHelpFormatter._get_help_string",
        ("training/run/command_line.py",),
        "Write the defaults into the help texts.",
    ),
    # -- torch: fused layers -----------------------------------------------------------------------------------------
    PrivateName(
        "torch:_addmm_activation",
        (FEED_FORWARD,),
        "FusedGELU.forward calls its base class on a GPU",
    ),
    *(
        PrivateName(
            f"{name} of torch.ops.mkldnn",
            users,
            "`has_onednn` returns False: layers on a CPU are then not packed, and GELU is an operator of its own.",
            lambda name=name: hasattr(torch.ops.mkldnn, name),
        )
        for name, users in (
            ("_linear_pointwise", (ONEDNN,)),
            ("_is_mkldnn_bf16_supported", (ONEDNN,)),
            ("_reorder_linear_weight", (PACKED_LINEAR,)),
        )
    ),
    PrivateName(
        "torch.nn:Module._save_to_state_dict",
        (PACKED_LINEAR,),
        "Register a state_dict hook that adds the weight in the usual layout.",
    ),
    PrivateName(
        "_compiled_call_impl of torch.nn.Module",
        (FUSED_LAYERS,),
        "Find another way to see that a module was compiled.",
        lambda: hasattr(torch.nn.Identity(), "_compiled_call_impl"),
    ),
    PrivateName(
        "_torchdynamo_orig_callable of what torch.compile returns",
        (FUSED_LAYERS,),
        "Find another way to see that a `forward` was compiled.",
        lambda: hasattr(torch.compile(len), "_torchdynamo_orig_callable"),
    ),
    PrivateName(
        "_forward_hooks of torch.nn.Module",
        (FUSED_LAYERS,),
        "find another way to see that a layer has hooks, or a hook would be passed by without a word",
        lambda: hasattr(torch.nn.Identity(), "_forward_hooks"),
    ),
    PrivateName(
        "_forward_pre_hooks of torch.nn.Module",
        (FUSED_LAYERS,),
        "find another way to see that a layer has hooks, or a hook would be passed by without a word",
        lambda: hasattr(torch.nn.Identity(), "_forward_pre_hooks"),
    ),
]

# Prefixes of keys in checkpoints and configurations. They lie in files that exist, so they cannot go.
WRITTEN_IN_FILES = {
    "_class_name",
    "_name_or_path",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}


def source_of(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__")


def nodes_of(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def source_files() -> list[Path]:
    return [
        path for folder in ("longlive_diffusers", "training", "examples") for path in (ROOT / folder).rglob("*.py")
    ]


@cache
def names_used(path: Path) -> set[str]:
    """Every name that a file imports, reads, writes, passes as an argument or declares in a class, and every string
    that could be an attribute's name."""
    names = set()
    for node in nodes_of(path):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.keyword(arg=str(name)) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.Constant(value=str(name)):
                names.add(name)
            case ast.ImportFrom(module=module, names=aliases):
                names |= {alias.name for alias in aliases} | set((module or "").split("."))
    return names


def names_defined(path: Path) -> set[str]:
    """What a file gives a name to: functions, classes, arguments, variables, attributes."""
    names = set()
    for node in nodes_of(path):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.arg(arg=name)
            ):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return names


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.path)
def test_the_name_is_there(entry):
    assert entry.is_there(), entry.when_gone


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.path)
def test_its_users_are_the_files_that_are_listed(entry):
    users = {path.relative_to(ROOT).as_posix() for path in source_files() if entry.name in names_used(path)}
    assert users == set(entry.users)


def test_no_other_private_name_is_used():
    """A private name that no file of ours defines is another package's."""
    own = set().union(*(names_defined(path) for path in source_files()))
    listed = {part for entry in PRIVATE_NAMES for part in entry.path.split(" of ")[0].replace(":", ".").split(".")}
    for path in source_files():
        used = {name for name in names_used(path) if name.isidentifier() and is_private(name)}
        suffixes = {node.args[0].value for node in nodes_of(path) if ends_with_a_word(node)}
        suffixes |= {part.value for node in nodes_of(path) for part in constant_ends(node)}
        assert used - own - listed - suffixes - WRITTEN_IN_FILES == set(), path


def ends_with_a_word(node: ast.AST) -> bool:
    """`name.endswith("_probability")`: the end of a name, not one."""
    match node:
        case ast.Call(func=ast.Attribute(attr="endswith"), args=[ast.Constant(value=str())]):
            return True
    return False


def constant_ends(node: ast.AST) -> list[ast.Constant]:
    """`f"{name}_seconds"`: what is put behind something else."""
    parts = node.values[1:] if isinstance(node, ast.JoinedStr) else []
    return [part for part in parts if isinstance(part, ast.Constant)]


def our_classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(longlive_diffusers.__path__, "longlive_diffusers."):
        if module.name.endswith("__main__"):
            continue
        with contextlib.suppress(ModuleNotFoundError):  # kernels need Triton
            members = vars(importlib.import_module(module.name)).values()
            yield from (cls for cls in members if inspect.isclass(cls) and cls.__module__ == module.name)


def test_no_other_private_name_is_overridden():
    """A private name of ours that a base class of another package also has."""
    listed = {entry.name for entry in PRIVATE_NAMES}
    made_by_python = {"_abc_impl", "_backward_cls", "_is_protocol"}  # ABC, autograd.Function and Protocol
    classes = list(our_classes())
    assert longlive_diffusers.LongLivePipeline in classes
    for cls in classes:
        bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] != "longlive_diffusers"]
        names = {name for name in vars(cls) if is_private(name) and not name.endswith("_")}
        foreign = {name for name in names for base in bases if name in vars(base)}
        assert foreign - listed - made_by_python == set(), cls
