"""Numbers of 8 bits, E4M3: what their codes are, and rows of them, each with a scale.

| file | what it has |
|---|---|
| `e4m3.py` | numbers to codes and back, with scales that are powers of two |
| `rows.py` | the input of a layer, quantized row by row |
| `operators.py`, `kernels.py` | Triton's kernels of it, as operators of PyTorch, and what other kernels use of them |
"""
