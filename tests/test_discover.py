"Domains on disk: the same bits, refused when they are not what they say"
import json
import numpy as np
import pytest
from hydramoe.domains.cluster import kmeans
from hydramoe.domains.discover import Domains
from hydramoe.foundations.arrays import load_arrays, save_arrays
from hydramoe.foundations.core import HydraError, digest, rng
from hydramoe.foundations.files import file_sha256, read_json, write_json
from helpers import blobs, forge, set_at

@pytest.fixture
def saved(tmp_path):
    x,_ = blobs()
    domains = Domains(kmeans(x, 3)[0], ['one','two','three'], 'words')
    domains.save(tmp_path)
    return tmp_path

def test_saved_and_loaded_are_the_same_bits(saved):
    back = Domains.load(saved)
    before = [file_sha256(p) for p in sorted(saved.iterdir())]
    back.save(saved)
    assert [file_sha256(p) for p in sorted(saved.iterdir())]==before and back.encoder=='words'

@pytest.mark.parametrize('name', ['domains.json', 'domains.safetensors'])
def test_a_missing_file_is_named(saved, name):
    (saved/name).unlink()
    with pytest.raises(HydraError, match=name): Domains.load(saved)

@pytest.mark.parametrize('name', ['domains.json', 'domains.safetensors'])
def test_any_altered_byte_is_noticed(saved, name):
    data = (saved/name).read_bytes()
    for i in rng(0, name).integers(0, len(data), 40):
        changed = bytearray(data); changed[i] ^= 4
        (saved/name).write_bytes(changed)
        try: loaded = Domains.load(saved)
        except HydraError as e: assert 'domains.' in str(e)
        else: # white space between JSON's tokens means nothing
            assert name=='domains.json' and json.loads(changed)==json.loads(data), (i, data[i:i+1], loaded)

@pytest.mark.parametrize('change,message', [
    (lambda a,b: set_at(a, 'centroids', (1,2), np.nan), "'centroids' holds a value that is not finite"),
    (lambda a,b: set_at(a, 'centroids', (1,2), np.inf), "'centroids' holds a value that is not finite"),
    (lambda a,b: a.update(more=np.zeros(2)), "holds arrays"),
    (lambda a,b: a.update(centroids=a['centroids'][:2]), 'tells of'),
    (lambda a,b: b.update(format=2), 'reads format 1'),
    (lambda a,b: b['meta'].update(names=['one','two','two']), "'two' occurs twice"),
    (lambda a,b: b['meta'].update(names=['one','two','../x']), 'cannot name a folder'),
    (lambda a,b: b['meta'].update(names=['one','two']), '2 names need centroids')])
def test_what_fits_but_is_wrong_is_refused(saved, change, message):
    forge(saved, 'domains', change)
    with pytest.raises(HydraError, match=message): Domains.load(saved)

def test_a_file_that_is_no_safetensors(saved):
    (saved/'domains.safetensors').write_bytes(b'not one')
    body = read_json(saved/'domains.json'); body.pop('digest')
    body['sha256'] = file_sha256(saved/'domains.safetensors')
    write_json(saved/'domains.json', body | dict(digest=digest(body)))
    with pytest.raises(HydraError, match='is not a safetensors file'): Domains.load(saved)

def test_arrays_of_any_layout_are_kept(tmp_path):
    a = np.arange(12.).reshape(3,4)
    arrays,_ = load_arrays(save_arrays(tmp_path, 'a', dict(turned=a.T, part=a[:,1:3]), {}), 'a')
    assert np.array_equal(arrays['turned'], a.T) and np.array_equal(arrays['part'], a[:,1:3])
