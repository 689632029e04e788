"""JSON files, files of rows that survive a crash of the run that writes them, the lock and the check of a run."""

import errno
import gc
import json
import os
import shlex
import socket
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..errors_pdlm import DataError, SettingError
from .json_blocks import read_object

_LARGE = 1 << 24  # bytes; a smaller file is decoded as a whole


def hash_file(path: Path, digest: Any) -> str:
    """Hash a file of any size, in hexadecimal digits.

    Args:
        path (`Path`)
        digest: of hashlib, perhaps begun already.
    """
    with path.open("rb") as file:
        while part := file.read(_LARGE):
            digest.update(part)
    return digest.hexdigest()


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file does not exist, cannot be read, is not valid JSON, or is cut short.
    """
    try:
        with without_collection():
            if path.stat().st_size > _LARGE:
                with suppress(ValueError, RecursionError), open(path, encoding="utf-8-sig") as file:
                    return read_object(file)
            return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not a file.") from None
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of more digits than Python reads
        raise DataError(f"{path}: not valid JSON, perhaps cut short ({error}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None


@contextmanager
def without_collection() -> Iterator[None]:
    """Read many small values without the garbage collector, which would traverse them again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_rows(
    path: Path,
    repair: bool = False,
    check: Callable[[dict[str, Any]], str | None] | None = None,
    damaged: Callable[[int, str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Read a JSONL file row by row. A last line that was cut short is skipped.

    Args:
        path (`Path`): the file; a file that does not exist has no rows.
        repair (`bool`): also remove the line that was cut short from the file, so that rows can be appended.
        check (*optional*): returns what is wrong with a row, or None.
        damaged (*optional*): called with the number of a damaged line, from 1, and the reason; reading goes on behind
            it. Without it a damaged line is an error.

    Raises:
        DataError: a line is damaged: it is not a JSON object, or `check` finds something wrong.
    """
    if not path.exists():
        return
    size = 0  # of the whole lines
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            size += len(line)
            row: Any = None
            try:
                row = json.loads(line)
                reason = "is not a JSON object" if not isinstance(row, dict) else check(row) if check else None
            except (ValueError, RecursionError) as error:
                reason = f"is damaged ({error})"
            if reason is None:
                yield row
            elif damaged is not None:
                damaged(number, reason)
            else:
                raise DataError(f"{path}: line {number} {reason}; mend or delete this line.")
    if repair and size < path.stat().st_size:
        os.truncate(path, size)


def move_lines(path: Path, numbers: Collection[int], target: Path) -> None:
    """Move lines of a file to the end of another file. A run that is killed meanwhile loses none of them.

    Args:
        path (`Path`), numbers (`Collection[int]`): the file, and its lines, from 1.
        target (`Path`): the other file.
    """
    with open(path, "rb") as file, open(target, "ab") as moved:
        moved.writelines(line for number, line in enumerate(file, 1) if number in numbers)
    with open(path, "rb") as file, replacing(path) as kept:
        kept.buffer.writelines(line for number, line in enumerate(file, 1) if number not in numbers)


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSONL file, all of them or none.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not text:
        return
    data = memoryview(text.encode(errors="backslashreplace"))  # file names may be no valid Unicode
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, start)
            raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a text file that takes the place of `path` when it is complete; if writing fails, `path` is unchanged.

    Raises:
        OSError: the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        # file names may be no valid Unicode; as escapes they are JSON
        with open(part, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: afterwards it is complete, or unchanged if writing failed.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_lists(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object with long lists as [`write_json`] does, one entry per line.

    Args:
        path (`Path`): the file.
        values (`dict`): by name, in the order to write; an iterator is written as a list without keeping its entries.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as file:
        for k, (name, value) in enumerate(values.items()):
            file.write(f"{',' if k else '{'}\n{json.dumps(name, ensure_ascii=False)}: ")
            if isinstance(value, (list, Iterator)):
                file.write("[")
                for n, entry in enumerate(value):
                    file.write(f"{',' if n else ''}\n{json.dumps(entry, ensure_ascii=False)}")
                file.write("\n]")
            else:
                file.write(json.dumps(value, ensure_ascii=False))
        file.write("\n}\n" if values else "{}\n")


class FileLock:
    """A lock on the files of a run, so that no second run writes them. It ends with its process, even by kill -9.

    A `with` block releases it at its end.

    Args:
        path (`Path`): the file of the lock, which names the holder and is removed by [`release`](FileLock.release).
            Its folder is created if it does not exist, and then removed by `release` if nothing was written into it.
        name: the file or folder of the run, for messages.
        otherwise (`str`): what else a user can do, for messages.

    Attributes:
        died (`float`, *optional*): when the last holder took the lock, in seconds since the epoch, if it ended without
            releasing it; None if it released it.

    Raises:
        SettingError: another run has the lock; the message has its process, host, start and command.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, name: Any, otherwise: str = "choose another file"):
        self.path = path
        self._made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = open(path, "a+", encoding="utf-8")
            try:
                self._acquire()
                if os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
                    break
            except FileNotFoundError:  # its holder removed the file after it was opened here
                pass
            except BlockingIOError:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise SettingError(
                    f"{name}: {holder}, is writing it. Wait until that run has ended, or {otherwise}."
                ) from None
            self._file.close()
        if hasattr(os, "register_at_fork"):  # or a worker that outlives this process would keep the lock
            os.register_at_fork(after_in_child=partial(_close, weakref.ref(self._file)))
        left = os.fstat(self._file.fileno())
        self.died = left.st_mtime if left.st_size else None
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since} ({_command(sys.argv)})")
        self._file.flush()

    def _acquire(self) -> None:
        """Lock the open file. Raises: BlockingIOError if another open file has the lock."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            warnings.warn(f"{self.path}: this file system has no locks; start no second run.", stacklevel=3)

    @property
    def released(self) -> bool:
        """Whether the lock was released."""
        return self._file.closed

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock; a second time nothing happens."""
        if not self.released:
            with suppress(OSError):  # the lock ends with the file being closed, not with its removal
                self.path.unlink()
                if self._made:
                    self.path.parent.rmdir()
            self._file.close()


def _close(found: weakref.ref[TextIO]) -> None:
    if (file := found()) is not None:
        file.close()


def _command(argv: list[str]) -> str:
    """The command of a process up to its first option: what follows may be a key."""
    words = [Path(argv[0]).name, *takewhile(lambda word: not word.startswith("-"), argv[1:])]
    return shlex.join(words)[:200]


def check_same_settings(before: Any, now: dict[str, Any], name: Any, otherwise: str = "choose another file") -> None:
    """Check that a run is resumed with the settings it was begun with.

    Args:
        before: the recorded settings; anything but a dict counts as none.
        now (`dict`): the settings of this call. A setting that is missing equals None.
        name: the file or folder of the run, for messages.
        otherwise (`str`): what a user with other settings can do, for messages.

    Raises:
        SettingError: settings differ; the message has each of them with both values.
    """
    before = before if isinstance(before, dict) else {}
    if changed := [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]:
        was = ", ".join(f"{key} was {before.get(key)!r:.300}, now {now.get(key)!r:.300}" for key in changed)
        raise SettingError(f"{name}: was begun with other settings ({was}). Use the same settings, or {otherwise}.")
