"""Installs `apc_kernels` and `apcnet`, and builds the native libraries where that is possible (apc_kernels/build.py).

Nothing here fails because torch, a compiler or nvcc is missing: the package then works without the library in question,
and `python -m apc_kernels.info` says what is missing. Metadata stand in pyproject.toml.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("apc_kernels_build", ROOT / "apc_kernels" / "build.py")
native = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = native
spec.loader.exec_module(native)


class BuildWithNative(build_py):
    def run(self):
        super().run()
        folder = ROOT / "build" / "native"
        record = native.build(folder)
        if not self.editable_mode:  # a checkout finds the libraries where they were built
            native.install(record, folder, Path(self.build_lib) / "apc_kernels" / "native")
        print(native.summary(record))


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        return native.decide(native.observe())["cpu"].build


try:
    setup(
        packages=[*find_packages(include=["apc_kernels*", "apcnet*"]), "apc_kernels.csrc"],
        package_dir={"apc_kernels.csrc": "csrc"},
        include_package_data=False,  # the list below is the whole of it
        package_data={
            "apc_kernels": ["py.typed"],
            "apc_kernels.csrc": ["**/*.h", "**/*.cpp", "**/*.cuh", "**/*.cu"],
            "apcnet": ["py.typed", "published.csv", "data/class_lists/*.txt", "training/report/page.*", "web/*.*"],
        },
        cmdclass={"build_py": BuildWithNative},
        distclass=NativeDistribution,
        # The libraries use no Python symbol at all, so that one wheel serves every Python from 3.10 on.
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
except native.BuildError as error:
    sys.exit(f"apc_kernels: {error}")
