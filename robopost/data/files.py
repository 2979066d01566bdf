# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: atomic replacement, and a full disk as one clear error."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zarr.storage import LocalStore

from robopost.errors import DataError

PARTIAL = ".partial"  # end of the name of a file that is being written
_FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file size limit exceeded",
}


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` so that after a crash the file has its old or its new content, no mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable (a rename is only on disk once its folder is)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn a full or unwritable disk inside the block into a DataError `"<doing>: <why>"`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(
                f"{doing}: {_FULL[error.errno]}. Fix: free space there, then try again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise DataError(f"{doing}: {error.strerror}. Fix: choose a folder you can write to") from error
        raise


class DurableStore(LocalStore):
    """A zarr store on the local file system whose every write is atomic and synced."""

    async def set(self, key: str, value: Any) -> None:
        """Write one shard or metadata document."""
        self.set_sync(key, value)

    def set_sync(self, key: str, value: Any) -> None:
        """As `set`, for the synchronous path of newer zarr releases."""
        self._check_writable()
        replace_file(self.root / key, value.to_bytes())
