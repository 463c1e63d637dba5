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
    assert t.rows == t.used + t.rejected + t.repeated
    assert len(rejects) == t.rejected + t.repeated
    assert t.records == len(records) == len({r['id'] for r in records})
    assert t.used == sum(t.forms.values())
    for r in records:
        for m in r['prompt'] + r['completion']:
            assert isinstance(m['content'], str)
            assert '\0' not in m['content']
        json.dumps(r, ensure_ascii=False).encode('utf-8')
    for r in rejects:
        assert r['line'] >= 1
        assert r['row'] >= 1
        assert r['reason']
        assert '\n' not in r['reason']
        assert isinstance(r['raw'], str)
    file = path.with_name('x.rejects.jsonl')
    write_rejects(file, rejects)
    back = [json.loads(l) for l in file.read_bytes().split(b'\n') if l]
    assert [b['raw'] for b in back] == [r['raw'] for r in rejects]
    return t, records, rejects


def sheet(rows, delimiter=',', **kw):
    f = io.StringIO(newline='')
    columns = list(dict.fromkeys(k for r in rows for k in r))
    w = csv.DictWriter(f, columns, delimiter=delimiter, **kw)
    w.writeheader()
    w.writerows(rows)
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
    inside = dict(version=1, names=['a'], data=QUOTED, n=dict(x=[[]]))
    texts = {
        'x.jsonl': '\n'.join(plain), 'y.jsonl': '\r\n'.join(plain) + '\r\n', 'lines.json': '\n'.join(plain),
        'x.json': json.dumps(QUOTED, ensure_ascii=False),
        'y.json': json.dumps(QUOTED, indent=2, ensure_ascii=False),
        'z.json': json.dumps(inside, ensure_ascii=False),
        'x.csv': sheet(QUOTED), 'x.tsv': sheet(QUOTED, '\t'), 'semi.csv': sheet(QUOTED, ';'),
        'excel.csv': 'sep=;\r\n' + sheet(QUOTED, ';', quoting=csv.QUOTE_ALL), 'pipe.txt': sheet(QUOTED, '|')}
    want = [(r['prompt'], r['completion'].strip()) for r in QUOTED]
    for name, text in texts.items():
        f = written(tmp_path, name + '.gz'*packed, text, encoding, packed)
        records, rejects = read_records(f)
        assert not rejects, name
        assert [(r['prompt'][0]['content'], r['completion'][0]['content']) for r in records] == want, name


def test_parquet_from_pandas_with_structs_lists_and_nulls(tmp_path):
    f = tmp_path/'x.parquet'
    talks = [TALK, None, [dict(role='user', content=None)]]
    pd.DataFrame(dict(id=[1, 2, 3], messages=talks, when=pd.Timestamp('2026-01-01'))).to_parquet(f)
    t, (r,), rejects = accounted(f)
    assert r['completion'][0]['content'] == 'Yo'
    assert [x['line'] for x in rejects] == [2, 3]

    shared = [{'from': 'human', 'value': 'e'}, {'from': 'gpt', 'value': 'f'}]
    forms = [dict(prompt='a', completion='b'), dict(messages=TALK), dict(instruction='c', input=None, output='d'),
             dict(conversations=shared)]
    pd.DataFrame(forms).to_parquet(f)
    t, records, rejects = accounted(f)
    assert dict(t.forms) == dict(pairs=1, messages=1, alpaca=1, sharegpt=1)
    assert not rejects

    as_bytes = pa.array([b'caf\xc3\xa9', b'\xff', b'x'])
    pq.write_table(pa.table(dict(prompt=as_bytes, completion=['a', 'b', 'c'], extra=[[1, None], [], None])), f)
    t, records, rejects = accounted(f)
    assert t.repairs == {'bytes read as UTF-8 text': 2}
    assert [x['row'] for x in rejects] == [2]

    offsets = pa.array(['ab', 'cd', 'ef']).buffers()[:2]
    bad = pa.Array.from_buffers(pa.string(), 3, offsets + [pa.py_buffer(b'ab\xff\xfeef')])
    pq.write_table(pa.table(dict(prompt=bad, completion=['a', 'b', 'c'])), f)
    t, records, rejects = accounted(f)
    assert [x['row'] for x in rejects] == [2]
    assert 'Python cannot read' in rejects[0]['reason']

    pq.write_table(pa.table(dict(prompt=pa.array([], pa.string()), completion=pa.array([], pa.string()))), f)
    with pytest.raises(BadRows, match='no rows'): read_records(f)
    broken = written(tmp_path, 'y.parquet', b'PAR1 and then nothing')
    with pytest.raises(HydraError, match='damaged'): read_records(broken)


def test_latin_1_is_refused_row_by_row_and_read_when_named(tmp_path):
    f = written(tmp_path, 'x.csv', 'prompt,completion\nWhere?,Here\nO\xf9?,L\xe0\n', 'latin-1')
    t, records, rejects = accounted(f)
    assert len(records) == 1
    assert rejects[0]['line'] == 3
    assert "encoding='cp1252'" in rejects[0]['reason']
    assert rejects[0]['raw'].encode('utf-8', 'surrogateescape') == b'O\xf9?,L\xe0'
    records, rejects = read_records(f, encoding='latin-1')
    assert records[1]['prompt'][0]['content'] == 'Où?'
    assert not rejects
    for wrong in ('utf-16', 'ascii', 'base64', 'no-such'):
        with pytest.raises(HydraError): read_records(f, encoding=wrong)


def test_a_conversation_is_one_row_and_its_records_share_a_group(tmp_path):
    talk = []
    for i in range(3): talk += [dict(role='user', content=f'q{i}'), dict(role='assistant', content=f'a{i}')]
    rows = [dict(messages=talk[:4]), dict(messages=talk), dict(messages=talk[:2])]
    t, records, rejects = accounted(written(tmp_path, 'x.jsonl', jsonl(rows)))
    assert (t.used, t.records, t.repeated) == (2, 3, 1)
    assert rejects[0]['reason'] == 'repeats line 1'
    assert t.repairs == {'turns that an earlier row has, left out': 1}
    assert len({r['group'] for r in records[:2]}) == 1


def test_repairs_are_counted(tmp_path):
    rows = [dict(id=7, messages=[dict(role='assistant', content='Welcome'), *TALK]),
            dict(id=7, messages=[TALK[0], TALK[0], TALK[1]]),
            dict(id=8, system='s', messages=[dict(role='system', content='t'), *TALK]),
            dict(messages=[*TALK, dict(role='system', content='x'), *TALK])]
    t, records, rejects = accounted(written(tmp_path, 'x.jsonl', jsonl(rows)))
    assert sorted(t.repairs.values()) == [1, 1, 1, 1]
    assert 'turn 3 is of the system' in rejects[0]['reason']
    assert '; ' in str(t)


# --- what is wrong is told --------------------------------------------------------------------------------------------

FAULTS = [
    ('x.csv', b'prompt,completion\n', 'no rows'),
    ('x.csv', b'a,b\n1,2\n', 'columns a, b (read from its first line); need prompt and completion; say which'),
    ('x.csv', b'prompt,prompt\n1,2\n', "names 'prompt' twice"),
    ('x.jsonl', b'', 'empty'), ('x.json', b' \n ', 'empty'), ('x.json', b'[]', 'no rows'),
    ('x.json', b'{}', 'without a list'),
    ('x.json', b'[{"prompt": "a", "completion": "b"}, {"pro', 'cut off'),
    ('x.json', b'[{"prompt": "a", "completion": "b"}] x', 'goes on'),
    ('x.json', b'{"a": [{}], "b": [{}]}', 'two lists'),
    ('x.json', b'{"prompt": {"0": "a"}, "completion": {"0": "b"}, ', ''),
    ('x.xlsx', b'PK\x03\x04...', 'not exported'), ('x', b'Dear all', 'say format='), ('x.jsonl', b'\0'*100, 'NUL'),
    ('x.jsonl', b'[1, 2]', 'line 1: is a list'), ('x.csv.gz', b'\x1f\x8b\x08broken', ''),
    ('x.jsonl', gzip.compress(b'{"prompt": "a", "completion": "b"}\n'*999, mtime=0)[:40], 'cut off'),
    ('x.jsonl', b'"'*9, 'line 1'), ('x.csv', b'prompt,completion\n"a,b\n', 'quote')]

@pytest.mark.parametrize('name,data,why', FAULTS)
def test_a_file_of_which_nothing_can_be_used(tmp_path, name, data, why):
    with pytest.raises(HydraError) as e: read_records(written(tmp_path, name, data))
    assert why in str(e.value)
    assert name in str(e.value)


MORE_BAD = [('{"prompt": "a", "completion": "b", "tools": 1}', 'tools is 1'), ('{', '')]

@pytest.mark.parametrize('line,reason', [*BAD, *MORE_BAD])
def test_a_bad_row_is_reported_with_its_line(tmp_path, line, reason):
    before, behind = '{"prompt": "a", "completion": "b"}\n\n', '\n{"prompt": "c", "completion": "d"}\n'
    f = written(tmp_path, 'x.jsonl', before + line + behind)
    t, records, rejects = accounted(f)
    assert len(records) == 2
    assert [(r['line'], r['row'], r['raw']) for r in rejects] == [(3, 2, line)]
    assert reason in rejects[0]['reason']
    with pytest.raises(BadRows, match='line 1'): read_records(written(tmp_path, 'y.jsonl', line))


def test_forms_in_the_wild_agree(tmp_path):
    t, (r,), rejects = accounted(written(tmp_path, 'x.jsonl', jsonl(FORMS)))
    assert (t.rows, t.used, t.repeated) == (6, 1, 5)
    assert {x['reason'] for x in rejects} == {'repeats line 1'}


ODD_ROWS = {
    'deep': '{"prompt": ' + '['*100_000 + ']'*100_000 + ', "completion": "x"}',
    'unused deep': '{"x": ' + '['*5000 + ']'*5000 + ', "prompt": "a"}',
    'huge': '{"prompt": ' + '9'*5000 + ', "completion": "x"}',
    'tools': '{"prompt": "a", "completion": "b", "tools": [{"x": ' + '9'*5000 + '}]}',
    'nan': '{"prompt": NaN, "completion": "b"}',
    'nul': '{"prompt": "a\\u0000", "completion": "b"}',
    'raw nul': '{"prompt": "a\0", "completion": "b"}',
    'surrogate': '{"prompt": "\\ud800", "completion": "b"}',
    'twice': '{"prompt": "a", "prompt": "b", "completion": "c"}',
    'long': '{"prompt": "' + 'x'*1_100_000 + '", "completion": "b"}',
    'text': 'oops', 'list': '[1]', 'number': '12', 'colon': '{"prompt" "a"}'}

@pytest.mark.parametrize('name', ODD_ROWS)
def test_an_odd_row_is_refused_alone(tmp_path, name):
    good = ['{"prompt": "a", "completion": "b"}', '{"prompt": "c", "completion": "d"}']
    lines = [good[0], ODD_ROWS[name], good[1]]
    listed = '[' + ',\n'.join(lines) + ']'
    texts = {'x.jsonl': '\n'.join(lines), 'x.json': listed, 'y.json': '{"rows": ' + listed + '}'}
    files = [written(tmp_path, name, text) for name, text in texts.items()]
    for f in files:
        t, records, rejects = accounted(f)
        assert (t.rows, t.used) == (3, 2), rejects
        assert [(r['line'], r['row']) for r in rejects] == [(2, 2)], rejects
        assert len(rejects[0]['raw']) <= 1_000_000
        assert len(rejects[0]['reason']) < 300


def test_a_huge_integer_in_a_column_that_is_not_read_does_no_harm(tmp_path):
    line = '{"prompt": "a", "completion": "b", "n": ' + '9'*5000 + '}'
    t, records, rejects = accounted(written(tmp_path, 'x.jsonl', line))
    assert not rejects


def test_ragged_csv_and_open_quotes(tmp_path):
    text = ('prompt,completion\n1,2\n3\n4,5,6\n7,8,,\n,,\n\n"a\nb","c\n\nd"\n9,"x"y\n10,11\n'
            '"open,1\n12,13\n"14\n15\n",16,17\n')
    t, records, rejects = accounted(written(tmp_path, 'x.csv', text))
    assert [r['line'] for r in rejects] == [3, 4, 12, 14, 16]
    assert t.used == 5
    opened, long = rejects[-2:]
    assert 'is not closed' in opened['reason']
    assert opened['raw'] == '"open,1'
    assert 'runs over 3 lines' in long['reason']
    assert records[2]['completion'][0]['content'] == 'c\n\nd'


def test_rejects_file_is_whole_or_absent(tmp_path):
    f = written(tmp_path, 'x.jsonl', '{"text": 1}\n'*3)
    out = tmp_path/'r'/'x.rejects.jsonl'
    with pytest.raises(BadRows):
        with rejects_file(out) as bad: list(stream_records(f, bad))
    assert [json.loads(l)['line'] for l in out.read_text().splitlines()] == [1, 2, 3]
    cut = written(tmp_path, 'y.json', '[{"prompt": "a", "completion": "b"}, {"x": 1}, {"')
    absent = tmp_path/'y.rejects.jsonl'
    with pytest.raises(HydraError, match='cut off'):
        with rejects_file(absent) as bad: list(stream_records(Form(cut, 'json'), bad))
    assert not absent.exists()
    assert len(list(tmp_path.iterdir())) == 3


# --- malformed input of every kind ------------------------------------------------------------------------------------

KEYS = ['prompt', 'completion', 'messages', 'conversations', 'instruction', 'input', 'output', 'role', 'content',
        'from', 'value', 'system', 'tools', 'domain', 'license', 'id', 'Prompt']
SHORT = ['user', 'assistant', 'system', 'tool', 'human', 'gpt', 'Hi', '\0', '\ud800', '"', '\n', ',',
         '[{"role": "user"}]']
SCRAPS = ['{', '}', '[', ']', ',', ':', '"', '\\', '\n', '\r', ' ', '"prompt"', '"completion"', '"x"',
          '{"prompt": "a", "completion": "b"}', '\0', 'é', ';', '\t', '|', 'prompt', 'completion', 'sep=;', '1',
          '\ufeff']

def having(**fields): return st.fixed_dictionaries(fields)

short_texts = st.text(max_size=6) | st.sampled_from(SHORT)
leaf = st.none() | st.booleans() | st.integers() | st.floats() | short_texts
role = st.sampled_from(['user', 'assistant', 'system', 'tool', 'x'])
speaker = st.sampled_from(['human', 'gpt', 'system', 'observation'])
turn = having(role=role, content=short_texts) | having(**{'from': speaker, 'value': short_texts})
key = st.sampled_from(KEYS)
def nested(c): return st.lists(c, max_size=3) | st.dictionaries(key, c, max_size=4)
anything = st.recursive(leaf, nested, max_leaves=8)
part = having(type=st.sampled_from(['text', 'image_url']), text=short_texts) | anything
call = having(function=having(name=short_texts, arguments=short_texts | anything)) | anything
sent = having(
    role=st.sampled_from(['user', 'assistant', 'tool']),
    content=st.lists(part, max_size=3) | short_texts | st.none(), tool_calls=st.lists(call, max_size=2) | anything)
any_row = (
    st.dictionaries(key, anything, max_size=5) | having(messages=st.lists(turn | sent, max_size=5))
    | having(conversations=st.lists(turn, max_size=5)) | having(prompt=short_texts, completion=short_texts) | anything)
any_rows = st.lists(any_row, min_size=1, max_size=6)
scraps = st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=30).map(''.join)
quick = settings(max_examples=60, deadline=None,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def damaged(text, data, times):
    "Bytes of which some are other ones"
    b = bytearray(text)
    for _ in range(times):
        value = data.draw(st.integers(0, 255))
        b[data.draw(st.integers(0, len(b)-1))] = value
    return bytes(b)


@quick
@given(any_rows)
def test_any_json_ends_as_record_or_reject(tmp_path, rows):
    texts = {'x.jsonl': jsonl(rows), 'x.json': json.dumps(rows), 'y.json': json.dumps(dict(rows=rows), indent=1)}
    files = [written(tmp_path, name, text) for name, text in texts.items()]
    for f in files:
        done = accounted(f)
        if done and f.name != 'y.json': assert done[0].rows == len(rows)


@quick
@given(any_rows, st.data())
def test_damaged_json_lines(tmp_path, rows, data):
    text = damaged(jsonl(rows).encode(), data, data.draw(st.integers(1, 4)))
    done = accounted(written(tmp_path, 'x.jsonl', text), format='jsonl', encoding='utf-8')
    lines = [l.decode('utf-8', 'surrogateescape') for l in text.split(b'\n')]
    if done: assert done[0].rows == sum(bool(l.strip()) for l in lines)


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


cell = st.text(max_size=5) | st.sampled_from(['"', ',', '\n', '\r\n', ''])
rows_of_cells = st.lists(st.lists(cell, max_size=4), min_size=1, max_size=6)


@quick
@given(rows_of_cells, st.sampled_from(',;\t'))
def test_csv_written_by_csv_is_read_row_by_row(tmp_path, cells, delimiter):
    "Rows of two fields come back as they were, all others are refused"
    f = io.StringIO(newline='')
    csv.writer(f, delimiter=delimiter).writerows([['prompt', 'completion'], *cells])
    text = f.getvalue().encode('utf-8', 'replace')
    done = accounted(written(tmp_path, 'x.csv', text), delimiter=delimiter)
    if done: assert done[0].rows == sum(any(c) for c in cells)


maybe_text = st.none() | short_texts
maybe_talk = st.none() | st.lists(turn, max_size=3)


@quick
@given(st.lists(st.tuples(maybe_text, maybe_text, maybe_talk), min_size=1, max_size=5), st.data())
def test_parquet_of_anything_and_damaged(tmp_path, rows, data):
    clean = json.loads(json.dumps(rows).replace('\\ud800', '?'))
    said = pa.struct({k: pa.string() for k in ('role', 'content', 'from', 'value')})
    t = pa.table(dict(
        prompt=pa.array([r[0] for r in clean], pa.string()), completion=pa.array([r[1] for r in clean], pa.string()),
        conversations=pa.array([r[2] for r in clean], pa.list_(said))))
    f = tmp_path/'x.parquet'
    pq.write_table(t, f)
    if done := accounted(f): assert done[0].rows == len(rows)
    accounted(written(tmp_path, 'y.parquet', damaged(f.read_bytes(), data, 3)))


@quick
@given(scraps, st.integers(1, 7))
def test_marks_do_not_depend_on_chunks(text, n):
    whole = list(formats._json_marks([text], 10**6))
    chunks = [text[i:i+n] for i in range(0, len(text), n)]
    assert list(formats._json_marks(chunks, 10**6)) == whole
    assert ''.join(t + m for _, t, m in whole).rstrip('"') == text.rstrip('"')


said_by = st.tuples(st.sampled_from(['system', 'user', 'assistant', 'tool']), st.text(min_size=1, max_size=3))


@quick
@given(st.lists(said_by, max_size=8))
def test_ordered_talks_are_in_order(talk):
    try: out = order_turns([dict(role=r, content=c) for r, c in talk], set())
    except ValueError: return
    roles = [m['role'] for m in out]
    assert 'system' not in roles[1:]
    assert all(a != b or a == 'tool' for a, b in zip(roles, roles[1:]))
    assert order_turns(out, set()) == out


# --- larger than memory -----------------------------------------------------------------------------------------------

def peak(path, n):
    "MiB of Python's memory while a file of n rows streams"
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_records(path)) == n
        return tracemalloc.get_traced_memory()[1]/2**20
    finally: tracemalloc.stop()


def write_many(f, rows):
    "Rows by the ending of the file, one after the other; y.json has them in a field"
    lines = (json.dumps(r, ensure_ascii=False) for r in rows)
    if f.name.endswith('parquet'):
        with pq.ParquetWriter(f, pa.schema(dict(prompt=pa.string(), completion=pa.string())), compression='none') as w:
            for i in range(0, len(rows), 50): w.write_table(pa.Table.from_pylist(rows[i:i+50]))
        return
    if f.name.endswith('.gz'): opened = gzip.open(f, 'wt', encoding='utf-8')
    else: opened = open(f, 'w', encoding='utf-8', newline='')
    with opened as g:
        if f.name.endswith('.csv'):
            w = csv.DictWriter(g, ['prompt', 'completion'])
            w.writeheader()
            w.writerows(rows)
        elif 'jsonl' in f.name: g.writelines(l + '\n' for l in lines)
        else:
            g.write('[' if f.name[0] == 'x' else '{"v": 1, "rows": [')
            g.write(next(lines))
            g.writelines(',\n' + l for l in lines)
            g.write(']' if f.name[0] == 'x' else ']}')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['x.jsonl', 'x.json', 'y.json', 'x.csv', 'x.jsonl.gz', 'x.parquet'])
def test_a_file_of_many_megabytes_streams_in_few(tmp_path, name):
    n, f = 500, tmp_path/name
    long = 'many words '*3000
    write_many(f, [dict(prompt=f'question {i}', completion=f'answer "{i}"\n,é {long}') for i in range(n)])
    assert name.endswith(('.gz', '.parquet')) or f.stat().st_size > 15*2**20
    assert peak(f, n) < 8


# --- from the command line --------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_build_reads_a_spreadsheet_and_says_what_it_saw(tmp_path, capsys, monkeypatch):
    from hydramoe.use.cli import main
    from hydramoe.domains.examples import lesson_texts
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    monkeypatch.delenv('HYDRAMOE_QUIET', raising=False)
    monkeypatch.delenv('IN_TEST', raising=False)
    questions, answers = lesson_texts()
    rows = [dict(Question=q, Answer=f'{a} é') for q, a in zip(questions, answers)]
    rows[0]['Answer'] = ''
    f = written(tmp_path, 'sheet.csv', sheet(rows, ';'), 'cp1252')
    build = ['build', str(f), '--base', 'tiny', '--quant', 'fp32', '--encoder', 'words', '--out', str(tmp_path/'out'),
             '--dry-run']
    assert main(build) == 2
    assert '--map prompt=Question,completion=Answer' in capsys.readouterr().err
    assert main([*build, '--map', 'prompt=Question,completion=Answer', '--encoding', 'cp1252']) == 0
    err = capsys.readouterr().err
    assert "CSV, cp1252, delimiter ';'" in err
    assert 'completion is empty' in err
    assert 'refused' in err
    reject, = (tmp_path/'out.rejects.jsonl').read_text().splitlines()
    assert json.loads(reject)['line'] == 2
    assert json.loads(reject)['raw'].endswith(';')
