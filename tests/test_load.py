"Bases by name: what loads, what is refused, and what is known before the weights are"
import pytest, torch
from hydramoe.models.base import tiny_base
from hydramoe.models.load import base_id, base_key, load_base
from hydramoe.models.template import byte_tokenizer, chatml
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import read_json
from hydramoe.foundations.store import stage
from hydras import save_base

def test_a_pickle_is_refused(tiny, tmp_path):
    save_base(tiny, tmp_path)
    torch.save(tiny.model.state_dict(), tmp_path/'pytorch_model.bin')
    (tmp_path/'model.safetensors').unlink()
    with pytest.raises(HydraError, match='safetensors only'): load_base(tmp_path)

@pytest.mark.parametrize('id', ['/no/such/dir', 'no-such-base', 'a/b/c', '~/nothing/here'])
def test_what_is_not_a_base(id):
    with pytest.raises(HydraError, match='neither'): load_base(id)

def test_a_tokenizer_without_template_or_padding(tiny, tmp_path):
    save_base(tiny, tmp_path)
    t = byte_tokenizer()
    t.chat_template = None
    t.pad_token = None
    for f in ('chat_template.jinja',): (tmp_path/f).unlink(missing_ok=True)
    t.save_pretrained(tmp_path)
    b = load_base(tmp_path)
    assert b.tokenizer.chat_template==chatml
    assert b.tokenizer.pad_token==b.tokenizer.eos_token


# ---- by name
def on_the_hub(monkeypatch, tmp_path, folder):
    "A Hub whose org/model is a folder here; its branch main can be moved"
    import huggingface_hub
    from types import SimpleNamespace
    main = ['a'*40]
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    def model_info(id, revision): return SimpleNamespace(sha=main[0])
    monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda id, revision, **kw: str(folder))
    return main

def test_a_hub_base_is_known_by_its_commit(tiny, tmp_path, monkeypatch):
    from hydramoe.hydra.saving import base_uri
    from hydramoe.hydra import Hydra
    from hydramoe.hydra.spec import BuildSpec, pin_base
    from hydramoe.hydra.route import uniform_router
    from hydramoe.experts.stack import LoraSpec
    from hydramoe.experts.model import gated
    main = on_the_hub(monkeypatch, tmp_path, save_base(tiny, tmp_path/'files'))
    b = load_base('org/model', device='cpu')
    assert b.id=='org/model@'+'a'*40==base_id('hub:org/model@main')
    assert pin_base(BuildSpec(base='org/model')).base==b.id
    assert base_uri(b)=='hub:'+b.id
    model = gated(b, 1, LoraSpec(1, 2, 'q_proj'))
    model.stack.init_expert(0, 0, 'law')
    at = Hydra(b, model, uniform_router(['law'])).save(tmp_path/'b')
    assert read_json(at/'hydra.json')['base']['id']=='hub:'+b.id
    assert read_json(at/'experts'/'law'/'adapter_config.json')['base_model_name_or_path']=='org/model'
    main[0] = 'nobody asks'
    assert Hydra.load(at, device='cpu').base.id==b.id

def test_a_build_records_the_commit(tiny, tmp_path, monkeypatch):
    from hydramoe.hydra import Hydra
    main = on_the_hub(monkeypatch, tmp_path, save_base(tiny, tmp_path/'files'))
    def row(i, word):
        asked, said = dict(role='user', content=f'{word} {i}?'), dict(role='assistant', content=word)
        return dict(id=str(i), prompt=[asked], completion=[said], domain='d', source='s', license='l')
    rows = [row(i, word) for i in range(6) for word in ('law', 'sea')]
    how = dict(base='org/model', quant='fp32', encoder='words', k=1, epochs=1, tokens=2000, dev=0, rank=1)
    Hydra.build(rows, tmp_path/'b', **how)
    assert read_json(tmp_path/'b'/'hydra.json')['built']['spec']['base']=='org/model@'+'a'*40
    main[0] = 'b'*40
    with pytest.raises(HydraError, match='holds another Hydra'): Hydra.build(rows, tmp_path/'b', **how)

def test_stages_know_what_is_behind_a_name(tiny, tmp_path):
    "The same name and place, another template or other weights: the stage is made again"
    save_base(tiny, tmp_path/'base')
    def first(): return stage(reads_base, dict(base=str(tmp_path/'base')), root=tmp_path/'stages')
    a = first()
    assert first()==a
    t = tmp_path/'base'/'chat_template.jinja'
    t.write_text(t.read_text()+' ')
    b = first()
    save_base(tiny_base(seed=1), tmp_path/'base')
    assert len({a, b, first()})==3

def reads_base(out, base): (out/'x').write_text(base)

LACKING = [('config.json', 'no config.json'), ('model.safetensors', 'no model.safetensors')]

@pytest.mark.parametrize('file, words', LACKING)
def test_a_folder_that_lacks_something(tiny, tmp_path, file, words):
    (save_base(tiny, tmp_path)/file).unlink()
    with pytest.raises(HydraError, match=words): base_key(tmp_path)
