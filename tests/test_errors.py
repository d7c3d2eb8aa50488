"""Messages, exit codes, and the disk's refusals in one sentence."""

import errno
from pathlib import Path

import pytest

from headstart import errors
from headstart.errors import (
    DataError,
    DiskError,
    HeadstartError,
    InputError,
    ModelError,
    RunError,
    StoppedEarlyError,
    disk_errno,
    disk_errors,
    printable,
)


@pytest.mark.parametrize("kind", [InputError, DataError, ModelError, RunError, DiskError])
def test_what_the_person_can_mend_ends_with_2(kind: type[HeadstartError]) -> None:
    assert issubclass(kind, InputError)
    assert kind.exit_code == 2


def test_other_ends() -> None:
    assert HeadstartError.exit_code == 1
    assert StoppedEarlyError.exit_code == 130
    assert not issubclass(StoppedEarlyError, InputError)


def test_a_data_error_holds_every_problem() -> None:
    assert DataError("one thing.").problems == ("one thing.",)
    both = DataError(["one thing.", "another."])
    assert both.problems == ("one thing.", "another.")
    assert str(both) == "one thing.\nanother."


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EFBIG, "the disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EPERM, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.ENOENT, "a part of the path is missing"),
        (errno.ENOTDIR, "is no folder"),
    ],
)
def test_the_disks_refusals_become_a_sentence(number: int, said: str) -> None:
    with pytest.raises(DiskError, match=said) as caught, disk_errors(Path("some/run")):
        raise OSError(number, "what the system says")
    assert "some/run" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_name_too_long_is_shortened_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="too long") as caught, disk_errors("x" * 5000):
        (tmp_path / ("x" * 5000)).mkdir()
    assert len(str(caught.value)) < 200


def test_a_refusal_that_a_rust_library_words_is_understood() -> None:
    with pytest.raises(DiskError, match="disk is full"), disk_errors("run"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_what_is_no_refusal_of_the_disk_passes_through() -> None:
    with pytest.raises(ValueError, match="unrelated"), disk_errors("run"):
        raise ValueError("unrelated")
    with pytest.raises(OSError, match="strange"), disk_errors("run"):
        raise OSError(errno.EIO, "strange")
    with pytest.raises(DataError, match="its own sentence"), disk_errors("run"):
        raise DataError("its own sentence about a file (os error 2).")


def test_disk_errno() -> None:
    assert disk_errno(OSError(errno.ENOSPC, "full")) == errno.ENOSPC
    assert disk_errno(OSError("no number")) is None
    assert disk_errno(ValueError("(os error 28)")) == errno.ENOSPC


def test_printable_keeps_text_and_takes_what_drives_a_terminal() -> None:
    assert printable("naïve 🎬 «text»\twith a tab") == "naïve 🎬 «text»\twith a tab"
    for code in (*range(9), *range(10, 32), *range(127, 160)):
        assert printable(f"a{chr(code)}b") == "a\ufffdb", code


def test_every_error_class_says_what_it_is_for() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, HeadstartError):
            assert kind.__doc__
