"Saved arrays: any flipped bit is named."
import tempfile
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hydramoe.foundations.arrays import load_arrays, save_arrays
from hydramoe.foundations.core import HydraError

ARRAYS = dict(x=np.arange(6, dtype='float32').reshape(2, 3), labels=np.array([1, 0, 2]))

@given(st.sampled_from(['a.json', 'a.safetensors']), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(max_examples=80, deadline=None)
def test_any_flipped_bit_is_named(name, where, bit):
    with tempfile.TemporaryDirectory() as d:
        file = save_arrays(d, 'a', ARRAYS, dict(names=['one', 'two']))/name
        data = bytearray(file.read_bytes())
        data[int(where*len(data))] ^= 1<<bit
        file.write_bytes(data)
        try: arrays, meta = load_arrays(d, 'a')
        except HydraError as e: assert str(e).startswith(f'{d}/a.')
        else: # a flip in the white space between JSON values changes nothing
            assert name=='a.json'
            assert meta==dict(names=['one', 'two'])
            assert all((arrays[n]==ARRAYS[n]).all() for n in ARRAYS)

def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    save_arrays(tmp_path, 'a', ARRAYS, dict(k=2))
    arrays, meta = load_arrays(tmp_path, 'a', list(ARRAYS))
    assert meta==dict(k=2)
    for n, want in ARRAYS.items():
        assert arrays[n].dtype==want.dtype
        assert arrays[n].tobytes()==want.tobytes()
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    save_arrays(tmp_path, 'a', dict(reversed(ARRAYS.items())), dict(k=2))
    again = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert first==again

def test_each_file_missing(tmp_path):
    for name in ('a.json', 'a.safetensors'):
        (save_arrays(tmp_path, 'a', ARRAYS, {})/name).unlink()
        with pytest.raises(HydraError, match=f'{name} (is missing|does not exist)'): load_arrays(tmp_path, 'a')
