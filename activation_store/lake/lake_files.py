"""The shards of a lake, in a folder or in a bucket: written once, never changed."""

import hashlib
import os
from pathlib import Path

import pyarrow.fs as pafs

from activation_store.catalog.catalogue import size_fault
from activation_store.errors import NotAStoreError, ShardError, StoreError, writing
from activation_store.lake.lake_place import LakePlace, bucket_access
from activation_store.shards.names import Shard
from activation_store.shards.shard_folder import ShardFolder

_CHUNK = 2**23


class LakeFiles:
    """The folder `shards` below the data path of a lake; touches nothing until asked."""

    def __init__(self, place: LakePlace) -> None:
        self.place = place
        fs = _bucket_system() if place.is_remote else pafs.LocalFileSystem()
        self.folder = ShardFolder(fs, f"{place.data_path.removeprefix('s3://')}/shards")

    def url(self, file: str) -> str:
        """Return the name under which DuckDB and others read a shard."""
        return f"{self.place.data_path}/shards/{file}"

    def check(self, create: bool) -> None:
        """Look whether the data path is there; with `create`, make a folder.

        Raises:
            NotAStoreError: there is no such folder.
            StoreError: there is no such bucket, or it cannot be reached.
        """
        if not self.place.is_remote:
            if create:
                with writing(Path(self.folder.root)):
                    Path(self.folder.root).mkdir(parents=True, exist_ok=True)
            elif not Path(self.folder.root).is_dir():
                raise NotAStoreError(f"{self.folder.root}: no such folder; check data_path.")
            return
        bucket = self.folder.root.partition("/")[0]
        try:
            status = self.folder.fs.get_file_info(bucket)
        except OSError as fault:
            raise StoreError(
                f"s3://{bucket}: cannot reach it: {_short(fault)}. Check AWS_ENDPOINT_URL, "
                "AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            ) from fault
        if status.type == pafs.FileType.NotFound:
            raise StoreError(f"s3://{bucket}: no such bucket; create it, or check data_path.")

    def upload(self, source: Path, shard: Shard) -> int:
        """Copy a shard, unless it is there, and return how many bytes were copied.

        Raises:
            ShardError: the file is missing or its bytes are not those listed.
            WriteError: the folder or the bucket refused.
        """
        target = self.folder.path(shard.file)
        # no turn is needed: a name belongs to one store, and its bytes never change
        if not source.is_file():
            raise ShardError(f"{source} is missing; run `lmmono store verify {source.parent}`.")
        with writing(Path(self.url(shard.file))):
            if self.folder.fs.get_file_info(target).size == shard.n_bytes:
                return 0
            part = target if self.place.is_remote else f"{target}.{os.getpid()}.part"
            digest = self._copy(source, part)
            if digest != shard.checksum:
                self.folder.fs.delete_file(part)
                raise ShardError(
                    f"{source}: sha256 {digest[:12]}..., listed {shard.checksum[:12]}...: bytes "
                    "were changed; run `lmmono store verify` on the store."
                )
            if part != target:
                os.replace(part, target)
        return shard.n_bytes

    def _copy(self, source: Path, target: str) -> str:
        digest = hashlib.sha256()
        with source.open("rb") as stream, self.folder.fs.open_output_stream(target) as out:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
        if not self.place.is_remote:
            handle = os.open(target, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        return digest.hexdigest()

    def remove(self, file: str) -> None:
        """Remove a shard that no commit lists any more; one that is gone already is no fault."""
        target = self.folder.path(file)
        if self.folder.fs.get_file_info(target).type != pafs.FileType.NotFound:
            self.folder.fs.delete_file(target)

    def download(self, shard: Shard, folder: Path) -> None:
        """Copy a shard into a folder of this machine, unless it is there.

        Raises:
            ShardError: the shard is missing or its bytes are not those listed.
            WriteError: the folder refused.
        """
        target = folder / shard.file
        if size_fault(target, shard.n_bytes) is None:
            return
        digest, part = hashlib.sha256(), folder / f"{shard.file}.{os.getpid()}.part"
        with writing(target):
            folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as out:
                for chunk in self.folder.chunks(shard.file):
                    digest.update(chunk)
                    out.write(chunk)
            if digest.hexdigest() != shard.checksum:
                part.unlink()
                raise ShardError(
                    f"{self.url(shard.file)}: its bytes were changed; run `lmmono store verify "
                    "--repair` on the lake, which drops only what is lost and says what."
                )
            os.replace(part, target)

    def set_aside(self, file: str) -> None:
        """Rename a damaged shard, so that a whole one can take its place, if it is there."""
        target = self.folder.path(file)
        if self.folder.fs.get_file_info(target).type != pafs.FileType.NotFound:
            self.folder.fs.move(target, f"{target}.damaged")


def _bucket_system() -> pafs.FileSystem:
    access = bucket_access()
    return pafs.S3FileSystem(
        access_key=access.key,
        secret_key=access.secret,
        session_token=access.token,
        anonymous=access.key is None,
        region=access.region,
        scheme="https" if access.use_ssl else "http",
        endpoint_override=access.endpoint,
        connect_timeout=5,
    )


def _short(fault: BaseException) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__
