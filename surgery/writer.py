"""Publishing: an output appears whole or not at all.

Work happens in a sibling folder ``.NAME.surgery-tmp`` under a lock, is synced, and takes the output's name in one
rename; an output that is being replaced trades places with it in one exchange. Whatever kills the process, the old
output stays whole, and the next run on the same output clears the remains away.

A run with a *digest* keeps a journal (:mod:`surgery.journal`) of the files it finished. If it is killed or interrupted,
its staging folder stays, and a run of the same digest on the same output continues from there; any other run clears it
away. A :class:`Share` makes some files of such an output, beside others that make the rest.

Where the system has no exchange, a replaced folder steps aside under ``.NAME.surgery-old`` first; a run that finds it
without the output puts it back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from surgery.errors import IOFailure, OutputError, SurgeryError, UsageError
from surgery.journal import Journal
from surgery.tensor import human_bytes

_AT_FDCWD = -100
_NO_REPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
RECOGNISED = ("surgery.json", "config.json", "adapter_config.json", "model_index.json")
"""Files that mark a folder as a model or adapter, which ``--overwrite`` may replace."""


def is_one_file(out: str | os.PathLike[str]) -> bool:
    """Say whether an output is one file; anything else is a folder.

    >>> is_one_file("merged.safetensors"), is_one_file("merged.safetensors/"), is_one_file("merged")
    (True, False, False)
    """
    return os.fspath(out).endswith(".safetensors")


class Publication:
    """One output in the making. Use as a context manager; nothing is published without :meth:`commit`."""

    one_at_a_time = False
    """Whether a file must be finished before the next is begun, because the disk need not hold them all."""

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        inputs: Iterable[Path] = (),
        digest: str | None = None,
        restart: bool = False,
        single: bool | None = None,
    ) -> None:
        """Check that ``out`` may be written.

        Args:
            out: a folder, or a file where it ends in ``.safetensors``.
            overwrite: replace what is there.
            inputs: resolved files and folders that must not be touched.
            digest: of the run; one that was broken off with the same digest is continued.
            restart: begin anew in any case.
            single: whether it is one file, where its name does not say so.

        Raises:
            UsageError: an empty path.
            OutputError: it exists, or is, holds or lies in an input.
        """
        text = os.fspath(out)
        if not text or "\0" in text:
            raise UsageError("the output path is empty" if not text else "the output path holds a NUL")
        self.out = Path(os.path.abspath(os.path.expanduser(text)))
        if os.path.expanduser(text).startswith("~"):
            raise UsageError("there is no such home", file=text)
        if not self.out.name:
            raise OutputError("a whole file system cannot be an output", file=text)
        self.single = is_one_file(text) if single is None else single
        self.staging = self.out.with_name(f".{self.out.name}.surgery-tmp")
        self._old = self.out.with_name(f".{self.out.name}.surgery-old")
        self._lock = Lock(self.out.with_name(f".{self.out.name}.surgery-lock"), text)
        self._overwrite = overwrite
        self._restart = restart
        self._journal = None if digest is None else Journal(self.staging, digest)
        self._keep = False
        self.finished: dict[str, dict[str, str]] = {}
        """Files that an earlier run finished, each with its tensors' fingerprints."""
        self._made_parents: list[Path] = []
        self._published = False
        self._shown = text
        for source in inputs:
            self._refuse_input(source)
        self._refuse_existing()

    def _refuse_input(self, source: Path) -> None:
        real = Path(os.path.realpath(self.out))
        if real == source or (os.path.exists(real) and os.path.samefile(real, source)):
            raise OutputError("is an input of this run", file=self._shown, mend="write somewhere else")
        if source.is_dir() and real.is_relative_to(source):
            raise OutputError(f"lies inside the input {source.name}", file=self._shown, mend="write somewhere else")
        if source.is_relative_to(real):
            raise OutputError(f"holds the input {source.name}", file=self._shown, mend="write somewhere else")

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.out):
            return
        if not self._overwrite:
            raise OutputError("exists already", file=self._shown, mend="choose another, or pass --overwrite")
        if self.out.is_dir() == self.single:
            kind = "folder" if self.out.is_dir() else "file"
            raise OutputError(f"is a {kind}, and would be replaced by something else", file=self._shown)
        if self.out.is_dir() and not _looks_like_ours(self.out):
            raise OutputError(
                "holds no model or adapter, so it is not overwritten", file=self._shown, mend="remove it by hand"
            )

    def __enter__(self) -> Self:
        try:
            self._make_parents()
            self._lock.acquire()
            self._recover(resume=not self._restart)
            self._refuse_existing()
            self._begin()
        except OSError as error:
            self._abandon()
            raise self._failure(error) from None
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit) and not self._published and self._has_finished():
            self.keep()
        if isinstance(error, KeyboardInterrupt):
            self._tell(error)
        try:
            self._abandon()
        except KeyboardInterrupt as interrupt:
            self._tell(interrupt)
            raise
        except OSError as failure:
            raise self._failure(failure) from None

    def _tell(self, interrupt: KeyboardInterrupt) -> None:
        if self._published:
            interrupt.add_note(f"{self._shown} was published whole")
        elif self._keep:
            interrupt.add_note("finished files are kept; the same command continues, --restart begins anew")

    def keep(self) -> None:
        """Leave the finished files for a later run, although this one ends in an error."""
        self._keep = True

    def _has_finished(self) -> bool:
        return self._journal is not None and self._journal.belongs() and bool(self._journal.finished())

    def _failure(self, error: OSError) -> SurgeryError:
        """Turn a system's error into ours, and say truly whether the output is there."""
        if self._published:
            what = f"was published, but clearing up failed: {error.strerror}"
            return IOFailure(what, file=self._shown, mend="verify it; a further run on it clears up")
        return _write_error(error, self._shown)

    def _make_parents(self) -> None:
        for parent in reversed([parent for parent in self.out.parents if not parent.exists()]):
            self._made_parents.append(parent)  # before it is made: a signal may come in between
            try:
                parent.mkdir()
            except FileExistsError:
                self._made_parents.remove(parent)  # somebody else made it meanwhile

    def _remove_parents(self) -> None:
        for parent in reversed(self._made_parents):
            try:
                parent.rmdir()
            except FileNotFoundError:
                continue  # it was never made
            except OSError:
                return  # not empty: somebody uses it

    def _begin(self) -> None:
        """Make the staging folder, or take over the one that a run of the same digest left."""
        if not os.path.lexists(self.staging):
            os.mkdir(self.staging, 0o777)
        if self._journal is not None:
            self._journal.begin()
            self.finished = self._journal.finished()

    def _recover(self, *, resume: bool) -> None:
        """Clear what a dead run on this output left; the lock says that no live one is at work."""
        if os.path.lexists(self._old):
            if os.path.lexists(self.out):
                _remove(self._old)
            else:
                os.rename(self._old, self.out)
        if resume and self._journal is not None and self._journal.belongs():
            self._journal.drop_unfinished()
        else:
            _remove(self.staging)

    def _abandon(self) -> None:
        """Clear away everything but what was published. What is another run's is left alone: its lock says so."""
        try:
            if self._lock.held:
                self._recover(resume=self._keep)
        finally:
            self._lock.release()
            if not self._published:
                self._remove_parents()

    def check_space(self, needed: int) -> None:
        """Refuse before the first byte if the disk has no room.

        Raises:
            OutputError: it has not.
        """
        try:
            free = shutil.disk_usage(self.staging).free
        except OSError as error:
            raise self._failure(error) from None
        if needed > free:
            raise OutputError(
                f"needs {human_bytes(needed)}, the disk has {human_bytes(free)} free",
                file=self._shown,
                mend="free some",
            )

    def create(self, name: str, size: int) -> OutputFile:
        """Create a file of ``size`` bytes to be written at any place."""
        path = self.staging / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._failure(error) from None
        return OutputFile(path, size, self._shown)

    def finish(
        self, name: str, file: OutputFile, fingerprints: Mapping[str, str], notes: Iterable[bytes] | None = None
    ) -> None:
        """Enter a file into the journal, if there is one, once all of it is written, with what was noted on the way."""
        if self._journal is None:
            return
        try:
            file.sync()
            self._journal.finish(name, file.size, fingerprints, notes)
        except OSError as error:
            raise self._failure(error) from None

    def notes(self, name: str) -> bytes:
        """Return what an earlier run noted while it made a file that is finished."""
        assert self._journal is not None  # nothing is finished without one
        try:
            return self._journal.notes(name)
        except OSError as error:
            raise self._failure(error) from None

    def write(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        with self.create(name, len(data)) as file:
            file.write_at(0, memoryview(data))

    def overwrite_start(self, name: str, data: bytes) -> None:
        """Replace the first bytes of a file that was written before."""
        try:
            with open(self.staging / name, "r+b") as file:
                file.write(data)
        except OSError as error:
            raise self._failure(error) from None

    def copy(self, name: str, source: Path) -> None:
        """Copy a side file's bytes (not its times or its owner)."""
        try:
            data = source.read_bytes()
        except OSError as error:
            raise IOFailure(f"cannot be read: {error.strerror}", file=source) from None
        self.write(name, data)

    def commit(self) -> None:
        """Sync everything and give it the output's name.

        Raises:
            IOFailure: the system failed; the old output is untouched.
            OutputError: somebody created the output meanwhile.
        """
        try:
            if self._journal is not None:
                self._journal.erase()
            _sync_tree(self.staging)
            self._publish(self.staging / self.out.name if self.single else self.staging)
            self._published = True
            for folder in (self.out.parent, *(parent.parent for parent in reversed(self._made_parents))):
                _sync_folder(folder)
        except OSError as error:
            raise self._failure(error) from None

    def _publish(self, made: Path) -> None:
        if not os.path.lexists(self.out):
            if _rename2(made, self.out, _NO_REPLACE):
                return
            if os.path.lexists(self.out):
                raise OutputError("was created by somebody else meanwhile", file=self._shown)
            os.rename(made, self.out)
        elif not self._overwrite:
            raise OutputError("was created by somebody else meanwhile", file=self._shown)
        elif self.single:
            os.replace(made, self.out)
        elif not _rename2(made, self.out, _EXCHANGE):
            os.rename(self.out, self._old)
            try:
                os.rename(made, self.out)
            except BaseException:
                if not os.path.lexists(self.out):
                    os.rename(self._old, self.out)
                raise


class Share(Publication):
    """Some files of an output whose other files are made elsewhere. Nothing is published: a last run does that.

    Its folder and its finished files stay, whatever ends it.
    """

    def __enter__(self) -> Self:
        try:
            self._make_parents()
            self._lock.acquire(shared=True)
            self._refuse_existing()
            self.staging.mkdir(exist_ok=True)
            assert self._journal is not None  # a share without a digest would have nothing to belong to
            self._journal.begin()
            self.finished = self._journal.finished()
        except OSError as error:
            self._lock.release()
            raise self._failure(error) from None
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            error.add_note("finished files are kept; the same command continues")
        self._lock.release()

    def create(self, name: str, size: int) -> OutputFile:
        """Create a file that nobody else is making."""
        assert self._journal is not None
        try:
            let_go = self._journal.claim(name)
        except OSError as error:
            raise self._failure(error) from None
        try:
            file = OutputFile(self.staging / name, size, self._shown)
        except BaseException:
            let_go()
            raise
        file.on_close = let_go
        return file


def write_file(path: str, data: bytes, *, overwrite: bool = False) -> None:
    """Write a small file of its own, whole or not at all.

    Raises:
        OutputError: it exists.
    """
    out = Path(path)
    draft = out.with_name(f".{out.name}.surgery-tmp")
    if os.path.lexists(out) and not overwrite:
        raise OutputError("exists already", file=path, mend="choose another, or pass --overwrite")
    try:
        draft.write_bytes(data)
        os.replace(draft, out)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise _write_error(error, path) from None


class OutputFile:
    """A file being written at any place, from any thread."""

    def __init__(self, path: Path, size: int, shown: str) -> None:
        self._shown = shown
        self.size = size
        self.on_close: Callable[[], None] = _nothing
        try:
            # The umask decides the mode, as for any other file the user makes.
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._descriptor, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    os.close(self._descriptor)
                    raise
        except OSError as error:
            raise _write_error(error, shown) from None

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``."""
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], offset + done)
        except OSError as error:
            raise _write_error(error, self._shown) from None

    def start_writing(self, offset: int, length: int) -> None:
        """Have the system begin to bring a part to disk, so that the sync in the end finds little left to do.

        A hint: where the system does not know it, nothing happens.
        """
        if _sync_file_range is not None:
            _sync_file_range(self._descriptor, offset, length, _START_WRITING)

    def sync(self) -> None:
        """Make what was written durable now, not only at commit."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close; what was written is synced at commit."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self.on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _nothing() -> None:
    """Do nothing."""


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):  # not Linux
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    found: Callable[[int, int, int, int], int] = function
    return found


_sync_file_range = _find_sync_file_range()
_START_WRITING = 2
"""``SYNC_FILE_RANGE_WRITE``: begin, and wait for nothing."""


class Lock:
    """An advisory lock on one output: the kernel drops it when its process dies."""

    def __init__(self, path: Path, shown: str) -> None:
        self._path = path
        self._shown = shown
        self._descriptor = -1
        self.held = False

    def acquire(self, *, shared: bool = False) -> None:
        """Take the lock, or refuse at once.

        Args:
            shared: beside others who share it.

        Raises:
            OutputError: another run holds it.
        """
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(self._descriptor, 64).decode("ascii", "replace").strip()
                self._close()
                who = f" (process {holder})" if holder else ""
                raise OutputError(f"another run is writing it{who}", file=self._shown, mend="wait for it") from None
            # The holder may have removed the file between our open and our lock: then ours guards nothing.
            try:
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                    break
            except FileNotFoundError:
                pass
            self._close()
        self.held = True
        os.ftruncate(self._descriptor, 0)
        if not shared:
            os.write(self._descriptor, str(os.getpid()).encode())

    def release(self) -> None:
        """Remove the file, unless somebody else holds it too, and drop the lock."""
        if self.held and self._alone():
            self._path.unlink(missing_ok=True)
        self.held = False
        self._close()

    def _alone(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _looks_like_ours(folder: Path) -> bool:
    names = os.listdir(folder)
    if ".git" in names or Path.cwd().is_relative_to(folder):
        return False
    return not names or any(name in RECOGNISED or name.endswith((".safetensors", ".bin")) for name in names)


def _write_error(error: OSError, shown: str) -> SurgeryError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError("the disk is full", file=shown, mend="free some space; nothing was published")
    return IOFailure(f"cannot be written: {error.strerror}", file=shown, mend="nothing was published")


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)  # a failed fsync is final: the pages may be marked clean, so never retry
            finally:
                os.close(descriptor)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename2(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags; ``False`` where the system or file system has no such call."""
    library = ctypes.CDLL(None, use_errno=True)
    arguments: Sequence[object]
    if sys.platform == "darwin":
        function, arguments = library.renamex_np, (os.fsencode(source), os.fsencode(target), 4 if flags == 1 else 2)
    elif hasattr(library, "renameat2"):
        function = library.renameat2
        arguments = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags)
    else:
        return False
    if function(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    if code == errno.EEXIST:
        raise OutputError("was created by somebody else meanwhile", file=target)
    raise OSError(code, os.strerror(code))
