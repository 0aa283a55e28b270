"""Tests that docstrings and help texts are sentences that a reader understands alone (CONTRIBUTING.md)."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("apc_kernels", "apcnet", "benchmarks", "docs", "examples", "experiments", "tests")
QUESTIONS = re.compile(r"(What|Of|Where|Whether|How|Which|Why)\b")
HELP = """
import sys
from apcnet import cli
for command in cli.COMMANDS:
    print(f"\\ncommand {command.__name__}")
    try:
        cli.main([command.__name__, "--help"])
    except SystemExit as stop:
        assert not stop.code, command
"""


def first_lines() -> Iterator[tuple[str, str]]:
    """Yields the place and the first line of every docstring, those of fields included."""
    for file in sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for statement in node.body if isinstance(node, ast.Module | ast.ClassDef) else node.body[:1]:
                    match statement:
                        case ast.Expr(ast.Constant(str(text))):
                            yield f"{file.relative_to(ROOT)}:{statement.lineno}", text.strip().split("\n")[0]


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    """Returns what `apcnet COMMAND --help` prints beside each flag and argument, and under each heading."""
    environ = {**os.environ, "COLUMNS": "120"}
    run = subprocess.run([sys.executable, "-c", HELP], cwd="/", env=environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    texts, flag = {}, ""
    for page in run.stdout.split("\ncommand ")[1:]:
        command = page.partition("\n")[0]
        for box in re.findall(r"^╭(.+?)^╰", page, re.DOTALL | re.MULTILINE):
            heading, *lines = (line.strip("│").removeprefix(" ").rstrip() for line in box.splitlines())
            for rule in [i for i, line in enumerate(lines) if not line.strip("─")]:  # below a word on all flags
                texts[f"{command}: {heading.strip('─╮ ')}"] = " ".join(lines[:rule])
                del lines[: rule + 1]
            for line in lines:
                if line.startswith(" "):
                    texts[flag] += f" {line.strip()}"
                else:  # FLAG  TEXT, or the text begins in the next line
                    name, _, text = re.sub(r" {2,}", "\t", line).partition("\t")
                    flag = f"{command} {name}"
                    texts[flag] = text
    return {
        flag: re.sub(r" ?\((required|default\b.*)\)$", "", text.strip())
        for flag, text in texts.items()
        if "--help" not in flag
    }


def test_help_is_read_whole(help_texts):
    flags = {flag.split(" {")[0].split(" [")[0] for flag in help_texts}
    assert {"train --steps INT", "evaluate RUN|MODEL", "evaluate --flip, --no-flip"} <= flags
    assert len(help_texts) > 100


def test_help_is_made_of_sentences(help_texts):
    for flag, text in help_texts.items():
        assert text.endswith(".") and len(text.split()) >= 3, f"apcnet {flag}: expected a sentence, got {text!r}"


def test_few_texts_open_with_a_question_word(help_texts):
    texts = {text: place for place, text in [*help_texts.items(), *first_lines()]}  # each once: a field's is a flag's
    found = [f"{place}: {text}" for text, place in texts.items() if QUESTIONS.match(text)]
    assert len(found) <= 20, "\n".join(found)
