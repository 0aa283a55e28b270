"""Tests that `python -m apc_kernels.info` reports what is installed, built and served."""

import subprocess
import sys

import torch

import apc_kernels
from apc_kernels import info

COMPOSITIONS = {"adaptive_context_norm", "encode", "pyramid_conv"}  # no kernels of their own


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
    public = set(apc_kernels.__all__) - {"accelerate", "backend", "checked_labels", "BatchNorm", "SlowPathWarning"}
    assert set(info.SERVED_BY) == public


def test_an_old_driver_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(info, "_driver_cuda_version", lambda: (12, 4))
    assert "the NVIDIA driver is too old. It allows CUDA 12.4, this torch needs 13.0" in info.gpu()
    monkeypatch.setattr(info, "_driver_cuda_version", lambda: None)
    assert info.gpu() == "none: no NVIDIA driver is installed"
