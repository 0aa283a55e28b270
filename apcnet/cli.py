"""Trains, evaluates and runs semantic segmentation models, converts and exports them, and checks datasets."""

import dataclasses
import functools
import importlib.util
import io
import itertools
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import tyro

from apcnet import threads
from apcnet.choices import check_choice
from apcnet.commands.data import check, import_data, pack, prepare
from apcnet.commands.exchange import convert, export, push
from apcnet.commands.models import compare, evaluate, info, predict, presets, train
from apcnet.commands.serving import explore, serve
from apcnet.config import Config, Model
from apcnet.console import print_error
from apcnet.files import printable
from apcnet.flags import refuse_minutes, ways_on
from apcnet.hub import locate
from apcnet.presets import preset, with_weights

COMMANDS = (
    *(train, evaluate, predict, serve, explore, compare, presets),
    *(convert, export, push, check, import_data, prepare, pack, info),
)

# The backbone weights of the preset `folder` where the package timm is installed, unless one of these flags is given.
OWN_WEIGHTS = "timm:resnet50c"
WEIGHTS = ("--backbone", "--backbone-weights", "--init", "--from-scratch")

# Errors of apc_kernels about APC_KERNELS_ISA and APC_KERNELS_BACKEND. To catch a class of their own, PyTorch would
# have to be imported, which takes a second.
ASKED_FOR = re.compile(r"APC_KERNELS_ISA=|\w+: the backend '\w+' was asked for, but ")

BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 2, 130, 141  # exit statuses; wrong flags exit with 2 too


def main(arguments: list[str] | None = None) -> None:
    """Runs a command, and reports wrong input in one line, without a traceback."""
    warnings.showwarning = print_error
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")  # names of files need not be valid in any encoding
    threads.sleep_while_waiting()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, `head` for example, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        sys.exit(CLOSED_PIPE)
    except ConnectionError as error:  # an OSError, but another process of the run has failed
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ValueError, ModuleNotFoundError, FloatingPointError) as error:
        _fail(str(error))
    except RuntimeError as error:
        if not ASKED_FOR.match(str(error)):
            raise
        _fail(str(error).partition("\n")[0])
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _run(arguments: list[str]) -> None:
    commands = {command.__name__: command for command in COMMANDS}
    if arguments and arguments[0] in commands:
        typed, name, arguments = ["apcnet", *arguments], arguments[0], arguments[1:]
        arguments, defaults = _defaults(name, arguments)
        command = functools.partial(commands[name], **defaults)
        try:
            tyro.cli(command, prog=f"apcnet {name}", args=arguments)
        except ValueError as error:
            raise ValueError(f"{error}{_ways_on(error, typed, defaults)}") from None
    else:
        if arguments and not arguments[0].startswith("-"):
            check_choice(arguments[0], "command", commands)
        tyro.extras.subcommand_cli_from_dict(commands, prog="apcnet", description=__doc__, args=arguments)


def _defaults(command: str, arguments: list[str]) -> tuple[list[str], dict]:
    """Removes the name of a preset from a command's arguments; returns the rest, and the defaults of its flags.

    The preset, or the config of the run that is named, determines the defaults.
    """
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    if command == "train":
        refuse_minutes(arguments)
        name = names[0] if names else "tiny"
        config = preset(name)
        for flag, following in itertools.zip_longest(arguments, arguments[1:]):
            if flag == "--init" or flag.startswith("--init="):
                config = dataclasses.replace(config, model=_read_model(flag.partition("=")[2] or following))
        chosen = {word.partition("=")[0].replace("_", "-") for word in arguments}
        if name == "folder" and not chosen & set(WEIGHTS) and importlib.util.find_spec("timm"):
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone_weights=OWN_WEIGHTS))
        return arguments[len(names[:1]) :], {"config": config, "out": Path("runs") / name}
    if command == "evaluate" and names:
        config = preset(names[1]) if len(names) > 1 else _config_of(names[0])
        return names[:1] + arguments[len(names[:2]) :], {"data": config.data, "protocol": config.evaluation}
    if command in ("predict", "serve") and names and Path(names[0]).is_dir():
        from apcnet.training.folder import model_file, read_config

        model_file(Path(names[0]))  # raises an error for a folder that is no run's
        return arguments, {"protocol": read_config(Path(names[0])).evaluation}
    return arguments, {}


def _ways_on(error: ValueError, typed: list[str], defaults: dict) -> str:
    """Returns the commands to type after an AnotherRunError or AnotherJobError, and nothing after other errors."""
    if again := getattr(error, "again", None):
        return f". To predict everything again: {shlex.join([*typed, again])}"
    stored, fields = getattr(error, "stored", None), getattr(error, "fields", [])
    if stored is None:
        return ""
    go_on, new = ways_on(typed, stored, fields, defaults["config"])
    return f". To go on with it: {go_on}; to start another run: {new}" if fields else f". To start another run: {new}"


def _read_model(path: str | None) -> Model:
    """Reads the architecture of a model file, as a config describes it."""
    from apcnet.zoo import read

    if path is None:
        raise ValueError("init: expected the path of a model file, got none")
    architecture = read(path)[0]["architecture"]
    try:
        return Model.of(architecture, init=Path(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {printable(error)}") from None


def _config_of(name: str) -> Config:
    """Returns the config that a model was trained with: a run's own, or the preset of published weights."""
    return preset(name) if name in with_weights() and not Path(name).exists() else _read_run_config(Path(name))


def _read_run_config(path: Path) -> Config:
    """Reads the config of a run from its folder or from the folder of its model file."""
    from apcnet.training.folder import read_config

    folder = path if path.is_dir() else path.parent
    if not path.exists() and path.name == str(path) and not path.suffix:
        locate(path.name, "weights: expected a run folder, a model file, hf:USER/MODEL or published weights")
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{path}: expected a run folder or a model in one, found no config.json; for other models, name the preset "
            "to evaluate with: apcnet evaluate MODEL.safetensors PRESET --root FOLDER"
        )
    return read_config(folder)


def _fail(message: str) -> NoReturn:
    """Prints an error and exits; torchrun, if it started this process, repeats the error at the end of its report."""
    print_error(message)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from apcnet.watch import report

        report(message)
    sys.exit(BAD_INPUT)
