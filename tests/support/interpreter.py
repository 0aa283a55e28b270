"""Makes Triton's interpreter faster: it patches Triton's language once for each kernel, not at each call in one.

The interpreter lists all names of `triton.language` and replaces its functions whenever a kernel calls a function of
Triton's or of ours, although the kernel's own start has replaced them: a third of the time of a test.
"""

import functools
import inspect

from triton.runtime import interpreter


def patch_language_once() -> None:
    """Replaces the interpreter's function; one that gives no scope to restore is of another version, and stays."""
    patch, language = interpreter._patch_lang, interpreter.tl
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patched: set[frozenset] = set()  # what the kernel that runs has patched

    @functools.cache
    def modules(function) -> frozenset:
        known = language, language.core
        return frozenset(v for v in function.__globals__.values() if inspect.ismodule(v) and v in known)

    def patch_once(function):
        if modules(function) in patched:
            return interpreter._LangPatchScope()
        scope, is_kernel = patch(function), not patched
        patched.add(modules(function))
        if is_kernel:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once
