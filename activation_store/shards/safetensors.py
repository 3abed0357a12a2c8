"""Files of named arrays in the safetensors format, written without another package.

Source: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

Tensors: TypeAlias = dict[str, np.ndarray]

_TYPES = {
    "float16": "F16",
    "float32": "F32",
    "int32": "I32",
    "int64": "I64",
    "uint16": "U16",
    "uint32": "U32",
}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays of any shape: the size of a JSON header, the header, and their bytes."""
    header: dict[str, object] = {}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        kind = _TYPES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers may want the arrays at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).data)
