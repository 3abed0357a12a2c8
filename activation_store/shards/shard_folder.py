"""Where the shards of a store lie, on a disk or in a bucket: reading them, checked."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from activation_store.errors import ShardError
from activation_store.shards.names import Shard

_CHUNK = 2**23  # bytes read at once from a disk or a bucket: 8 MiB


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """A folder of shards; touches nothing until asked."""

    fs: pafs.FileSystem
    root: str
    """Folder within `fs`."""

    @classmethod
    def local(cls, folder: Path) -> "ShardFolder":
        """Return a folder of this machine."""
        return cls(pafs.LocalFileSystem(), str(folder))

    def path(self, file: str) -> str:
        """Return the name of a shard within `fs`."""
        return f"{self.root}/{file}"

    def size_fault(self, shard: Shard) -> str | None:
        """Return what a look at the size of a shard finds wrong, or None."""
        info = self.fs.get_file_info(self.path(shard.file))
        if info.type == pafs.FileType.NotFound:
            return "is missing"
        return (
            None if info.size == shard.n_bytes else f"has {info.size} bytes, want {shard.n_bytes}"
        )

    def bytes_fault(self, shard: Shard) -> str | None:
        """Read a shard whole and return what is wrong with its bytes, or None."""
        digest = hashlib.sha256()
        try:
            if (fault := self.size_fault(shard)) is not None:
                return fault
            for chunk in self.chunks(shard.file):
                digest.update(chunk)
        except (OSError, pa.ArrowException) as fault:
            return str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        actual, wanted = digest.hexdigest()[:12], shard.checksum[:12]
        if digest.hexdigest() == shard.checksum:
            return None
        return f"its sha256 is {actual}..., want {wanted}...; bytes were changed"

    def chunks(self, file: str) -> Iterator[bytes]:
        """Yield the bytes of a shard, some at a time."""
        with self.fs.open_input_stream(self.path(file)) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    def open(self, file: str) -> pa.NativeFile:
        """Open a shard for reading at any place."""
        return self.fs.open_input_file(self.path(file))

    def checked(self, shard: Shard) -> pa.NativeFile:
        """Open a shard after reading it whole: for who writes its rows anew under a new checksum.

        Raises:
            ShardError: its bytes are not those listed.
        """
        if (fault := self.bytes_fault(shard)) is not None:
            raise ShardError(
                f"{self.path(shard.file)}: {fault}. Run `lmmono store verify --repair` on the "
                "store, which drops only what is lost and says what; nothing was changed."
            )
        return self.open(shard.file)
