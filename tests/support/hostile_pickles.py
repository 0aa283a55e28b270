"""Writes checkpoints whose pickles attack the reader: an assembler of instructions, and the cases.

Each case puts a hostile object beside a good tensor, {"weight": tensor, "x": object}, or in its place, and is written
in both formats of `torch.save`.
"""

import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

WEIGHT = torch.arange(6.0).reshape(2, 3)
MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"\x80\x02M\xe9\x03."


# Instructions


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(dotted: str) -> bytes:
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode("utf-8", "surrogatepass")


def many(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: str, *arguments: bytes) -> bytes:
    return name(function) + many(*arguments) + b"R"


def storage(zipped: bool = True, **changes: bytes) -> bytes:
    """Returns a reference to the stored numbers, with changes of key, count, kind or location."""
    parts = {
        "kind": name("torch.FloatStorage"),
        "key": text("0"),
        "location": text("cpu"),
        "count": number(6),
    } | changes
    return many(text("storage"), *parts.values(), *([] if zipped else [b"N"])) + b"Q"


def tensor(zipped: bool, **changes: bytes) -> bytes:
    """Returns a call that builds the good tensor, with changes of offset, size, stride or of parts of its storage."""
    size, stride = many(number(2), number(3)), many(number(3), number(1))
    parts = {"offset": number(0), "size": size, "stride": stride}
    view = {key: changes.pop(key, part) for key, part in parts.items()}
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage(zipped, **changes), *view.values(), b"\x89", hooks)


def checkpoint(extra: bytes, zipped: bool) -> bytes:
    """Returns the pickle of {"weight": tensor}, to which `extra` adds items."""
    return b"\x80\x02}(" + text("weight") + tensor(zipped) + extra + b"u."


def write(path: Path, pickle: bytes, zipped: bool) -> Path:
    """Writes a file of `torch.save` with this pickle and one storage of six numbers."""
    numbers = WEIGHT.numpy().tobytes()
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for entry, content in (
                ("data.pkl", pickle),
                ("byteorder", b"little"),
                ("data/0", numbers),
                ("version", b"3"),
            ):
                archive.writestr(f"archive/{entry}", content)
        return path
    system = b"\x80\x02}(" + text("little_endian") + b"\x88u."
    keys = b"\x80\x02](" + text("0") + b"e."
    path.write_bytes(MAGIC + system + pickle + keys + struct.pack("<q", 6) + numbers)
    return path


# Objects


DANGEROUS = [
    "os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.__import__", "builtins.open",
    "builtins.map",
    "subprocess.Popen", "subprocess.check_output", "sys.exit", "runpy.run_path", "pickle.loads", "marshal.loads",
    "ctypes.CDLL", "shutil.rmtree", "importlib.import_module", "operator.attrgetter", "functools.partial",
    "types.CodeType",
    "timeit.timeit", "code.interact", "pdb.set_trace", "webbrowser.open", "asyncio.run", "torch.load", "torch.hub.load",
    "torch.jit.load", "torch.ops.load_library", "torch.utils.cpp_extension.load", "torch.nn.modules.linear.Linear",
    "torch.storage._load_from_bytes", "torch._C._jit_init", "torch.compile", "numpy.load", "numpy.f2py.compile",
    "numpy.testing._private.utils.runstring", "codecs.open", "pty.spawn", "bdb.Bdb", "copy.deepcopy", "sys.modules",
    "collections.namedtuple", "collections.abc.Callable", "__main__.f", "apcnet.cli.main", "a.b.c.d.e", "x.é\udce9",
]  # fmt: skip
PARAMETER = "torch._utils._rebuild_parameter"
NEST = {  # instructions that put the object on top of the stack into another one
    "tuple1": b"\x85",
    "tuple2": b"N\x86",
    "tuple3": b"NN\x87",
    "tuple of a mark": None,
    "list": b"q\x00]h\x00a",
    "dict": b"q\x00}Nh\x00s",
    "frozenset": None,
    "OrderedDict": b"q\x00" + name("collections.OrderedDict") + b")Rh\x00b",
    "argument": b"\x85q\x00" + name("datetime.date") + b"h\x00R",
    "Size": b"\x85q\x00" + name("torch.Size") + b"h\x00\x85R",
    "parameter": b"q\x00" + name(PARAMETER) + b"(h\x00\x88NtR",
    "new object": b"\x85q\x00" + name("mmcv.ConfigDict") + b"h\x00\x81",
}
PLACES = {  # {object} stands for the instructions of the hostile object
    "value": lambda hostile, _: text("x") + hostile,
    "key": lambda hostile, _: hostile + b"N",
    "key twice": lambda hostile, _: hostile + b"q\x01Nh\x01N",
    "equal keys": lambda hostile, _: hostile + b"N" + hostile + b"N",
    "set": lambda hostile, _: text("x") + call("builtins.set", b"](" + hostile + b"e"),
    "set of protocol 4": lambda hostile, _: text("x") + b"\x8f(" + hostile + b"\x90",
    "frozenset": lambda hostile, _: text("x") + b"(" + hostile + b"\x91",
    "OrderedDict": lambda hostile, _: text("x") + call("collections.OrderedDict", b"](](" + hostile + b"Nee"),
    "Counter": lambda hostile, _: text("x") + call("collections.Counter", b"}" + hostile + b"Ns"),
    "defaultdict": lambda hostile, _: text("x") + call("collections.defaultdict", b"N") + hostile + b"Ns",
    "state": lambda hostile, _: text("x") + call("collections.OrderedDict") + hostile + b"b",
    "function": lambda hostile, _: text("x") + hostile + b")R",
    "arguments": lambda hostile, _: text("x") + name("collections.OrderedDict") + hostile + b"R",
    "identifier": lambda hostile, _: text("x") + hostile + b"Q",
    "storage key": lambda hostile, zipped: text("x") + tensor(zipped, key=hostile),
    "storage type": lambda hostile, zipped: text("x") + tensor(zipped, kind=hostile),
    "storage location": lambda hostile, zipped: text("x") + tensor(zipped, location=hostile),
    "storage count": lambda hostile, zipped: text("x") + tensor(zipped, count=hostile),
    "offset": lambda hostile, zipped: text("x") + tensor(zipped, offset=hostile),
    "shape": lambda hostile, zipped: text("x") + tensor(zipped, size=hostile),
    "one side": lambda hostile, zipped: text("x") + tensor(zipped, size=many(hostile, number(1))),
    "strides": lambda hostile, zipped: text("x") + tensor(zipped, stride=hostile),
    "one stride": lambda hostile, zipped: text("x") + tensor(zipped, stride=many(number(1), hostile)),
}
LARGE = 50_000  # bytes; such programs are tried in some places only
PLACES_OF_LARGE = ("value", "key", "equal keys", "set", "OrderedDict", "arguments", "shape")


def nested(kind: str, depth: int) -> bytes:
    """Returns an object inside `depth` others; half of them where marks are needed first."""
    if kind == "tuple of a mark":
        return b"(" * depth + b"N" + b"t" * depth
    if kind == "frozenset":
        return b"(" * depth + b"N" + b"\x91" * depth
    return b"N" + NEST[kind] * depth


def bombs() -> dict[str, bytes]:
    """Returns small programs for objects that are huge, endless or slow to compare."""
    doubled = b"N\x85" + b"q\x00h\x00h\x00\x86" * 100
    collide = b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 30_000))
    million = b"](" + b"N" * 500_000 + b"eq\x05"
    return {
        "tuples doubled 100 times": doubled,
        "lists doubled 100 times": b"]q\x00" + b"](h\x00h\x00eq\x00" * 100,
        "dicts doubled 100 times": b"}q\x00" + b"}(Nh\x00K\x01h\x00uq\x00" * 100,
        "list of itself": b"]q\x00h\x00a",
        "dict of itself": b"}q\x00Nh\x00s",
        "tuple of a list of itself": b"]q\x00h\x00\x85a",
        "text 10,000 times": text("a" * 10_000) + b"q\x00" + b"h\x00" * 10_000 + b"0" * 10_000,
        "encoded 1,000 times": text("a" * 100_000) + (b"q\x00" + name("_codecs.encode") + b"h\x00\x85R0h\x00") * 1000,
        "colliding numbers": b"}(" + collide + b"u",
        "colliding numbers in a set": b"\x8f(" + collide.replace(b"N", b"") + b"\x90",
        "a list copied 1,000 times": million + (name("collections.deque") + b"h\x05\x85R0") * 1000,
        "a set of a list 1,000 times": million + (name("builtins.set") + b"h\x05\x85R0") * 1000,
        "arguments copied 1,000 times": many(b"N" * 500_000) + b"q\x05" + (name(PARAMETER) + b"h\x05R0") * 1000,
        "3,000,000 objects": b"](" + b"N" * 3_000_000 + b"e",
        "3,000,000 dicts": b"](" + b"}" * 3_000_000 + b"e",
        "100,000 marks": b"(" * 100_000 + b"N",
        "numbers as keys": b"}(" + b"".join(number(i) + b"N" for i in range(100_000)) + b"u",
    }  # fmt: skip


def literals() -> dict[str, bytes]:
    """Returns numbers, texts and lengths at the limits of their types and beyond, and instructions that are cut."""
    numbers = {
        f"{value:.5e}": number(value) for value in (-1, 0, 7, 1 << 31, 1 << 47, 1 << 48, 1 << 62, 1 << 63, 1 << 64)
    }
    long = {f"a number of {n:,} bytes": b"\x8b" + struct.pack("<i", n) + b"\x7f" * n for n in (300, 100_000, 5_000_000)}
    declared = {
        f"{code!r} of {size:,} bytes": code + size.to_bytes(width, "little")
        for codes, width in ((b"XTB\x8b", 4), (b"\x8d\x8e\x95\x96", 8))
        for code in (codes[i : i + 1] for i in range(len(codes)))
        for size in (1 << 16, 1 << 24, (1 << 31) - 1, (1 << 8 * width) - 1)
    }  # fmt: skip
    return numbers | long | declared | {
        "infinity": b"G\x7f\xf0" + bytes(6), "not a number": b"G\x7f\xf8" + bytes(6), "a text": text("a"),
        "no UTF-8": b"X\x02\x00\x00\x00\xff\xfe", "a surrogate": text("\udce9"), "a line": text("a\nb"), "None": b"N",
        "true": b"\x88", "bytes": b"C\x01a", "a bytearray": b"\x96" + struct.pack("<Q", 3) + b"abc",
        "a tensor of no shape": b")",
        "decimals": b"L" + b"9" * 10_000 + b"L\n", "decimal float": b"Fnan\n", "no decimals": b"Iabc\n",
        "a line without end": b"V",
        "memo of 2**32 - 1": b"Nr\xff\xff\xff\xff", "no such memo": b"j\xff\xff\xff\xff",
        "no such short memo": b"h\xff",
        "decimal memo": b"Np99999999999999999999\n", "an extension": b"\x82\x01", "a buffer": b"\x97",
        "a view": b"\x98",
        "persistent text": b"Pstorage\n", "an instance": b"(ios\nsystem\n", "an object": b"(cos\nsystem\no",
        "no instruction": b"\xff",
        "protocol 255": b"\x80\xff", "a frame": b"\x95" + struct.pack("<Q", 1), "from an empty stack": b"000000",
        "no mark": b"ttt",
        "a global of numbers": b"K\x01K\x02\x93", "a path": text("../../../../etc/passwd"),
        "another storage": text("1"),
    }  # fmt: skip


def tensors(zipped: bool) -> dict[str, bytes]:
    """Returns calls of everything that rebuilds tensors, with absurd arguments."""
    found = {}
    base, big = storage(zipped=zipped), number(1 << 40)
    shapes = {
        "too large": (many(big), many(number(1))), "too large by strides": (many(number(2)), many(big)),
        "too many elements": (many(big, big), many(number(0), number(0))),
        "negative": (many(number(-2)), many(number(1))),
        "negative strides": (many(number(2)), many(number(-1))),
        "fewer strides": (many(number(1), number(2)), many(number(1))),
        "a thousand sides": (many(*[number(1)] * 1000), many(*[number(1)] * 1000)),
        "empty but wide": (many(big, number(0)), many(number(1), number(1))),
        "expanded": (many(number(1 << 30)), many(number(0))), "lists": (b"](K\x01e", b"](K\x01e"),
        "texts": (many(text("2")), many(text("1"))),
        "overflow": (many(*[number(1 << 32)] * 3), many(*[number(1)] * 3)),
        "floats": (many(b"G?\xf0" + bytes(6)), many(number(1))),
    }  # fmt: skip
    for what, (size, stride) in shapes.items():
        for function, rest in {
            "tensor": [], "tensor_v2": [b"\x89", b"N"], "tensor_v3": [b"\x89", b"N", name("torch.int64")],
            "qtensor": [many(name("torch.per_tensor_affine"), number(1), number(0)), b"\x89", b"N"],
        }.items():  # fmt: skip
            found[f"{function}: {what}"] = call(
                f"torch._utils._rebuild_{function}", base, number(0), size, stride, *rest
            )
        found[f"meta: {what}"] = call(
            "torch._utils._rebuild_meta_tensor_no_storage", name("torch.float32"), size, stride, b"\x89"
        )
        found[f"wrapper: {what}"] = call(
            "torch._utils._rebuild_wrapper_subclass",
            name("torch.Tensor"),
            name("torch.float32"),
            size,
            stride,
            number(0),
            b"NN\x89",
        )
        sparse = many(base, base, size, b"\x88")
        found[f"sparse: {what}"] = call(
            "torch._utils._rebuild_sparse_tensor",
            call("torch.serialization._get_layout", text("torch.sparse_coo")),
            sparse,
        )
        found[f"nested: {what}"] = call("torch._utils._rebuild_nested_tensor", base, size, stride, size)
    ordinary = [number(0), many(number(6)), many(number(1)), b"\x89", b"N"]
    for dtype in (
        "torch.float64",
        "torch.complex128",
        "torch.bits8",
        "torch.qint8",
        "torch.float8_e4m3fn",
        "torch.uint1",
        "torch.nothing",
        "torch.load",
    ):
        found[f"tensor_v3 of {dtype}"] = call("torch._utils._rebuild_tensor_v3", base, *ordinary, name(dtype))
    for kind in (
        "torch.DoubleStorage",
        "torch.QInt8Storage",
        "torch.cuda.FloatStorage",
        "torch.NoneStorage",
        "torch.storage.UntypedStorage",
        "torch.Storage",
    ):
        found[f"storage of {kind}"] = tensor(zipped, kind=name(kind))
    found["conjugated"] = call("torch._utils._rebuild_tensor_v2", base, *ordinary, b"}" + text("conj") + b"\x88s")
    found["of type, in itself"] = (
        (name("torch._tensor._rebuild_from_type_v2") + b"q\x00") + b"h\x00h\x00)N" * 3 + b"(h\x00Nh\x00\x85Nt\x85R"
    )
    found["of type, no function"] = call("torch._tensor._rebuild_from_type_v2", b"N", b"N", b")", b"N")
    found["of type, a call"] = call(
        "torch._tensor._rebuild_from_type_v2", name("builtins.getattr"), b"N", many(base, text("a")), b"N"
    )
    found["shared a million times"] = (
        name("torch._utils._rebuild_tensor_v2")
        + b"q\x00"
        + many(base, *ordinary)
        + b"q\x01"
        + b"h\x00h\x01R0" * 200
        + b"N"
    )
    found["parameter of nothing"] = call(PARAMETER)
    found["tensor of nothing"] = call("torch._utils._rebuild_tensor_v2")
    view = many(text("1"), number(0), number(9))
    found["a view of a storage"] = call("torch._utils._rebuild_tensor_v2", storage(True, view=view), *ordinary)
    found["new tensor"] = name("torch.Tensor") + many(big) + b"\x81"
    found["new storage"] = name("torch.FloatStorage") + many(big) + b"\x81"
    found["a device"] = call("torch.device", text("cuda:99"))
    found["a tensor from numpy"] = call(
        "torch._utils._rebuild_device_tensor_from_numpy", b"N", name("torch.float32"), text("xla:0"), b"\x89"
    )
    return found


def programs() -> Iterator[tuple[str, Callable[[], bytes], bool]]:
    """Yields every case by hand: (name, function that returns the pickle, whether in the zip format)."""
    for zipped in (True, False):
        for place in PLACES_OF_LARGE:  # deep enough to overflow C's stack when a key is hashed
            yield f"deepest as {place}", partial(_placed, place, nested("tuple1", 500_000), zipped), zipped
        for dotted in DANGEROUS:
            module, _, last = dotted.rpartition(".")
            for how, hostile in {
                "called": call(dotted, text("true")),
                "new": name(dotted) + many(text("true")) + b"\x81",
                "named by texts": text(module) + text(last) + b"\x93" + many(text("true")) + b"R",
                "through getattr": call("builtins.getattr", name("mmengine.runner"), text(dotted)) + b")R",
            }.items():
                yield f"{dotted} {how}", partial(checkpoint, text("x") + hostile, zipped), zipped
        objects = {f"{kind} {depth:,} deep": nested(kind, depth) for kind in NEST for depth in (2, 1_000, 100_000)}
        for what, hostile in (objects | bombs() | literals()).items():
            for place in PLACES if len(hostile) < LARGE else PLACES_OF_LARGE:
                yield f"{what} as {place}", partial(_placed, place, hostile, zipped), zipped
            yield f"{what} alone", partial(b"\x80\x02%b.".__mod__, hostile), zipped
        for what, hostile in tensors(zipped).items():
            yield what, partial(checkpoint, text("x") + hostile, zipped), zipped


def _placed(place: str, hostile: bytes, zipped: bool) -> bytes:
    return checkpoint(PLACES[place](hostile, zipped), zipped)


def soup(generator: random.Random) -> tuple[str, bytes, bool]:
    """Returns a random program of instructions and fragments that follow each other plausibly or not."""
    zipped = generator.random() < 0.5
    pieces = [bytes([code]) for code in b"()]}N\x85\x86\x87trsuaeR\x81bQ0(2\x88\x8f\x90\x91\x93\x94"] + [
        text("a"), text("storage"), number(3), b"K\x01", b"q\x00", b"h\x00", b"q\x01", b"h\x01", storage(zipped=zipped),
        tensor(zipped), name("collections.OrderedDict"), name("torch._utils._rebuild_tensor_v2"),
        name("builtins.getattr"),
        name("torch.FloatStorage"), name("mmengine.x"),
        name("torch._tensor._rebuild_from_type_v2"), many(number(1)), b"l1L\n",
        name("builtins.set"), name("collections.defaultdict"), name("torch.Size"),
        call("_codecs.encode", text("é"), text("latin1")),
    ]  # fmt: skip
    program = b"".join(generator.choices(pieces, k=generator.randint(1, 60)))
    if generator.random() < 0.5:
        return "", checkpoint(text("x") + program, zipped), zipped
    return "", b"\x80\x02" + program + b".", zipped
