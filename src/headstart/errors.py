"""What headstart raises on purpose, in whole sentences: what is wrong and what to do. Knows nothing of other rooms."""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Control characters, which a hostile text could use to drive a terminal, are shown as a replacement sign.
CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code != 9}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says when there is no room


def printable(text: str) -> str:
    """A text safe to print on one line of a terminal."""
    return text.translate(CONTROL)


def count_of(number: int, thing: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


class HeadstartError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(HeadstartError):
    """Something the person gave cannot be used; the message says how to mend it."""

    exit_code = 2


class ArgumentError(InputError, ValueError):
    """What was given from Python cannot be used; a ValueError, too, as scikit-learn has it."""


class DataError(InputError):
    """A table cannot be used. Holds every problem found in it, one sentence each, not only the first."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ModelError(InputError):
    """An encoder cannot be found, read or used."""


class RunError(InputError):
    """A run folder cannot be read or written."""


class ExportError(InputError):
    """An exported model does not answer as its run does; the message has the numbers."""


class DiskError(InputError):
    """The disk refused a write: full, read-only or forbidden."""


class StoppedEarlyError(HeadstartError):
    """Ctrl-C ended the work early; the message says what was kept."""

    exit_code = 130


class TerminatedError(HeadstartError):
    """SIGTERM ended the work; the message says what was kept."""

    exit_code = 143


class UnevenError(InputError):
    """Processes that train together have not begun at the same place."""


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn the disk's refusals inside the block into a `DiskError` about `path`."""
    try:
        yield
    except Exception as error:
        number = disk_errno(error)
        if number in FULL:
            why = "the disk is full. Free some space or choose another --out, and run it again."
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = "cannot be written (no permission). Choose another folder or change its mode."
        elif number in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            why = "cannot be written: a part of the path is missing or is no folder."
        elif number == errno.ENAMETOOLONG:
            path, why = f"{str(path)[:60]}…", "the file name is too long for this disk. Choose a shorter one."
        else:
            raise
        raise DiskError(f"{path}: {why}") from error


def disk_errno(error: Exception) -> int | None:
    """The system's number behind a refusal of the disk, also where a library written in Rust words it; else None."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = None if isinstance(error, HeadstartError) else re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
