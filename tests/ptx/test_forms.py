"""Every form of an instruction that the machine knows, against exact arithmetic in Python, on values that are hard."""

import itertools
import math
import operator
import random
import struct
from fractions import Fraction

import numpy as np
import ptx
import pytest
from snippets import THREADS, apply, width

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
CANONICAL = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}
SIGNED, UNSIGNED, PLAIN = ("s16", "s32", "s64"), ("u16", "u32", "u64"), ("b16", "b32", "b64")


# Numbers: bits into exact values and back, rounded


def decode(bits: int, kind: str) -> float:
    """float16, bfloat16, float32 and float64 are all numbers of float64."""
    if kind == "bf16":
        bits, kind = bits << 16, "f32"
    code = {"f16": "<He", "f32": "<If", "f64": "<Qd"}[kind]
    return struct.unpack("<" + code[2], struct.pack(code[:2], bits))[0]


def encode(value, kind: str, mode: str = "nearest", zero_sign: bool = False) -> int:
    """The bits of a Fraction rounded, or of a float64 that is no number, infinite or a signed zero."""
    precision, lowest, highest = FORMATS[kind]
    size = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}[kind]
    mantissa = precision - 1
    if isinstance(value, float):
        if math.isnan(value):
            return CANONICAL.get(kind, 0x7FF8000000000000)
        if math.isinf(value):
            exponent_bits = (highest * 2 + 1) << mantissa
            return exponent_bits | (value < 0) << (size - 1)
        if value == 0:
            return (math.copysign(1, value) < 0) << (size - 1)
        value = Fraction(value)
    if value == 0:
        return zero_sign << (size - 1)
    sign, magnitude = value < 0, abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    exponent = max(exponent, lowest)
    steps = value / Fraction(2) ** (exponent - mantissa)
    count = abs(round(steps) if mode == "nearest" else math.floor(steps))
    if count == 2**precision:
        count, exponent = count // 2, exponent + 1
    if exponent > highest:
        overflowed = mode == "nearest" or sign
        return encode(-math.inf if sign else math.inf, kind) if overflowed else encode(math.inf, kind) - 1
    biased = 0 if count < 2**mantissa else exponent + highest
    return sign << (size - 1) | biased << mantissa | (count & (2**mantissa - 1))


def same(actual: int, expected: int, kind: str) -> bool:
    """The same bits; of float64, any NaN for a NaN."""
    if kind == "f64" and math.isnan(decode(expected, kind)):
        return math.isnan(decode(actual, kind))
    return actual == expected


def flush(bits: int) -> int:
    return bits & 0x80000000 if bits & 0x7F800000 == 0 else bits


def exact(function, special, kind: str, mode: str = "nearest"):
    """Returns a form's exact result on floats as a function of their bits.

    It is `function` of Fractions where all are finite, and `special` of floats where one is not, or where the result
    is 0 and has a sign.
    """

    def result(*bits: int) -> int:
        values = [decode(b, kind) for b in bits]
        if all(map(math.isfinite, values)):
            try:
                value = function(*map(Fraction, values))
            except ZeroDivisionError:
                value = 0
            if value != 0:
                return encode(value, kind, mode)
        with np.errstate(all="ignore"):
            sum_of_zero = float(special(*map(np.float64, values)))
        if mode == "down" and sum_of_zero == 0 and any(values):
            products_and_sum = values[0] * values[1], values[2]
            if products_and_sum[0] == -products_and_sum[1] != 0:
                return encode(-0.0, kind)
        if mode == "down" and sum_of_zero == 0:
            signs = math.copysign(1, values[0] * values[1]), math.copysign(1, values[2])
            return encode(-0.0 if min(signs) < 0 else 0.0, kind)
        return encode(sum_of_zero, kind)

    return result


def signed(bits: int, size: int) -> int:
    return bits - (1 << size) if bits >> (size - 1) else bits


def integer(function, kind: str, result: str | None = None):
    """A form on integers of one kind; a result is taken modulo its size."""
    size, out = width(kind), width(result or kind)

    def wrapped(*bits: int) -> int:
        values = [signed(b, size) if kind[0] == "s" else b for b in bits]
        return function(*values) & ((1 << out) - 1)

    return wrapped


def truncated(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int) -> int:
    return a if b == 0 else a - b * truncated(a, b)


def field(kind: str):
    size = width(kind)

    def extract(value: int, position: int, length: int) -> int:
        """Bit by bit, as the manual writes it."""
        position, length = position & 0xFF, length & 0xFF
        sign = 0
        if kind[0] == "s" and length:
            sign = value >> min(position + length - 1, size - 1) & 1
        bits = 0
        for i in range(size):
            inside = i < length and position + i < size
            bits |= (value >> (position + i) & 1 if inside else sign) << i
        return bits

    return extract


def permute(a: int, b: int, selectors: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    out = []
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = data[selector & 7]
        out.append((0xFF if byte >> 7 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def least(kind: str, sign: int):
    """min (sign 1) and max (sign -1): the number beside a NaN, and -0 below +0."""

    def choose(a: int, b: int) -> int:
        x, y = decode(a, kind), decode(b, kind)
        if math.isnan(x) or math.isnan(y):
            other = b if math.isnan(x) else a
            return encode(math.nan, kind) if math.isnan(x) and math.isnan(y) else other
        key = (sign * x, sign * math.copysign(1, x)), (sign * y, sign * math.copysign(1, y))
        return a if key[0] <= key[1] else b

    return choose


def in_halves(function):
    """A form on two numbers of 16 bits in each register."""
    return lambda *bits: function(*(b & 0xFFFF for b in bits)) | function(*(b >> 16 for b in bits)) << 16


def largest_or_nan(a: int, b: int) -> int:
    either = any(math.isnan(decode(bits, "f32")) for bits in (a, b))
    return encode(math.nan, "f32") if either else least("f32", -1)(a, b)


def special_fma(a: float, b: float, c: float) -> float:
    """An infinity beside finite factors stays, however large their product; a zero's sign is the sum's."""
    return c if math.isinf(c) and math.isfinite(a) and math.isfinite(b) else a * b + c


# The table: form -> (types of the operands, type of the result, function of bits)

FORMS: dict[str, tuple[list[str], str, object]] = {}


def add(form: str, kinds: list[str], result: str, function) -> None:
    FORMS[form] = (kinds, result, function)


for kind in SIGNED + UNSIGNED:
    size, wide = width(kind), kind[0] + str(2 * width(kind))
    for name, function in {"add": operator.add, "sub": operator.sub, "mul.lo": operator.mul}.items():
        add(f"{name}.{kind}", [kind] * 2, kind, integer(function, kind))
    for name, function in {"min": min, "max": max, "div": truncated, "rem": remainder}.items():
        add(f"{name}.{kind}", [kind] * 2, kind, integer(function, kind))
    add(f"mul.hi.{kind}", [kind] * 2, kind, integer(lambda a, b, size=size: a * b >> size, kind))
    add(f"mad.lo.{kind}", [kind] * 3, kind, integer(lambda a, b, c: a * b + c, kind))
    shift = integer(lambda a, by, size=size: a >> min(by, size), kind)
    add(
        f"shr.{kind}",
        [kind, "u32"],
        kind,
        lambda a, by, kind=kind, size=size: (
            ((signed(a, size) if kind[0] == "s" else a) >> min(by, size)) & ((1 << size) - 1)
        ),
    )
    if kind[0] == "s":
        add(f"neg.{kind}", [kind], kind, integer(operator.neg, kind))
        add(f"abs.{kind}", [kind], kind, integer(abs, kind))
    if size < 64:
        add(f"mul.wide.{kind}", [kind] * 2, wide, integer(operator.mul, kind, wide))
        add(
            f"mad.wide.{kind}",
            [kind, kind, wide],
            wide,
            lambda a, b, c, kind=kind, size=size: (
                ((signed(a, size) * signed(b, size) if kind[0] == "s" else a * b) + c) & ((1 << 2 * size) - 1)
            ),
        )
    if size > 16:
        add(f"bfe.{kind}", [kind, "u32", "u32"], kind, field(kind))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        add(f"setp.{name}.{kind}", [kind] * 2, "pred", integer(getattr(operator, name), kind, "pred"))

add("min.relu.s32", ["s32"] * 2, "s32", integer(lambda a, b: max(min(a, b), 0), "s32"))
for kind in PLAIN:
    size = width(kind)
    for name in ("eq", "ne"):
        add(f"setp.{name}.{kind}", [kind] * 2, "pred", getattr(operator, name))
    add(f"shl.{kind}", [kind, "u32"], kind, lambda a, by, size=size: a << min(by, size) & ((1 << size) - 1))
    add(f"shr.{kind}", [kind, "u32"], kind, lambda a, by, size=size: a >> min(by, size))
for kind in ("pred", *PLAIN):
    ones = 1 if kind == "pred" else (1 << width(kind)) - 1
    for name, function in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        add(f"{name}.{kind}", [kind] * 2, kind, function)
    add(f"not.{kind}", [kind], kind, lambda a, ones=ones: a ^ ones)
for kind in ("pred", *PLAIN, *SIGNED, *UNSIGNED, "f32", "f64"):
    add(f"mov.{kind}", [kind], kind, lambda a: a)
    add(f"selp.{kind}", [kind, kind, "pred"], kind, lambda a, b, first: a if first else b)

for kind in ("f32", "f64"):
    sums = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
    for name, function in sums.items():
        add(f"{name}.{kind}", [kind] * 2, kind, exact(function, function, kind))
        add(f"{name}.rn.{kind}", [kind] * 2, kind, exact(function, function, kind))
    add(f"div.rn.{kind}", [kind] * 2, kind, exact(operator.truediv, operator.truediv, kind))
    add(f"rcp.rn.{kind}", [kind], kind, exact(lambda a: 1 / a, lambda a: 1 / a, kind))
    add(f"fma.rn.{kind}", [kind] * 3, kind, exact(lambda a, b, c: a * b + c, special_fma, kind))
    add(f"sqrt.rn.{kind}", [kind], kind, lambda a, kind=kind: root(a, kind))
    add(f"min.{kind}", [kind] * 2, kind, least(kind, 1))
    add(f"max.{kind}", [kind] * 2, kind, least(kind, -1))
    sign = 1 << (width(kind) - 1)
    add(f"neg.{kind}", [kind], kind, lambda a, sign=sign: a ^ sign)
    add(f"abs.{kind}", [kind], kind, lambda a, sign=sign: a & ~sign)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        compare = getattr(operator, name)

        def ordered(a, b, kind=kind, compare=compare):
            x, y = decode(a, kind), decode(b, kind)
            return int(not math.isnan(x) and not math.isnan(y) and compare(x, y))

        def unordered(a, b, kind=kind, compare=compare):
            x, y = decode(a, kind), decode(b, kind)
            return int(math.isnan(x) or math.isnan(y) or compare(x, y))

        add(f"setp.{name}.{kind}", [kind] * 2, "pred", ordered)
        add(f"setp.{name}u.{kind}", [kind] * 2, "pred", unordered)
    numbers = lambda a, b, kind=kind: not math.isnan(decode(a, kind)) and not math.isnan(decode(b, kind))  # noqa: E731
    add(f"setp.num.{kind}", [kind] * 2, "pred", lambda a, b, f=numbers: int(f(a, b)))
    add(f"setp.nan.{kind}", [kind] * 2, "pred", lambda a, b, f=numbers: int(not f(a, b)))


for kind, (name, sign) in itertools.product(("f16", "bf16"), (("min", 1), ("max", -1))):
    add(f"{name}.{kind}", [kind] * 2, kind, least(kind, sign))
    add(f"{name}.{kind}x2", ["b32"] * 2, "b32", in_halves(least(kind, sign)))


def root(bits: int, kind: str) -> int:
    value = decode(bits, kind)
    if not value > 0 or math.isinf(value):
        return encode(math.nan if value < 0 else value, kind)
    x = Fraction(value)
    scale = 4**300 if kind == "f64" else 4**120  # 2^60 more bits than a result has, and an odd one where more follow
    whole = math.isqrt(int(x * scale**4))
    return encode(Fraction(2 * whole + (whole * whole != x * scale**4), 2 * scale**2), kind)


def flushing(function):
    return lambda *bits: flush(function(*map(flush, bits)))


def power(bits: int) -> int:
    value = decode(bits, "f32")
    if not math.isfinite(value) or abs(value) > 200:
        return encode(math.nan if math.isnan(value) else (math.inf if value > 0 else 0.0), "f32")
    return encode(Fraction(2.0**value), "f32")


def logarithm(bits: int) -> int:
    value = decode(bits, "f32")
    if not value > 0 or math.isinf(value):
        return encode(-math.inf if value == 0 else (math.inf if value > 0 else math.nan), "f32")
    return encode(math.log2(value), "f32")


add("max.NaN.f32", ["f32"] * 2, "f32", largest_or_nan)
add("div.full.f32", *FORMS["div.rn.f32"])
add("rcp.approx.f32", *FORMS["rcp.rn.f32"])
add("rcp.approx.ftz.f32", ["f32"], "f32", flushing(FORMS["rcp.rn.f32"][2]))
for name in ("add", "mul"):
    add(f"{name}.ftz.f32", ["f32"] * 2, "f32", flushing(FORMS[f"{name}.f32"][2]))
add("fma.rn.ftz.f32", ["f32"] * 3, "f32", flushing(FORMS["fma.rn.f32"][2]))
add("fma.rm.f32", ["f32"] * 3, "f32", exact(lambda a, b, c: a * b + c, special_fma, "f32", "down"))
add("ex2.approx.f32", ["f32"], "f32", power)
add("ex2.approx.ftz.f32", ["f32"], "f32", flushing(power))
add("lg2.approx.f32", ["f32"], "f32", logarithm)
add("prmt.b32", ["b32"] * 3, "b32", permute)
add("shf.l.wrap.b32", ["b32"] * 3, "b32", lambda low, high, by: ((high << 32 | low) << by % 32) >> 32 & 0xFFFFFFFF)
add("add.s16x2", ["b32"] * 2, "b32", lambda a, b: (a + b & 0xFFFF) | ((a >> 16) + (b >> 16) & 0xFFFF) << 16)

for to, source in itertools.product(("s8", "u8", *SIGNED, *UNSIGNED), repeat=2):
    bits = int(source[1:])

    def convert(a, source=source, bits=bits, to=to):
        """The low bits of the source; a narrow result is extended in its register, as its sign says."""
        value = a & ((1 << bits) - 1)
        value = signed(value, bits) if source[0] == "s" else value
        low = value & ((1 << int(to[1:])) - 1)
        low = signed(low, int(to[1:])) if to[0] == "s" else low
        return low & ((1 << width(to)) - 1)

    add(f"cvt.{to}.{source}", [source], to, convert)
for source in SIGNED + UNSIGNED:
    for to in ("f32", "f64"):
        value = lambda a, source=source: signed(a, width(source)) if source[0] == "s" else a  # noqa: E731
        add(f"cvt.rn.{to}.{source}", [source], to, lambda a, to=to, value=value: encode(Fraction(value(a)), to))
for to, source in (("f32", "f16"), ("f32", "bf16"), ("f64", "f32")):
    add(f"cvt.{to}.{source}", [source], to, lambda a, to=to, source=source: encode(decode(a, source), to))
for to, source in (("f16", "f32"), ("bf16", "f32"), ("f32", "f64")):
    add(f"cvt.rn.{to}.{source}", [source], to, lambda a, to=to, source=source: encode(decode(a, source), to))
for kind in ("f16", "bf16"):
    add(
        f"cvt.rn.{kind}x2.f32",
        ["f32"] * 2,
        "b32",
        lambda a, b, kind=kind: encode(decode(a, "f32"), kind) << 16 | encode(decode(b, "f32"), kind),
    )


def saturated(bits: int) -> int:
    value = decode(bits, "f32")
    return encode(0.0 if not value > 0 else min(value, 1.0), "f32")


add("cvt.sat.f32.f32", ["f32"], "f32", saturated)
for form in ("cvta.to.global.u64", "cvta.global.u64"):
    add(form, ["u64"], "u64", lambda a: a)


def hard_values(kind: str) -> list[int]:
    """Bits of every value that is known to be hard, and some at random."""
    size = width(kind)
    draw = random.Random(kind)
    some = [draw.getrandbits(size) for _ in range(8)]
    if kind == "pred":
        return [0, 1]
    if kind not in FORMATS:
        edges = [0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256]
        edges += [1 << (size - 1), (1 << (size - 1)) - 1, (1 << size) - 1, (1 << size) - 2, (1 << size) - 7]
        return edges[: len(edges) if size > 16 else None] + some
    precision, _, highest = FORMATS[kind]
    one = highest << (precision - 1)
    infinity = (2 * highest + 1) << (precision - 1)
    smallest_normal = 1 << (precision - 1)
    positive = [0, 1, 2, smallest_normal - 1, smallest_normal, one - 1, one, one + 1, infinity - 1, infinity]
    positive += [
        infinity + 1,
        infinity + (1 << (precision - 2)),
        encode(Fraction(3, 2), kind),
        encode(Fraction(1, 10), kind),
    ]
    # Where a narrower float's rounding turns: between its numbers, half a subnormal, the largest.
    for other, (p, low, high) in FORMATS.items():
        if width(other) < size or (other != kind and p < precision):
            ties = [
                1 + Fraction(1, 2**p),
                1 + Fraction(3, 2**p),
                Fraction(2) ** (low - p),
                Fraction(3) * Fraction(2) ** (low - p),
            ]
            ties += [(2 - Fraction(1, 2**p)) * Fraction(2) ** high]
            for tie in ties:
                bits = encode(tie, kind)
                positive += [bits - 1, bits, bits + 1] if bits else [bits]
    both = [b | s << (size - 1) for b in positive for s in (0, 1)]
    return [b & ((1 << size) - 1) for b in both] + some


def operands_of(form: str, kinds: list[str]) -> list[np.ndarray]:
    """All combinations of the hard values, or as many of them as there are threads."""
    draw = random.Random(form)
    values = [hard_values(kind) for kind in kinds]
    combinations = list(itertools.product(*values)) if math.prod(map(len, values)) < 10**5 else None
    if combinations is None or len(combinations) > THREADS:
        chosen = [tuple(draw.choice(v) for v in values) for _ in range(THREADS)]
    else:
        chosen = combinations
    return [np.array(column, np.uint64) for column in zip(*chosen, strict=True)]


@pytest.mark.parametrize("form", FORMS)
def test_form(form):
    kinds, result, function = FORMS[form]
    operands = operands_of(form, kinds)
    actual = apply(form, kinds, result, operands)
    for values, bits in zip(zip(*operands, strict=True), actual, strict=True):
        expected = function(*map(int, values))
        assert same(int(bits), expected, result), f"{form} {[hex(v) for v in values]}: {int(bits):#x}, {expected:#x}"


def test_every_form_is_tested():
    """Here, or with the memory, the barriers and the products that they are about (the other files of this folder)."""
    elsewhere = (
        "ld.",
        "st.",
        "atom.",
        "red.",
        "cp.async",
        "ldmatrix",
        "stmatrix",
        "shfl",
        "redux",
        "vote",
        "mma",
        "wgmma",
    )
    elsewhere += ("bra", "ret", "exit", "bar.", "fence", "mov.b32.", "mov.b64.")
    left = [form for form in ptx.machine().known_forms() if form not in FORMS and not form.startswith(elsewhere)]
    assert not left
