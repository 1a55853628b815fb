"""Arrays in `.npz` files. They are read and written in blocks, so that a whole array need not fit into memory."""

import contextlib
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusers_adm.atomic_files import atomic_write


@dataclass
class Rows:
    """
    Array that is produced in blocks of rows.

    Args:
        shape: Shape of the whole array. The number of rows comes first.
        dtype: Data type of the array.
        blocks: Blocks of rows, in order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Iterable[np.ndarray]


class NpzFile:
    """
    Arrays of an `.npz` file.

    Args:
        path: Path of the file.

    Raises:
        ValueError: If the file is not an `.npz` file, or is incomplete.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with self._reading(), zipfile.ZipFile(self.path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist()]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """
        Returns the shape and the data type of an array.

        Raises:
            ValueError: If the array does not exist, or holds objects.
        """
        with self._opened(name) as (_, shape, dtype):
            return shape, dtype

    def checksum(self, name: str) -> int:
        """Returns the checksum of an array that the file stores."""
        with self._reading(), zipfile.ZipFile(self.path) as archive:
            return archive.getinfo(name + ".npy").CRC

    def read(self, name: str) -> np.ndarray:
        """
        Returns a whole array.

        Raises:
            ValueError: If the array does not exist, holds objects, or is incomplete.
        """
        self.header(name)
        with self._reading(), np.load(self.path, allow_pickle=False) as arrays:
            return arrays[name]

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """
        Yields an array in blocks of `rows` rows. The last block may have fewer.

        Raises:
            ValueError: If the array does not exist, holds objects, or is incomplete.
        """
        with self._opened(name) as (member, shape, dtype):
            row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                data = member.read(count * row_bytes)
                if len(data) < count * row_bytes:
                    raise ValueError(f"The array {name} in {self.path} ends after {start} of {shape[0]} rows.")
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:]).copy()  # writable

    def metadata(self) -> dict:
        """Returns the record that the command `sample` or `make-reference` wrote. It is empty for files of other programs."""
        with contextlib.suppress(ValueError):
            record = json.loads(str(self.read("metadata"))) if "metadata" in self else {}
            return record if isinstance(record, dict) else {}
        return {}

    @contextlib.contextmanager
    def _opened(self, name: str):
        if name not in self:
            raise ValueError(
                f"{self.path} must have the array {name}, but has {', '.join(self.names) or 'no arrays'}."
            )
        with self._reading(), zipfile.ZipFile(self.path) as archive, archive.open(name + ".npy") as member:
            version = np.lib.format.read_magic(member)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read_header is None:
                raise ValueError(f"version {version} of the format is not supported")
            shape, fortran_order, dtype = read_header(member)
            if dtype.hasobject or (fortran_order and len(shape) > 1):
                raise ValueError(
                    f"The array {name} in {self.path} holds objects or is in Fortran order. Save it in C order."
                )
            yield member, shape, dtype

    @contextlib.contextmanager
    def _reading(self):
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, ValueError) as error:
            if str(self.path) in str(error):
                raise
            raise ValueError(f"{self.path} is damaged, incomplete, or not an .npz file: {error}") from error


def write_npz(path: Path, arrays: dict[str, np.ndarray | Rows]) -> None:
    """
    Writes an `.npz` file block by block. If writing fails, no file is left.

    Args:
        path: Path of the file.
        arrays: Arrays by their names.

    Raises:
        ValueError: If blocks do not have the shape or data type of their array.
    """
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, array in arrays.items():
            rows = array if isinstance(array, Rows) else Rows(array.shape, array.dtype, [array])
            with archive.open(name + ".npy", "w", force_zip64=True) as member:
                header = {
                    "descr": np.lib.format.dtype_to_descr(rows.dtype),
                    "fortran_order": False,
                    "shape": rows.shape,
                }
                np.lib.format.write_array_header_1_0(member, header)
                written = 0
                for block in rows.blocks:
                    if block.dtype != rows.dtype or block.shape[1:] != rows.shape[1:]:
                        raise ValueError(
                            f"Blocks of {name} must fit {rows.shape} {rows.dtype}, but got {block.shape} {block.dtype}."
                        )
                    written += block.size
                    member.write(np.ascontiguousarray(block).tobytes())
                if written != int(np.prod(rows.shape)):
                    raise ValueError(f"Blocks of {name} must fill the shape {rows.shape}, but have {written} numbers.")
