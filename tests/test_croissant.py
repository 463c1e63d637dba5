"Cards please the Hub, and what is prepared leads back to the same records through mlcroissant alone"
import json
import pytest
from huggingface_hub import DatasetCard
from hydramoe.data.cards import card_names, load_card
from hydramoe.data.load import load
from hydramoe.data.hub_metadata import front_faults
from hydramoe.data.croissant import read_croissant
from hydramoe.data.prepare import check_card, hub_front, hub_records, run_prepare
from hydramoe.data.new_card import new_card
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import read_jsonl
from hydramoe.foundations.store import open_sealed
from cards import FETCHED

@pytest.mark.parametrize('name', card_names(verified=None))
def test_a_card_has_no_faults(name): assert check_card(name, fetch=False)['faults']==[]

def test_ninety_cards_are_verified_and_say_how():
    states = [load_card(n)['verified'] for n in card_names(verified=None)]
    assert sum(s in ('data','schema') for s in states) >= 90

@pytest.mark.parametrize('name', ['champ', 'chatterbot', 'bfcl_simple'])
def test_prepared_leads_back_to_its_records(name):
    d = run_prepare(name)
    open_sealed(d)
    kept = ('id','prompt','completion','domain','source','license')
    want = [{k: r[k] for k in kept} for r in read_jsonl(d/'records.jsonl')]
    assert read_croissant(d/'croissant.json')==want
    assert run_prepare(name)==d

@pytest.mark.slow
@pytest.mark.parametrize('name', FETCHED)
def test_every_fetched_card_prepares_and_leads_back(name):
    d = run_prepare(name)
    assert len(read_croissant(d/'croissant.json'))==load_card(name)['rows']

def test_raw_sources_keep_their_checksums():
    card = load_card('champ')
    told = json.loads((run_prepare('champ')/'croissant.json').read_text())
    assert {f['name']: f['sha256'] for f in told['distribution'] if f['@id']!='records.jsonl'}==card['members']

@pytest.mark.parametrize('byte', [0, 100, -2])
def test_an_altered_file_is_refused(tmp_path, byte):
    d = run_prepare('champ')
    for f in ('records.jsonl', 'croissant.json'): (tmp_path/f).write_bytes((d/f).read_bytes())
    raw = bytearray((d/'records.jsonl').read_bytes())
    raw[byte] ^= 1
    (tmp_path/'records.jsonl').write_bytes(raw)
    with pytest.raises(HydraError, match='altered'): read_croissant(tmp_path/'croissant.json')

def test_the_hub_reads_the_prepared_card():
    read = DatasetCard.load(run_prepare('champ')/'README.md', ignore_metadata_errors=False)
    assert read.data.license=='mit'
    assert read.data.configs[0]['data_files']=='records.jsonl'

def test_a_hub_set_is_fetched_at_its_revision_and_mapped(monkeypatch):
    asked = {}
    def load_dataset(path, **kw):
        asked.update(kw, path=path)
        return [dict(q='Who?', a='Me.'), dict(q=None, a='x')]
    import datasets
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    mapped = dict(prompt='{q}', completion='{a}')
    card = dict(name='p', domain='general', hub='a/b', revision='c'*40, split='train', map=mapped)
    records, rejects = hub_records(card)
    assert asked==dict(path='a/b', name=None, split='train', revision='c'*40)
    assert len(records)==1
    assert rejects[0]['line']==2

def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    import datasets
    def down(*a, **kw): raise ConnectionError('no route')
    monkeypatch.setattr(datasets, 'load_dataset', down)
    card = dict(name='p', domain='general', hub='a/b', revision='unknown', map='alpaca')
    with pytest.raises(HydraError, match='could not be read'): hub_records(card)

FILES = ['[{"instruction": "a", "output": "b"}]', '[{"prompt": "a", "completion": "b"}, {"prompt": ""}]']

@pytest.mark.parametrize('text', FILES)
def test_a_card_of_ones_own_loads_and_can_be_altered_only_openly(tmp_path, monkeypatch, text):
    (tmp_path/'mine.json').write_text(text)
    out = tmp_path/'cards'
    new_card(tmp_path/'mine.json', 'mine', out, domain='writing')
    monkeypatch.setenv('HYDRAMOE_CARDS', str(out))
    assert check_card('mine')['faults']==[]
    assert len(load('mine'))==1
    (out/'mine.jsonl').write_text('{"prompt": "a", "completion": "c"}\n')
    assert 'sha256' in check_card('mine')['faults'][0]

def test_a_broken_card_is_told_of_and_not_raised(tmp_path, monkeypatch):
    (tmp_path/'odd.md').write_text('---\nlicense: mit\n---\n')
    monkeypatch.setenv('HYDRAMOE_CARDS', str(tmp_path))
    assert check_card('odd')['verified']=='broken'

FAULTS = [('license', 'MIT', 'license'), ('task_categories', ['chat'], 'task_categories'),
          ('size_categories', ['n<1K'], 'size_categories'), ('language', ['English'], 'language')]

@pytest.mark.parametrize('key,value,word', FAULTS)
def test_each_fault_is_found(key, value, word):
    front = hub_front(load_card('gsm8k'))
    assert front_faults(front, 1319)==[]
    (fault,) = front_faults(front | {key: value}, 1319)
    assert fault.startswith(word)
