"""Takes one thing at a time away from compiled kernels, and tells which removals nothing notices.

Launches are recorded with the memory as it was, and repeated with one instruction changed: a barrier, a wait or a fence
left out, a shift or a scale of an address without effect, a mask of an address that lets everything through. A removal
is noticed if the machine reports it, if the launch does not end, or if a byte of the results differs.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import ptx

SYNCHRONISATION = re.compile(
    r"^[ \t]*(bar\.sync|bar\.warp\.sync|cp\.async\.wait_group|wgmma\.wait_group|wgmma\.fence|fence\.proxy)[^;]*;", re.M
)
# A result, what it comes from, and the constant: of shifts and scales of an address, and of masks.
ADDRESSING = re.compile(
    r"^[ \t]*(?P<opcode>shl\.b32|shl\.b64|shr\.[us]32|shr\.[us]64|and\.b32|and\.b64|mul\.wide\.[us]32|mul\.lo\.s32"
    r"|mul\.lo\.s64|mad\.wide\.[us]32|mad\.lo\.s32|mad\.lo\.s64)\s+(?P<result>%\w+), %\w+, (?P<constant>-?\d+)[,;]",
    re.M,
)
ARITHMETIC = re.compile(r"(add|sub|neg|mul|mad|shl|shr|shf|and|or|xor|lop3|mov|cvt|cvta|bfi|bfe|prmt|selp|shfl)\.")
REGISTER = re.compile(r"%[a-z]+\d+")
WITHOUT_EFFECT = {"sh": "0", "an": "-1", "mu": "1", "ma": "1"}  # by how an opcode begins


@dataclass
class Launch:
    """Holds what repeats a launch: its arguments, the memory as it was before it, and what it left."""

    memory: ptx.Memory
    arguments: dict
    restore: Callable[[], None]
    left: list[np.ndarray]
    result: dict

    def repeat(self, text: str, line: int) -> "Effect":
        """Launches another text, in which the instruction of a line is changed."""
        self.restore()
        executed = sum(n for n, _ in self.result["opcodes"].values())
        options = {"counting": True, "budget": 4 * executed + 10_000, "one_finding": True}
        try:
            result = ptx.launch(text, **self.arguments | options)
        except ptx.FaultError as error:
            return Effect(error.findings[0]["kind"])
        except RuntimeError:
            return Effect("no end")
        if not all(np.array_equal(a, b) for a, b in zip(self.memory.contents(), self.left, strict=True)):
            return Effect("another result")
        ours, theirs = self.result["executed_lines"], result["executed_lines"]
        return Effect("", ours[line] != theirs.get(line), self.result["addresses"] != result["addresses"])


class Effect(NamedTuple):
    """Tells how a change of an instruction shows; if it does not, what it changes all the same."""

    noticed: str
    computes: bool = True  # other numbers
    accesses: bool = True  # other places


def record(monkeypatch, run: Callable[[], object]) -> dict[str, list[Launch]]:
    """Returns the launches that a function makes, by the text of their kernels."""
    launches, launch = defaultdict(list), ptx.launch

    def recorded(text, kernel, memory, grid, threads, shared, parameters, seed, counting, harmless=()):
        arguments = {"kernel": kernel, "memory": memory, "grid": grid, "threads": threads, "shared": shared}
        arguments |= {"parameters": parameters, "seed": seed, "harmless": harmless}
        restore = memory.snapshot()
        result = launch(text, **arguments, counting=True)
        launches[text].append(Launch(memory, arguments, restore, memory.contents(), result))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(ptx, "launch", recorded)
        run()
    return dict(launches)


def removals(text: str) -> Iterator[tuple[int, str, str]]:
    """Yields line, instruction and new text for each barrier, wait and fence."""
    for match in SYNCHRONISATION.finditer(text):
        yield _line(text, match.start()), match[0].strip(), text[: match.start()] + text[match.end() :]


def changed_addresses(text: str) -> Iterator[tuple[int, str, str]]:
    """Yields line, instruction and new text for each shift, scale and mask that an address is computed with."""
    of_addresses = address_registers(text)
    for match in ADDRESSING.finditer(text):
        neutral = WITHOUT_EFFECT[match["opcode"][:2]]
        is_sign = match["opcode"].startswith("shr.s") and match["constant"] in (
            "31",
            "63",
        )  # 0 where the index is positive
        if match["result"] in of_addresses and match["constant"] != neutral and not is_sign:
            begin, end = match.span("constant")
            yield _line(text, match.start()), match[0].strip(), text[:begin] + neutral + text[end:]


def _line(text: str, position: int) -> int:
    return 1 + text.count("\n", 0, position + len(re.match(r"\s*", text[position:])[0]))


def address_registers(text: str) -> set[str]:
    """Returns the registers from which addresses, and the descriptors of wgmma, are computed by integer arithmetic."""
    reached, sources = set(), defaultdict(set)
    for line in text.splitlines():
        statement = re.sub(r"^\s*(@!?%p\d+\s+)?", "", line)
        for address in re.findall(r"\[([^\]]*)\]", statement):
            reached.update(REGISTER.findall(address))
        if statement.startswith("wgmma.mma"):
            reached.update(register for register in REGISTER.findall(statement) if register.startswith("%rd"))
        if re.match(
            r"(add|sub|mul|mad|shl|shr|and|or|xor|mov|cvt|bfi|bfe|selp|lop3|cvta|shf|neg|prmt|shfl)\.", statement
        ):
            result, *operands = REGISTER.findall(statement) or [""]
            sources[result].update(operands)
    waiting = list(reached)
    while waiting:
        for register in sources[waiting.pop()] - reached:
            reached.add(register)
            waiting.append(register)
    return reached


@dataclass
class Outcome:
    """Counts what became of removals: how each was noticed, and those that nothing depends on in these launches.

    unreached: instructions that no launch executes. idle: it computes the same without what was removed, say a mask of
    bits that are 0. unused: it computes another number, and no access has another address because of it. unnoticed:
    everything else, by kernel. For a barrier that is a proof that it is redundant: that two accesses race does not
    depend on the order in which they happened to run.
    """

    noticed: Counter = field(default_factory=Counter)
    unreached: list[str] = field(default_factory=list)
    idle: int = 0
    unused: int = 0
    unnoticed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def tried(self) -> int:
        return self.noticed.total() + self.idle + self.unused + self.left

    @property
    def left(self) -> int:
        return sum(map(len, self.unnoticed.values()))

    def __str__(self) -> str:
        noticed = ", ".join(f"{n} {how}" for how, n in self.noticed.most_common())
        return (
            f"{self.tried} removals, {self.noticed.total()} noticed ({noticed}), {self.idle} idle, "
            f"{self.unused} unused, {self.left} unnoticed; {len(self.unreached)} not reached"
        )


def try_all(launches: dict[str, list[Launch]], mutants: Callable, every: int = 1) -> Outcome:
    """Tries each mutant (or one of `every`) of an instruction that the launches execute, until a launch notices it."""
    outcome, number = Outcome(), 0
    for text, of_text in launches.items():
        for line, instruction, mutant in mutants(text):
            reached = [launch for launch in of_text if line in launch.result["executed_lines"]]
            if not reached:
                outcome.unreached.append(instruction)
                continue
            number += 1
            if number % every:
                continue
            effects: list[Effect] = []
            while reached and not (effects and effects[-1].noticed):
                effects.append(reached.pop(0).repeat(mutant, line))
            is_address = mutants is not removals
            if effects[-1].noticed:
                outcome.noticed[effects[-1].noticed] += 1
            elif is_address and not any(effect.computes for effect in effects):
                outcome.idle += 1
            elif is_address and not any(effect.accesses for effect in effects):
                outcome.unused += 1
            else:
                outcome.unnoticed[of_text[0].arguments["kernel"]].append(f"line {line}: {instruction}")
    return outcome
