"""Is an answer right: against the checkers that others use, against plain SQLite, and for any text that a model may
write"""
import json, random, re, sqlite3, types
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from hydramoe.data.check import (
    CHECKS, boxed, check_call, check_choice, check_math, check_no_call, check_number, check_program, check_rows,
    normalize_latex, numbers_in, run_query, same_rows)
from hydramoe.data.tools import first_accepted
from hydramoe.foundations import fetch
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.sandbox import isolation
from cards import cached_load

def answer(r): return r['completion'][-1]['content']

PROPERTIES = dict(base=dict(type='integer'), unit=dict(type='string'))
AREA = dict(name='area', parameters=dict(type='dict', required=['base'], properties=PROPERTIES))
PETS = ("CREATE TABLE pets(name, kind, age); "
        "INSERT INTO pets VALUES ('Tom', 'cat', 3), ('Rex', 'dog', 5), ('Kit', 'cat', 1), ('Old', NULL, 5);")
EACH = dict(
    number=lambda text: check_number(text, '7'), math=lambda text: check_math(text, r'\frac12'),
    choice=lambda text: check_choice(text, ['litres', 'A dog', 'c'], 1),
    rows=lambda text: check_rows(text, PETS, 'SELECT name FROM pets'),
    call=lambda text: check_call(text, [dict(area=dict(base=[1]))], [AREA]),
    no_call=lambda text: check_no_call(text, [AREA]))


# all of them

def test_each_has_a_name():
    assert set(CHECKS)=={*EACH, 'program'}
    assert all(callable(c) for c in CHECKS.values())

@pytest.mark.parametrize('name', EACH)
@pytest.mark.parametrize('text', [None, 3, b'1', ['1']])
def test_an_answer_is_a_text(name, text):
    with pytest.raises(HydraError, match='give the text'): EACH[name](text)

PIECES = ['SELECT ', 'FROM pets ', 'WITH a AS (', '```', '`', '[', '{', '"name": "area"', '"arguments": ', ';', '(',
          ')', '1', '/', '0', '-', '.', ',', '\n', '$', '\\(', '\\)', '\\boxed{', '}', '\\frac', '\\text{', '\\sqrt',
          '####', 'answer is ', 'A', 'B', ' or ', 'A dog', 'e9', '%', '²', '٣']
pieced = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=25).map(''.join)

@pytest.mark.parametrize('name', EACH)
@settings(deadline=None, max_examples=60)
@given(text=st.text() | pieced)
def test_no_answer_raises(name, text): assert EACH[name](text) in (True, False)

BOMBS = ['(', '[', '{', '1,', '9', '$', '\\(', '\\frac{', '\\text{', '\\boxed{', 'A ', 'A dog ', 'SELECT ', '```', ' ',
         '\n', '1 1/', '{"a":', '1e999 ', '\ud800', '\x00']

@pytest.mark.parametrize('name', EACH)
@pytest.mark.parametrize('piece', BOMBS)
def test_bombs_are_wrong_and_soon_so(name, piece):
    "A regular expression that went back and forth would take hours"
    for text in (piece*(20_000//len(piece)), 'answer is '+piece*(19_000//len(piece)), piece*10**6):
        may_pass = name=='no_call' and len(text)<=20_000 or piece=='A dog ' and name=='choice'
        assert not EACH[name](text) or may_pass


# numbers

def spellings(value):
    "How people write a whole number or one with decimals"
    plain = f'{value:f}' if isinstance(value, float) else str(value)
    whole, dot, rest = plain.partition('.')
    by_thousands = plain if plain.startswith('-0') else f'{int(whole):,}{dot}{rest}'
    in_dollars = f'-${plain[1:]}' if plain[0]=='-' else f'${plain}'
    return [plain, by_thousands, plain.replace('-', '−'), in_dollars]

whole_numbers = st.integers(-10**9, 10**9)
values = whole_numbers | whole_numbers.map(lambda n: n/100)
FRAMES = ['{}', 'The answer is {}.', 'From 3 and 4 we get {} dollars.', '1 + 1 = 2\n#### {}',
          r'So $\boxed{{{}}}$, as 7 > 5.', '**{}**', '({})', 'x={}']

@given(values, values, st.sampled_from(FRAMES))
def test_a_number_equals_its_spellings_and_no_other_number(value, other, frame):
    for text in spellings(value):
        assert check_number(frame.format(text), spellings(value)[0]), text
        assert check_number(frame.format(text), spellings(other)[0])==(value==other)

@given(st.fractions(max_denominator=1000), st.integers(1, 9))
def test_fractions_are_exact(value, k):
    n, d = abs(value.numerator), value.denominator
    sign = '-' if value<0 else ''
    whole, rest = divmod(n, d)
    texts = [f'{sign}{n*k}/{d*k}', rf'{sign}\frac{{{n*k}}}{{{d*k}}}', rf'\boxed{{{sign}\dfrac{{{n}}}{{{d}}}}}',
             f'{sign}{whole} {rest}/{d}']
    for text in texts:
        assert numbers_in(text)==[value]
        assert check_number(text, f'{value.numerator}/{d}')
    if d not in (1, 2, 4, 5, 8, 10):
        rounded = f'{n/d:.3f}'
        assert not check_number(rounded, f'{n}/{d}') or Fraction(rounded)==Fraction(n, d)

NUMBERS = [
    ('7-3', [7, 3]), ('1,2,3', [1, 2, 3]), ('1,200,3', [1200, 3]), ('1e3', [1000]), ('2/0', []), ('v2', [2]), ('', []),
    ('-', []), ('1.2.', [Fraction('1.2')]), ('5 - 3', [5, -3]), ('1e-2', [Fraction('.01')]), ('3.', [3]), ('١', [1])]

@pytest.mark.parametrize('text, found', NUMBERS)
def test_what_is_a_number(text, found): assert numbers_in(text)==found

def test_a_sign_is_part_of_a_number():
    for text in ('-5', '−5', '-$5', '- 5', r'\boxed{-5}', '-10/2'):
        assert check_number(text, '-5'), text
        assert not check_number(text, '5'), text
    for text in ('5', '10-5', 'x-5', '(2)-5'):
        assert check_number(text, '5'), text
        assert not check_number(text, '-5'), text

def test_percent_is_a_unit():
    assert check_number('50%', '50')
    assert check_number(r'50\%', '50')
    assert not check_number('50%', '0.5')
    assert not check_number('0.5', '50%')

def test_only_the_final_number_counts():
    assert not check_number('18 of 20', '18')
    assert check_number('18 of 20', '20')
    assert check_number('20\n#### 18\nthat is 7', '18')
    assert not check_number('#### 18', '20')
    assert not check_number(r'18 \boxed{x}', '18')

def test_references_without_a_number_are_refused():
    for reference in ('', 'many', '1/0', '#### x\n5'):
        with pytest.raises(HydraError, match='holds no number'): check_number('1', reference)

def test_gsm8k_agrees_with_its_own_rule():
    "The official one: what follows ####, without commas, as text"
    def official(text): return re.search(r'#### (\-?[0-9\.\,]+)', text)[1].replace(',', '')
    answers = [answer(r) for r in cached_load('gsm8k')]
    for own, other in zip(answers, answers[1:]):
        assert check_number(own, own)
        assert check_number(f'It is {official(own)}.', own)
        equal = float(official(other))==float(official(own))
        assert check_number(other, own)==equal


# expressions

def references(): return [boxed(answer(r)) for r in cached_load('math_500')]

def each_two(latex):
    "Each with each that stands before it"
    return ((one, other) for i, one in enumerate(latex) for other in latex[:i])

@pytest.fixture(scope='module')
def is_equiv(): return pytest.importorskip('lm_eval.tasks.hendrycks_math.utils').is_equiv

def respelled(latex):
    "The same for a reader"
    return [latex, f' {latex} .', latex.replace(r'\frac', r'\dfrac'),
            latex.replace('(', r'\left(').replace(')', r'\right)'), latex.replace(',', ', '), latex.replace('+', ' + '),
            rf'\displaystyle {latex}']

def test_math_finds_its_own_answers_however_spelled():
    frames = [r'\boxed{%s}', r'So $\frac{1}{2}$, then $%s$', r'The answer is $%s$.', r'\boxed{0} or rather \boxed{%s}']
    for latex in references():
        for text in respelled(latex):
            for frame in frames: assert check_math(frame % text, latex), (latex, frame % text)

def test_math_is_never_stricter_than_the_benchmark(is_equiv):
    "What the MATH benchmark's own rule calls equal is equal here"
    latex = references()
    pairs = [(one, text) for one in latex for text in respelled(one)]
    pairs += [(one, other) for one, other in each_two(latex) if one[:1]==other[:1]]
    equal = [(one, other) for one, other in pairs if is_equiv(one, other)]
    assert len(equal)>500
    assert [(one, other) for one, other in equal if not check_math(rf'\boxed{{{other}}}', one)]==[]

def test_math_tells_different_answers_apart():
    """Of references that are not alike but for spaces and layout, none is taken for another, unless they are one
    number"""
    latex = sorted(set(references()))
    alike = [(one, other) for one, other in each_two(latex) if check_math(rf'\boxed{{{other}}}', one)]
    def numbers(x): return numbers_in(re.sub(r'\\text\{.*\}|\^\\circ|[a-z]=', '', normalize_latex(x)))
    for one, other in alike:
        one_number = numbers(one)==numbers(other)!=[]
        assert one_number or normalize_latex(one)==normalize_latex(other), (one, other)
    assert len(alike)<len(latex)

EQUAL = [
    (r'\frac{1}{2}', '0.5'), (r'\frac{-1}{2}', '-0.5'), (r'-\frac12', '-1/2'), ('1{,}000', '1000'),
    (r'11,\! 111', '11111'), (r'5\text{ cm}^2', '5'), ('x=5', '5'), (r'x \in [1,2]', '[1,2]'), (r'1\frac45', '9/5'),
    (r'\text{(C)}', '(C)'), ('.5', '1/2'), (r'90^{\circ}', '90'), (r'\$5', '5'), (r'50\%', '50'), ('f(x) = 2', '2')]

@pytest.mark.parametrize('one, other', EQUAL)
def test_equal_expressions(one, other):
    assert check_math(rf'\boxed{{{one}}}', other)
    assert check_math(rf'\boxed{{{other}}}', one)

UNEQUAL = [
    ('(1,2)', '(2,1)'), ('(1,2)', '[1,2]'), ('1', '-1'), (r'\sqrt{2}', '2'), ('2x', '2'),
    (r'\frac{1}{2}', r'\frac{2}{1}'), ('1,2', '12'), ('x^2', 'x_2'), ('', '1'), (r'\text{east}', r'\text{west}'),
    ('12', r'\frac{1}{2}'), ('__import__("os")', '1')]

@pytest.mark.parametrize('one, other', UNEQUAL)
def test_unequal_expressions(one, other): assert not check_math(rf'\boxed{{{one}}}', other)

@given(st.text(st.characters(exclude_characters='{}\\'), max_size=20))
def test_a_box_holds_what_is_in_it(text):
    for nested in (text, f'{{{text}}}', f'a{{{{{text}}}b}}'):
        assert boxed(rf'\boxed{{1}} then \boxed{{{nested}}} end }}')==nested


# choices

words = st.sampled_from('ash bee cod dew elk fig gnu hen'.split())

@given(st.data(), st.integers(2, 8))
def test_one_choice_by_letter_or_text(data, n):
    drawn = data.draw(st.lists(words, min_size=n, max_size=n, unique=True))
    choices = [f'thing number {w}' for w in drawn]
    right, said, more = (data.draw(st.integers(0, n-1)) for _ in range(3))
    letter, text = chr(65+said), choices[said]
    one = [
        letter, f'({letter})', f'{letter}.', f'{letter}) {text}', f'The answer is {letter}.', f'Answer: ({letter})',
        text, f'It is {text}.', f'**{letter}**', letter.lower(), rf'\boxed{{{letter}}}', f'#### {letter}',
        f'Of A and B and C, hm.\nThe correct answer is: {letter}', f'{letter} is right', f'Option {letter}']
    for answer in one: assert check_choice(answer, choices, right)==(said==right), answer
    other_letter, other_text = chr(65+more), choices[more]
    two = [f'{letter} or {other_letter}', f'{text} and {other_text}', f'The answer is {letter}, {other_letter}',
           f'{letter}. {other_text}']
    if said!=more:
        for answer in two: assert not check_choice(answer, choices, right), answer

def test_words_are_no_letters():
    for text in ('A dog', 'It is a dog.', 'DNA', 'vitamin-A'):
        assert not check_choice(text, ['iron', 'copper', 'zinc'], 0), text
    assert check_choice('A dog.', ['a cat', 'a dog'], 1)
    assert not check_choice('kilograms', ['grams', 'litres'], 0)
    parts = ['cell', 'cell wall', 'wall']
    for i, text in enumerate(parts): assert check_choice(f'It is the {text}.', parts, i)

BAD_CHOICES = [([], 0), (['a'], 0), (['a', ''], 0), (['a', 'b'], 2), (['a', 'b'], -1), (['a', None], 0),
               (list('abcdefghijklmnopqrstuvwxyz0'), 0)]

@pytest.mark.parametrize('choices, right', BAD_CHOICES)
def test_bad_choices_are_refused(choices, right):
    with pytest.raises(HydraError): check_choice('A', choices, right)


# rows

def plain(query, schema=PETS):
    "What SQLite finds, unguarded"
    con = sqlite3.connect(':memory:')
    con.executescript(schema)
    return con.execute(query).fetchall()

QUERIES = [
    'SELECT name FROM pets', 'SELECT name, age FROM pets WHERE age > 2',
    "SELECT kind, COUNT(*) FROM pets GROUP BY kind", 'SELECT AVG(age) FROM pets',
    "SELECT name FROM pets WHERE kind IS NULL",
    'SELECT a.name FROM pets a JOIN pets b ON a.age = b.age AND a.name <> b.name',
    'WITH old AS (SELECT * FROM pets WHERE age > 2) SELECT COUNT(*) FROM old',
    'SELECT kind FROM pets UNION SELECT name FROM pets', 'SELECT name, RANK() OVER (ORDER BY age) FROM pets',
    "SELECT name FROM pets WHERE name LIKE 'x%'", 'SELECT SUM(age)/COUNT(*) FROM pets', 'SELECT MAX(age) FROM pets',
    'SELECT 5']

def test_rows_agree_with_plain_sqlite():
    for reference in QUERIES:
        for query in QUERIES:
            equal = sorted(map(repr, plain(query)))==sorted(map(repr, plain(reference)))
            assert check_rows(f'```sql\n{query};\n```', PETS, reference)==equal, (query, reference)

def test_order_counts_only_if_it_is_asked_for():
    any_order = 'SELECT name FROM pets'
    up, down = f'{any_order} ORDER BY name', f'{any_order} ORDER BY name DESC'
    assert check_rows(up, PETS, any_order)
    assert check_rows(down, PETS, any_order)
    assert check_rows(up, PETS, up)
    assert not check_rows(down, PETS, up)
    assert check_rows(up, PETS, 'SELECT name FROM (SELECT name FROM pets ORDER BY name DESC)')

cells = st.none() | st.integers(-3, 3) | st.sampled_from(['a', 'b', '1']) | st.sampled_from([.5, 1.0])
tables = st.lists(st.tuples(cells, cells), max_size=5)

@given(tables, tables, st.randoms(use_true_random=False))
def test_rows_are_a_bag(one, other, r):
    shuffled = r.sample(one, len(one))
    assert same_rows(shuffled, one, False)
    assert same_rows(one, one, True)
    def as_float(v): return float(v) if isinstance(v, (int, float)) else v
    def key(rows): return sorted(repr([as_float(v) for v in row]) for row in rows)
    assert same_rows(one, other, False)==(key(one)==key(other))

def test_hostile_queries_find_nothing_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = [f', {n} AS (SELECT 1 FROM {b}, {b}, {b}, {b})' for b, n in zip('abcdefghijk', 'bcdefghijkl')]
    unfolding = 'WITH a AS (SELECT 1)'+''.join(steps)
    thirty = ', '.join(f'pets t{i}' for i in range(30))
    hostile = [
        "ATTACH DATABASE 'reached.db' AS x", "VACUUM INTO 'reached.db'", 'PRAGMA writable_schema = 1',
        'SELECT * FROM pragma_database_list', 'DROP TABLE pets', 'DELETE FROM pets',
        'CREATE TABLE reached AS SELECT * FROM pets', 'CREATE TEMP TABLE t AS SELECT 1',
        "SELECT load_extension('reached')", "SELECT readfile('/etc/passwd')",
        'WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c',
        f'{unfolding} SELECT 1 FROM l', f"SELECT COUNT(*) FROM {thirty}", 'SELECT randomblob(2000000000)',
        'SELECT zeroblob(2000000000)', "SELECT printf('%2000000000d', 1)", 'SELECT random()', 'SELECT '+'('*3000,
        'SELECT x\x00', "SELECT '\ud800'",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT x FROM c"]
    for query in hostile:
        con = sqlite3.connect(':memory:')
        con.executescript(PETS)
        assert run_query(con, query) in (None, [(None,)]), query # or NULL, for a text that is too long
        assert not check_rows(query, PETS, 'SELECT COUNT(*) FROM pets'), query
        con.set_authorizer(None)
        assert con.execute('SELECT COUNT(*) FROM pets').fetchone()==(4,)
    assert not list(Path().iterdir())

FAULTS = [
    ('CREATE TABLE pets(name)', 'SELECT name FROM pets', 'fills no table'), ('', 'SELECT 1', 'fills no table'),
    ('nonsense', 'SELECT 1', 'does not run'), ("ATTACH 'reached.db' AS x", 'SELECT 1', 'does not run'),
    (PETS, 'SELECT nothing FROM pets', 'is no query'), (PETS, 'DROP TABLE pets', 'is no query'),
    (PETS, '', 'is no query')]

@pytest.mark.parametrize('schema, reference, why', FAULTS)
def test_faults_of_the_data_are_errors(schema, reference, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HydraError, match=why): check_rows('SELECT 1', schema, reference)
    assert not list(Path().iterdir())

def test_a_second_statement_makes_it_wrong():
    names = 'SELECT name FROM pets'
    for other in ('DROP TABLE pets', 'SELECT 1', 'PRAGMA user_version'):
        assert not check_rows(f'{names}; {other};', PETS, names)
        assert not check_rows(f'{other}; {names}', PETS, names)


# calls

CATEGORIES = ['simple_python', 'multiple']

@pytest.fixture(scope='module')
def bfcl():
    "Questions with their true answers, from the package that the cards pin"
    rows = {}
    def read(folder, category):
        file = fetch.member('bfcl-eval', f'bfcl_eval/data/{folder}BFCL_v4_{category}.json')
        return [json.loads(line) for line in file.decode().splitlines()]
    for category in CATEGORIES:
        truth = {row['id']: row['ground_truth'] for row in read('possible_answer/', category)}
        rows[category] = [(row['function'], truth[row['id']]) for row in read('', category)]
    return rows

@pytest.fixture(scope='module')
def ast_checker():
    "The leaderboard's own checker, without what it imports for other languages and models"
    source = fetch.member('bfcl-eval', 'bfcl_eval/eval_checker/ast_eval/ast_checker.py').decode()
    imports = (r'(?m)^from bfcl_eval\.(?:constants\.(?:model_config|type_mappings|enums)|eval_checker)'
               r'.*(?:\n    .*|\n\))*')
    source = re.sub(imports, '', source)
    language = types.SimpleNamespace(PYTHON='python', JAVA='java', JAVASCRIPT='js')
    models = dict(x=types.SimpleNamespace(underscore_to_dot=False))
    names = dict(re=re, Language=language, MODEL_CONFIG_MAPPING=models)
    exec(compile(source, 'ast_checker.py', 'exec'), names)
    def valid(functions, calls, truth, category):
        return names['ast_checker'](functions, calls, truth, 'python', category, 'x')['valid']
    return valid

def mutated(value, r):
    "Another value, or the same in another form"
    forms = [str(value), [value], None, r.choice([True, 1, 'x', {}, [], 1.5])]
    if isinstance(value, str): forms += [value.upper()+' ', value.replace(' ', ''), value+'x']
    if isinstance(value, (int, float)): forms += [value+1, float(value), int(value)]
    if isinstance(value, list): forms += [value[::-1], value+value[:1], [mutated(v, r) for v in value]]
    if isinstance(value, dict): forms += [dict(value, more=1), dict(list(value.items())[1:])]
    return r.choice(forms)

def variants(truth, r):
    "The true calls, and the same with something changed"
    calls = [(name, first_accepted(accepted)) for one in truth for name, accepted in one.items()]
    yield calls
    for _ in range(6):
        changed = json.loads(json.dumps(calls))
        name, arguments = r.choice(changed)
        key = r.choice(list(arguments) or ['none'])
        what = r.randrange(6)
        if what==0: arguments.pop(key, None)
        elif what==1: arguments['more'] = 1
        elif key in arguments: arguments[key] = mutated(arguments[key], r)
        yield changed

@pytest.mark.parametrize('category', CATEGORIES)
def test_calls_are_judged_as_the_leaderboard_does(category, bfcl, ast_checker):
    r = random.Random(0)
    judged = []
    for functions, truth in bfcl[category]:
        for calls in variants(truth, r):
            said = json.dumps([dict(name=name, arguments=arguments) for name, arguments in calls])
            theirs = ast_checker(functions, [{name: arguments} for name, arguments in calls], truth, category)
            judged.append(theirs)
            assert check_call(said, truth, functions)==theirs, (said, truth)
    assert .2<sum(judged)/len(judged)<.8

@pytest.mark.parametrize('category', CATEGORIES)
def test_records_hold_calls_that_pass(category, bfcl):
    """Their own form, plain calls, too; and no other record's. One true answer leaves out a parameter that its function
    requires"""
    failed = []
    rows = bfcl[category]
    records = cached_load(dict(simple_python='bfcl_simple', multiple='bfcl_multiple')[category])
    for (functions, truth), r, other in zip(rows, records, records[1:]+records[:1]):
        passed = check_call(answer(r), truth, functions)
        assert passed==check_call(answer(r), json.loads(answer(r)), functions)
        if not passed: failed.append(truth)
        assert not check_call(answer(other), truth, functions) or answer(other)==answer(r)
        assert not check_no_call(answer(r), functions)
        assert not check_call('[]', truth, functions)
    assert len(failed)<=1
    for truth in failed:
        for one in truth: assert '' in one['calculate_emissions']['fuel_efficiency']

def area_calls(*several): return json.dumps([dict(name='area', arguments=arguments) for arguments in several])
def call(**arguments): return area_calls(arguments)

def test_the_order_of_calls_does_not_matter():
    "Also where the first match found would leave none for the other"
    two = [dict(area=dict(base=[1, 2])), dict(area=dict(base=[1]))]
    for expected in (two, two[::-1]):
        for said in ([1, 2], [2, 1]):
            assert check_call(area_calls(*(dict(base=b) for b in said)), expected, [AREA])
        for said in ([2, 2], [1], [1, 1, 1], []):
            assert not check_call(area_calls(*(dict(base=b) for b in said)), expected, [AREA])

def test_required_optional_and_unknown_parameters():
    expected = [dict(area=dict(base=[1], unit=['cm', '']))]
    for said in (call(base=1), call(base=1, unit='cm'), call(unit='CM', base=1)):
        assert check_call(said, expected, [AREA])
    wrong = [call(unit='cm'), call(base=1, unit='mm'), call(base=1, more=1), call(base='1'), call(base=True),
             call(base=1.5), call(base=None), call(base=[1]), call()]
    for said in wrong: assert not check_call(said, expected, [AREA]), said
    needs_unit = [dict(area=dict(base=[1], unit=['cm']))]
    assert not check_call(call(base=1), needs_unit, [AREA])

def test_both_forms_of_a_reference_and_openai_tools():
    for expected in (dict(area=dict(base=[1, 2])), dict(name='area', arguments=dict(base=[1, 2]))):
        assert check_call(call(base=2), [expected], [dict(type='function', function=AREA)])
        assert not check_call(call(base=3), [expected], [AREA])

NO_CALLS = [[], ['area'], [dict(name='area')], [dict(volume=dict(base=[1]))], [dict(name='volume', arguments={})], [3],
            [{}]]

@pytest.mark.parametrize('expected', NO_CALLS)
def test_references_that_are_no_calls_are_refused(expected):
    with pytest.raises(HydraError): check_call(call(base=1), expected, [AREA])

def test_no_call():
    nothing = ['[]', '', 'I cannot do that.', '{"name": "Ann"}', 'The area is unknown.', '```json\n[]\n```',
               'my_area(1)']
    for text in nothing: assert check_no_call(text, [AREA]), text
    something = [call(base=1), 'area(base=1)', 'Let me see: area (1)', '{"name": "other", "arguments": {}}',
                 f'```json\n{call()}\n```']
    for text in something: assert not check_no_call(text, [AREA]), text


# programs

runs = pytest.mark.skipif(isolation() is None, reason='programs cannot be isolated on this machine')
DOUBLE = 'assert double(2) == 4\nassert double("a") == "aa"'
RIGHT = 'def double(x): return 2*x'

def passes(text, tests=DOUBLE, entry='double'): return check_program(text, tests, entry, allow_code=True, seconds=20)

def test_a_program_runs_only_if_asked():
    for how in ({}, dict(allow_code=1)):
        with pytest.raises(HydraError, match='--allow-code'): check_program(RIGHT, DOUBLE, **how)

@pytest.mark.parametrize('tests, entry', [('', None), (' \n', 'f'), ('assert 1', 'f(x); import os'), ('assert 1', '')])
def test_tests_that_test_nothing_are_refused(tests, entry):
    with pytest.raises(HydraError): check_program('pass', tests, entry, allow_code=True)

@runs
def test_right_programs_pass():
    fenced = f'```python\n{RIGHT}\n```'
    in_a_class_too = ('from __future__ import annotations\nfrom dataclasses import dataclass\n'
                      '@dataclass\nclass P:\n    x: int\ndouble = lambda x: 2*x')
    texts = [
        RIGHT, fenced, f'Sure:\n```\n{RIGHT}\n```\nTry it:\n```python\nprint(double(3))\n```',
        f'```python\nimport os\n```\n{fenced}', f'{RIGHT}\nif __name__=="__main__":\n    print(double(input()))',
        in_a_class_too, f'{RIGHT}\nprint("no newline", end="")', f'{RIGHT}\nprint(double(1))']
    for text in texts: assert passes(text), text

@runs
def test_wrong_programs_do_not():
    wrong = [
        '', 'def double(x): return x+x+1', f'{RIGHT}\nimport sys\nsys.exit()', f'{RIGHT}\nexit(0)',
        f'{RIGHT}\nimport os\nos._exit(0)', 'def double(x): return 2*', 'def triple(x): return 2*x', 'raise SystemExit',
        f'{RIGHT}\nprint("x"*10**6)', f'{RIGHT}\nimport builtins\nbuiltins.print = lambda *a: None',
        'class Yes:\n    __eq__ = lambda s, o: exit()\ndouble = lambda x: Yes()', 'I cannot do that.']
    for text in wrong: assert not passes(text), text
    endless = 'def double(x):\n    while True: pass'
    assert not check_program(endless, DOUBLE, allow_code=True, seconds=.5)

@runs
def test_tests_as_human_eval_has_them():
    tests = 'METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4'
    assert passes(RIGHT, tests)
    assert not passes('def double(x): return x', tests)
    assert not passes('def other(x): return 2*x', tests)

@runs
def test_mbpp_solutions_pass_their_test():
    "And another's solution does not"
    records = cached_load('mbpp')[:8]
    def test_of(r): return re.search(r'(?s)It should pass this test:\n\n(.*)', r['prompt'][0]['content'])[1]
    tests = [test_of(r) for r in records]
    for i, r in enumerate(records):
        assert passes(answer(r), tests[i], None), r['id']
        assert not passes(answer(records[i-1]), tests[i], None)
