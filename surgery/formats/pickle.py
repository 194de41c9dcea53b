"""The zip checkpoints that ``torch.save`` writes (``.bin``, ``.pt``, ``.pth``, ``.ckpt``), read without running them.

A file is a zip archive of stored (never compressed) entries: ``<name>/data.pkl`` describes the objects, and
``<name>/data/<key>`` holds the bytes of one storage. A pickle is a program; here it is never run. A small machine of
our own steps over the opcodes that plain state dicts use, on an allow-list of globals that stay symbols and are never
imported. Whatever is not on a list is refused with its byte offset: unreadable is never "clean".

The archive is read by :mod:`surgery.formats.archive`, more strictly than torch reads it. Every count that a file can blow up (opcodes, tree nodes, depth, bytes of the description) has a limit.

Nothing here opens a file, imports torch or calls ``pickle``. No scanner for bad globals, and no switch that widens the
lists at run time, may enter.
"""

from __future__ import annotations

import math
import pickletools
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import FormatError, SurgeryError, UnsafeError, UnsupportedError
from surgery.formats.archive import INCOMPLETE, SANDBOX, Read, Span, check_kind, exactly, read_archive
from surgery.tensor import BITS

PICKLE_LIMIT = 100_000_000
"""Largest ``data.pkl``, in bytes: what safetensors allows its header."""
STEP_LIMIT = 3_200_000
"""Most opcodes of a pickle: enough for 100,000 tensors at some 30 each."""
PART_LIMIT = 1_000_000
"""Most parts of the tree that a pickle makes, counted each time where a part is shared."""
DEPTH_LIMIT = 64
DIMENSION_LIMIT = 32
SIZE_LIMIT = 2**63 - 1
KEY_LIMIT = 2**31
"""Integer keys lie below this: larger ones can be chosen to collide, which makes a dict quadratic."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the file. Tied tensors are equal, views of one storage share ``storage``."""

    dtype: str
    """A name of :data:`surgery.tensor.BITS`."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements; 0 where a dimension is expanded."""
    offset: int
    """Byte offset in the file of the first element."""
    storage: tuple[int, int]
    """Byte range in the file of the whole storage."""

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after the other in C order, so that the bytes can be copied as they are."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True


def read_tree(read: Read, size: int) -> dict[str, Any]:
    """Read what a checkpoint holds, without its storages.

    Args:
        read: gives ``length`` bytes of the file from ``offset``.
        size: the size of the whole file, in bytes.

    Returns:
        The pickled mapping as nested dicts with string keys, lists and tuples. Leaves are :class:`StoredTensor`,
        strings, numbers, booleans and None; a ``torch.Size`` becomes a tuple, a dtype the string ``torch.float32``.

    Raises:
        FormatError: the archive or the pickle is malformed, truncated, or beyond a limit.
        UnsafeError: the pickle would run something, or the file is of a kind that cannot be read without running it.
        UnsupportedError: a tensor of a dtype or kind that surgery does not operate on.
    """
    check_kind(exactly(read, 0, min(size, 262)))
    entries = read_archive(read, size)
    folder = _folder(entries)
    low, high, crc = entries[f"{folder}data.pkl"]
    if high - low > PICKLE_LIMIT:
        raise FormatError(f"data.pkl has {high - low:,} bytes, beyond the limit of {PICKLE_LIMIT:,}")
    code = exactly(read, low, high - low)
    # A writer may leave checksums out (torch.serialization.set_crc32_options), and then it stores 0.
    if crc not in (0, zlib.crc32(code)):
        raise FormatError("the checksum of data.pkl does not match its bytes", mend="fetch it again, it is damaged")
    _check_byteorder(read, entries.get(f"{folder}byteorder"))
    root = _Machine(code).run()
    if type(root) not in (dict, OrderedDict):
        raise FormatError("the top level is not a mapping of names to tensors", mend="save a state_dict()")
    tree: dict[str, Any] = _Resolver(entries, folder).value(root, ())
    return tree


def gather(tensor: StoredTensor, storage: bytes | memoryview) -> bytes:
    """Copy a view, strided, transposed or expanded, out of its storage into C order.

    Args:
        tensor: a tensor that :func:`read_tree` returned.
        storage: the bytes of the file in ``tensor.storage``.

    Returns:
        The elements' bytes, ``math.prod(shape)`` times the item size. An expanded view can be far larger than its
        storage: hold its size against the memory budget first.
    """
    if 0 in tensor.shape:
        return b""
    import numpy as np  # here, because reading a header must not pay for it

    width = BITS[tensor.dtype] // 8
    # Unsigned integers are only carriers of the bytes. The constructor checks the bounds once more.
    view: np.ndarray[Any, Any] = np.ndarray(
        tensor.shape,
        f"u{width}",
        storage,
        tensor.offset - tensor.storage[0],
        # The stride of a dimension of one element is never used, and may be anything.
        tuple(0 if size == 1 else stride * width for size, stride in zip(tensor.shape, tensor.strides, strict=True)),
    )
    return view.tobytes()


def _folder(entries: Mapping[str, Span]) -> str:
    found = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1 or found[0].count("/") != 1:
        raise FormatError(f"a zip checkpoint holds one <name>/data.pkl, this one {len(found)}: {found[:3]!r:.80}")
    return found[0].removesuffix("data.pkl")


def _check_byteorder(read: Read, span: Span | None) -> None:
    if span is None:  # torch before 2.1 wrote none, and was little-endian everywhere that mattered
        return
    order = exactly(read, span[0], min(span[1] - span[0], 16))
    if order != b"little":
        raise FormatError(f"the byte order is {order!r}, not little", mend="save it again on x86 or ARM")


# The machine.


@dataclass(frozen=True, slots=True)
class _Symbol:
    """An allowed global: what it is called, what it stands for, and the dtype it names."""

    name: str
    role: str
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class _Storage:
    symbol: _Symbol
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that the pickle asks for, kept until it is known which tensor it makes."""

    role: str
    args: tuple[Any, ...]


_TYPED = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32", "Short": "I16",
    "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64", "ComplexDouble": "torch.complex128",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    # Known and harmless, but no dtype that safetensors defines (or, for float4, two elements in one).
    **{name: f"torch.{name}" for name in ("complex128", "complex32", "float4_e2m1fn_x2", "bits8", "bits16",
                                          "bits1x8", "bits2x4", "bits4x2")},
}  # fmt: skip
_GLOBALS: dict[tuple[str, str], _Symbol] = {
    ("collections", "OrderedDict"): _Symbol("collections.OrderedDict", "ordered"),
    ("torch._utils", "_rebuild_tensor_v2"): _Symbol("torch._utils._rebuild_tensor_v2", "v2"),
    ("torch._utils", "_rebuild_tensor_v3"): _Symbol("torch._utils._rebuild_tensor_v3", "v3"),
    ("torch._utils", "_rebuild_parameter"): _Symbol("torch._utils._rebuild_parameter", "parameter"),
    ("torch", "Size"): _Symbol("torch.Size", "size"),
    ("torch.storage", "UntypedStorage"): _Symbol("torch.storage.UntypedStorage", "storage"),
    **{("torch", f"{x}Storage"): _Symbol(f"torch.{x}Storage", "storage", dtype) for x, dtype in _TYPED.items()},
    **{("torch", x): _Symbol(f"torch.{x}", "dtype", dtype) for x, dtype in _DTYPES.items()},
}


class _Machine:
    """Step over a pickle's opcodes, making plain containers, symbols and calls that nobody makes."""

    def __init__(self, code: bytes) -> None:
        self.code = code
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        if self.code[:1] != b"\x80":
            raise FormatError("data.pkl does not start as a pickle of protocol 2 or later")
        for opcode, argument, position in _opcodes(self.code):
            self.position = position
            action = _ACTIONS.get(opcode)
            if action is None:
                raise UnsafeError(f"data.pkl uses the opcode {opcode} at byte {self.position}", mend=SANDBOX)
            action(self, argument)
        if self.position != len(self.code) - 1 or len(self.stack) != 1 or self.marks:
            raise self.malformed("more than one value")
        return self.stack[0]

    def malformed(self, what: str) -> FormatError:
        return FormatError(f"data.pkl is malformed at byte {self.position}: {what}")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def floor(self) -> int:
        return self.marks[-1] if self.marks else 0

    def top(self) -> Any:
        if len(self.stack) <= self.floor():
            raise self.malformed("too little on the stack")
        return self.stack[-1]

    def marked(self) -> list[Any]:
        if not self.marks:
            raise self.malformed("no mark on the stack")
        floor = self.marks.pop()
        items = self.stack[floor:]
        del self.stack[floor:]
        return items

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) - count < self.floor():
            raise self.malformed("too little on the stack")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def protocol(self, version: int) -> None:
        if self.position or not 2 <= version <= 5:
            raise self.malformed(f"protocol {version}")

    def remember(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.malformed(f"memo {index} was never set")
        self.push(self.memo[index])

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise self.malformed("items for something that is no list")
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise self.malformed("keys for something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and 0 <= key < KEY_LIMIT):
                raise self.malformed(f"a key is a {type(key).__name__}, or a number out of range")
            if key in target:
                raise self.malformed(f"the key {key!r:.80} stands twice")
            target[key] = value

    def build(self) -> None:
        self.last(1)  # the state, where torch keeps _metadata: no tensor in it
        if type(self.top()) is not OrderedDict:
            raise UnsafeError(f"data.pkl sets the state of an object at byte {self.position}", mend=SANDBOX)

    def named(self, pair: str) -> None:
        # pickletools joins the two lines with a space, and resolves escapes that no unpickler resolves.
        raw = pair.replace(" ", "\n").encode("ascii") + b"\n"
        if not self.code.startswith(raw, self.position + 1):
            raise self.refused(pair.replace(" ", "."))
        module, _, name = pair.partition(" ")
        self.symbol(module, name)

    def stacked(self) -> None:
        module, name = self.last(2)
        if type(module) is not str or type(name) is not str:
            raise self.malformed("a global's name is not a string")
        self.symbol(module, name)

    def symbol(self, module: str, name: str) -> None:
        found = _GLOBALS.get((module, name))
        if found is None:
            raise self.refused(f"{module}.{name}")
        self.push(found)

    def refused(self, name: str) -> UnsafeError:
        return UnsafeError(f"data.pkl calls for {name[:200]} at byte {self.position}", mend=SANDBOX)

    def reduce(self) -> None:
        function, args = self.last(2)
        if type(function) is not _Symbol or function.role in ("storage", "dtype"):
            name = function.name if type(function) is _Symbol else f"a {type(function).__name__}"
            raise UnsafeError(f"data.pkl calls {name} as a function at byte {self.position}", mend=SANDBOX)
        if type(args) is not tuple or (function.role == "ordered" and args):
            raise self.malformed(f"arguments that {function.name} does not take")
        self.push(OrderedDict() if function.role == "ordered" else _Call(function.role, args))

    def persistent(self) -> None:
        match self.last(1)[0]:
            case ("storage", _Symbol(role="storage") as symbol, str(key), str(), int(numel)):
                self.push(_Storage(symbol, key, numel))
            case _:
                raise self.malformed("a persistent id that is no storage")


def _opcodes(code: bytes) -> Iterator[tuple[str, Any, int]]:
    try:
        for step, (opcode, argument, position) in enumerate(pickletools.genops(code)):
            if step == STEP_LIMIT:
                raise FormatError(f"data.pkl has more than {STEP_LIMIT:,} opcodes")
            yield opcode.name, argument, position or 0
    except ValueError as error:
        raise FormatError(f"data.pkl is malformed: {str(error)[:200]}") from None


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    **dict.fromkeys(("FRAME", "STOP"), lambda *_: None),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "TUPLE1": lambda machine, _: machine.push(machine.last(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.last(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.last(3)),
    "APPEND": lambda machine, _: machine.extend([*machine.last(1)]),
    "APPENDS": lambda machine, _: machine.extend(machine.marked()),
    "SETITEM": lambda machine, _: machine.update([*machine.last(2)]),
    "SETITEMS": lambda machine, _: machine.update(machine.marked()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": lambda machine, _: machine.stacked(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.persistent(),
}


# From what the machine left to tensors with names.


class _Resolver:
    """Copy the machine's value into a plain tree, turning its calls into tensors that lie within the file."""

    def __init__(self, entries: Mapping[str, Span], folder: str) -> None:
        self.entries = entries
        self.folder = folder
        self.parts = 0

    def value(self, value: Any, path: tuple[str, ...]) -> Any:
        self.parts += 1
        if self.parts > PART_LIMIT:
            raise FormatError(f"data.pkl unfolds into more than {PART_LIMIT:,} parts")
        if len(path) > DEPTH_LIMIT:
            raise FormatError(f"data.pkl nests deeper than {DEPTH_LIMIT}")
        if value is None or type(value) in (str, int, float, bool):
            return value
        if type(value) in (dict, OrderedDict):
            return self.mapping(value, path)
        if type(value) is list:
            return [self.value(item, (*path, str(index))) for index, item in enumerate(value)]
        if type(value) is tuple:
            return tuple(self.value(item, (*path, str(index))) for index, item in enumerate(value))
        try:
            return self.leaf(value)
        except SurgeryError as error:
            raise error.at(tensor=_dotted(path)) from None

    def mapping(self, value: dict[str | int, Any], path: tuple[str, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in value.items():
            name = str(key)
            if name in result or (type(key) is int and not path):
                raise FormatError("a key that is a number stands for a name", tensor=_dotted((*path, name)))
            result[name] = self.value(item, (*path, name))
        return result

    def leaf(self, value: Any) -> Any:
        match value:
            case _Symbol(role="dtype"):
                return value.name
            case _Call(role="size", args=(sizes,)):
                return _sizes(sizes)
            case _Call(role="parameter", args=(_Call(role="v2" | "v3") as data, _, _)):
                return self.tensor(data)
            case _Call(role="v2" | "v3"):
                return self.tensor(value)
            case _Storage():
                raise UnsupportedError("a bare storage, not a tensor", mend="save tensors")
        raise FormatError("neither a tensor nor plain data")

    def tensor(self, call: _Call) -> StoredTensor:
        match call.role, call.args:
            case "v2", (_Storage(symbol=_Symbol(dtype=dtype)) as storage, int(offset), shape, strides, _, _,
                        *more) if dtype:  # fmt: skip
                pass
            case "v3", (_Storage(symbol=_Symbol(dtype="")) as storage, int(offset), shape, strides, _, _,
                        _Symbol(role="dtype", dtype=dtype), *more):  # fmt: skip
                pass
            case _:
                raise FormatError("a tensor is rebuilt from the wrong arguments")
        if len(more) > 1 or any(more):
            raise UnsupportedError("a conjugated or negated view", mend="save tensor.resolve_conj().resolve_neg()")
        if dtype not in BITS:
            raise UnsupportedError(f"the dtype {dtype} is none that surgery operates on")
        shape, strides, width = _sizes(shape), _sizes(strides), BITS[dtype] // 8
        low, high = self.storage(storage, width if storage.symbol.dtype else 1)
        start = _first(offset, shape, strides, (high - low) // width, width)
        return StoredTensor(dtype, shape, strides, low + start * width, (low, high))

    def storage(self, storage: _Storage, width: int) -> tuple[int, int]:
        name = f"{self.folder}data/{storage.key}"
        span = self.entries.get(name.lower())
        if span is None:
            raise FormatError(f"its storage {name!r:.80} is not in the archive", mend=INCOMPLETE)
        if span[1] - span[0] != storage.numel * width:
            raise FormatError(
                f"its storage should have {storage.numel * width:,} bytes, the archive holds {span[1] - span[0]:,}"
            )
        return span[:2]


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(key[:200] for key in path)


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is _Call and value.role == "size" and len(value.args) == 1:
        value = value.args[0]
    if type(value) not in (tuple, list) or len(value) > DIMENSION_LIMIT:
        raise FormatError(f"a shape or stride is not a list of up to {DIMENSION_LIMIT} sizes")
    if not all(type(size) is int and 0 <= size <= SIZE_LIMIT for size in value):
        raise FormatError("a shape or stride has a size that is negative, too large, or no whole number")
    return tuple(value)


def _first(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], available: int, width: int) -> int:
    """Return the first element's index, once the last one is known to lie in the storage."""
    if len(shape) != len(strides):
        raise FormatError(f"{len(shape)} sizes do not go with {len(strides)} strides")
    if offset < 0 or math.prod(size for size in shape if size) * width > SIZE_LIMIT:
        raise FormatError(f"the offset {offset} or the size of the tensor overflows")
    if 0 in shape:
        return 0  # torch lets an empty view start anywhere; no byte of it is read
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= available:
        raise FormatError(f"its last element is number {last:,} of a storage of {available:,}")
    return offset
