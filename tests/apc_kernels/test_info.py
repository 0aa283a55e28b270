"""Tests that `python -m apc_kernels.info` reports what is installed, built and served."""

import subprocess
import sys
from types import SimpleNamespace

import torch

import apc_kernels
from apc_kernels import info, library
from apc_kernels.ops.affinities import checks, moments

# Operations without kernels of their own.
COMPOSITIONS = {"adaptive_context_norm", "upsample_binary_cross_entropy"}


def test_it_names_every_operation_on_every_device():
    run = subprocess.run([sys.executable, "-m", "apc_kernels.info"], cwd="/", capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    for line in ("apc_kernels ", "torch ", "threads ", "gpu ", "cpu library ", "cuda library ", "instructions "):
        assert f"\n{line}" in f"\n{run.stdout}"
    lines = [line.split("  ")[0] for line in run.stdout.splitlines()]
    for operation in info.SERVED_BY:
        expected = {operation} if operation in COMPOSITIONS else {f"{operation} on cpu", f"{operation} on cuda"}
        assert expected <= {*lines}


def test_operations_are_the_public_functions():
    public = set(apc_kernels.__all__) - {
        "accelerate",
        "backend",
        "checked_labels",
        "BatchNorm",
        "FusedConv2d",
        "SlowPathWarning",
    }
    assert set(info.SERVED_BY) == public


def test_an_old_driver_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(info, "_driver_cuda_version", lambda: (12, 4))
    assert "the NVIDIA driver is too old. It allows CUDA 12.4, this torch needs 13.0" in info.gpu()
    monkeypatch.setattr(info, "_driver_cuda_version", lambda: None)
    assert info.gpu() == "none: no NVIDIA driver is installed"


def test_a_build_for_amd_gpus_is_not_one_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert info.gpu() == "none: no AMD GPU is visible (check rocminfo and HIP_VISIBLE_DEVICES)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert info.gpu() == "AMD Instinct MI300X (gfx942)"
    assert library.cuda.__wrapped__().reason.endswith("is a build for AMD GPUs")


def test_an_old_triton_leaves_float32_moments_to_pytorch_on_amd_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    x = torch.zeros(1, 4, 4, 4)
    for version, reasons in (((3, 7), ["triton"]), ((3, 8), [])):
        monkeypatch.setattr(checks, "triton_version", lambda version=version: version)
        assert list(moments._limits(x, (1, 2))) == reasons
        assert not moments._limits(x.bfloat16(), (1, 2))
