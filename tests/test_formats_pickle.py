"""The reader of torch zip checkpoints: what torch writes comes back bit for bit, and nothing hostile ever runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from surgery.errors import FormatError, SurgeryError, UnsafeError, UnsupportedError
from surgery.formats import archive as archive_reader
from surgery.formats import pickle as reader
from surgery.formats.pickle import StoredTensor, gather, read_tree
from surgery.tensor import BITS

# --- making files


def source(data):
    return lambda offset, length: data[offset : offset + length]


def tree_of(data):
    return read_tree(source(data), len(data))


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def archive(code=b"", storages=(), *, byteorder=b"little", folder="archive", compression=zipfile.ZIP_STORED, more=()):
    """Write a checkpoint by hand: a pickle, and the bytes of its storages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the equal names that some tests want
        entries = [(f"{folder}/data.pkl", code)] if code is not None else []
        entries += [(f"{folder}/byteorder", byteorder)] if byteorder is not None else []
        entries += [(f"{folder}/data/{key}", data) for key, data in dict(storages).items()]
        for name, data in [*entries, *more]:
            target.writestr(name, data)
    return buffer.getvalue()


def body(value):
    """Pickle a plain value without protocol and STOP, to be put into a larger program."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def program(*parts, protocol=2):
    return b"\x80" + bytes([protocol]) + b"".join(parts) + b"."


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def mapping(**items):
    return program(b"}(", *(body(key) + value for key, value in items.items()), b"u")


def stored(kind="FloatStorage", key="0", numel=4, location="cpu", module="torch"):
    return b"(" + body("storage") + name(module, kind) + body(key) + body(location) + body(numel) + b"tQ"


HOOKS = name("collections", "OrderedDict") + b")R"


def tensor(storage=None, *, offset=0, shape=(4,), strides=(1,), rest=b"\x89" + HOOKS, function="_rebuild_tensor_v2"):
    arguments = (stored() if storage is None else storage) + body(offset) + body(shape) + body(strides) + rest
    return name("torch._utils", function) + b"(" + arguments + b"tR"


ONE = {"0": np.arange(4, dtype="<f4").tobytes()}


# --- comparing with torch


def flat(tree, path=""):
    """List a tree's leaves by path."""
    if isinstance(tree, dict):
        return {k: v for key, item in tree.items() for k, v in flat(item, f"{path}.{key}").items()}
    if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
        return {k: v for key, item in enumerate(tree) for k, v in flat(item, f"{path}.{key}").items()}
    return {path: tree}


def raw(value):
    if not value.numel():
        return b""
    return (
        value.detach()
        .resolve_conj()
        .clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def contents(found, data):
    return gather(found, memoryview(data)[slice(*found.storage)])


def assert_same(value, **options):
    """Hold our tree against torch's own: leaves, shapes, strides and every byte. Return ours."""
    data = saved(value, **options)
    safe = options.get("pickle_protocol", 2) < 4  # torch's own restricted unpickler stops at protocol 3
    tree, theirs = tree_of(data), flat(torch.load(io.BytesIO(data), weights_only=safe))
    ours = flat(tree)
    assert list(ours) == list(theirs)
    for path, expected in theirs.items():
        found = ours[path]
        if not isinstance(expected, torch.Tensor):
            assert found == expected
            assert type(found) is type(expected)
            continue
        assert isinstance(found, StoredTensor)
        assert (found.shape, found.strides) == (tuple(expected.shape), expected.stride())
        assert found.contiguous == expected.is_contiguous()
        assert contents(found, data) == raw(expected)
        if found.contiguous:
            assert data[found.offset : found.offset + expected.nbytes] == raw(expected)
    return tree


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def sample(dtype, *shape):
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    values = torch.arange(count, dtype=torch.int64).mul(37).add(11).remainder(2 if dtype is torch.bool else 251)
    return values.to(torch.uint8).view(dtype).reshape(shape)


# --- what torch writes comes back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_every_dtype_comes_back_bit_for_bit(dtype):
    tree = assert_same({"w": sample(dtype, 3, 5), "scalar": sample(dtype, 1)[0], "t": sample(dtype, 4, 2).t()})
    assert tree["w"].dtype == DTYPES[dtype]


def test_every_whole_byte_dtype_of_the_table_is_reached():
    assert set(DTYPES.values()) == {dtype for dtype, bits in BITS.items() if bits % 8 == 0}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_that_torch_can_write_is_read(protocol):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert_same({"state_dict": model.state_dict(), "fp8": sample(torch.float8_e5m2, 3)}, pickle_protocol=protocol)


def test_a_state_dict_with_its_metadata_becomes_a_plain_dict_of_tensors():
    state = torch.nn.Linear(3, 2).state_dict()
    assert state._metadata
    tree = assert_same(state)
    assert type(tree) is dict
    assert list(tree) == ["weight", "bias"]


def test_a_parameter_is_read_as_its_tensor():
    assert_same({"w": torch.nn.Parameter(torch.randn(2, 3)), "frozen": torch.nn.Parameter(torch.ones(2), False)})


def test_tied_tensors_are_equal_and_views_share_their_storage():
    weight = torch.randn(4, 6)
    tree = assert_same({"embed": weight, "head": weight, "row": weight[2], "other": torch.randn(4, 6)})
    assert tree["embed"] == tree["head"]
    assert tree["row"].storage == tree["embed"].storage
    assert tree["row"].offset == tree["embed"].offset + 2 * 6 * 4
    assert tree["other"].storage != tree["embed"].storage


def test_views_of_every_kind_are_gathered_into_c_order():
    base = torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)
    tree = assert_same(
        {
            "transposed": base.permute(3, 1, 0, 2),
            "stepped": base[:, ::2, 1:3, ::3],
            "expanded": torch.arange(3.0)[:, None].expand(3, 4),
            "broadcast scalar": torch.tensor(7.0).expand(2, 3),
            "overlapping": torch.arange(6.0).as_strided((4, 3), (1, 1)),
            "tail": base.flatten()[117:],
            "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        }
    )
    assert tree["expanded"].strides == (1, 0)
    assert tree["tail"].contiguous
    assert not tree["channels last"].contiguous


def test_empty_and_zero_dimensional_tensors_come_back():
    tree = assert_same(
        {
            "empty": torch.zeros(0),
            "rows": torch.zeros(0, 4),
            "columns": torch.zeros(3, 0),
            "scalar": torch.tensor(3.5),
            "empty view at the end": torch.arange(5.0)[5:],
            "empty view beyond": torch.zeros(3, 0)[2:],
            "ones": torch.ones(1, 1, 1),
        }
    )
    assert tree["scalar"].shape == ()
    assert gather(tree["columns"], b"") == b""


def test_the_stride_of_a_single_row_may_be_anything():
    strange = torch.arange(3.0).as_strided((1, 3), (2**40, 1))
    assert_same({"w": strange, "t": strange.t()})
    huge = tree_of(archive(mapping(w=tensor(shape=(1, 4), strides=(2**62, 1))), ONE))["w"]
    assert huge.contiguous
    assert gather(huge, ONE["0"]) == ONE["0"]


def test_nested_checkpoints_keep_their_plain_values_and_number_keys_become_strings():
    value = {
        "state_dict": collections.OrderedDict(w=torch.ones(2)),
        "epoch": 3,
        "seed": 2**70,
        "negative": -(2**40),
        "loss": 0.25,
        "note": "é\n\x1b",
        "none": None,
        "flags": [True, False, ("a", 1), {}],
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}, 11: {}}, "betas": (0.9, 0.999)},
    }
    tree = tree_of(saved(value))
    assert tree.pop("state_dict")["w"].shape == (2,)
    assert tree["optimizer"]["state"].pop("0")["step"].shape == ()
    expected = {key: value[key] for key in tree} | {"dtype": "torch.bfloat16", "size": (2, 3)}
    expected["optimizer"] = {"state": {"11": {}}, "betas": (0.9, 0.999)}
    assert tree == expected


def test_an_empty_state_dict_is_an_empty_tree():
    assert tree_of(saved({})) == {}


def test_checkpoints_without_checksums_or_byteorder_are_read():
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        assert_same({"w": torch.randn(3)})
    finally:
        torch.serialization.set_crc32_options(before)
    assert tree_of(archive(mapping(w=tensor()), ONE, byteorder=None))["w"].shape == (4,)


def test_an_archive_that_was_unpacked_and_zipped_again_without_compression_is_read():
    data = saved({"w": torch.randn(3, 2).t()})
    again = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(again, "w") as new:
        new.writestr("archive/", b"")
        for entry in old.namelist():
            with new.open(entry, "w", force_zip64=True) as target:
                target.write(old.read(entry))
    ours, theirs = (tree_of(file)["w"] for file in (again.getvalue(), data))
    assert contents(ours, again.getvalue()) == contents(theirs, data)


def test_a_file_beyond_four_gigabytes_is_read_by_its_zip64_fields(tmp_path):
    path = tmp_path / "big.pt"
    with FakeTensorMode():
        state = {"big": torch.empty(5_000_000_000, dtype=torch.uint8), "after": torch.empty(3)}
    with torch.serialization.skip_data(materialize_fake_tensors=True):  # leaves holes: the file takes few blocks
        torch.save(state, path)
    with path.open("r+b") as file:
        mark = b"twelve bytes"
        size = path.stat().st_size
        tree = read_tree(lambda offset, length: os.pread(file.fileno(), length, offset), size)
        file.seek(tree["after"].offset)
        file.write(mark)
        file.flush()
        assert raw(torch.load(path, mmap=True, weights_only=True)["after"]) == mark
    assert tree["big"].storage[1] - tree["big"].storage[0] == 5_000_000_000
    assert tree["after"].offset > 5_000_000_000


def test_reading_the_tree_never_reads_a_storage():
    data = saved({"w": torch.ones(100_000), "v": torch.ones(100_000)})
    ranges = []

    def read(offset, length):
        ranges.append((offset, offset + length))
        return data[offset : offset + length]

    tree = read_tree(read, len(data))
    for low, high in (found.storage for found in tree.values()):
        assert all(stop <= low or start >= high for start, stop in ranges)


def test_torch_is_not_imported_by_the_reader():
    code = "import sys, surgery.formats.pickle; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_view_of_a_storage_comes_back(data):
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    base = sample(dtype, data.draw(st.integers(1, 40)))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = data.draw(st.lists(st.integers(0, 5), min_size=len(shape), max_size=len(shape)))
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    offset = data.draw(st.integers(0, max(base.numel() - 1 - reach, 0)))
    if offset + reach < base.numel():
        assert_same({"view": base.as_strided(shape, strides, offset)})


# --- what a pickle may not do

TRAP = "trap_of_the_pickle_tests"
SPRUNG = []
sys.modules[TRAP] = type(sys)(TRAP)


def spring(*_):
    SPRUNG.append(True)
    return {}


class Sprung(dict):
    """A class whose making is the side effect."""

    def __new__(cls, *_):
        spring()
        return super().__new__(cls)

    def __setstate__(self, state):
        spring()


sys.modules[TRAP].spring = spring
sys.modules[TRAP].Sprung = Sprung
CODE = body(f"__import__({TRAP!r}).spring()")


def called(module, attribute, *arguments):
    return name(module, attribute) + b"(" + b"".join(arguments) + b"tR"


# Programs that do run under the standard unpickler: a test below sees to it that the trap works.
RUNNING = {
    "a function by GLOBAL and REDUCE": program(called(TRAP, "spring")),
    "a function by STACK_GLOBAL": program(body(TRAP), body("spring"), b"\x93)R", protocol=4),
    "a function whose result is thrown away": program(called(TRAP, "spring"), b"0}"),
    "a function inside a state dict": mapping(w=called(TRAP, "spring"), v=body(1)),
    "a function inside OrderedDict state": program(HOOKS, called(TRAP, "spring"), b"b"),
    "a function among a tensor's hooks": mapping(w=called(TRAP, "spring")),
    "INST": program(b"(" + f"i{TRAP}\nSprung\n".encode()),
    "OBJ": program(b"(" + name(TRAP, "Sprung") + b"o"),
    "NEWOBJ": program(name(TRAP, "Sprung"), b")\x81"),
    "NEWOBJ_EX": program(name(TRAP, "Sprung"), b")}\x92", protocol=4),
    "BUILD with __setstate__": program(name(TRAP, "Sprung"), b")R", body({"a": 1}), b"b"),
    "BUILD on a dict subclass": program(name(TRAP, "Sprung"), b")\x81}", b"b"),
    "os.system": program(called("os", "system", body("exit 0"))),
    "posix.system": program(called("posix" if os.name == "posix" else "nt", "system", body("exit 0"))),
    "builtins.eval": program(called("builtins", "eval", CODE)),
    "__builtin__.eval, renamed from Python 2": program(called("__builtin__", "eval", CODE)),
    "builtins.exec": program(called("builtins", "exec", CODE)),
    "builtins.getattr chain": program(
        called("builtins", "getattr", called("importlib", "import_module", body(TRAP)), body("spring")) + b")R"
    ),
    "a dotted name by STACK_GLOBAL": program(body(TRAP), body("spring.__call__"), b"\x93)R", protocol=4),
    "functools.partial": program(called("functools", "partial", name(TRAP, "spring")), b")R"),
    "operator.methodcaller": program(
        called("operator", "methodcaller", body("spring")) + called("importlib", "import_module", body(TRAP)) + b"\x85R"
    ),
    "map and list": program(called("builtins", "list", called("builtins", "map", name(TRAP, "spring"), b"]K\1a"))),
    "timeit": program(called("timeit", "timeit", CODE, body("pass"), name("time", "perf_counter"), body(1))),
    "an opcode after a valid state dict": program(HOOKS, b"0", called(TRAP, "spring")),
    "LONG_BINPUT and LONG_BINGET around a function": program(
        name(TRAP, "spring"), b"r\xff\xff\0\0", b"0", b"j\xff\xff\0\0", b")R"
    ),
    "FRAME around a function": program(b"\x95" + struct.pack("<Q", 0), called(TRAP, "spring"), protocol=4),
}

FORBIDDEN = {
    "torch.load": called("torch", "load", body("/nonexistent")),
    "torch.serialization.load": called("torch.serialization", "load", body("/nonexistent")),
    "torch.storage._load_from_bytes": called("torch.storage", "_load_from_bytes", b"C\1."),
    "torch.hub.load": called("torch.hub", "load", body("x/y"), body("z")),
    "torch.save": called("torch", "save", body({}), body("/nonexistent/x")),
    "torch.jit.load": called("torch.jit", "load", body("x")),
    "torch._utils._rebuild_parameter_with_state": name("torch._utils", "_rebuild_parameter_with_state"),
    "torch._utils._rebuild_qtensor": name("torch._utils", "_rebuild_qtensor"),
    "torch._utils._rebuild_sparse_tensor": name("torch._utils", "_rebuild_sparse_tensor"),
    "torch._utils._rebuild_wrapper_subclass": name("torch._utils", "_rebuild_wrapper_subclass"),
    "torch._tensor._rebuild_from_type_v2": name("torch._tensor", "_rebuild_from_type_v2"),
    "torch._utils._import_dotted_name": name("torch._utils", "_import_dotted_name"),
    "torch.utils.bottleneck": called("torch.utils.bottleneck.__main__", "run_autograd_prof", CODE, b"}"),
    "torch.jit.unsupported_tensor_ops.execWrapper": called("torch.jit.unsupported_tensor_ops", "execWrapper", CODE),
    "torch.nn.Linear": called("torch.nn.modules.linear", "Linear", body(1), body(1)),
    "torch.QInt8Storage": name("torch", "QInt8Storage"),
    "torch.device": called("torch", "device", body("cpu")),
    "numpy scalar": called(
        "numpy.core.multiarray", "scalar", called("numpy", "dtype", body("f8")), b"C\x08" + bytes(8)
    ),
    "numpy scalar, new name": name("numpy._core.multiarray", "scalar"),
    "numpy array": called("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), b"K\0\x85", b"C\1b"),
    "numpy.load with pickles": name("numpy", "load"),
    "codecs.encode": called("_codecs", "encode", body("x"), body("latin1")),
    "copyreg._reconstructor": name("copyreg", "_reconstructor"),
    "copy_reg._reconstructor": name("copy_reg", "_reconstructor"),
    "builtins.set": called("__builtin__", "set", b"]"),
    "builtins.__import__": called("builtins", "__import__", body(TRAP)),
    "collections.defaultdict": called("collections", "defaultdict", name("builtins", "list")),
    "collections.Counter": name("collections", "Counter"),
    "pickle.loads": called("pickle", "loads", b"C\1N"),
    "_pickle.loads": name("_pickle", "loads"),
    "subprocess.Popen": called("subprocess", "Popen", body(["true"])),
    "shutil.rmtree": called("shutil", "rmtree", body("/nonexistent")),
    "webbrowser.open": called("webbrowser", "open", body("x")),
    "socket.create_connection": name("socket", "create_connection"),
    "ctypes.CDLL": name("ctypes", "CDLL"),
    "types.CodeType": name("types", "CodeType"),
    "runpy.run_path": name("runpy", "run_path"),
    "pip.main": name("pip._internal", "main"),
    "pdb.run": name("pdb", "run"),
    "cProfile.run": name("cProfile", "run"),
    "asyncio": name("asyncio.unix_events", "_UnixSubprocessTransport._start"),
    "doctest.debug_script": name("doctest", "debug_script"),
    "transformers": name("transformers.training_args", "TrainingArguments"),
    "an empty name": name("", ""),
    "a name with a space": b"ctorch Size\nx\n",
    "a name with an escape": b"ctorch\nS\\x69ze\n",
    "a known name in a foreign module": name("os", "OrderedDict"),
    "a known name behind a dot": body("torch") + body("storage.UntypedStorage") + b"\x93",
    "a class behind a function": body("collections") + body("OrderedDict.__reduce__") + b"\x93",
    "a relative module": name(".torch", "Size"),
    "another case": name("Torch", "Size"),
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pstorage\n",
    "DUP": b"}2",
    "POP": b"}N0",
    "POP_MARK": b"}(N1",
    "DICT": b"(d",
    "LIST": b"(l",
    "INT": b"I01\n",
    "LONG4": b"\x8b\x01\x00\x00\x00\x01",
    "STRING": b"S'x'\n",
    "UNICODE": b"Vx\n",
    "FLOAT": b"F1.0\n",
    "GET": b"}p0\ng0\n",
    "BINBYTES": b"B\x01\x00\x00\x00x",
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1) + b"x",
    "EMPTY_SET": b"\x8f",
    "FROZENSET": b"(\x91",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"}\x98",
    "REDUCE on a string": body("eval") + b")R",
    "REDUCE on a dict": b"})R",
    "REDUCE on a storage class": name("torch", "FloatStorage") + b")R",
    "REDUCE on a dtype": name("torch", "float32") + b")R",
    "REDUCE on a tensor": tensor() + b")R",
    "BUILD on a dict": b"}" + body({"a": 1}) + b"b",
    "BUILD on a tensor": tensor() + body({"a": 1}) + b"b",
    "BUILD on a class": name("collections", "OrderedDict") + body({"__init__": 1}) + b"b",
}


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch):
    """Fail every test in which a payload ran: the shell, or the trap."""
    SPRUNG.clear()
    for module in (os, sys.modules[os.system.__module__]):
        monkeypatch.setattr(module, "system", spring)
    yield
    assert not SPRUNG


@pytest.mark.parametrize("kind", RUNNING)
def test_a_program_that_would_run_is_refused(kind):
    with pytest.raises(UnsafeError, match=r"at byte \d+; convert it in a sandbox") as caught:
        tree_of(archive(RUNNING[kind], ONE))
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("kind", RUNNING)
def test_the_trap_does_spring_under_the_standard_unpickler(kind):
    pickle.loads(RUNNING[kind])
    assert SPRUNG
    SPRUNG.clear()


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_a_global_or_opcode_that_is_not_on_the_list_is_refused(kind):
    code = program(body({"a": 1}), FORBIDDEN[kind], protocol=5)
    with pytest.raises(UnsafeError, match=r"at byte \d+; convert it in a sandbox"):
        tree_of(archive(code, ONE))


def test_the_error_names_the_global_and_its_byte():
    code = mapping(w=called("posix", "system", body("x")))
    with pytest.raises(UnsafeError, match=rf"data.pkl calls for posix\.system at byte {code.index(b'cposix')};"):
        tree_of(archive(code))


def test_the_error_names_the_opcode_and_its_byte():
    code = program(b"}", b"(" + name("collections", "OrderedDict") + b"o")
    with pytest.raises(UnsafeError, match=rf"uses the opcode OBJ at byte {len(code) - 2}"):
        tree_of(archive(code))


def test_a_payload_of_torch_save_itself_is_refused(tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return subprocess.call, (["touch", str(canary)],)

    data = saved({"w": torch.ones(1), "x": Payload()}, pickle_protocol=4)
    with pytest.raises(UnsafeError, match=r"calls for subprocess\.call"):
        tree_of(data)
    assert not canary.exists()


@pytest.mark.parametrize(
    "value", [np.float64(1), np.ones(2), {1, 2}, b"bytes", torch.device("cpu"), torch.ones(2).to_sparse()]
)
def test_objects_outside_plain_state_dicts_are_refused(value):
    with pytest.raises(UnsafeError):
        tree_of(saved({"x": value}))


# --- malformed pickles

MALFORMED = {
    "nothing": b"",
    "no protocol": b"}.",
    "protocol 0": b"(dp0\n.",
    "protocol 1": program(b"}", protocol=1),
    "protocol 6": program(b"}", protocol=6),
    "a second protocol": program(b"\x80\x02}"),
    "no STOP": b"\x80\x02}",
    "bytes after STOP": program(b"}") + b"x",
    "a second pickle after STOP": program(b"}") + program(b"}"),
    "an unknown opcode": program(b"\xff"),
    "a truncated string": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a string of 2**63 bytes": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
    "a truncated number": b"\x80\x02J\0.",
    "a string that is not UTF-8": program(b"}X\x01\0\0\0\xffNs"),
    "a global without a second line": b"\x80\x02cos.",
    "a global that is not ASCII": program(b"c\xc3\xa9\nx\n"),
    "a number of a million digits": program(b"L" + b"9" * 1_000_000 + b"L\n"),
    "an empty stack": program(),
    "two values": program(b"}}"),
    "an open mark": program(b"}("),
    "a mark that is missing": program(b"}u"),
    "a pop below a mark": program(b"}", body("a"), b"(Ns"),
    "a tuple below a mark": program(b"NN(\x86"),
    "a memo that was never set": program(b"h\x05"),
    "a memo of nothing": program(b"q\0}"),
    "a memo of a mark": program(b"(q\0u}"),
    "items for a dict": program(b"}Na"),
    "items for a tuple": program(b")(NNe"),
    "items for a tensor": mapping(w=tensor() + b"(" + body(1) + b"e"),
    "keys for a list": program(b"]", body("a"), b"Ns"),
    "keys for a tensor": mapping(w=tensor() + body("a") + b"Ns"),
    "keys for a storage": mapping(w=stored() + body(0) + body(1) + b"s"),
    "a key without a value": program(b"}(", body("a"), b"u"),
    "a key twice": program(b"}(", body("a"), b"N", body("a"), b"Nu"),
    "a key twice, by SETITEM": program(b"}", body("a"), b"Ns", body("a"), b"Ns"),
    "a number and its name as keys": mapping(a=b"}(K\1N" + body("1") + b"Nu"),
    "a number at the top level": program(b"}K\1Ns"),
    "None as a key": program(b"}NNs"),
    "a list as a key": program(b"}]Ns"),
    "a tuple as a key": program(b"})Ns"),
    "a boolean as a key": program(b"}\x88Ns"),
    "a float as a key": program(b"}", body(1.5), b"Ns"),
    "a tensor as a key": program(b"}", tensor(), b"Ns"),
    "a negative key": mapping(a=b"}" + body(-1) + b"Ns"),
    "a key chosen to collide": mapping(a=b"}" + body(2**61 - 1) + b"Ns"),
    "a list at the top": program(b"]"),
    "None at the top": program(b"N"),
    "a tensor at the top": program(tensor()),
    "a global at the top": program(name("torch", "Size")),
    "a class as a leaf": mapping(a=name("collections", "OrderedDict")),
    "an OrderedDict from arguments": program(name("collections", "OrderedDict"), b"](", body("a"), b"Ne\x85R"),
    "a call without a tuple": program(name("collections", "OrderedDict"), b"]R"),
    "a global's name that is a number": program(body("torch"), b"K\1\x93", protocol=4),
    "a persistent id that is a string": program(body("storage"), b"Q"),
    "a persistent id that is too short": program(body(("storage", "x")), b"Q"),
    "a persistent id of a module": program(b"(", body("module"), name("torch", "FloatStorage"), body("0"), body("cpu"), b"K\4tQ"),
    "a storage of a class that is none": mapping(w=tensor(stored("Size"))),
    "a storage with a number for its key": mapping(w=tensor(stored(key=0))),
    "a size that is a string": mapping(w=name("torch", "Size") + body("ab") + b"\x85R"),
    "a size that is negative": mapping(w=name("torch", "Size") + body((-1,)) + b"\x85R"),
    "a size of nothing": mapping(w=name("torch", "Size") + b")R"),
    "a dict that holds itself": program(b"}q\0", body("a"), b"h\0s"),
    "a list that holds itself": mapping(a=b"]q\0h\0a"),
    "lists within lists": mapping(a=b"]" * 500 + b"a" * 499),
    "tuples within tuples": mapping(a=b")" + b"\x85" * 200_000),
}  # fmt: skip

# Each has the storage of four float32 values, and the tensor is called "w".
GEOMETRY = {
    "a storage of another size": tensor(stored(numel=5)),
    "a storage of another dtype": tensor(stored("DoubleStorage")),
    "a storage of negative size": tensor(stored(numel=-4)),
    "a storage of 2**62 elements": tensor(stored(numel=2**62)),
    "a storage that is missing": tensor(stored(key="1")),
    "a storage outside its folder": tensor(stored(key="../data.pkl")),
    "an offset past the end": tensor(offset=1),
    "an offset far past the end": tensor(offset=2**64),
    "a negative offset": tensor(offset=-1),
    "an offset that is a float": tensor(offset=0.0),
    "a shape past the end": tensor(shape=(5,)),
    "a shape of 2**63": tensor(shape=(2**63,)),
    "a shape that overflows": tensor(shape=(2**62, 2**62), strides=(0, 0)),
    "an empty shape that overflows": tensor(shape=(2**62, 2**62, 0), strides=(1, 1, 1)),
    "a negative size": tensor(shape=(-1,)),
    "a size that is a float": tensor(shape=(4.0,)),
    "a size that is a boolean": tensor(shape=(True,)),
    "a size that is a dict": tensor(shape={}),
    "a shape that is a string": tensor(shape="4"),
    "a negative stride": tensor(offset=3, strides=(-1,)),
    "a stride past the end": tensor(strides=(2,)),
    "a stride that overflows": tensor(shape=(4, 2), strides=(1, 2**62)),
    "a stride of 2**64": tensor(shape=(1,), strides=(2**64,)),
    "a stride too few": tensor(shape=(2, 2), strides=(1,)),
    "a stride too many": tensor(shape=(4,), strides=(1, 1)),
    "a scalar past the end": tensor(offset=4, shape=(), strides=()),
    "33 dimensions": tensor(shape=(1,) * 33, strides=(1,) * 33),
    "no storage": tensor(body(None)),
    "a tensor for its storage": tensor(tensor()),
    "too few arguments": tensor(rest=b""),
    "an untyped storage without a dtype": tensor(stored("UntypedStorage", numel=16, module="torch.storage")),
    "a dtype that is a string": tensor(
        stored("UntypedStorage", numel=16, module="torch.storage"),
        rest=b"\x89" + HOOKS + body("float32"),
        function="_rebuild_tensor_v3",
    ),
    "a dtype for a typed storage": tensor(
        rest=b"\x89" + HOOKS + name("torch", "float32"), function="_rebuild_tensor_v3"
    ),
    "a dtype wider than its storage": tensor(
        stored("UntypedStorage", numel=16, module="torch.storage"),
        rest=b"\x89" + HOOKS + name("torch", "float64"),
        function="_rebuild_tensor_v3",
    ),
    "a parameter of nothing": name("torch._utils", "_rebuild_parameter") + body((None, True, None)) + b"R",
    "a parameter of a parameter": name("torch._utils", "_rebuild_parameter") * 2
    + b"(" + tensor() + b"\x88NtR\x88N\x87R",
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_pickle_is_refused(kind):
    with pytest.raises(FormatError):
        tree_of(archive(MALFORMED[kind], ONE))


@pytest.mark.parametrize("kind", GEOMETRY)
def test_a_tensor_that_does_not_fit_its_storage_is_refused_by_name(kind):
    with pytest.raises(FormatError) as caught:
        tree_of(archive(mapping(model=b"}" + body("w") + GEOMETRY[kind] + b"s"), ONE))
    assert caught.value.tensor == "model.w"


def test_the_builders_of_these_tests_make_valid_files():
    tree = tree_of(archive(mapping(w=tensor(), n=body([1, None])), ONE))
    assert tree == {"w": StoredTensor("F32", (4,), (1,), tree["w"].offset, tree["w"].storage), "n": [1, None]}
    untyped = stored("UntypedStorage", numel=16, module="torch.storage")
    rest = b"\x89" + HOOKS + name("torch", "uint16")
    tree = tree_of(archive(mapping(w=tensor(untyped, shape=(8,), rest=rest, function="_rebuild_tensor_v3")), ONE))
    assert tree["w"].dtype == "U16"


UNSUPPORTED = {
    "complex128": torch.ones(2, dtype=torch.complex128),
    "complex32": sample(torch.complex32, 2),
    "float4": sample(torch.float4_e2m1fn_x2, 2),
    "a conjugated view": torch.ones(2, dtype=torch.complex64).conj(),
    "a negated view": torch.ones(2, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_tensor_whose_bytes_are_not_its_values_is_refused_by_name(kind):
    with pytest.raises(UnsupportedError) as caught:
        tree_of(saved({"state": [UNSUPPORTED[kind]]}))
    assert caught.value.tensor == "state.0"


def test_a_bare_storage_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="bare storage") as caught:
        tree_of(archive(mapping(s=stored()), ONE))
    assert caught.value.tensor == "s"


# --- bombs


def test_a_pickle_that_unfolds_exponentially_is_refused(monkeypatch):
    monkeypatch.setattr(reader, "PART_LIMIT", 10_000)
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(50))
    with pytest.raises(FormatError, match="unfolds into more than 10,000 parts"):
        tree_of(archive(mapping(a=b"]" + doubled)))
    laughs = b"".join(b"q" + bytes([i]) + b"](" + (b"h" + bytes([i])) * 10 + b"e" for i in range(30))
    with pytest.raises(FormatError, match="unfolds into more than 10,000 parts"):
        tree_of(archive(mapping(a=b"(]" + laughs + b"t")))


def test_a_pickle_of_too_many_opcodes_is_refused(monkeypatch):
    monkeypatch.setattr(reader, "STEP_LIMIT", 10_000)
    for bomb in (
        b"N" * 20_000,
        b"(" * 20_000,
        b"}q\0" + b"h\0" * 20_000,
        b"})" + b"\x85" * 20_000,
        b"}\x94" + b"\x94" * 20_000,
    ):
        with pytest.raises(FormatError, match="more than 10,000 opcodes"):
            tree_of(archive(program(bomb, protocol=4)))


def test_the_real_limits_let_a_hundred_thousand_tensors_through():
    with zipfile.ZipFile(io.BytesIO(saved({f"layer.{i}": torch.ones(1) for i in range(500)}))) as target:
        opcodes = sum(1 for _ in pickletools.genops(target.read("archive/data.pkl")))
    assert opcodes / 500 * 100_000 < reader.STEP_LIMIT
    assert min(reader.PART_LIMIT, archive_reader.ENTRY_LIMIT) > 100_000


def test_a_memo_index_of_four_billion_costs_nothing():
    assert tree_of(archive(program(b"}r" + b"\xff" * 4))) == {}


def test_state_that_would_unfold_is_dropped_unseen():
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(100))
    assert tree_of(archive(program(HOOKS, b"]" + doubled, b"b"))) == {}


def test_a_description_beyond_the_limit_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(reader, "PICKLE_LIMIT", 1000)
    data = archive(program(b"}", b"N" * 2000))
    with pytest.raises(FormatError, match="beyond the limit of 1,000"):
        tree_of(data)


def test_an_archive_of_too_many_entries_is_refused(monkeypatch):
    monkeypatch.setattr(archive_reader, "ENTRY_LIMIT", 3)
    with pytest.raises(FormatError, match="4 entries exceeds"):
        tree_of(archive(program(b"}"), {"0": b"", "1": b""}))


def test_an_expanded_view_costs_nothing_until_it_is_gathered():
    found = tree_of(archive(mapping(w=tensor(shape=(2**40,), strides=(0,))), ONE))["w"]
    assert found.shape == (2**40,)


# --- hostile archives

GOOD = archive(mapping(w=tensor()), ONE)


def patched(old, new, data=GOOD, count=1):
    assert data.count(old) >= 1
    return data.replace(old, new, count)


def field(data, signature, offset, value, which=0):
    """Overwrite a field of the ``which``-th zip record that starts with ``signature``."""
    at = -1
    for _ in range(which + 1):
        at = data.index(signature, at + 1)
    return data[: at + offset] + value + data[at + offset + len(value) :]


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
TORCH = saved({"w": torch.arange(4.0)})
DATA = next(i for i, entry in enumerate(zipfile.ZipFile(io.BytesIO(GOOD)).infolist()) if "/data/" in entry.filename)


def streamed_lie():
    """A local header that tells another size, where torch writes zeros."""
    return field(TORCH, LOCAL, 22, struct.pack("<I", 1))


ARCHIVES = {
    "an empty file": b"",
    "one byte": b"P",
    "only a signature": LOCAL,
    "an end record alone": END + bytes(18),
    "text": b"hello world" * 30,
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "a safetensors file": struct.pack("<Q", 2) + b"{}",
    "an end record after a signature": LOCAL + END + bytes(18),
    "bytes before the archive": b"x" + GOOD,
    "a whole archive before the archive": TORCH + GOOD,
    "bytes after the archive": GOOD + b"x",
    "a comment": GOOD[:-2] + b"\x05\x00hello",
    "a cut end": GOOD[:-1],
    "half of it": GOOD[: len(GOOD) // 2],
    "a hole before the directory": GOOD[:40] + GOOD[60:],
    "compressed entries": archive(mapping(w=tensor()), ONE, compression=zipfile.ZIP_DEFLATED),
    "a compressed bomb": archive(mapping(w=tensor()), {"0": bytes(10_000_000)}, compression=zipfile.ZIP_DEFLATED),
    "bzip2": archive(mapping(w=tensor()), ONE, compression=zipfile.ZIP_BZIP2),
    "LZMA": archive(mapping(w=tensor()), ONE, compression=zipfile.ZIP_LZMA),
    "a storage twice": archive(mapping(w=tensor()), ONE, more=[("archive/data/0", bytes(16))]),
    "a description twice": archive(mapping(w=tensor()), ONE, more=[("archive/data.pkl", program(b"}"))]),
    "a description in another case": archive(mapping(w=tensor()), ONE, more=[("archive/DATA.PKL", program(b"}"))]),
    "a description in another folder": archive(mapping(w=tensor()), ONE, more=[("other/data.pkl", program(b"}"))]),
    "a description in a deeper folder": archive(mapping(w=tensor()), ONE, folder="a/b"),
    "a description at the root": archive(None, more=[("data.pkl", program(b"}"))]),
    "no description": archive(None, ONE),
    "no entries": archive(None, byteorder=None),
    "a big-endian file": archive(mapping(w=tensor()), ONE, byteorder=b"big"),
    "an unknown byte order": archive(mapping(w=tensor()), ONE, byteorder=b"little" * 9),
    "a byte order in another case": archive(mapping(w=tensor()), ONE, byteorder=None, more=[("archive/BYTEORDER", b"big")]),
    "a name that is not UTF-8": patched(b"archive/data/0", b"archive/data/\xff", count=2),
    "an encrypted entry": field(field(GOOD, CENTRAL, 8, b"\x01\0"), LOCAL, 6, b"\x01\0"),
    "flags that differ": field(GOOD, CENTRAL, 8, b"\x00\x08"),
    "methods that differ": field(GOOD, LOCAL, 8, b"\x08\0"),
    "names that differ": patched(b"archive/data/0", b"archive/data/1"),
    "names of other lengths": field(GOOD, LOCAL, 26, b"\x05\0"),
    "checksums that differ": field(GOOD, LOCAL, 14, b"\1\2\3\4"),
    "sizes that differ": field(GOOD, LOCAL, 22, struct.pack("<I", 12), which=DATA),
    "stored sizes that differ": field(GOOD, LOCAL, 18, struct.pack("<I", 12), which=DATA),
    "sizes that differ in a streamed entry": streamed_lie(),
    "a size that is not the stored size": field(GOOD, CENTRAL, 24, struct.pack("<I", 12), which=DATA),
    "a storage one byte short": archive(mapping(w=tensor()), {"0": bytes(15)}),
    "a storage one byte long": archive(mapping(w=tensor()), {"0": bytes(17)}),
    "an entry that lies outside": field(GOOD, CENTRAL, 42, struct.pack("<I", 2**31)),
    "an entry that lies nowhere": field(GOOD, CENTRAL, 42, struct.pack("<I", 7)),
    "two entries in one place": field(GOOD, CENTRAL, 42, bytes(4), which=DATA),
    "a zip64 size that is missing": field(GOOD, CENTRAL, 24, b"\xff" * 4),
    "a zip64 offset that is missing": field(GOOD, CENTRAL, 42, b"\xff" * 4),
    "an entry that is marked as a folder": field(GOOD, CENTRAL, 38, b"\x10", which=DATA),
    "an entry after a gap": field(GOOD, LOCAL, 28, b"\1\0"),
    "a descriptor with another size": field(TORCH, b"PK\x07\x08", 8, b"\1"),
    "a descriptor with another checksum": field(TORCH, b"PK\x07\x08", 4, b"\1\2\3\4", which=4),
    "a descriptor that is missing": patched(b"PK\x07\x08", bytes(4), TORCH),
    "data that begin one byte late": field(TORCH, LOCAL, 28, bytes([TORCH[TORCH.index(b"archive/data/0") - 2] + 1]), which=4),
    "an entry on another disk": field(GOOD, CENTRAL, 34, b"\1\0"),
    "an archive of two disks": field(GOOD, END, 4, b"\1\0"),
    "an entry more": field(GOOD, END, 8, struct.pack("<HH", 4, 4)),
    "an entry less": field(GOOD, END, 8, struct.pack("<HH", 2, 2)),
    "counts that differ": field(GOOD, END, 8, struct.pack("<H", 2)),
    "a directory elsewhere": field(GOOD, END, 16, bytes(4)),
    "a directory of 4 GB": field(GOOD, END, 12, b"\xff" * 4),
    "a broken directory": patched(CENTRAL, b"PK\x01\x03"),
    "a name longer than the directory": field(GOOD, CENTRAL, 28, b"\xff\xff"),
    "a comment longer than the directory": field(GOOD, CENTRAL, 32, b"\xff\xff", which=DATA),
    "a zip64 record that disagrees": field(TORCH, b"PK\x06\x06", 32, struct.pack("<Q", 5)),
    "a zip64 record of another size": field(TORCH, b"PK\x06\x06", 4, struct.pack("<Q", 45)),
    "a zip64 locator that points elsewhere": field(TORCH, b"PK\x06\x07", 8, bytes(8)),
    "a zip64 directory of 2**64 bytes": field(
        field(TORCH, b"PK\x06\x06", 40, b"\xff" * 8), END, 12, b"\xff" * 4
    ),
    "an extra field that reaches into the directory": field(GOOD, LOCAL, 28, b"\xff\xff", which=DATA),
    "a description with a flipped bit": patched(b"FloatStorage", b"FloatStoragd"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_malformed_archive_is_refused(kind):
    with pytest.raises(FormatError):
        tree_of(ARCHIVES[kind])


def test_a_file_cut_at_any_byte_is_refused():
    for data in (GOOD, TORCH):
        assert tree_of(data)
        for length in range(0, len(data), 7):
            with pytest.raises(FormatError):
                tree_of(data[:length])


def test_a_file_that_shrinks_while_it_is_read_is_refused():
    with pytest.raises(FormatError, match="ends within"):
        read_tree(source(GOOD[:-5]), len(GOOD))


def test_a_zip_entry_that_overlaps_another_is_refused():
    # The first entry's size grows, in both headers alike, until it swallows the second one's header.
    size = struct.unpack_from("<I", GOOD, 22)[0] + 20
    sizes = struct.pack("<II", size, size)
    with pytest.raises(FormatError, match="overlaps"):
        tree_of(field(field(GOOD, LOCAL, 18, sizes), CENTRAL, 20, sizes))


def test_a_legacy_pickle_is_refused_as_unsafe():
    legacy = saved({"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeError, match=r"legacy format.*sandbox") as caught:
        tree_of(legacy)
    assert "weights_only" not in str(caught.value)
    with pytest.raises(UnsafeError):
        tree_of(RUNNING["os.system"])


def test_a_tar_checkpoint_is_refused_as_unsafe():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as target:
        target.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(UnsafeError, match="tar archive"):
        tree_of(buffer.getvalue())


def test_a_torchscript_archive_is_refused_by_its_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and its files live on
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    with pytest.raises(UnsafeError, match="TorchScript"):
        tree_of(buffer.getvalue())


# --- any other file


def survives(data):
    """Read a file of any bytes: it is understood, or refused on purpose."""
    try:
        tree = tree_of(data)
    except SurgeryError:
        return False
    for found in flat(tree).values():
        if isinstance(found, StoredTensor) and np.prod(found.shape, dtype=float) < 1e6:
            contents(found, data)
    return True


def test_a_file_with_changed_bytes_is_understood_or_refused_on_purpose():
    rng = random.Random(7)
    outcomes = set()
    for _ in range(1500):
        data = bytearray(rng.choice([GOOD, TORCH]))
        for _ in range(rng.choice([1, 1, 2, 5])):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        outcomes.add(survives(bytes(data)))
    assert outcomes == {True, False}


def test_a_pickle_with_changed_bytes_is_understood_or_refused_on_purpose():
    rng = random.Random(11)
    # Checksums left out, so that the changes reach the machine.
    kinds = [
        mapping(w=tensor(), v=body([1, (2.5, "x")])),
        zipfile.ZipFile(io.BytesIO(TORCH)).read("archive/data.pkl"),
        zipfile.ZipFile(io.BytesIO(saved(torch.nn.Linear(2, 2).state_dict(), pickle_protocol=4))).read(
            "archive/data.pkl"
        ),
    ]
    opcodes = [ord(opcode.code) for opcode in pickletools.opcodes]
    outcomes = set()
    for _ in range(1500):
        code = bytearray(rng.choice(kinds))
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(code))
            code[at : at + rng.choice([0, 1, 1, 2])] = bytes(
                [rng.choice(opcodes)] if rng.random() < 0.7 else [rng.randrange(256)]
            )
        outcomes.add(survives(archive(bytes(code), ONE)))
    assert outcomes == {True, False}


def test_random_opcodes_are_refused_on_purpose():
    rng = random.Random(13)
    pieces = [b"}", b"]", b")", b"(", b"N", b"t", b"u", b"s", b"e", b"a", b"\x85", b"\x86", b"R", b"b", b"Q", b"q\0", b"h\0",
              body("a"), body(1), name("torch", "Size"), name("collections", "OrderedDict"), stored(), tensor()]  # fmt: skip
    for _ in range(1500):
        survives(archive(program(*rng.choices(pieces, k=rng.randrange(1, 12))), ONE))


def test_the_checksum_of_the_description_is_the_one_of_the_directory():
    with zipfile.ZipFile(io.BytesIO(GOOD)) as target:
        assert zlib.crc32(target.read("archive/data.pkl")) == target.getinfo("archive/data.pkl").CRC
    damaged = patched(b"\x89ccollections", b"\x88ccollections")  # requires_grad: still well-formed
    with pytest.raises(FormatError, match="checksum"):
        tree_of(damaged)
