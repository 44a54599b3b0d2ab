"""Triton's interpreter without work that it does again and again: kernels that call functions take a third less.

It looks through all of Triton's language at every call of a function of a kernel, to replace what is replaced already,
and makes a table of all dtypes whenever it asks for one.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


POINTER = np.dtype(np.uint64)


def quicken_interpreter() -> None:
    """Change Triton's interpreter in this process; what it computes stays the same."""
    replace_language = interpreter._patch_lang

    def replace_language_once(function):
        seen = [module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())]
        is_replaced = not any(tl.core.is_builtin(module.load) for module in seen)
        return interpreter._LangPatchScope() if is_replaced else replace_language(function)

    interpreter._patch_lang = replace_language_once
    numpy_type = functools.cache(interpreter._get_np_dtype)

    def numpy_type_of_elements(type: tl.dtype):
        element = type.element_ty if isinstance(type, tl.block_type) else type
        return POINTER if isinstance(element, tl.pointer_type) else numpy_type(element)

    interpreter._get_np_dtype = numpy_type_of_elements
