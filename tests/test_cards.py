"Cards: complete, true to their archives, found in a checkout and in a wheel"
import csv, json, os, re, sqlite3, subprocess, sys, zipfile
from collections import Counter
import pytest, yaml
from hydramoe.data.records import DOMAINS, record
from hydramoe.data.rows import map_row
from hydramoe.data.splits import prompt_key
from hydramoe.data.cards import card_names, load_card, sample_pairs, validate_card
from hydramoe.data.load import load
from hydramoe.foundations import fetch
from hydramoe.foundations.core import HydraError, repo_root
from hydramoe.data.leaks import find_leaks
from cards import FETCHED, cached_load

PUBLIC = [n for n in card_names(verified=None) if n not in FETCHED]
OURS = {'domain', 'use', 'verified', 'map', 'canary', 'rows', 'faults', 'roles'}
def front_of(name): return yaml.safe_load((repo_root()/'data_cards'/f'{name}.md').read_text().split('---\n', 2)[1])


@pytest.mark.parametrize('name', FETCHED)
def test_a_card_gives_what_it_says(name):
    card, rows = load_card(name), cached_load(name)
    assert len(rows) == card['rows'] == len({r['id'] for r in rows})
    for r in rows:
        assert r['domain'] == card['domain']
        assert r['source'] == name
        assert r['license']
        assert r['prompt'][-1]['role'] in ('user', 'tool')
        assert r['completion'][-1]['role'] == 'assistant'
        assert all(m['content'].strip() for m in r['completion'])


@pytest.mark.parametrize('name', ['sonnets', 'human_eval', 'bfcl_sql'])
def test_a_sample_is_drawn_by_the_seed(name):
    few = load(name, limit=3, seed=1)
    assert few == load(name, limit=3, seed=1) != load(name, limit=3, seed=2)
    assert {r['id'] for r in few} < {r['id'] for r in cached_load(name)}
    assert len(few) == 3


@pytest.mark.parametrize('name', FETCHED + PUBLIC)
def test_front_matter_is_the_hubs(name):
    from huggingface_hub import DatasetCardData
    front = front_of(name)
    ours = front.pop('hydramoe')
    known = DatasetCardData(**front)
    assert known.pretty_name
    assert known.license
    assert known.language
    assert known.size_categories
    assert known.license != 'other' or front.get('license_name')
    assert set(front) <= {'pretty_name', 'license', 'license_name', 'license_link', 'language', 'task_categories',
                          'size_categories', 'tags'}
    packaged = {'package', 'members', 'generator', 'args'}
    public = {'hub', 'revision', 'config', 'split', 'data_dir', 'data_files', 'layout', 'columns', 'sample', 'size'}
    assert set(ours) <= OURS | (packaged if name in FETCHED else public)
    assert isinstance(ours['canary'], bool)
    assert isinstance(ours['faults'], list)
    assert len(load_card(name)['prose']) > 150


@pytest.mark.parametrize('name', PUBLIC)
def test_a_public_card_claims_no_more_than_it_knows(name):
    "Its map does on its sample exactly what it says, and nothing is said to have been counted here"
    card = load_card(name)
    assert card['verified'] in ('schema', 'unverified')
    assert not {'package', 'members', 'generator'} & set(card)
    assert card['rows'] == 'unknown' or isinstance(card['rows'], int)
    with pytest.raises(HydraError, match=f"{re.escape(card['hub'])} on the Hub"): load(name)
    if card['verified'] == 'unverified': return
    assert '/' in card['hub']
    assert '/' in card['layout']['repository']
    assert card['layout']['path']
    assert 1 <= len(card['sample']) <= 3
    for s in card['sample']:
        pairs = sample_pairs(card, s['row'])
        is_list = isinstance(s['prompt'], list)
        said = list(zip(s['prompt'], s['completion'])) if is_list else [(s['prompt'], s['completion'])]
        assert pairs[-len(said):] == said
        assert all(p.strip() for p, _ in pairs)
        assert all(c.strip() for _, c in pairs)
        assert set(s['row']) <= set(card['columns'])
    touched = set()
    class Row(dict): # tells which columns are looked at
        def __getitem__(self, k):
            touched.add(k)
            return dict.__getitem__(self, k)
        def get(self, k, default=None):
            touched.add(k)
            return dict.get(self, k, default)
    for s in card['sample']: map_row(Row(s['row']), card['map'], card.get('roles'))
    assert touched - {'tools', 'input'} <= set(card['columns'])


PLAIN = dict(
    name='plain', license='mit', domain='general', use='train', verified='schema', hub='owner/set', revision='unknown',
    layout=dict(repository='owner/code', path='README.md'), columns=['q', 'a'],
    map=dict(prompt='{q}', completion='{a}'),
    sample=[dict(row=dict(q='Why?', a='So.'), prompt='Why?', completion='So.')],
    canary=False, rows='unknown', faults=[])
SAID = (('system', 's'), ('human', 'a'), ('sage', 'b'), ('human', 'c'), ('sage', 'd'))
SHAREGPT = dict(
    columns=['chat'], map={'sharegpt': 'chat', 'from': 'who', 'value': 'text'}, roles=dict(sage='assistant'),
    sample=[dict(row=dict(chat=[dict(who=w, text=t) for w, t in SAID]), prompt=['a', 'c'], completion=['b', 'd'])])

def with_sample(card, **fields):
    "A card whose only sample has other fields"
    return card | dict(sample=[dict(card['sample'][0], **fields)])

PAIRS = dict(map='pairs', columns=['prompt', 'completion'],
             sample=[dict(row=dict(prompt='x', completion='y'), prompt='x', completion='y')])
ALPACA = dict(columns=['instruction', 'output'], map='alpaca',
              sample=[dict(row=dict(instruction='x', output='y'), prompt='x', completion='y')])
WHOLE = [{}, SHAREGPT, with_sample(SHAREGPT, prompt='c', completion='d'), PAIRS, ALPACA,
         dict(verified='unverified', map='unknown')]

@pytest.mark.parametrize('change', WHOLE)
def test_a_whole_public_card_passes(change): assert validate_card(PLAIN | change)

FAULTS = [
    (dict(verified='data'), "'data' is for a card with `package`"), (dict(verified='sure'), 'verified'),
    (dict(domain='misc'), 'domain'), (dict(hub='https://x/y'), 'need owner/name'), (dict(revision='abc'), '40 hex'),
    (dict(layout=dict(repository='owner', path='x')), 'need the repository'), (dict(sample=[]), 'needs one row'),
    (dict(sample=[dict(row=dict(q='x'))]), 'needs one row'), (dict(map='unknown'), 'map names unknown'),
    (dict(columns=['q']), "needs the column 'a'"),
    (dict(sample=[dict(PLAIN['sample'][0], row=dict(q='Why?', a='So.', z=1))]), "has the column 'z'"),
    (dict(canary=True), 'never be trained on'), (SHAREGPT | dict(roles={}), 'role "sage" is none of'),
    (with_sample(SHAREGPT, prompt=['a'], completion=['b']), 'the card says')]

@pytest.mark.parametrize('change,why', FAULTS)
def test_a_public_card_with_a_fault_is_refused(change, why):
    with pytest.raises(HydraError, match=why): validate_card(PLAIN | change)


def test_a_card_of_another_state_is_asked_for_by_name():
    assert set(FETCHED) == set(card_names(verified='data'))
    assert not set(FETCHED) & set(card_names(verified='schema'))
    assert not card_names('general')
    assert set(card_names('general', verified=None)) <= set(PUBLIC)


def test_every_domain_is_fed_and_examined():
    assert len(card_names(use='train')) >= 16
    assert len(card_names(use='evaluate')) >= 10
    for d in DOMAINS:
        assert len(card_names(d, 'train')) >= 2
        assert card_names(d, 'evaluate')


def test_nothing_with_a_canary_is_trained_on():
    for n in FETCHED:
        c = load_card(n)
        if c['use'] == 'train' and 'package' in c:
            package = c['package'].split('==')[0]
            members = [fetch.member(package, p) for p in c['members'] if '*' not in p]
            assert not any(b'SHOULD NEVER APPEAR IN TRAINING' in m for m in members)


def words(text): return re.findall(r'\w+', text.lower())
def runs(text): return {hash(tuple(w[i:i+13])) for w in [words(text)] for i in range(len(w)-12)}

def leaked(records, held):
    "Records that hold a held-out question, or thirteen words of one: written apart from `find_leaks`"
    asked = {' '.join(words(r['prompt'][-1]['content'])) for r in held} - {''}
    seen = set().union(*(runs(r['prompt'][-1]['content']) for r in held))
    def shows(r):
        texts = [m['content'] for m in r['prompt'] + r['completion'] if m['role'] != 'system']
        return ' '.join(words(r['prompt'][-1]['content'])) in asked or any(not seen.isdisjoint(runs(t)) for t in texts)
    return [r for r in records if shows(r)]


@pytest.fixture(scope='module')
def everything():
    "All training and all held-out records"
    def of(use): return [r for n in card_names(use=use) for r in cached_load(n)]
    return of('train'), of('evaluate')


def test_no_evaluation_row_is_trained_on(everything):
    """Over all cards: what `find_leaks` finds nothing in, and thus what any unified set draws from, holds no held-out
    question and no thirteen words of one"""
    train, held = everything
    clean = [r for r,where in zip(train, find_leaks(train, held)) if not where]
    assert not leaked(clean, held)
    had, left = Counter(r['source'] for r in train), Counter(r['source'] for r in clean)
    for n in had:
        gone = f'{n}: {had[n]-left[n]} of {had[n]} rows are in a held-out set; the card itself should leave them out'
        assert left[n] >= .94*had[n], gone


def test_a_planted_evaluation_row_is_found(everything):
    "The test above can fail: one row for each held-out set, asked again, told in an answer, said in an earlier turn"
    train, held = everything
    def text(r): return r['prompt'][-1]['content']
    long = {r['source']: r for r in held if len(words(text(r))) >= 20}
    short = {r['source']: r for r in held if 3 <= len(words(text(r))) < 13}
    def earlier(r):
        asked, said = dict(role='user', content='As they say, ' + text(r)), dict(role='assistant', content='Yes.')
        return record([asked, said, dict(role='user', content='And?')], 'x', 'web')
    planted = [record(f'  {text(r).upper()} !!', 'x', 'web') for r in [*long.values(), *short.values()]]
    planted += [record('Tell me something.', 'Well: ' + text(r), 'web') for r in long.values()]
    planted += [earlier(r) for r in long.values()]
    assert set(long) | set(short) == set(card_names(use='evaluate'))
    assert len(planted) > 40
    assert leaked(planted, held) == planted
    assert all(find_leaks(planted, held))


def test_training_and_held_out_sets_share_no_question(everything):
    "The cards as they are, before anything is dropped"
    held = {prompt_key(r) for r in everything[1]}
    for n in card_names(use='train'):
        shared = sum(prompt_key(r) in held for r in cached_load(n))
        assert shared <= 2, f'{n}: {shared} prompts are in a held-out set'


def test_tables_and_claims_are_right():
    "The crafted responses, computed again in another way"
    for r in cached_load('element_claims'):
        text = r['completion'][0]['content']
        a, b = re.findall(r' (-?[\d.]+(?:e-?\d+)?)(?= |\.$)', text)[:2]
        assert text.startswith(str(float(a) > float(b.rstrip('.'))))
    checked = 0
    for r in cached_load('element_tables'):
        m = re.match(r'Convert this (\w+) table to (\w+):\n\n(.*)', r['prompt'][0]['content'], re.S)
        if not m: continue
        assert table_cells(m[1], m[3]) == table_cells(m[2], r['completion'][0]['content'])
        checked += 1
    assert checked > 500


def table_cells(kind, text):
    "A table in any of the three formats as lists of strings"
    if kind == 'JSON':
        rows = json.loads(text)
        return [list(rows[0])] + [['' if v is None else str(v) for v in r.values()] for r in rows]
    if kind == 'CSV': return list(csv.reader(text.splitlines()))
    lines = [[c.strip() for c in l.strip('|').split('|')] for l in text.splitlines()]
    return lines[:1] + lines[2:]


def test_sql_of_the_tables_gives_the_stated_rows():
    def value(b): return float(b) if re.fullmatch(r'-?[\d.e+-]+', str(b)) else b
    checked = 0
    for r in cached_load('element_tables'):
        m = re.match(r'Table elements:\n\n(.*?)\n\nWhich', r['prompt'][0]['content'], re.S)
        if not m: continue
        head, *rows = csv.reader(m[1].splitlines())
        con = sqlite3.connect(':memory:')
        con.execute(f"create table elements ({', '.join(f'{h} numeric' for h in head)})")
        places = ','.join('?'*len(head))
        con.executemany(f'insert into elements values ({places})', [[v or None for v in row] for row in rows])
        sql, want = r['completion'][0]['content'].split(';\n\n')
        got, said = con.execute(sql).fetchall(), list(csv.reader(want.splitlines()))[1:]
        assert [[a, value(b)] for a, b in got] == [[a, value(b)] for a, b in said]
        checked += 1
    assert checked > 300


def test_an_altered_member_is_refused(monkeypatch):
    real = fetch.member
    monkeypatch.setattr(fetch, 'member', lambda n, p: real(n, p) + b' ')
    with pytest.raises(HydraError, match='has sha256 .* the card says'): load('gsm8k')


def test_cards_ship_in_the_wheel(tmp_path):
    "Built without a network, opened outside the checkout"
    src = tmp_path/'src'
    list_files = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(list_files, cwd=repo_root(), capture_output=True, check=True).stdout.decode()
    parts = ('hydramoe', 'data_cards', 'pyproject.toml', 'settings.ini', 'README.md', 'LICENSE')
    for f in listed.split('\0'):
        if f.split('/')[0] in parts and (repo_root()/f).is_file():
            (src/f).parent.mkdir(parents=True, exist_ok=True)
            (src/f).write_bytes((repo_root()/f).read_bytes())
    offline = ['--no-build-isolation', '--no-deps', '--no-index']
    build = [sys.executable, '-m', 'pip', 'wheel', '-q', *offline, '-w', str(tmp_path), str(src)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('*.whl')
    assert Counter(zipfile.ZipFile(wheel).namelist())['hydramoe/data_cards/gsm8k.md'] == 1
    site = tmp_path/'site'
    zipfile.ZipFile(wheel).extractall(site)
    code = """
import hydramoe.data.cards as d
assert "site" in d.__file__, d.__file__
print(len(d.card_names()), d.load_card("gsm8k")["rows"])
"""
    env = os.environ | dict(PYTHONPATH=str(site))
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.stdout.split() == [str(len(FETCHED)), '1319'], out.stderr
