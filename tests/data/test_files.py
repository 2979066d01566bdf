# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os

import pytest

from robopost.data import files
from robopost.data.files import disk_errors, replace_file
from robopost.errors import DataError


def test_old_content_until_the_new_is_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "record"
    replace_file(path, b"old")
    seen = []
    whole = os.fsync

    def fsync(descriptor):
        seen.append(path.read_bytes())
        whole(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    replace_file(path, b"new")
    assert seen == [b"old", b"new"]  # the file is synced under another name, the folder after the rename
    assert os.listdir(tmp_path) == ["record"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, code):
    path = tmp_path / "record"
    replace_file(path, b"old")

    def fsync(descriptor):
        raise OSError(code, "full")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(DataError, match=r"can't save: .*Fix: free space"), disk_errors("can't save"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record"]


def test_other_errors_pass_through():
    with pytest.raises(FileNotFoundError), disk_errors("can't read"):
        open("/nowhere/at/all")  # noqa: SIM115
