"""Output files: errors name the file that was asked for, and nothing stays behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from torch_prepared.certify.encoding import write_json
from torch_prepared.cli._staging import staged_files
from torch_prepared.errors import ModelFormatError

from .conftest import Run, WriteModel, one_line_error


@pytest.fixture
def few_bytes() -> Iterator[int]:
    """No file may grow beyond some bytes, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_with_the_name_that_was_given(
    run: Run, write_model: WriteModel, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = write_model()
    examples = tmp_path / "edits.npz"
    np.savez(examples, inputs=np.array([[2.0, 1.0]], np.float32), targets=np.array([1]))
    out, certificate = tmp_path / "out.onnx", tmp_path / "cert.json"
    before = sorted(tmp_path.iterdir())
    request.getfixturevalue("few_bytes")
    message = one_line_error(
        run("pointwise", model, examples, "-o", out, "--certificate", certificate)
    )
    assert message.startswith(f"error: {out}: ")
    assert os.strerror(errno.EFBIG) in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_failed_write_without_a_name_gets_the_files_still_missing(
    tmp_path: Path, few_bytes: int
) -> None:
    targets = [tmp_path / "one.json", tmp_path / "two.json"]

    def write() -> None:
        with staged_files(targets, []) as staged:
            write_json(staged.paths[0], "short")
            write_json(staged.paths[1], "x" * 2 * few_bytes)

    with pytest.raises(OSError, match=r"two\.json") as caught:
        write()
    assert caught.value.filename == str(targets[1])
    assert list(tmp_path.iterdir()) == []


def test_errors_that_name_a_temporary_file_name_its_target(tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    with (
        pytest.raises(ModelFormatError, match=r"^\S*/net.onnx: cannot") as caught,
        staged_files([target], []) as staged,
    ):
        raise ModelFormatError(f"{staged.paths[0]}: cannot write the network")
    assert str(caught.value) == f"{target}: cannot write the network"

    def lose() -> None:
        with staged_files([target], []) as staged:
            staged.paths[0].unlink()
            staged.commit()

    with pytest.raises(FileNotFoundError) as gone:
        lose()
    assert gone.value.filename == str(target)


def test_errors_about_other_files_stay_as_they_are(tmp_path: Path) -> None:
    other = tmp_path / "input.npz"
    with pytest.raises(FileNotFoundError) as caught, staged_files([tmp_path / "out"], []):
        other.open("rb")
    assert caught.value.filename == str(other)
    with pytest.raises(ModelFormatError, match="some model"), staged_files([tmp_path / "out"], []):
        raise ModelFormatError("some model: bad")
