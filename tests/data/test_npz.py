"""Arrays in `.npz` files, block by block."""

import numpy as np
import pytest

from diffusers_adm.data.npz import NpzFile, Rows, write_npz


def test_arrays_are_read_and_written_in_blocks(tmp_path):
    array = np.arange(7 * 3 * 2, dtype=np.int32).reshape(7, 3, 2)
    np.savez_compressed(tmp_path / "theirs.npz", a=array, b=np.array(5.0))
    theirs = NpzFile(tmp_path / "theirs.npz")
    assert [len(block) for block in theirs.blocks("a", 3)] == [3, 3, 1]
    assert np.array_equal(np.concatenate(list(theirs.blocks("a", 3))), array) and theirs.read("b") == 5
    blocks = Rows(array.shape, array.dtype, iter([array[:4], array[4:]]))
    write_npz(tmp_path / "ours.npz", {"a": blocks, "text": np.array("text")})
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as ours:
        assert np.array_equal(ours["a"], array) and ours["text"] == "text"
    before = (tmp_path / "ours.npz").read_bytes()
    with pytest.raises(ValueError, match="must fill the shape"):
        write_npz(tmp_path / "ours.npz", {"a": Rows((8, 3, 2), array.dtype, [array])})
    assert (tmp_path / "ours.npz").read_bytes() == before and not list(tmp_path.glob("partial-*"))
