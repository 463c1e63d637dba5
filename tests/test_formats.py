"Formats: what does not fit a lesson (thousands of broken files, files larger than memory, every encoding)"
import csv, gzip, io, json, tracemalloc
import pandas as pd
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from hydramoe.data import formats
from hydramoe.foundations.core import HydraError
from hydramoe.data.formats import Form
from hydramoe.data.forms import order_turns
from hydramoe.data.detect import BadRows
from hydramoe.data.stream import RowCounts, read_records, rejects_file, stream_records, write_rejects
from rows import BAD, FORMS, TALK, jsonl

QUOTED = [dict(prompt=f'q{i} é✓', completion=f'a{i}, "said"\nhe; |\t') for i in range(6)]


def accounted(path, **how):
    "Read a file whatever it is: every row has an end, and whatever is raised is a HydraError"
    t = RowCounts()
    try: records, rejects = read_records(path, tally=t, **how)
    except HydraError as e:
        assert str(e)
        return None
    assert t.rows == t.used + t.rejected + t.repeated and len(rejects) == t.rejected + t.repeated
    assert t.records == len(records) == len({r['id'] for r in records}) and t.used == sum(t.forms.values())
    for r in records:
        assert all(isinstance(m['content'], str) and '\0' not in m['content'] for m in r['prompt'] + r['completion'])
        json.dumps(r, ensure_ascii=False).encode('utf-8')
    for r in rejects: assert r['line'] >= 1 and r['row'] >= 1 and r['reason'] and '\n' not in r['reason'] and isinstance(r['raw'], str)
    write_rejects(path.with_name('x.rejects.jsonl'), rejects)
    back = [json.loads(l) for l in path.with_name('x.rejects.jsonl').read_bytes().split(b'\n') if l]
    assert [b['raw'] for b in back] == [r['raw'] for r in rejects]
    return t, records, rejects


def sheet(rows, delimiter=',', **kw):
    f = io.StringIO(newline='')
    w = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)), delimiter=delimiter, **kw)
    w.writeheader(); w.writerows(rows)
    return f.getvalue()


def written(d, name, text, encoding='utf-8', packed=False):
    f = d/name
    data = text if isinstance(text, bytes) else text.encode(encoding)
    f.write_bytes(gzip.compress(data) if packed else data)
    return f


# --- what is there is read --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
def test_every_format_gives_the_same_records(tmp_path, encoding, packed):
    plain = [json.dumps(r, ensure_ascii=False) for r in QUOTED]
    texts = {'x.jsonl': '\n'.join(plain), 'y.jsonl': '\r\n'.join(plain) + '\r\n', 'x.json': json.dumps(QUOTED, ensure_ascii=False), 'y.json': json.dumps(QUOTED, indent=2, ensure_ascii=False),
             'z.json': json.dumps(dict(version=1, names=['a'], data=QUOTED, n=dict(x=[[]])), ensure_ascii=False), 'lines.json': '\n'.join(plain), 'x.csv': sheet(QUOTED), 'x.tsv': sheet(QUOTED, '\t'),
             'semi.csv': sheet(QUOTED, ';'), 'excel.csv': 'sep=;\r\n' + sheet(QUOTED, ';', quoting=csv.QUOTE_ALL), 'pipe.txt': sheet(QUOTED, '|')}
    for name, text in texts.items():
        f = written(tmp_path, name + '.gz'*packed, text, encoding, packed)
        records, rejects = read_records(f)
        assert not rejects and [(r['prompt'][0]['content'], r['completion'][0]['content']) for r in records] == [(r['prompt'], r['completion'].strip()) for r in QUOTED], name


def test_parquet_from_pandas_with_structs_lists_and_nulls(tmp_path):
    f = tmp_path/'x.parquet'
    pd.DataFrame(dict(id=[1, 2, 3], messages=[TALK, None, [dict(role='user', content=None)]], when=pd.Timestamp('2026-01-01'))).to_parquet(f)
    t, (r,), rejects = accounted(f)
    assert r['completion'][0]['content'] == 'Yo' and [x['line'] for x in rejects] == [2, 3]
    pd.DataFrame([dict(prompt='a', completion='b'), dict(messages=TALK), dict(instruction='c', input=None, output='d'), dict(conversations=[{'from': 'human', 'value': 'e'}, {'from': 'gpt', 'value': 'f'}])]).to_parquet(f)
    t, records, rejects = accounted(f)
    assert dict(t.forms) == dict(pairs=1, messages=1, alpaca=1, sharegpt=1) and not rejects
    pq.write_table(pa.table(dict(prompt=pa.array([b'caf\xc3\xa9', b'\xff', b'x']), completion=['a', 'b', 'c'], extra=[[1, None], [], None])), f)
    t, records, rejects = accounted(f)
    assert t.repairs == {'bytes read as UTF-8 text': 2} and [x['row'] for x in rejects] == [2]
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array(['ab', 'cd', 'ef']).buffers()[:2] + [pa.py_buffer(b'ab\xff\xfeef')])
    pq.write_table(pa.table(dict(prompt=bad, completion=['a', 'b', 'c'])), f)
    t, records, rejects = accounted(f)
    assert [x['row'] for x in rejects] == [2] and 'Python cannot read' in rejects[0]['reason']
    pq.write_table(pa.table(dict(prompt=pa.array([], pa.string()), completion=pa.array([], pa.string()))), f)
    with pytest.raises(BadRows, match='no rows'): read_records(f)
    with pytest.raises(HydraError, match='damaged'): read_records(written(tmp_path, 'y.parquet', b'PAR1 and then nothing'))


def test_latin_1_is_refused_row_by_row_and_read_when_named(tmp_path):
    f = written(tmp_path, 'x.csv', 'prompt,completion\nWhere?,Here\nO\xf9?,L\xe0\n', 'latin-1')
    t, records, rejects = accounted(f)
    assert len(records) == 1 and rejects[0]['line'] == 3 and "encoding='cp1252'" in rejects[0]['reason'] and rejects[0]['raw'].encode('utf-8', 'surrogateescape') == b'O\xf9?,L\xe0'
    records, rejects = read_records(f, encoding='latin-1')
    assert records[1]['prompt'][0]['content'] == 'Où?' and not rejects
    for wrong in ('utf-16', 'ascii', 'base64', 'no-such'):
        with pytest.raises(HydraError): read_records(f, encoding=wrong)


def test_a_conversation_is_one_row_and_its_records_share_a_group(tmp_path):
    talk = [m for i in range(3) for m in (dict(role='user', content=f'q{i}'), dict(role='assistant', content=f'a{i}'))]
    t, records, rejects = accounted(written(tmp_path, 'x.jsonl', jsonl([dict(messages=talk[:4]), dict(messages=talk), dict(messages=talk[:2])])))
    assert (t.used, t.records, t.repeated) == (2, 3, 1) and rejects[0]['reason'] == 'repeats line 1'
    assert t.repairs == {'turns that an earlier row has, left out': 1}
    assert len({r['group'] for r in records[:2]}) == 1


def test_repairs_are_counted(tmp_path):
    rows = [dict(id=7, messages=[dict(role='assistant', content='Welcome'), *TALK]), dict(id=7, messages=[TALK[0], TALK[0], TALK[1]]), dict(id=8, system='s', messages=[dict(role='system', content='t'), *TALK]),
            dict(messages=[*TALK, dict(role='system', content='x'), *TALK])]
    t, records, rejects = accounted(written(tmp_path, 'x.jsonl', jsonl(rows)))
    assert sorted(t.repairs.values()) == [1, 1, 1, 1] and 'turn 3 is of the system' in rejects[0]['reason'] and '; ' in str(t)


# --- what is wrong is told --------------------------------------------------------------------------------------------

FAULTS = [('x.csv', b'prompt,completion\n', 'no rows'), ('x.csv', b'a,b\n1,2\n', 'columns a, b (read from its first line); need prompt and completion; say which'), ('x.csv', b'prompt,prompt\n1,2\n', "names 'prompt' twice"),
          ('x.jsonl', b'', 'empty'), ('x.json', b' \n ', 'empty'), ('x.json', b'[]', 'no rows'), ('x.json', b'{}', 'without a list'), ('x.json', b'[{"prompt": "a", "completion": "b"}, {"pro', 'cut off'),
          ('x.json', b'[{"prompt": "a", "completion": "b"}] x', 'goes on'), ('x.json', b'{"a": [{}], "b": [{}]}', 'two lists'), ('x.json', b'{"prompt": {"0": "a"}, "completion": {"0": "b"}, ', ''),
          ('x.xlsx', b'PK\x03\x04...', 'not exported'), ('x', b'Dear all', 'say format='), ('x.jsonl', b'\0'*100, 'NUL'), ('x.jsonl', b'[1, 2]', 'line 1: is a list'), ('x.csv.gz', b'\x1f\x8b\x08broken', ''),
          ('x.jsonl', gzip.compress(b'{"prompt": "a", "completion": "b"}\n'*999, mtime=0)[:40], 'cut off'), ('x.jsonl', b'"'*9, 'line 1'), ('x.csv', b'prompt,completion\n"a,b\n', 'quote')]

@pytest.mark.parametrize('name,data,why', FAULTS)
def test_a_file_of_which_nothing_can_be_used(tmp_path, name, data, why):
    with pytest.raises(HydraError) as e: read_records(written(tmp_path, name, data))
    assert why in str(e.value) and name in str(e.value)


@pytest.mark.parametrize('line,reason', [*BAD, ('{"prompt": "a", "completion": "b", "tools": 1}', 'tools is 1'), ('{', '')])
def test_a_bad_row_is_reported_with_its_line(tmp_path, line, reason):
    f = written(tmp_path, 'x.jsonl', '{"prompt": "a", "completion": "b"}\n\n' + line + '\n{"prompt": "c", "completion": "d"}\n')
    t, records, rejects = accounted(f)
    assert len(records) == 2 and [(r['line'], r['row'], r['raw']) for r in rejects] == [(3, 2, line)] and reason in rejects[0]['reason']
    with pytest.raises(BadRows, match='line 1'): read_records(written(tmp_path, 'y.jsonl', line))


def test_forms_in_the_wild_agree(tmp_path):
    t, (r,), rejects = accounted(written(tmp_path, 'x.jsonl', jsonl(FORMS)))
    assert (t.rows, t.used, t.repeated) == (6, 1, 5) and {x['reason'] for x in rejects} == {'repeats line 1'}


ODD_ROWS = {'deep': '{"prompt": ' + '['*100_000 + ']'*100_000 + ', "completion": "x"}', 'unused deep': '{"x": ' + '['*5000 + ']'*5000 + ', "prompt": "a"}', 'huge': '{"prompt": ' + '9'*5000 + ', "completion": "x"}',
       'tools': '{"prompt": "a", "completion": "b", "tools": [{"x": ' + '9'*5000 + '}]}', 'nan': '{"prompt": NaN, "completion": "b"}', 'nul': '{"prompt": "a\\u0000", "completion": "b"}', 'raw nul': '{"prompt": "a\0", "completion": "b"}',
       'surrogate': '{"prompt": "\\ud800", "completion": "b"}', 'twice': '{"prompt": "a", "prompt": "b", "completion": "c"}', 'long': '{"prompt": "' + 'x'*1_100_000 + '", "completion": "b"}', 'text': 'oops', 'list': '[1]', 'number': '12', 'colon': '{"prompt" "a"}'}

@pytest.mark.parametrize('name', ODD_ROWS)
def test_an_odd_row_is_refused_alone(tmp_path, name):
    good = ['{"prompt": "a", "completion": "b"}', '{"prompt": "c", "completion": "d"}']
    lines = [good[0], ODD_ROWS[name], good[1]]
    for f in (written(tmp_path, 'x.jsonl', '\n'.join(lines)), written(tmp_path, 'x.json', '[' + ',\n'.join(lines) + ']'), written(tmp_path, 'y.json', '{"rows": [' + ',\n'.join(lines) + ']}')):
        t, records, rejects = accounted(f)
        assert (t.rows, t.used) == (3, 2) and [(r['line'], r['row']) for r in rejects] == [(2, 2)], rejects
        assert len(rejects[0]['raw']) <= 1_000_000 and len(rejects[0]['reason']) < 300


def test_a_huge_integer_in_a_column_that_is_not_read_does_no_harm(tmp_path):
    t, records, rejects = accounted(written(tmp_path, 'x.jsonl', '{"prompt": "a", "completion": "b", "n": ' + '9'*5000 + '}'))
    assert not rejects


def test_ragged_csv_and_open_quotes(tmp_path):
    t, records, rejects = accounted(written(tmp_path, 'x.csv', 'prompt,completion\n1,2\n3\n4,5,6\n7,8,,\n,,\n\n"a\nb","c\n\nd"\n9,"x"y\n10,11\n"open,1\n12,13\n"14\n15\n",16,17\n'))
    assert [r['line'] for r in rejects] == [3, 4, 12, 14, 16] and t.used == 5
    assert 'is not closed' in rejects[-2]['reason'] and rejects[-2]['raw'] == '"open,1' and 'runs over 3 lines' in rejects[-1]['reason']
    assert records[2]['completion'][0]['content'] == 'c\n\nd'


def test_rejects_file_is_whole_or_absent(tmp_path):
    f, out = written(tmp_path, 'x.jsonl', '{"text": 1}\n'*3), tmp_path/'r'/'x.rejects.jsonl'
    with pytest.raises(BadRows):
        with rejects_file(out) as bad: list(stream_records(f, bad))
    assert [json.loads(l)['line'] for l in out.read_text().splitlines()] == [1, 2, 3]
    g = written(tmp_path, 'y.json', '[{"prompt": "a", "completion": "b"}, {"x": 1}, {"')
    with pytest.raises(HydraError, match='cut off'):
        with rejects_file(tmp_path/'y.rejects.jsonl') as bad: list(stream_records(Form(g, 'json'), bad))
    assert not (tmp_path/'y.rejects.jsonl').exists() and len(list(tmp_path.iterdir())) == 3


# --- malformed input of every kind ------------------------------------------------------------------------------------

KEYS = ['prompt', 'completion', 'messages', 'conversations', 'instruction', 'input', 'output', 'role', 'content', 'from', 'value', 'system', 'tools', 'domain', 'license', 'id', 'Prompt']
short_texts = st.text(max_size=6) | st.sampled_from(['user', 'assistant', 'system', 'tool', 'human', 'gpt', 'Hi', '\0', '\ud800', '"', '\n', ',', '[{"role": "user"}]'])
leaf = st.none() | st.booleans() | st.integers() | st.floats() | short_texts
turn = st.fixed_dictionaries(dict(role=st.sampled_from(['user', 'assistant', 'system', 'tool', 'x']), content=short_texts)) | st.fixed_dictionaries({'from': st.sampled_from(['human', 'gpt', 'system', 'observation']), 'value': short_texts})
anything = st.recursive(leaf, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.sampled_from(KEYS), c, max_size=4), max_leaves=8)
part = st.fixed_dictionaries(dict(type=st.sampled_from(['text', 'image_url']), text=short_texts)) | anything
call = st.fixed_dictionaries(dict(function=st.fixed_dictionaries(dict(name=short_texts, arguments=short_texts | anything)))) | anything
sent = st.fixed_dictionaries(dict(role=st.sampled_from(['user', 'assistant', 'tool']), content=st.lists(part, max_size=3) | short_texts | st.none(), tool_calls=st.lists(call, max_size=2) | anything))
any_row = st.dictionaries(st.sampled_from(KEYS), anything, max_size=5) | st.fixed_dictionaries(dict(messages=st.lists(turn | sent, max_size=5))) | st.fixed_dictionaries(dict(conversations=st.lists(turn, max_size=5))) | st.fixed_dictionaries(dict(prompt=short_texts, completion=short_texts)) | anything
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
scraps = st.lists(st.sampled_from(['{', '}', '[', ']', ',', ':', '"', '\\', '\n', '\r', ' ', '"prompt"', '"completion"', '"x"', '{"prompt": "a", "completion": "b"}', '\0', 'é', ';', '\t', '|', 'prompt', 'completion', 'sep=;', '1', '\ufeff']) | st.text(max_size=3), max_size=30).map(''.join)


@quick
@given(st.lists(any_row, min_size=1, max_size=6))
def test_any_json_ends_as_record_or_reject(tmp_path, rows):
    for f in (written(tmp_path, 'x.jsonl', jsonl(rows)), written(tmp_path, 'x.json', json.dumps(rows)), written(tmp_path, 'y.json', json.dumps(dict(rows=rows), indent=1))):
        done = accounted(f)
        if done and f.name != 'y.json': assert done[0].rows == len(rows)


@quick
@given(st.lists(any_row, min_size=1, max_size=6), st.data())
def test_damaged_json_lines(tmp_path, rows, data):
    text = bytearray(jsonl(rows).encode())
    for _ in range(data.draw(st.integers(1, 4))): text[data.draw(st.integers(0, len(text)-1))] = data.draw(st.integers(0, 255))
    done = accounted(written(tmp_path, 'x.jsonl', bytes(text)), format='jsonl', encoding='utf-8')
    if done: assert done[0].rows == sum(bool(l.decode('utf-8', 'surrogateescape').strip()) for l in bytes(text).split(b'\n'))


@quick
@given(scraps)
def test_scraps_of_text_by_any_name(tmp_path, text):
    for name in ('x.jsonl', 'x.json', 'x.csv', 'x.tsv', 'x'): accounted(written(tmp_path, name, text))
    for how in formats.FILE_FORMATS: accounted(written(tmp_path, 'x', text), format=how)


@quick
@given(st.binary(max_size=200))
@example(b'\xff\xfe\x00')
@example(b'PAR1')
@example(b'\x1f\x8b\x08\x00')
def test_bytes_by_any_name(tmp_path, data):
    for name in ('x.jsonl', 'x.json', 'x.csv', 'x.parquet', 'x'): accounted(written(tmp_path, name, data))
    accounted(written(tmp_path, 'x.csv', b'prompt,completion\n' + data), format='csv')
    accounted(written(tmp_path, 'x.parquet', b'PAR1' + data + b'PAR1'))


@quick
@given(st.lists(st.lists(st.text(max_size=5) | st.sampled_from(['"', ',', '\n', '\r\n', '']), max_size=4), min_size=1, max_size=6), st.sampled_from(',;\t'))
def test_csv_written_by_csv_is_read_row_by_row(tmp_path, cells, delimiter):
    "Rows of two fields come back as they were, all others are refused"
    f = io.StringIO(newline='')
    csv.writer(f, delimiter=delimiter).writerows([['prompt', 'completion'], *cells])
    done = accounted(written(tmp_path, 'x.csv', f.getvalue().encode('utf-8', 'replace')), delimiter=delimiter)
    if done: assert done[0].rows == sum(any(c) for c in cells)


@quick
@given(st.lists(st.tuples(st.none() | short_texts, st.none() | short_texts, st.none() | st.lists(turn, max_size=3)), min_size=1, max_size=5), st.data())
def test_parquet_of_anything_and_damaged(tmp_path, rows, data):
    clean = json.loads(json.dumps(rows).replace('\\ud800', '?'))
    t = pa.table(dict(prompt=pa.array([r[0] for r in clean], pa.string()), completion=pa.array([r[1] for r in clean], pa.string()),
                      conversations=pa.array([r[2] for r in clean], pa.list_(pa.struct({k: pa.string() for k in ('role', 'content', 'from', 'value')})))))
    f = tmp_path/'x.parquet'
    pq.write_table(t, f)
    if done := accounted(f): assert done[0].rows == len(rows)
    b = bytearray(f.read_bytes())
    for _ in range(3): b[data.draw(st.integers(0, len(b)-1))] = data.draw(st.integers(0, 255))
    accounted(written(tmp_path, 'y.parquet', bytes(b)))


@quick
@given(scraps, st.integers(1, 7))
def test_marks_do_not_depend_on_chunks(text, n):
    whole = list(formats._json_marks([text], 10**6))
    assert list(formats._json_marks([text[i:i+n] for i in range(0, len(text), n)], 10**6)) == whole
    assert ''.join(t + m for _, t, m in whole).rstrip('"') == text.rstrip('"')


@quick
@given(st.lists(st.tuples(st.sampled_from(['system', 'user', 'assistant', 'tool']), st.text(min_size=1, max_size=3)), max_size=8))
def test_ordered_talks_are_in_order(talk):
    try: out = order_turns([dict(role=r, content=c) for r, c in talk], set())
    except ValueError: return
    roles = [m['role'] for m in out]
    assert 'system' not in roles[1:] and all(a != b or a == 'tool' for a, b in zip(roles, roles[1:]))
    assert order_turns(out, set()) == out


# --- larger than memory -----------------------------------------------------------------------------------------------

def peak(path, n):
    "MiB of Python's memory while a file of n rows streams"
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_records(path)) == n
        return tracemalloc.get_traced_memory()[1]/2**20
    finally: tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['x.jsonl', 'x.json', 'y.json', 'x.csv', 'x.jsonl.gz', 'x.parquet'])
def test_a_file_of_many_megabytes_streams_in_few(tmp_path, name):
    n, row = 500, lambda i: dict(prompt=f'question {i}', completion=f'answer "{i}"\n,é ' + 'many words '*3000)
    f, lines = tmp_path/name, (json.dumps(row(i), ensure_ascii=False) for i in range(n))
    opened = gzip.open(f, 'wt', encoding='utf-8') if name.endswith('.gz') else open(f, 'w', encoding='utf-8', newline='')
    if name.endswith('parquet'):
        with pq.ParquetWriter(f, pa.schema(dict(prompt=pa.string(), completion=pa.string())), compression='none') as w:
            for i in range(0, n, 50): w.write_table(pa.Table.from_pylist([row(j) for j in range(i, i+50)]))
    else:
        with opened as g:
            if name.endswith('.csv'): w = csv.DictWriter(g, ['prompt', 'completion']); w.writeheader(); w.writerows(map(row, range(n)))
            elif 'jsonl' in name: g.writelines(l + '\n' for l in lines)
            else:
                g.write('[' if name[0] == 'x' else '{"v": 1, "rows": [')
                g.writelines(('' if i == 0 else ',\n') + l for i, l in enumerate(lines))
                g.write(']' if name[0] == 'x' else ']}')
    assert name.endswith(('.gz', '.parquet')) or f.stat().st_size > 15*2**20
    assert peak(f, n) < 8


# --- from the command line --------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_build_reads_a_spreadsheet_and_says_what_it_saw(tmp_path, capsys, monkeypatch):
    from hydramoe.use.cli import main
    from hydramoe.domains.examples import lesson_texts
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache')); monkeypatch.delenv('HYDRAMOE_QUIET', raising=False); monkeypatch.delenv('IN_TEST', raising=False)
    f = written(tmp_path, 'sheet.csv', sheet([dict(Question=q, Answer=f'{a} é' if i else '') for i, (q, a) in enumerate(zip(*lesson_texts()))], ';'), 'cp1252')
    how = ['--base', 'tiny', '--quant', 'fp32', '--encoder', 'words', '--out', str(tmp_path/'out'), '--dry-run']
    assert main(['build', str(f), *how]) == 2 and '--map prompt=Question,completion=Answer' in capsys.readouterr().err
    assert main(['build', str(f), *how, '--map', 'prompt=Question,completion=Answer', '--encoding', 'cp1252']) == 0
    err = capsys.readouterr().err
    assert "CSV, cp1252, delimiter ';'" in err and 'completion is empty' in err and 'refused' in err
    reject, = (tmp_path/'out.rejects.jsonl').read_text().splitlines()
    assert json.loads(reject)['line'] == 2 and json.loads(reject)['raw'].endswith(';')
