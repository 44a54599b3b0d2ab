"""The names that options take, and their limits.

They are spelled out, because the modules that define them import torch, and parsing must not wait for that.
tests/cli/test_choices.py compares them with what they name.
"""

from ..limits import FPS as FPS
from ..limits import MAX_STEPS as MAX_STEPS


DTYPES = ("float32", "bfloat16", "float16")
KV_CACHE_DTYPES = (*DTYPES, "nvfp4", "fp8", "fp8_attention")
CLEAN_PASSES = ("full", "text_free", "last")
NVFP4_BACKENDS = ("scaled_mm", "te", "fp8", "w4a16", "emulate")
SCALE_RULES = ("static_6", "static_4", "mse", "mae", "abs_max", "unbiased")
WEIGHT_BLOCKS = {"1x16": (1, 16), "16x16": (16, 16)}
RECIPES = ("longlive", "nvidia", "nvfp4_pretrain")
KEPT_MODULES = ("patch_embedding", "condition_embedder", "proj_out")
SPEEDS = ("exact", "fast", "fastest")
BENCH_SIZES = ("toy", "cpu-reference", "5b")
BENCH_DECODERS = ("vae", "tiny")

DEFAULT_SECONDS = 5.0

MAX_SEED = 2**64 - 1  # torch's generators take 64 bits
MAX_SECONDS = 1_000_000  # 11 days; beyond that, --stream
MAX_FRAMES = MAX_SECONDS * FPS
MAX_CHUNKS = 10_000_000
MAX_CACHED_FRAMES = 100_000
MAX_THREADS = 1024
MAX_ROUNDS = 1000
MAX_DEVICES = 1024
MAX_LORA_SCALE = 100
MAX_SESSIONS = 1000
MAX_QUEUE = 100_000
MAX_REPLICAS = 1024
MAX_MINUTES = 60 * 24 * 7
MAX_PIXELS = 2**28
MAX_PORT = 65_535
