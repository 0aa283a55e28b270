"""Compiles GPU code for GPUs that are not there; no register may spill that is not listed here with a reason."""

import json
import os
import re
import subprocess
from pathlib import Path

import forked
import pytest

from apc_kernels import build
from apc_kernels.dispatch import triton_version

ROOT = Path(__file__).resolve().parents[2]
USUAL, *OTHERS = "90", "80", "100"
SPILLS_ALLOWED: dict[str, str] = {}  # kernel name: reason
SHARED_LIMIT = 48 * 1024  # what a kernel gets without asking for more
# CUDA kernels, counting each instance of a template. They take most of the library's build time: add an instance only
# where a branch at run time would cost more.
INSTANCES = 42

TRITON = [path.parent.name for path in sorted((ROOT / "apc_kernels" / "ops").glob("*/triton.py"))]
CUDA = [file for file in build.cuda_files() if file.suffix == ".cu"]


def compiled_triton(arch: str, *options: str) -> list[dict]:
    pytest.importorskip("triton", reason="needs triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    gate = ROOT / "tests" / "support" / "triton_gate.py"
    run = forked.run([gate, arch, *options, *TRITON], env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = json.loads(run.stdout)
    assert len({kernel["kernel"] for kernel in kernels}) == len(kernels) > 0
    spilling = [k for k in kernels if k["stack"] > 0 and k["kernel"].split()[0] not in SPILLS_ALLOWED]
    assert not spilling
    return kernels


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=pytest.mark.slow) for arch in (USUAL, *OTHERS)])
def test_triton(arch):
    kernels = compiled_triton(f"sm_{arch}")
    assert all(0 < kernel["reg"] <= 255 and kernel["shared"] <= SHARED_LIMIT for kernel in kernels)


def test_triton_on_aligned_maps():
    """Compiles one case of every family of kernels: all of them take minutes."""
    kernels = compiled_triton(f"sm_{USUAL}", "--first")
    assert all(0 < kernel["reg"] <= 255 and kernel["shared"] <= SHARED_LIMIT for kernel in kernels)


@pytest.mark.slow
def test_triton_for_amd():
    if triton_version() < (3, 8):
        pytest.skip("needs Triton 3.8 or newer for float64 products on AMD GPUs")
    assert all(kernel["shared"] <= 64 * 1024 for kernel in compiled_triton("gfx942"))


def test_triton_compiles_a_kernel_a_few_times_for_all_sizes():
    """Every variant stops a training at a new size for seconds."""
    pytest.importorskip("triton", reason="needs triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = forked.run([ROOT / "tests" / "support" / "triton_variants.py", "2000"], env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    variants = json.loads(run.stdout)
    assert len(variants) >= 17 and max(variants.values()) <= 2, variants
    assert sum(variants.values()) <= 40


def test_triton_reads_the_map_in_16_bytes():
    """The map of an aligned channels_last case is read and written in vectors of 128 bits."""
    pytest.importorskip("triton", reason="needs triton")
    program = """
import json, torch, triton, triton_gate
from triton.backends.compiler import GPUTarget
from apc_kernels.ops.pyramid_pool import triton as module
x = triton_gate.meta(8, 2048, 64, 64, dtype=torch.bfloat16, channels_last=True)
pooled = triton_gate.meta(8, 2048, 50, dtype=torch.bfloat16)
launches = [module.forward_launches(x, (1, 2, 3, 6), pooled)[0], *module.backward_launches(pooled, (1, 2, 3, 6), x)]
compiled = [triton.compile(triton_gate.source(k, a), target=GPUTarget("cuda", 90, 32)) for k, _, a in launches]
print(json.dumps([kernel.asm["ptx"] for kernel in compiled]))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "support"), environment.get("PYTHONPATH", "")])
    run = forked.run(["-c", program], env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    forward, backward = json.loads(run.stdout)
    loads = re.findall(r"ld\.global\.\S+", forward)
    assert loads.count("ld.global.b32") == 2  # where the segment of rows starts and ends
    assert set(loads) == {"ld.global.b32", "ld.global.v4.b32"}
    assert set(re.findall(r"st\.global\.\S+", backward)) == {"st.global.v4.b32"}


@pytest.fixture
def compiled_cuda(arch):
    """Returns the objects of the CUDA library by name, compiled anew only where a source has changed.

    Beside each lies ptxas' report on its kernels. The code for the CPU is compiled for one architecture alone: it is
    the same for all of them.
    """
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    import torch

    files = CUDA if arch != USUAL else build.cuda_files()
    folder = ROOT / "build" / "gates" / f"sm_{arch}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = " ".join([*build.nvcc_flags(), f"-isystem {build.quote(Path(torch.__file__).parent / 'include')}"])
    output = "-c" if arch == USUAL else "-cubin"
    command = f"{build.quote(nvcc)} {flags} -arch=sm_{arch} -Xptxas -v -MD -MF $out.d {output} $in -o $out"
    lines = [
        f"rule cuda\n  command = {command} > $out.log 2>&1 || {{ cat $out.log; exit 1; }}",
        "  depfile = $out.d\n  deps = gcc",
    ]
    objects = {file.name: f"{file.relative_to(build.SOURCES).as_posix()}.o" for file in files}
    lines += [f"build {objects[file.name]}: cuda {build.escape(file)}" for file in files]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    run = subprocess.run([build.find_ninja(), "-C", str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    return {name: folder / target for name, target in objects.items()}


def assert_fits(log: str, where: str) -> int:
    """Checks what ptxas tells about each kernel, and returns their number."""
    assert "warning" not in log, log
    entries = log.split("Compiling entry function")[1:]
    for entry in entries:
        name = re.search(r"'(\w+)'", entry)[1]
        spills = [int(number) for number in re.findall(r"(\d+) bytes spill", entry)]
        assert spills and (max(spills) == 0 or any(kernel in name for kernel in SPILLS_ALLOWED)), f"{name} in {where}"
        # Two blocks at least share a multiprocessor's 65536 registers.
        threads = 128 if "_mma" in name else 256
        assert 2 * threads * int(re.search(r"Used (\d+) registers", entry)[1]) <= 65536, f"{name} in {where}"
        static = re.search(r"(\d+) bytes smem", entry)
        assert static is None, f"{name} in {where}: shared memory is one dynamic buffer (SHARED_BUFFER)"
    return len(entries)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [USUAL, *OTHERS])
def test_cuda(compiled_cuda, arch):
    for file in CUDA:
        log = compiled_cuda[file.name].with_name(f"{file.name}.o.log").read_text()
        assert assert_fits(log, f"{file.name} for sm_{arch}") > 0
    for target in compiled_cuda.values():
        assert "warning" not in target.with_name(f"{target.name}.log").read_text(), target


def test_cuda_as_it_runs_here(tmp_path):
    """Tests the PTX that tests/ptx executes, for one GPU: the library's files take half a minute to compile."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    import ptx_cuda

    texts = ptx_cuda.bindings().texts()
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.ptx").write_text(text)
        command = [Path(nvcc).with_name("ptxas"), "-v", f"-arch=sm_{USUAL}", f"{number}.ptx", "-o", f"{number}.cubin"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        assert assert_fits(run.stderr, f"the kernels of tests/emulation for sm_{USUAL}") == text.count(".entry ")
    assert len(texts) < sum(text.count(".entry ") for text in texts) <= INSTANCES


@pytest.mark.slow
@pytest.mark.parametrize("arch", [USUAL])
def test_cuda_imports_no_unstable_symbol(compiled_cuda):
    for target in compiled_cuda.values():
        symbols = subprocess.run(["nm", "--undefined-only", target], capture_output=True, text=True, check=True).stdout
        unstable = re.findall(r"U (_ZNK?(?:2at|3c10|5torch)\w*|_?Py\w+)", symbols)
        assert not unstable, f"{target}: {unstable}"


def test_kernels_for_one_instruction_set_share_nothing_with_another():
    """A weak symbol in a *_cpu object would let the linker take AVX-512 code for every processor's."""
    objects = list((ROOT / "build" / "native" / "objects").rglob("*_cpu.*.o"))
    if not objects:
        pytest.skip("needs the objects of a build in this checkout")
    for path in objects:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r" [WVu] \w+", symbols), f"{path}\n{symbols}"
