"""Steps of a transformer block that are memory traffic and no product, fused: plain functions, which say what is
computed, and decide by their arguments how.

Where nothing fits - with gradients, while compiling, for layers that are more than they seem - plain PyTorch computes
the same.

| file | what it computes |
|---|---|
| `residual.py` | add an update to the residual stream, normalize, modulate |
| `rotation.py` | normalize queries and keys, rotate them, write keys and values into the KV cache |
| `decode.py` | attention's result in FP8 to numbers |
| `feed_forward.py`, `packed_linear.py` | linear layers and GELU; a linear layer on a CPU |
| `onednn.py` | what PyTorch multiplies with on a CPU |
| `layers.py` | whether a layer is only what its class says, so that its weights may be used without calling it |
| `operators.py`, `kernels.py` | the Triton kernels, as operators of PyTorch |
"""
