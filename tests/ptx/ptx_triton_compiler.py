"""Compiles Triton kernels to PTX in a process of its own, because those decorated for the interpreter cannot be.

Reads pickled requests from standard input, and answers each with a pickled dictionary.
"""

import importlib
import os
import pickle
import sys

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend


def compile_to_ptx(module: str, name: str, arch: int, arguments: dict, options: dict) -> dict:
    """Returns PTX and how to launch it. arguments: by name; a tensor is ("tensor", type, whether it is aligned)."""
    kernel = getattr(importlib.import_module(module), name)
    source, order = describe(kernel, arguments)
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages = {}
    backend.add_stages(stages, options, source.language)
    code = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    metadata = {"target": target, **options.__dict__}
    for extension, stage in stages.items():
        code = stage(code, metadata)
        if extension == "ptx":
            break
    assert not metadata["global_scratch_size"] and not metadata["profile_scratch_size"]
    return {
        "ptx": code,
        "name": metadata["name"],
        "shared": metadata["shared"],
        "threads": 32 * metadata["num_warps"],
        "order": order,
    }


def describe(kernel, arguments: dict) -> tuple[ASTSource, list[tuple]]:
    """Specialises the kernel as Triton's launcher would; returns it and the paths of the arguments that are left."""
    signature, constants, attributes, order = {}, {}, {}, []

    def kind(value, path: tuple, parameter) -> str:
        if parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            constants[path] = value
            return "constexpr"
        order.append(path)
        is_tensor = isinstance(value, tuple)
        aligned = value[2] if is_tensor else value % 16 == 0
        if aligned and not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment:
            attributes[path] = [["tt.divisibility", 16]]
        if is_tensor:
            return value[1]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or not isinstance(value, tuple) or value[:1] == ("tensor",):
            signature[parameter.name] = kind(value, (index,), parameter)
        else:
            signature[parameter.name] = tuple(kind(v, (index, place), parameter) for place, v in enumerate(value))
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes), order


def serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed on the way is no answer
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = compile_to_ptx(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        pickle.dump(answer | {"triton": triton.__version__}, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
