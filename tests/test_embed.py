"Embedding: the same in any batch, goes on after a kill, and an encoder is what is in its folder"
import json
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from hydramoe.domains import embed as embed_module
from hydramoe.domains.embed import embed, embed_stage, encoder_id, fit_tfidf
from hydramoe.domains.cluster import agreement, kmeans
from hydramoe.domains.discover import cluster_texts
from hydramoe.domains.examples import lesson_texts
from hydramoe.foundations.core import HydraError
from helpers import exchange

texts, topics = lesson_texts()

# --- MiniLM

def test_minilm_is_near_itself_in_any_batch():
    x = embed(texts)
    assert x.dtype==np.float32
    assert np.allclose((x**2).sum(1), 1, atol=1e-5)
    assert np.allclose(embed(texts[::-1], batch_size=7)[::-1], x, atol=1e-5)
    assert np.isfinite(embed(['', 'a '*5000])).all()

def test_minilm_finds_more_than_words():
    nmi = {e: agreement(cluster_texts(texts, 5, encoder=e)[1], topics)['nmi'] for e in ('minilm','words')}
    assert nmi['minilm']>nmi['words']+.2

# --- embedding goes on after a kill

def test_embedding_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    many = [f'{t} {i}' for i in range(4) for t in texts] # 160 texts: five pieces at 2 texts a pass
    calls, encode = [], embed_module._encode
    def once(model, piece, n):
        calls.append(len(piece))
        if len(calls)==3: raise KeyboardInterrupt
        return encode(model, piece, n)
    monkeypatch.setattr(embed_module, '_encode', once)
    with pytest.raises(KeyboardInterrupt): embed(many, batch_size=2, keep=tmp_path)
    x = embed(many, batch_size=2, keep=tmp_path)
    assert len(calls)==3+3 # two of five pieces were there
    assert np.array_equal(x, embed(many, batch_size=2))
    assert len(calls)==11
    assert np.array_equal(x, embed(many, batch_size=2, keep=tmp_path))
    assert len(calls)==11

# --- TF-IDF

def test_tfidf_is_the_same_after_saving_and_knows_topics(tmp_path):
    at = fit_tfidf(texts, tmp_path/'t', dims=30)
    x = embed(texts, at)
    assert np.array_equal(x, embed(texts, str(fit_tfidf(texts, tmp_path/'u', dims=30))))
    assert np.allclose(embed(['12345 67'], at), 0)
    assert agreement(kmeans(x, 5)[1], topics)['nmi']>.2

# --- encoders in folders

@pytest.fixture
def encoder(tmp_path):
    "A random sentence encoder of 32 dimensions in a folder"
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as models
    from transformers import BertConfig, BertModel
    from hydramoe.models.template import byte_tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=259, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=32)
        bert = BertModel(config)
    bert.save_pretrained(tmp_path/'bert')
    byte_tokenizer().save_pretrained(tmp_path/'bert')
    whole = models.Transformer(str(tmp_path/'bert'))
    SentenceTransformer(modules=[whole, models.Pooling(32)]).save(str(tmp_path/'enc'))
    return tmp_path/'enc'

def zeroed(file):
    "Zeros in the middle, in place, of equal size and date"
    data = bytearray(file.read_bytes())
    n = len(data)//4
    data[n:-n] = bytes(len(data)-2*n)
    exchange(file, data)

def other_weights(file):
    "Weights of an encoder in reverse: finite, and another space"
    t = load_file(file)
    save_file({n: np.ascontiguousarray(a[::-1]) for n,a in t.items()}, file, metadata={'format': 'pt'})

def test_an_encoder_is_what_is_in_its_folder(encoder, tmp_path):
    from hydramoe.foundations.store import sealing, stage
    question = dict(prompt=[dict(role='user', content='Where?')])
    with sealing(tmp_path/'rows', {}) as d: (d/'train.jsonl').write_text(json.dumps(question))
    how = dict(parts='train', encoder=str(encoder))
    def made(): return stage(embed_stage, how, dict(rows=tmp_path/'rows'), root=tmp_path/'stages')
    first = made()
    x = embed(texts[:3], str(encoder))
    name = encoder_id(encoder)
    assert made()==first
    assert x.shape==(3, 32)
    (encoder/'README.md').write_text('other words')
    assert made()==first
    assert encoder_id(encoder)==name
    zeroed(encoder/'model.safetensors')
    assert encoder_id(encoder)!=name
    assert made()!=first
    assert not np.allclose(embed(texts[:3], str(encoder)), x) # nor is the old model at work in this process
    names = {encoder_id(encoder)}
    for f in sorted(p for p in encoder.rglob('*.json')):
        f.write_bytes(f.read_bytes()+b' ')
        names.add(encoder_id(encoder))
    assert len(names)==1+len(list(encoder.rglob('*.json')))

def test_a_build_with_an_encoder_in_a_folder(encoder, tmp_path):
    from hydramoe.hydra.bundle import BundleError
    from hydramoe.hydra import Hydra
    def row(i, word):
        asked, said = dict(role='user', content=f'{word} {i}?'), dict(role='assistant', content=word)
        return dict(id=str(i), prompt=[asked], completion=[said], domain='d', source='s', license='l')
    rows = [row(i, word) for i in range(6) for word in ('law', 'sea')]
    how = dict(base='tiny', quant='fp32', k=2, epochs=1, tokens=2000, dev=0, rank=1, root=tmp_path/'stages')
    h = Hydra.build(rows, tmp_path/'b', encoder=str(encoder), **how)
    assert h.router.params['encoder'].startswith('sha256:')
    assert h.router.places
    assert h.ask('law?', max_new_tokens=1) is not None
    assert str(encoder) not in ''.join(f.read_text() for f in (tmp_path/'b').rglob('*.json'))
    with pytest.raises(BundleError, match='give its place, encoder= .--encoder'): Hydra.load(tmp_path/'b')
    opened = Hydra.load(tmp_path/'b', encoder=encoder)
    assert np.allclose(opened.gates(['law?']), h.gates(['law?']))
    other_weights(encoder/'model.safetensors')
    with pytest.raises(HydraError, match='exchanged'): Hydra.load(tmp_path/'b', encoder=encoder)
    with pytest.raises(HydraError, match='exchanged'): opened.gates(['law?'])
    before = {p.name for p in (tmp_path/'stages').iterdir()}
    again = Hydra.build(rows, encoder=str(encoder), **how)
    assert again.router.params['encoder']!=h.router.params['encoder']
    new = {p.name for p in (tmp_path/'stages').iterdir()}-before
    assert any(name.startswith('embed_stage') for name in new)
