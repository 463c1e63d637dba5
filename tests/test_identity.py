"Fingerprints: what they must survive, and what they must notice"
import os
import pytest, torch
from hydramoe.models.base import tiny_base
from hydramoe.models.identity import checkpoint_fingerprint, fingerprint, remember_hash
from hydramoe.models.load import load_base
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import file_sha256
from transformers import LlamaForCausalLM
from hydras import save_base

def test_fingerprint_of_shards(tiny, tmp_path):
    save_base(tiny, tmp_path, max_shard_size='100KB')
    shards = sorted(tmp_path.glob('model-*.safetensors'))
    assert len(shards)>1 and checkpoint_fingerprint(tmp_path)==tiny.fingerprint
    shards[1].unlink()
    with pytest.raises(HydraError, match=shards[1].name): load_base(tmp_path)

def test_fingerprint_of_an_untied_head(tiny, tmp_path):
    cfg = type(tiny.model.config).from_dict({**tiny.model.config.to_dict(), 'tie_word_embeddings': False})
    model = LlamaForCausalLM(cfg)
    before = fingerprint(model)
    with torch.no_grad(): model.lm_head.weight[3,3] += 1
    assert fingerprint(model)!=before
    model.save_pretrained(tmp_path)
    assert checkpoint_fingerprint(tmp_path)==fingerprint(model)

def test_a_touched_checkpoint_is_named_anew(tiny, tmp_path):
    save_base(tiny, tmp_path)
    first = load_base(tmp_path).fingerprint
    save_base(tiny_base(seed=1), tmp_path)
    assert load_base(tmp_path).fingerprint!=first

def test_a_hash_is_remembered_by_kind_files_and_key(tmp_path, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    file = tmp_path/'x'
    file.write_bytes(b'abc')
    calls = []
    def compute():
        calls.append(1)
        return file_sha256(file)
    first = remember_hash('a', [file], compute)
    assert remember_hash('a', [file], compute)==first and len(calls)==1
    remember_hash('b', [file], compute)
    remember_hash('a', [file], compute, 'key')
    assert len(calls)==3
    s = file.stat()
    file.write_bytes(b'abd')
    os.utime(file, ns=(s.st_atime_ns, s.st_mtime_ns))
    assert remember_hash('a', [file], compute)!=first

def test_a_hash_of_files_that_change_meanwhile_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    file = tmp_path/'x'
    file.write_bytes(b'abc')
    def compute():
        file.write_bytes(b'abcd')
        return 'of the old content'
    remember_hash('a', [file], compute)
    assert not (tmp_path/'cache'/'a').exists()
