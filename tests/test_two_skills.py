"Instructions that need two domains at once: what holds for any draw, and for any answer"
import ast, functools, json, re, sqlite3, time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from hydramoe.data.cards import card_names
from hydramoe.data.records import DOMAINS
from hydramoe.data.two_skills import check_answer, two_skills
from hydramoe.foundations.core import HydraError
from helpers import root

SEEDS = [0, 1, 2]
drawn = functools.cache(two_skills)
def answer(r): return r['completion'][0]['content']
def characters(messages): return sum(len(m['content']) for m in messages)
one_of_each = {r['check']['kind']+' '+r['domain']: r for r in drawn()[:5]}
queries = [r for r in drawn() if r['check']['kind']=='query']
each_kind = pytest.mark.parametrize('r', one_of_each.values(), ids=list(one_of_each))


# the set

def test_a_seed_gives_the_same_set_and_another_seed_another():
    assert two_skills(160, 3)==two_skills(160, 3)
    first, second = ({json.dumps(r) for r in drawn(160, seed)} for seed in (0, 1))
    assert not first & second

@pytest.mark.parametrize('seed', SEEDS)
def test_records_are_records_and_short(seed):
    records = drawn(160, seed)
    assert len(records)==160
    assert len({r['id'] for r in records})==160
    assert set(Counter((r['check']['kind'], *r['skills']) for r in records).values())=={32}
    for r in records:
        assert set(r)=={'id', 'prompt', 'completion', 'domain', 'source', 'license', 'skills', 'check'}
        assert len(set(r['skills']))==2
        assert set(r['skills'])<=set(DOMAINS)
        assert r['domain']==r['skills'][0]
        assert characters(r['prompt'])<=440
        assert characters(r['completion'])<=240
    assert json.loads(json.dumps(records))==records

@pytest.mark.parametrize('seed', SEEDS)
def test_each_instruction_is_answered_by_its_own_answer_alone(seed):
    records = drawn(160, seed)
    pairs = [(i, j) for i in range(160) for j in range(160)]
    passing = [(i, j) for i, j in pairs if check_answer(records[i], answer(records[j]))]
    assert passing==[(i, i) for i in range(160)]

def test_no_braces_are_left_of_the_templates():
    for r in drawn():
        user = r['prompt'][-1]['content']
        assert '{' not in user
        assert '}' not in user
        assert user==user.strip()
        assert '  ' not in user

def test_it_is_no_card_and_only_the_stages_of_an_experiment_import_it():
    assert 'two_skills' not in card_names()
    modules = (root/'hydramoe').rglob('*.py')
    used = [f for f in modules if re.search(r'^\s*(?:from|import)\b.*\btwo_skills\b', f.read_text(), re.M)]
    assert [f.name for f in used]==['merging.py']

@pytest.mark.parametrize('n', [0, -5, 12, 2.5, '160', None, True])
def test_unequal_numbers_are_refused(n):
    with pytest.raises(HydraError): two_skills(n)

@pytest.mark.parametrize('seed', [-1, .5, '0', None])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(HydraError): two_skills(5, seed)

def test_too_many_are_refused_with_their_number():
    with pytest.raises(HydraError, match='120 instructions of kind .* were asked for'): two_skills(600)


# answers of models

@each_kind
def test_fences_and_words_around_an_answer_do_no_harm(r):
    own = answer(r)
    texts = (f'```\n{own}\n```', f'```text\n{own}', f'Sure, here it is:\n\n{own}', f'{own}\n\nTell me if I can help.',
             f'  {own}\n')
    for text in texts:
        may_fail = text.startswith('```text') and r['check']['kind'] in ('query', 'expression')
        assert check_answer(r, text) or may_fail, text

@each_kind
def test_answers_that_say_nothing_are_wrong(r):
    prompt = '\n'.join(m['content'] for m in r['prompt'])
    texts = ('', ' ', '\n', '0', '[]', '{}', '```', '``````', 'null', ';', 'I cannot help with that.',
             prompt, prompt[:-1])
    for text in texts: assert not check_answer(r, text), text

@each_kind
def test_an_answer_is_a_text_and_a_record_has_a_check(r):
    for given_answer in (None, 3, b'x', ['x']):
        with pytest.raises(HydraError, match='give the text'): check_answer(r, given_answer)
    for check in (None, {}, dict(kind='other')):
        with pytest.raises(HydraError, match='how it is checked'): check_answer(r | dict(check=check), 'x')
    with pytest.raises(HydraError, match='how it is checked'): check_answer(dict(id='x'), 'x')

def test_a_query_must_be_a_query():
    for r in queries:
        table, expected = r['check']['table'], r['check']['expected'][0]
        for value in [*expected, str(expected)]:
            for text in (str(value), f'SELECT {value!r}', f"SELECT '{value}' FROM {table} LIMIT 1"):
                assert not check_answer(r, text), (r['id'], text)

def test_sorting_by_a_column_is_no_law():
    for r in queries:
        table, (label, *columns) = r['check']['table'], r['check']['columns']
        orders = [f'{c} {way}' for c in columns for way in ('', 'DESC')]
        lazy = [f'SELECT {label} FROM {table} ORDER BY {order} LIMIT 1' for order in orders]
        assert not any(check_answer(r, text) for text in lazy), r['id']

def test_the_result_is_what_plain_sqlite_finds():
    for r in queries:
        check = r['check']
        for rows, expected in zip(check['tables'], check['expected']):
            con = sqlite3.connect(':memory:')
            con.execute(f"CREATE TABLE {check['table']} ({', '.join(check['columns'])})")
            con.executemany(f"INSERT INTO {check['table']} VALUES (?, ?, ?)", rows)
            found = [value for value, in con.execute(answer(r))]
            are_texts = isinstance((expected or [''])[0], str)
            assert found==(expected if are_texts else [pytest.approx(v, abs=1e-5) for v in expected])

def test_the_table_shown_is_the_first_that_is_checked():
    for r in queries:
        lines = r['prompt'][-1]['content'].split('\n')
        table = [r['check']['columns'], *r['check']['tables'][0]]
        assert lines[-4:]==[','.join(map(str, row)) for row in table]

def test_numbers_may_be_rounded_and_calls_reordered():
    r = next(r for r in drawn() if r['check']['kind']=='call')
    name, arguments = r['check']['name'], r['check']['arguments']
    turned = dict(reversed(arguments.items()))
    assert check_answer(r, json.dumps(dict(arguments=turned, name=name)))
    figure = next(k for k, v in arguments.items() if not isinstance(v, str))
    right = arguments[figure]
    for wrong in (right+1, str(right), True, None, [right], 10**400, float('inf'), float('nan')):
        assert not check_answer(r, json.dumps([dict(name=name, arguments=arguments | {figure: wrong})]))
    assert not check_answer(r, json.dumps([dict(name=name, arguments=arguments | dict(more=1))]))
    assert not check_answer(r, answer(r)+'\n'+answer(r))

def test_names_of_an_expression_stand_in_its_question():
    for r in drawn():
        if r['check']['kind']!='expression': continue
        used = {n.id for n in ast.walk(ast.parse(answer(r))) if isinstance(n, ast.Name)}
        assert used==set(r['check']['values'][0])
        assert all(f'`{name}`' in r['prompt'][-1]['content'] for name in used)


# hostile answers

def hostile(table, label):
    "Queries that write, reach out, go on for ever, or fill the memory"
    pairs = zip('abcdefghijk', 'bcdefghijkl')
    unfolding = 'WITH a AS (SELECT 1)'+''.join(f', {n} AS (SELECT 1 FROM {b}, {b}, {b}, {b})' for b, n in pairs)
    counting = 'c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)'
    crossed = ', '.join(f'{table} t{i}' for i in range(30))
    long_label = f'{label} '+f'|| {label} '*15
    return ["ATTACH DATABASE 'reached.db' AS x", "VACUUM INTO 'reached.db'", 'PRAGMA writable_schema = 1',
            'SELECT * FROM pragma_database_list', f'DROP TABLE {table}', f'DELETE FROM {table}',
            f'CREATE TABLE reached AS SELECT * FROM {table}', "SELECT load_extension('reached')",
            "SELECT readfile('/etc/passwd')", 'SELECT sql FROM sqlite_master',
            f'WITH RECURSIVE {counting} SELECT x FROM c', f'WITH {counting} SELECT COUNT(*) FROM c',
            f'SELECT COUNT(*) FROM {crossed}', 'SELECT randomblob(2000000000)', 'SELECT zeroblob(2000000000)',
            "SELECT printf('%2000000000d', 1)", "SELECT replace(hex(zeroblob(99999)), '0', hex(zeroblob(99999)))",
            f"SELECT a.x {'|| a.x '*40} FROM (SELECT {long_label} AS x FROM {table}) a",
            f"SELECT group_concat({label}) FROM {table}", f'{unfolding} SELECT 1 FROM l', 'SELECT 1; SELECT 2',
            'SELECT '+'('*3000, 'SELECT '+'-'*3000+'1', 'SELECT 9999999999999999999999999',
            'SELECT 9223372036854775807 + 9223372036854775807', 'SELECT x\x00', "SELECT '\ud800'",
            f'EXPLAIN SELECT * FROM {table}', 'VALUES (1)']

def test_hostile_queries_are_wrong_quickly_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    for r in queries[:4]:
        for query in hostile(r['check']['table'], r['check']['columns'][0]):
            assert not check_answer(r, query), query
    assert time.monotonic()-began<10
    assert not list(Path().iterdir())

def test_a_right_query_with_another_statement_is_wrong():
    for r in queries:
        others = ('DROP TABLE x', "ATTACH DATABASE 'reached.db' AS x", answer(r).rstrip(';'), 'PRAGMA user_version')
        for other in others:
            assert not check_answer(r, f'{answer(r)} {other};')
            assert not check_answer(r, f'{other}; {answer(r)}')

@each_kind
def test_bombs_are_wrong(r):
    names = ' + '.join(r['check'].get('values', [{}])[0]) or 'x'
    bombs = ('['*4000, '{"a":'*800, '[[],'*1000, '9'*4000, '[{"name": '+'9'*3000+'}]', '`'*4000, '```'*1333, ';'*4000,
             'SELECT '*571, 'WITH a AS('*400, '('*200, '9**9**9**9', f'({names})**9**9',
             '__import__("os").system("true")', '-'*4000, '1e999', 'a'*10**6, '\x00', '\ud800',
             f'{names} if 1 else 0', f'print({names})')
    for text in bombs: assert not check_answer(r, text), text[:40]

words_of_answers = [w for r in one_of_each.values() for w in answer(r).split()]
pieces = st.sampled_from([
    'SELECT ', 'FROM ', 'WITH a AS (', '```', '`', '[', '{', '"name": ', ';', '(', ')', ' * ', ' - ', '1', '\n',
    *words_of_answers])

@settings(deadline=None)
@given(st.text() | st.lists(pieces | st.text(max_size=5), max_size=30).map(''.join))
def test_no_answer_raises(text):
    for r in one_of_each.values(): assert check_answer(r, text) in (True, False)

@settings(deadline=None)
@given(st.text(max_size=40))
def test_what_stands_behind_an_empty_line_does_not_help_a_query(text):
    r = queries[0]
    assert not check_answer(r, f'SELECT 1\n\n{text}')
