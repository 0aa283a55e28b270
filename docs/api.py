"""Writes the API reference, docs/api/*.md, from the signatures and docstrings of both packages: python docs/api.py.

With --check it writes nothing, and exits with 1 where a page is stale. Signatures are taken from the source as it
stands, so that every version of Python makes the same pages.
"""

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent / "api"
REFERENCE = {  # page: its modules, each with the names that are public where the module has no __all__
    "apc_kernels": {
        "apc_kernels": (),
        "apc_kernels.interop.report": ("Report",),
        "apc_kernels.interop.smp": ("accelerate",),
    },
    "apcnet": {
        "apcnet": (),
        "apcnet.models": (),
        "apcnet.inference": (),
        "apcnet.inference.prediction": ("Prediction",),
        "apcnet.bulk": (),
        "apcnet.bulk.raster": ("predict_raster",),
        "apcnet.bulk.video": ("predict_video", "VideoReport"),
        "apcnet.confusion": ("ConfusionMatrix", "Scores"),
        "apcnet.losses": (),
        "apcnet.data": (),
        "apcnet.data.augment": (
            *("resize", "keep_ratio_size", "normalise"),
            *("brightness", "contrast", "saturation", "hue"),
        ),
        "apcnet.interop.mmseg": (),
        "apcnet.interop.sssegmentation": ("load_head",),
        "apcnet.interop.convert": ("convert",),
        "apcnet.export": ("export",),
        "apcnet.web": ("write",),
        "apcnet.serve": ("create_app", "Served", "Limits"),
    },
}
OPENING = """\
# API reference: {page}

<!-- Written by `python docs/api.py` from signatures and docstrings: change those. -->
"""


def main() -> int:
    pages = {FOLDER / f"{page}.md": write_page(page, modules) for page, modules in REFERENCE.items()}
    if "--check" not in sys.argv:
        FOLDER.mkdir(exist_ok=True)
        for file, text in pages.items():
            file.write_text(text)
        return 0
    stale = [file.name for file, text in pages.items() if not file.is_file() or file.read_text() != text]
    if stale:
        print(f"docs/api: stale: {', '.join(stale)}; run python docs/api.py", file=sys.stderr)
    return 1 if stale else 0


def write_page(page: str, modules: dict[str, tuple[str, ...]]) -> str:
    contents, sections, documented = [], [], {}
    for module_name, names in modules.items():
        module = importlib.import_module(module_name)
        if module_name == page:
            contents.append(f"{markdown(module.__doc__)}\n")
        else:
            contents.append(f"\n**[`{module_name}`](#{anchor(module_name)})**\n")
            sections.append(f"## `{module_name}`\n\n{markdown(module.__doc__)}")
        for name in names or module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType):
                continue  # a section of its own
            title = f"{module_name}.{name}"
            home, node = find(value, name, module)
            if (home, node) in documented:  # under the first of its names
                title = documented[home, node]
            else:
                documented[home, node] = title
                sections.append(entry(title, value, home, node))
            contents.append(f"- [`{module_name}.{name}`](#{anchor(title)}){summary(node, value)}")
    return "\n".join([OPENING.format(page=page), *contents, "", "\n\n".join(sections), ""])


def find(value, name: str, module: ModuleType) -> tuple[str, ast.AST]:
    """Returns the module that defines a value, and the node of its definition."""
    if inspect.isclass(value) or inspect.isroutine(value):
        value = inspect.unwrap(value)
        module, name = importlib.import_module(value.__module__), value.__name__
    for node in reversed(parse(module).body):  # the last definition is the function, those before it are overloads
        if getattr(node, "name", None) == name:
            return module.__name__, node
        if isinstance(node, ast.Assign) and name in {getattr(target, "id", None) for target in node.targets}:
            return module.__name__, node
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return find(value, name, importlib.import_module(node.module or ""))
    raise LookupError(f"{module.__name__} does not define {name}")


@functools.cache
def parse(module: ModuleType) -> ast.Module:
    """Returns the syntax tree of a module, the same object each time."""
    return ast.parse(inspect.getsource(module))


def entry(title: str, value, home: str, node: ast.AST) -> str:
    """Returns the section on a function, a class or a constant."""
    module = importlib.import_module(home)
    lines = inspect.getsource(module).splitlines()
    path = home.replace(".", "/") + ("/__init__.py" if hasattr(module, "__path__") else ".py")
    parts = [f"### `{title}`", f"[source](../../{path})"]
    if isinstance(node, ast.FunctionDef):
        parts += [fenced(signature(node, lines)), markdown(ast.get_docstring(node))]
    elif isinstance(node, ast.ClassDef):
        parts += [fenced(class_source(node, lines)), markdown(ast.get_docstring(node)), *methods(title, node, lines)]
    else:
        parts.append(fenced(f"{title.rpartition('.')[2]} = {value!r}"))
    return "\n\n".join(filter(None, parts))


def methods(title: str, node: ast.ClassDef, lines: list[str]) -> Iterator[str]:
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            yield f"#### `{title.rpartition('.')[2]}.{method.name}`"
            yield fenced(signature(method, lines))
            yield markdown(ast.get_docstring(method))


def class_source(node: ast.ClassDef, lines: list[str]) -> str:
    """Returns the opening line of a class, its fields with their comments, and its signature."""
    parts = [lines[node.lineno - 1]]
    for statement in node.body:
        is_text_of_field = isinstance(statement, ast.Expr) and len(parts) > 1
        if isinstance(statement, ast.AnnAssign) or is_text_of_field:
            parts += lines[statement.lineno - 1 : statement.end_lineno]
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            parts += textwrap.indent(signature(statement, lines), "    ").splitlines()
    return "\n".join(parts)


def signature(node: ast.FunctionDef, lines: list[str]) -> str:
    """Returns the lines of a function up to its body, with its decorators."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(lines[first - 1 : node.body[0].lineno - 1]))


def summary(node: ast.AST, value) -> str:
    """Returns what the list of contents says of an entry: the first sentence of its docstring."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        first = (ast.get_docstring(node) or "").split("\n\n")[0]
        return f" – {escape(' '.join(first.split()))}" if first else ""
    return f" = `{value!r}`"


def markdown(docstring: str | None) -> str:
    """Turns a docstring into Markdown: indented blocks are formulas, sections are lists of arguments or paragraphs."""
    blocks = []
    for block in re.split(r"\n{2,}", inspect.cleandoc(docstring or "")):
        title, _, rest = block.partition("\n")
        if title in ("Args:", "Raises:"):
            items = re.sub(r"\n +", " ", textwrap.dedent(rest)).splitlines()
            named = (item.partition(": ") for item in items)
            listed = "\n".join(f"- `{name}`: {escape(text)}" for name, _, text in named)
            blocks.append(f"**{title[:-1].replace('Args', 'Arguments')}**\n\n{listed}")
        elif title in ("Returns:", "Yields:"):
            blocks.append(f"**{title[:-1]}** {escape(textwrap.dedent(rest))}")
        elif block.startswith("    ") or re.search(r"^\S+ {2,}\S", block, re.MULTILINE):
            blocks.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            blocks.append(escape(block))
    return "\n\n".join(blocks)


def escape(text: str) -> str:
    """Keeps Markdown from reading formulas in running text as markup; code between backticks stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<\[\]])", r"\\\1", part) for part in parts)


def fenced(code: str) -> str:
    return f"```py\n{code}\n```"  # not python: these are signatures, and no program


def anchor(title: str) -> str:
    """Returns what code hosts make of a heading in links."""
    return re.sub(r"[^\w-]", "", title.lower())


if __name__ == "__main__":
    sys.exit(main())
