"""Builds the tensors, texts, numbers and containers of a pickle, and runs none of the code that it names.

A pickle is a program for a stack machine: its instructions may import any function and call it. This machine imports
nothing. It knows the few functions that rebuild tensors and containers; any other name that a checkpoint may hold gives
an `Inert` object, which keeps nothing, and a name that no checkpoint needs is an error.

An untrusted file cannot crash or block it either. Python compares and hashes nested tuples by recursion in C, so keys
are texts and numbers, or tuples of these. Instructions and the items that they copy have a limit, and so have the keys
that are no texts, whose hashes a file can choose to be equal.
"""

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

LIMIT = 2_000_000  # instructions and copied items in a file; a checkpoint of 1,000 tensors has 30,000
TOO_MANY = f"it has more than {LIMIT:,} objects"
ODD_KEYS = 10_000  # keys that are no texts in a file; optimizers number their parameters
SHARED = 16  # tensors that hold the same number: models share few weights, and optimizers none
DIMENSIONS = 64  # of a tensor, as in PyTorch

# Checkpoints of mmsegmentation 0.x and 1.x and of sssegmentation name these besides tensors: log histories with numpy
# arrays and (through getattr) the methods that summarise them, config objects, random states, dates and paths.
HARMLESS = re.compile(
    r"(mmengine|mmcv|mmseg|mmcls|mmpretrain|mmdet|ssseg|addict|argparse|pathlib|datetime)\..+"
    r"|collections\.(OrderedDict|Counter|defaultdict|deque)"
    r"|builtins\.(getattr|object|list|dict|tuple|int|float|complex|bool|str|set|frozenset|range|slice|bytes|bytearray)"
    r"|copyreg\._reconstructor|_codecs\.encode"
    r"|numpy\.(dtype|ndarray|(_?core\.(multiarray|numeric)|dtypes|random)\..+)"
    # tensors and what they consist of: torch.float32, torch.cuda.HalfStorage, torch._utils._rebuild_tensor_v2
    r"|torch\.(Size|device|per_\w+|([bq]?u?int|b?float|complex)\d\w*|bool)"
    r"|torch\.((cuda|sparse|cuda\.sparse|storage)\.)?\w*(Storage|Tensor)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.serialization\._get_layout"
    r"|torch\.nn\.parameter\.(Parameter|Buffer)"
)
# Instances of these are filled item by item.
MAPPINGS = re.compile(r"collections\.(OrderedDict|Counter|defaultdict)|.+\.ConfigDict|addict\..*Dict")

DTYPES = {f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
    }.items()
}  # fmt: skip
REBUILD, FROM_TYPE = "torch._utils._rebuild_", "torch._tensor._rebuild_from_type_v2"

LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"}
LITERALS |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Inert:
    """Replaces an object that a file names but nobody needs; keeps nothing."""


@dataclass(frozen=True, eq=False)
class Name:
    """Holds the name of a function or a class; it is never looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """Holds the numbers that tensors are views of."""

    values: Tensor


SIMPLE = (str, bytes, int, float, type(None), Inert, Name)  # their hashes are computed without recursion


class RefusedNameError(ValueError):
    """Reports that a pickle names a function or a class that no checkpoint needs."""


class Unpickler:
    """Runs pickles. The limits hold for all that one object runs.

    Args:
        storage: Function that returns the numbers of a storage from its dtype, its key and their count. It is called
            once for each storage.
    """

    def __init__(self, storage: Callable[[torch.dtype, str, int], Tensor]):
        self.storage = storage
        self.storages: dict[str, Storage] = {}
        self.used = self.odd_keys = self.stored = self.viewed = 0

    def run(self, file: IO[bytes]) -> Any:
        """Runs one pickle from the position of the file on, and leaves the file behind it."""
        stack: list[Any] = []
        outer: list[list[Any]] = []  # the stacks below each mark
        memo: dict[int, Any] = {}
        for instruction, argument, _ in pickletools.genops(file):
            name = instruction.name
            self.used += 1
            if self.used > LIMIT:
                raise ValueError(TOO_MANY)
            if name in LITERALS:
                stack.append(argument)
                continue
            if name in CONSTANTS:
                stack.append(CONSTANTS[name])
                continue
            match name:  # the most frequent first
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "MARK":
                    outer.append(stack)
                    stack = []
                case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                    items, stack = stack, outer.pop()
                    stack.append(self._container(name, items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(_popped(stack, int(name[-1]))))
                case "REDUCE" | "NEWOBJ":
                    stack.append(self._call(*_popped(stack, 2)))
                case "BINPERSID":
                    stack.append(self._stored(*_popped(stack, 1)))
                case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                    stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}[name]())
                case "APPENDS" | "SETITEMS" | "ADDITEMS":
                    items, stack = stack, outer.pop()
                    self._fill(stack[-1], items, name)
                case "APPEND" | "SETITEM":
                    items = _popped(stack, 1 if name == "APPEND" else 2)
                    self._fill(stack[-1], items, f"{name}S")
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GLOBAL":
                    stack.append(_name(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    stack.append(_name(*_popped(stack, 2)))
                case "BUILD":  # the state of an object that keeps nothing, or attributes of a container
                    _popped(stack, 1)
                case "NEWOBJ_EX":
                    function, arguments, _ = _popped(stack, 3)
                    stack.append(self._call(function, arguments))
                case "POP":
                    _popped(stack, 1)
                case "POP_MARK":
                    stack = outer.pop()
                case "DUP":
                    stack.append(stack[-1])
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return _popped(stack, 1)[0]
                case _:
                    raise ValueError(f"it has the instruction {name}, which torch.save does not write")
        raise AssertionError("pickletools ends with STOP or an error")

    def _count(self, items: int) -> None:
        self.used += items
        if self.used > LIMIT:
            raise ValueError(TOO_MANY)

    def _container(self, name: str, items: list[Any]) -> Any:
        if name == "DICT":
            return self._mapping({}, zip(items[::2], items[1::2], strict=True))
        if name == "FROZENSET":
            return frozenset(map(self._key, items))
        return tuple(items) if name == "TUPLE" else items

    def _fill(self, container: Any, items: list[Any], name: str) -> None:
        if isinstance(container, Inert):
            return
        if name == "APPENDS" and isinstance(container, list):
            container.extend(items)
        elif name == "SETITEMS" and isinstance(container, dict):
            self._mapping(container, zip(items[::2], items[1::2], strict=True))
        elif name == "ADDITEMS" and isinstance(container, set):
            container.update(map(self._key, items))
        else:
            raise ValueError(f"it has the instruction {name} for an object of type {type(container).__name__}")

    def _mapping(self, mapping: dict, pairs: Iterable[Any]) -> dict:
        for key, value in pairs:
            mapping[self._key(key)] = value
        return mapping

    def _key(self, key: Any) -> Any:
        if not isinstance(key, str):
            self.odd_keys += 1
            if self.odd_keys > ODD_KEYS:
                raise ValueError(f"it has more than {ODD_KEYS:,} keys that are no texts")
            for part in key if isinstance(key, tuple) else (key,):
                if not isinstance(part, SIMPLE):
                    raise ValueError(f"it has a key of type {type(part).__name__}; keys are texts and numbers")
        return key

    def _call(self, function: Any, arguments: Any) -> Any:
        """Returns the result of a known function, and an inert object for any other."""
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls an object that is no function")
        self._count(len(arguments))
        name = function.name
        if name == FROM_TYPE:  # a tensor with attributes, or of a class of its own
            inner, _, arguments, *_ = arguments
            if not isinstance(inner, Name) or inner.name == FROM_TYPE:
                raise ValueError(f"it calls {FROM_TYPE} with an object that is no function")
            return self._call(inner, arguments)
        if name.startswith(REBUILD):
            return self._rebuilt(name.removeprefix(REBUILD), arguments)
        if name == "torch.Size" and arguments and isinstance(arguments[0], tuple):
            return arguments[0]
        if MAPPINGS.fullmatch(name):
            return self._mapping(OrderedDict(), self._pairs(name, arguments))
        if name in ("builtins.set", "builtins.frozenset"):
            return set(map(self._key, self._items(arguments)))
        return [] if name == "collections.deque" else Inert()

    def _pairs(self, name: str, arguments: tuple) -> Iterable[Any]:
        """Returns the items that a mapping is made with: Python 2 wrote them as lists [key, value]."""
        if not name.startswith("collections.") or name == "collections.defaultdict":
            return ()
        items = self._items(arguments)
        return items.items() if isinstance(items, dict) else items

    def _items(self, arguments: tuple) -> Any:
        items = arguments[0] if arguments else ()
        if not isinstance(items, list | tuple | dict | set | frozenset):
            raise ValueError(f"it makes a container from an object of type {type(items).__name__}")
        self._count(len(items))
        return items

    def _rebuilt(self, kind: str, arguments: tuple) -> Any:
        match kind, arguments:
            case (("parameter" | "parameter_with_state"), (data, *_)):
                return data
            case "tensor", (Storage() as storage, offset, size, stride):
                return self._view(storage.values, offset, size, stride)
            case "tensor_v2", (Storage() as storage, offset, size, stride, _, _, *metadata):
                return self._view(storage.values, offset, size, stride, *metadata)
            case "tensor_v3", (Storage() as storage, offset, size, stride, _, _, Name(dtype), *metadata):
                values = storage.values.view(torch.uint8).view(DTYPES[dtype])
                return self._view(values, offset, size, stride, *metadata)
            case (("tensor" | "tensor_v2" | "tensor_v3" | "parameter"), _):
                raise ValueError(f"it calls {REBUILD}{kind} with other arguments than torch.save")
        return Inert()  # quantized, sparse, nested or of another device: no model here has any

    def _view(self, values: Tensor, offset: Any, size: Any, stride: Any, metadata: Any = None) -> Tensor | Inert:
        """Returns a view of stored numbers. One with more numbers than are stored is inert: no model here has any."""
        shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= DIMENSIONS
        if not shaped or not all(type(number) is int and 0 <= number < 1 << 48 for number in (offset, *size, *stride)):
            raise ValueError("it has a tensor whose shape, strides or offset are no small whole numbers")
        if metadata:
            raise ValueError("it has a tensor that is conjugated or negated when it is read")
        view = values.as_strided(size, stride, offset)  # PyTorch checks that it ends inside the storage
        if view.numel() > values.numel():
            return Inert()
        self.viewed += view.nbytes
        if self.viewed > SHARED * self.stored:
            raise ValueError(f"its tensors share their numbers more than {SHARED} times")
        return view

    def _stored(self, identifier: Any) -> Any:
        match identifier:
            case ("storage", Name(name), str(key), str(), int(count), *view) if view in ([], [None]):
                dtype = STORAGES.get(name.rpartition(".")[2])
                if dtype is None:
                    raise ValueError(f"it has numbers of the type {name}, which no model here has")
                if count < 0:
                    raise ValueError(f"it has a storage of {count} numbers")
                if key not in self.storages:
                    self.storages[key] = Storage(self.storage(dtype, key, count))
                    self.stored += count * dtype.itemsize
                values = self.storages[key].values
                if values.dtype != dtype or len(values) != count:
                    raise ValueError(f"it has storage {key} twice, with {count:,} and with {len(values):,} numbers")
                return self.storages[key]
            case ("module", Name(), *_):
                return Inert()
        raise ValueError("it refers to something else than a storage")


def _popped(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("it takes an object from an empty stack")
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return items


def _name(module: Any, name: Any) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("it names a function by an object that is no text")
    # Protocol 2, torch's, writes Python 2's names.
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    if not HARMLESS.fullmatch(f"{module}.{name}"):
        raise RefusedNameError(f"{module}.{name}")
    return Name(f"{module}.{name}")
