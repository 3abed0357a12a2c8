"""The vectors of a lake as files: where they lie, or a copy of what lies in a bucket."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from activation_store.errors import StoreError
from activation_store.lake.lake_place import LAKE
from activation_store.shards.names import listed

if TYPE_CHECKING:
    from activation_store.lake.shared import Lake
else:  # for annotations only
    Lake = object


def vectors_folder(
    lake: "Lake", hooks: str | Sequence[str], copy_to: str | os.PathLike[str] | None
) -> Path:
    """Return a folder of this machine that holds the vectors of `hooks`.

    Raises:
        StoreError: they lie in a bucket and there is no folder to copy them to.
        ShardError: a shard in the bucket is damaged.
        WriteError: the folder cannot be written.
    """
    if not lake.place.is_remote:
        return Path(lake.place.data_path) / "shards"
    names = {hooks} if isinstance(hooks, str) else set(hooks)
    cursor = lake.cursor()
    cursor.execute(f"USE {LAKE}")
    shards = [shard for shard in listed(cursor) if shard.kind == "vectors" and shard.hook in names]
    if copy_to is None:
        n_bytes = sum(shard.n_bytes for shard in shards)
        raise StoreError(
            f"{lake.place.name}: its vectors lie in {lake.place.data_path}, and batches are read "
            f"from files: name a folder with room for {n_bytes / 1e6:,.1f} MB, as "
            'vectors(..., copy_to="/scratch/acts"); what is there already is not copied again.'
        )
    for shard in shards:
        lake.files.download(shard, Path(copy_to))
    return Path(copy_to)
