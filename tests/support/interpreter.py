"""Make Triton's interpreter twice as fast, with the same results."""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def accelerate() -> None:
    """Cache work that the interpreter repeats for every call of a jit function inside a kernel.

    It searches all of ``triton.language`` for functions to replace, although the launch has already replaced them, and it rebuilds its
    table of dtypes for every operation.
    """
    replace = interpreter._patch_lang

    def replace_once(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
        if all(not tl.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()
        return replace(fn)

    look_up, dtypes = interpreter._get_np_dtype, {}

    def look_up_once(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(element, tl.pointer_type):
            return look_up(element)
        if element.name not in dtypes:
            dtypes[element.name] = look_up(element)
        return dtypes[element.name]

    interpreter._patch_lang = replace_once
    interpreter._get_np_dtype = look_up_once
