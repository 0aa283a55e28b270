"""Runs Python programs in processes that have imported PyTorch: a server has done so, and forks for each program.

The import takes a second of a core, which is most of what a short program takes. Tests of imports, threads or signals
start an interpreter of their own.
"""

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

THREADS = "OMP_NUM_THREADS"  # PyTorch has read it when it forks


def run(
    arguments: Sequence[str | Path], cwd: str | Path = "/", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs `python *arguments` (a file, -c CODE or -m MODULE, and its arguments) and captures what it prints."""
    arguments, env = [str(argument) for argument in arguments], dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        request = {"arguments": arguments, "cwd": str(cwd), "env": env, "files": [*map(str, files)]}
        server = _server(env.get(THREADS))
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(file.read_text() for file in files))


@functools.cache
def _server(threads: str | None) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != THREADS}
    environment |= {} if threads is None else {THREADS: threads}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], env=environment, cwd="/", **pipes)
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def _serve() -> dict | None:
    """Forks for each request, and prints the status of its program; returns the request in the forked process."""
    import torch  # noqa: F401

    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def _execute(arguments: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    for descriptor, path in enumerate((os.devnull, *files)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115, the server's has buffered requests
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    first, *sys.argv = arguments
    more = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = ["" if first.startswith("-") else os.path.dirname(first), *more]
    match first:
        case "-c":
            code = sys.argv[0]
            sys.argv[0] = "-c"
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        case _:
            sys.argv.insert(0, first)
            runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    request = _serve()
    if request is not None:
        _execute(**request)
