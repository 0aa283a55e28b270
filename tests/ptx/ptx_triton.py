"""Runs Triton launches (kernel, grid, arguments) as compiled code: Triton's PTX, executed by the machine of ptx.py."""

import atexit
import functools
import hashlib
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import ptx
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
TYPES |= {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}

# What each kernel stores to. An `update` is read before it is written, and so has to hold something.
OUTPUTS = {
    "pool_rows_kernel": {"row_sums"},
    "pool_bins_kernel": {"out"},
    "spread_rows_kernel": {"grad_x"},
    "context_kernel": {"z"},
    "regions_kernel": {"grad_regions", "grad_shift", "grad_bias", "slope", "slope_moments"},
    "map_kernel": {"result", "grad_weight", "grad_bias"},
    "moments_kernel": {"means", "rests", "squares"},
    "join_kernel": {"mean", "covariance"},
    "guide_statistics_kernel": {"features", "statistics"},
    "guide_biases_kernel": {"biases"},
    "vectors_kernel": {"vectors"},
    "products_kernel": {"statistics"},
    "product_norm_kernel": {"norm_rows", "shift", "center"},
    "norm_sums_kernel": {"sums", "grad_gamma", "grad_beta"},
    "vector_gradients_kernel": {"grad_vectors"},
    "region_gradients_kernel": {"grad_regions"},
    "projections_kernel": {"grad_projection"},
    "moment_gradients_kernel": {"linear", "quadratic"},
    "guide_sums_kernel": {"through", "sums", "grad_weight", "grad_gamma", "grad_beta"},
    "guide_gradients_kernel": {"grad_guide"},
    "constant_kernel": {"constant"},
    "encode_kernel": {"distances", "weights", "sums", "counts"},
    "residuals_kernel": {"result", "sums", "counts", "of_scale"},
    "peaks_kernel": {"peaks", "taints", "means"},
    "cross_entropy_kernel": {"normalizer", "losses", "sums"},
    "argmax_kernel": {"labels"},
    "softmax_kernel": {"out"},
    "confusion_kernel": set(),
    "pixels_kernel": set(),
    "cells_kernel": {"grad_logits"},
    "region_sums_kernel": {"wrong"},
    "region_pixels_kernel": {"largest", "inverse", "best", "reference", "mean"},
    "region_cells_kernel": {"grad_logits"},
}
UPDATES = {"confusion_kernel": {"counts", "invalid"}, "region_sums_kernel": {"sums"}}
UPDATES |= {"pixels_kernel": {"records", "classes", "scales"}}  # zeros where a slot holds no pixel
# Findings that are no fault, with the reason.
HARMLESS = {
    # A tile smaller than the block: several threads load what is added to, one of them stores. What the others load
    # late they throw away; a result that had it would be wrong in some schedule.
    ("softmax_kernel", "race between warps", "out"),
    ("softmax_kernel", "race between lanes", "out"),
}


MODULES = ("pyramid_pool.triton", "affinities.triton", "affinities.triton_backward", "affinities.triton_moments")
MODULES += ("affinities.triton_phases", "affinities.triton_guide_backward", "affinities.triton_product_backward")
MODULES += ("encode.triton", "upsample.triton", "upsample.triton_labels", "upsample.triton_regions")
MODULES += ("upsample.triton_cross_entropy", "upsample.triton_cross_entropy_backward")


def serve(monkeypatch, arch: int, **options) -> None:
    """Lets the machine run what the package's operations launch: all that `run` takes is its options."""
    for name in MODULES:
        module = importlib.import_module(f"apc_kernels.ops.{name}")
        monkeypatch.setattr(module, "run", lambda launches, x: run(launches, arch, **options))
        if hasattr(module, "operand_dtype"):  # the interpreter's products of bfloat16 are wrong; ours are not
            monkeypatch.setattr(module, "operand_dtype", lambda x: x.dtype)


class Compiler:
    """Runs a process that compiles, started when the first kernel is not in the cache."""

    def __init__(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([*sys.path, environment.get("PYTHONPATH", "")])
        script = Path(__file__).with_name("ptx_triton_compiler.py")
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        atexit.register(self.process.kill)

    def __call__(self, request: dict) -> dict:
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)
        if "error" in answer:
            raise RuntimeError(f"{request['name']} for sm_{request['arch']}: {answer['error']}")
        return answer


@functools.cache
def compiler() -> Compiler:
    return Compiler()


@functools.cache
def sources(module: str) -> str:
    """Returns the text of all kernels beside a module, on which its compiled code depends."""
    folder = Path(sys.modules[module].__file__).parent
    files = sorted(folder.glob("triton*.py"))
    return "".join(file.read_text() for file in files) + version("triton")


def compiled(function, arch: int, arguments: dict, options: dict) -> dict:
    request = {
        "module": function.__module__,
        "name": function.__name__,
        "arch": arch,
        "arguments": arguments,
        "options": options,
    }
    key = hashlib.sha256((sources(function.__module__) + repr(request)).encode()).hexdigest()[:32]
    file = ptx.FOLDER / "triton" / f"{key}.pickle"
    if file.exists():
        return pickle.loads(file.read_bytes())
    answer = compiler()(request)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(pickle.dumps(answer))
    temporary.replace(file)
    return answer


def run(
    launches: list[tuple], arch: int = 80, seed: int | None = None, changed=lambda kernel, text: text, counts=None
) -> None:
    """Runs launches one after the other on one memory. changed(kernel, text) makes another text of its PTX."""
    memory = ptx.Memory()
    seen_outputs = set()
    for kernel, _, arguments in launches:
        name = kernel.fn.__name__
        outputs, updates = OUTPUTS[name], UPDATES.get(name, set())
        if arguments.get("ADD"):  # to what is there
            outputs, updates = set(), outputs
        for argument, value in arguments.items():
            if isinstance(value, Tensor):
                written = argument in outputs | updates
                first = value.untyped_storage().data_ptr() not in seen_outputs
                if argument in outputs:
                    seen_outputs.add(value.untyped_storage().data_ptr())
                read = first and argument not in outputs
                memory.add(argument, value, written=written, read=read)
    memory.place()
    for kernel, grid, arguments in launches:
        launch(kernel, grid, arguments, memory, arch, seed, changed, counts)
    memory.copy_back()


def launch(kernel, grid, arguments: dict, memory: ptx.Memory, arch: int, seed, changed, counts) -> None:
    def described(value):
        if isinstance(value, Tensor):
            return ("tensor", TYPES[value.dtype], memory.address(value) % 16 == 0)
        return value

    options = {key: arguments[key] for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in arguments}
    parameters = list(inspect.signature(kernel.fn).parameters)
    values = {key: arguments[key] for key in parameters}
    code = compiled(kernel.fn, arch, {key: described(value) for key, value in values.items()}, options)
    numbers = []
    for path in code["order"]:
        value = values[parameters[path[0]]]
        value = value[path[1]] if len(path) > 1 else value
        numbers.append(memory.address(value) if isinstance(value, Tensor) else int(value))
    text = changed(code["name"], code["ptx"])
    layout = ptx.parse(text).parameters(code["name"])
    packed = ptx.pack(layout, numbers + [0] * (len(layout) - len(numbers)))  # at the end, pointers to no scratch
    result = ptx.launch(
        text, code["name"], memory, grid, code["threads"], code["shared"], packed, seed, counts is not None, HARMLESS
    )
    if counts is not None:
        counts.append((code["name"], result))
