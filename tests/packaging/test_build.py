"""Tests what apc_kernels/build.py builds, for which GPUs, and where later builds go, without compiling."""

import json
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from apc_kernels import build

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="native code is built on Linux only")

EVERYTHING = build.Toolchain(
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    torch_path="/python/torch",
    compiler="/usr/bin/c++",
    ninja="/usr/bin/ninja",
    nvcc="/cuda/bin/nvcc",
    nvcc_cuda="13.0",
)
LIBRARIES = (build.CPU_LIBRARY, build.CUDA_LIBRARY)
NO_TORCH = replace(EVERYTHING, torch=None, torch_cuda=None, torch_path=None)
CPU_TORCH = replace(EVERYTHING, torch="2.13.0+cpu", torch_cuda=None)
NO_NVCC = replace(EVERYTHING, nvcc=None, nvcc_cuda=None)

# Toolchain, then what the reason against the CPU and against the CUDA library must name; None: it is built.
WORLDS = {
    "no torch": (NO_TORCH, "torch is not in the build environment", "torch is not in the build environment"),
    "CPU torch": (CPU_TORCH, None, "torch 2.13.0+cpu is a build without CUDA"),
    "CUDA torch, no nvcc": (NO_NVCC, None, "nvcc was not found"),
    "everything": (EVERYTHING, None, None),
    "nvcc of another minor version": (replace(EVERYTHING, nvcc_cuda="13.2"), None, None),
    "nvcc of another major version": (replace(EVERYTHING, nvcc_cuda="12.8"), None, "nvcc is CUDA 12.8, torch was"),
    "the oldest torch": (replace(EVERYTHING, torch="2.11.0"), None, None),
    "a nightly torch": (replace(EVERYTHING, torch="2.16.0.dev20261101+cu130"), None, None),
    "a torch of the next major version": (replace(EVERYTHING, torch="3.0.1"), None, None),
    "a torch too old": (replace(EVERYTHING, torch="2.9.1+cu130"), "2.9.1+cu130 is older than 2.11", "older than 2.11"),
    "no compiler": (replace(EVERYTHING, compiler=None), "no C++ compiler was found", "no C++ compiler was found"),
    "no ninja": (replace(EVERYTHING, ninja=None), "ninja was not found", "ninja was not found"),
    # One reason is enough, and the first thing to mend comes first.
    "nothing": (build.Toolchain(*[None] * 7), "torch is not in", "torch is not in"),
    "CPU torch, no nvcc": (replace(CPU_TORCH, nvcc=None, nvcc_cuda=None), None, "a build without CUDA"),
}


@pytest.mark.parametrize(("world", "against_cpu", "against_cuda"), WORLDS.values(), ids=WORLDS.keys())
def test_decide(world, against_cpu, against_cuda):
    decisions = build.decide(world, {})
    for device, against in (("cpu", against_cpu), ("cuda", against_cuda)):
        assert decisions[device].build is (against is None)
        assert (against or world.torch) in decisions[device].reason
    if against_cuda is None:
        assert f"nvcc {world.nvcc_cuda}" in decisions["cuda"].reason


@pytest.mark.parametrize(("world", "against_cpu", "against_cuda"), WORLDS.values(), ids=WORLDS.keys())
def test_force_cuda(world, against_cpu, against_cuda):
    forced = {"APC_KERNELS_FORCE_CUDA": "1"}
    if against_cuda is None:
        assert build.decide(world, forced) == build.decide(world, {})
    else:
        with pytest.raises(build.BuildError, match="APC_KERNELS_FORCE_CUDA") as error:
            build.decide(world, forced)
        assert against_cuda in str(error.value)


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_skip_native(value):
    for decision in build.decide(EVERYTHING, {"APC_KERNELS_SKIP_NATIVE": value}).values():
        assert decision == build.Decision(False, "APC_KERNELS_SKIP_NATIVE is set")


@pytest.mark.parametrize("name", ["APC_KERNELS_SKIP_NATIVE", "APC_KERNELS_FORCE_CUDA"])
@pytest.mark.parametrize("value", ["", "0", "false", "No"])
def test_a_variable_can_say_no(name, value):
    assert build.decide(CPU_TORCH, {name: value}) == build.decide(CPU_TORCH, {})


def test_skipping_and_forcing_contradict_each_other():
    with pytest.raises(build.BuildError, match="APC_KERNELS_SKIP_NATIVE is set"):
        build.decide(EVERYTHING, {"APC_KERNELS_SKIP_NATIVE": "1", "APC_KERNELS_FORCE_CUDA": "1"})


def test_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    for decision in build.decide(EVERYTHING, {}).values():
        assert not decision.build
        assert "darwin" in decision.reason


def test_no_gpu_is_ever_asked_for(monkeypatch):
    """Tests that nvcc and a CUDA torch suffice to build both libraries, as in containers and on login nodes."""

    def asked(*_):
        raise AssertionError("the build asked for a GPU")

    for name in ("is_available", "device_count", "get_device_capability", "get_device_properties", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, asked)
    world = build.observe({})
    assert world.torch == torch.__version__
    assert not [field.name for field in fields(world) if "gpu" in field.name or "device" in field.name]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "80 90 100 100+"),
        ("", "80 90 100 100+"),
        ("9.0", "90"),
        ("8.0;9.0a+PTX", "80 90a 90a+"),
        ("8.0 8.6, 12.0", "80 86 120"),
        ("10.0+PTX", "100 100+"),
    ],
)
def test_architectures(given, expected):
    environ = {} if given is None else {"TORCH_CUDA_ARCH_LIST": given}
    assert build.code_options(build.architectures(environ)) == [
        f"-gencode=arch=compute_{number.rstrip('+')},code={'compute' if '+' in number else 'sm'}_{number.rstrip('+')}"
        for number in expected.split()
    ]


@pytest.mark.parametrize("wrong", ["90", "sm_90", "Hopper", "9.0+ptx", "9.0-PTX", "9.0ab"])
def test_wrong_architectures(wrong):
    with pytest.raises(build.BuildError, match="TORCH_CUDA_ARCH_LIST") as error:
        build.architectures({"TORCH_CUDA_ARCH_LIST": f"8.0;{wrong}"})
    assert repr(wrong) in str(error.value)


@pytest.mark.parametrize(
    ("given", "nvcc", "expected"),
    [
        (None, "12.6", ["8.0", "9.0+PTX"]),
        (None, "12.8", ["8.0", "9.0", "10.0+PTX"]),
        ("7.0;7.5;8.0;9.0+PTX", "13.0", ["8.0", "9.0+PTX"]),  # as containers have it
    ],
)
def test_architectures_that_nothing_is_compiled_for(given, nvcc, expected):
    assert build.architectures({"TORCH_CUDA_ARCH_LIST": given or ""}, nvcc) == expected


def test_only_older_architectures():
    with pytest.raises(build.BuildError, match=r"expected an architecture from 8\.0 on, got '6\.1;7\.5'"):
        build.architectures({"TORCH_CUDA_ARCH_LIST": "6.1;7.5"})


@pytest.mark.parametrize(
    ("entries", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0;10.0+PTX", (8, 0), False),
        ("9.0;10.0+PTX", (12, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("8.0;9.0;10.0+PTX", (7, 5), False),
    ],
)
def test_which_gpus_compiled_code_runs_on(entries, capability, runs):
    assert build.has_code(entries.split(";"), capability) is runs


def test_wrong_architectures_do_not_matter_where_nothing_is_built_for_a_gpu():
    text = build.ninja_file(CPU_TORCH, build.decide(CPU_TORCH, {}), {"TORCH_CUDA_ARCH_LIST": "Hopper"})
    assert build.CPU_LIBRARY in text
    assert build.CUDA_LIBRARY not in text


def test_each_library_is_linked_from_its_own_files():
    text = build.ninja_file(EVERYTHING, build.decide(EVERYTHING, {}), {})
    linked = {name: re.search(rf"^build {re.escape(name)}: \w+ (.*)$", text, re.M)[1] for name in LIBRARIES}
    in_cuda = set(linked[build.CUDA_LIBRARY].split())
    assert in_cuda == {f"objects/{path.relative_to(build.SOURCES).as_posix()}.o" for path in build.cuda_files()}
    assert {"objects/affinities/affinities_cuda.cpp.o", "objects/affinities/affinity_moments.cu.o"} <= in_cuda
    assert "_cuda" not in linked[build.CPU_LIBRARY]


def test_installing_takes_away_what_is_no_longer_built(tmp_path):
    built, installed = tmp_path / "built", tmp_path / "installed"
    for folder in (built, installed):
        folder.mkdir()
    for name in (build.RECORD, build.CPU_LIBRARY):
        (built / name).write_text("new")
    for name in (build.RECORD, build.CPU_LIBRARY, build.CUDA_LIBRARY):
        (installed / name).write_text("old")
    record = {"cpu": {"built": True}, "cuda": {"built": False}}
    build.install(record, built, installed)
    assert {path.name for path in installed.iterdir()} == {build.RECORD, build.CPU_LIBRARY}
    assert (installed / build.CPU_LIBRARY).read_text() == "new"
    assert json.loads((installed / build.RECORD).read_text()) == record


def stand_in(path: Path, output: str) -> str:
    """Makes a program that prints one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return str(path)


def test_which_nvcc(tmp_path):
    named = stand_in(tmp_path / "named" / "my-nvcc", "Cuda compilation tools, release 13.1, V13.1.5")
    home = stand_in(tmp_path / "home" / "bin" / "nvcc", "Cuda compilation tools, release 12.9, V12.9.41")
    environ = {"NVCC": named, "CUDA_HOME": str(tmp_path / "home"), "CUDA_PATH": str(tmp_path / "elsewhere")}
    assert build.observe(environ).nvcc == named
    assert build.observe(environ).nvcc_cuda == "13.1"
    assert build.find_nvcc({**environ, "NVCC": ""}) == home
    # One that is named but not there is not quietly replaced by another.
    assert build.find_nvcc({**environ, "NVCC": str(tmp_path / "absent")}) is None


def test_an_nvcc_that_does_not_answer_counts_as_none(tmp_path):
    world = build.observe({"NVCC": stand_in(tmp_path / "nvcc", "the CUDA toolkit is not installed")})
    assert world.nvcc is None
    assert world.nvcc_cuda is None


def test_the_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build.user_cache().is_relative_to(tmp_path / "home" / ".cache" / "apc_kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.user_cache().is_relative_to(tmp_path / "cache" / "apc_kernels")


def test_every_version_of_the_sources_has_its_own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    (tmp_path / "kernel.cpp").write_text("int a;")
    before = build.user_cache()
    (tmp_path / "README").write_text("not compiled")
    assert build.user_cache() == before
    (tmp_path / "kernel.cpp").write_text("int b;")
    assert build.user_cache() != before
    (tmp_path / "kernel.cpp").write_text("int a;")
    assert build.user_cache() == before
