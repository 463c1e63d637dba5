"Cards: complete, true to their archives, found in a checkout and in a wheel"
import csv, functools, json, os, re, sqlite3, subprocess, sys, zipfile
from collections import Counter
from pathlib import Path
import pytest, yaml
from hydramoe import data, fetch
from hydramoe.core import HydraError, repo_root

NAMES = data.card_names()
load = functools.cache(data.load)


@pytest.mark.parametrize('name', NAMES)
def test_a_card_gives_what_it_says(name):
    card, rows = data.load_card(name), load(name)
    assert len(rows) == card['rows'] == len({r['id'] for r in rows})
    assert all(r['domain'] == card['domain'] and r['source'] == name and r['license'] for r in rows)
    assert all(r['prompt'][-1]['role'] in ('user', 'tool') and r['completion'][-1]['role'] == 'assistant' for r in rows)
    assert all(m['content'].strip() for r in rows for m in r['completion'])
    assert data.load(name, limit=3, seed=1) == data.load(name, limit=3, seed=1) != data.load(name, limit=3, seed=2)


@pytest.mark.parametrize('name', NAMES)
def test_front_matter_is_the_hubs(name):
    from huggingface_hub import DatasetCardData
    text = (repo_root()/'data_cards'/f'{name}.md').read_text()
    front = yaml.safe_load(text.split('---\n', 2)[1])
    ours = front.pop('hydramoe')
    known = DatasetCardData(**front)
    assert known.pretty_name and known.license and known.language == ['en'] and known.size_categories
    assert set(front) <= {'pretty_name', 'license', 'license_name', 'language', 'task_categories', 'size_categories', 'tags'}
    assert set(ours) <= {'domain', 'use', 'package', 'members', 'generator', 'map', 'args', 'canary', 'rows', 'faults'}
    assert isinstance(ours['canary'], bool) and len(data.load_card(name)['prose']) > 150


def test_every_domain_is_fed_and_examined():
    for d in data.DOMAINS: assert len(data.card_names(d, 'train')) >= 2 and data.card_names(d, 'evaluate')


def test_nothing_with_a_canary_is_trained_on():
    for n in NAMES:
        c = data.load_card(n)
        if c['use'] == 'train' and 'package' in c:
            assert not any(b'SHOULD NEVER APPEAR IN TRAINING' in fetch.member(c['package'].split('==')[0], p) for p in c['members'] if '*' not in p)


def test_training_and_held_out_sets_share_no_question():
    held = {data.prompt_key(r) for n in data.card_names(use='evaluate') for r in load(n)}
    for n in data.card_names(use='train'):
        shared = sum(data.prompt_key(r) in held for r in load(n))
        assert shared <= 2, f'{n}: {shared} prompts are in a held-out set'


def test_tables_and_claims_are_right():
    "The crafted responses, computed again in another way"
    for r in load('element_claims'):
        text = r['completion'][0]['content']
        a, b = re.findall(r' (-?[\d.]+(?:e-?\d+)?)(?= |\.$)', text)[:2]
        assert text.startswith(str(float(a) > float(b.rstrip('.'))))
    checked = 0
    for r in load('element_tables'):
        m = re.match(r'Convert this (\w+) table to (\w+):\n\n(.*)', r['prompt'][0]['content'], re.S)
        if not m: continue
        assert cells(m[1], m[3]) == cells(m[2], r['completion'][0]['content'])
        checked += 1
    assert checked > 500


def cells(kind, text):
    "A table in any of the three formats as lists of strings"
    if kind == 'JSON':
        rows = json.loads(text)
        return [list(rows[0])] + [['' if v is None else str(v) for v in r.values()] for r in rows]
    if kind == 'CSV': return list(csv.reader(text.splitlines()))
    lines = [[c.strip() for c in l.strip('|').split('|')] for l in text.splitlines()]
    return lines[:1] + lines[2:]


def test_sql_of_the_tables_gives_the_stated_rows():
    checked = 0
    for r in load('element_tables'):
        m = re.match(r'Table elements:\n\n(.*?)\n\nWhich', r['prompt'][0]['content'], re.S)
        if not m: continue
        head, *rows = csv.reader(m[1].splitlines())
        con = sqlite3.connect(':memory:')
        con.execute(f"create table elements ({', '.join(f'{h} numeric' for h in head)})")
        con.executemany(f"insert into elements values ({','.join('?'*len(head))})", [[v or None for v in row] for row in rows])
        sql, want = r['completion'][0]['content'].split(';\n\n')
        got, said = con.execute(sql).fetchall(), list(csv.reader(want.splitlines()))[1:]
        assert [[a, float(b) if re.fullmatch(r'-?[\d.e+-]+', str(b)) else b] for a, b in got] == [[a, float(b) if re.fullmatch(r'-?[\d.e+-]+', b) else b] for a, b in said]
        checked += 1
    assert checked > 300


def test_an_altered_member_is_refused(monkeypatch):
    real = fetch.member
    monkeypatch.setattr(fetch, 'member', lambda n, p: real(n, p) + b' ')
    with pytest.raises(HydraError, match='has sha256 .* the card says'): data.load('gsm8k')


def test_cards_ship_in_the_wheel(tmp_path):
    "Built without a network, opened outside the checkout"
    src = tmp_path/'src'
    files = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=repo_root(), capture_output=True, check=True).stdout.decode().split('\0')
    for f in files:
        if f.split('/')[0] in ('hydramoe', 'data_cards', 'pyproject.toml', 'settings.ini', 'README.md', 'LICENSE') and (repo_root()/f).is_file():
            (src/f).parent.mkdir(parents=True, exist_ok=True); (src/f).write_bytes((repo_root()/f).read_bytes())
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-build-isolation', '--no-deps', '--no-index', '-w', str(tmp_path), str(src)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob('*.whl')
    assert Counter(zipfile.ZipFile(wheel).namelist())['hydramoe/data_cards/gsm8k.md'] == 1
    site = tmp_path/'site'
    zipfile.ZipFile(wheel).extractall(site)
    code = 'import hydramoe.data as d; assert "site" in d.__file__, d.__file__; print(len(d.card_names()), d.load_card("gsm8k")["rows"])'
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(site)), capture_output=True, text=True)
    assert out.stdout.split() == [str(len(NAMES)), '1319'], out.stderr
