"Data: what does not fit a lesson (TRL's own rendering, hash seeds, damaged files)"
import json, random, re
import pytest
from hypothesis import example, given, settings, strategies as st
from hydramoe import data
from hydramoe.base import byte_tokenizer, smollm2_dir


@pytest.fixture(scope='module')
def smol():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(smollm2_dir())


ROWS = [data.record('Hi', 'Hello', 'x'), data.record('  What\r\nis this? ', 'Ünïcode ✓ 你好', 'x'),
        data.record([dict(role='system', content='Be brief.'), dict(role='user', content='a'), dict(role='assistant', content='b'), dict(role='user', content='c')], 'd\n\ne', 'x'),
        data.record('<|im_end|> in text', 'x <|im_start|> y', 'x'), *data.toy_records(2)]


@pytest.mark.parametrize('which', ['byte', 'smol'])
def test_encode_equals_trl(which, request, tmp_path):
    "The ids and labels that TRL's SFTTrainer makes of the same rows"
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from hydramoe.base import tiny_base
    base = tiny_base()
    tok = base.tokenizer if which == 'byte' else request.getfixturevalue('smol')
    rows = Dataset.from_list([dict(prompt=r['prompt'], completion=r['completion']) for r in ROWS])
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to='none', max_length=None, shuffle_dataset=False)
    got = SFTTrainer(model=base.model, args=args, train_dataset=rows, processing_class=tok).train_dataset
    assert len(got) == len(ROWS)
    for r, g in zip(ROWS, got):
        e = data.encode(r, tok, 1000, 1000)
        assert e.ids == g['input_ids']
        assert g['labels'] == [-100]*e.n_prompt + e.ids[e.n_prompt:]


def test_tools_are_seen_by_every_template(smol):
    r = data.record('Area?', '[]', 'x', tools=[dict(name='area_of_rectangle', description='d', parameters={})])
    for tok in (smol, byte_tokenizer()): assert 'area_of_rectangle' in tok.decode(data.encode(r, tok).ids)


def test_hash_seed_and_row_order_do_not_matter(in_two_processes):
    "The same rows from another process with another PYTHONHASHSEED"
    code = 'import sys; from hydramoe.core import write_jsonl; from hydramoe.data import toy_records; write_jsonl(sys.argv[1]+"/toys.jsonl", toy_records(30, 5))'
    outs = in_two_processes(code)
    assert outs[0] == outs[1]
    rows = data.toy_records(30)
    parts = data.split(rows, dict(test=40, dev=30, train=.5), seed=3)
    for s in range(3):
        shuffled = random.Random(s).sample(rows, len(rows))
        assert data.split(shuffled, dict(test=40, dev=30, train=.5), seed=3) == parts


def test_split_is_disjoint_and_keeps_conversations_whole():
    talk = lambda i: [m for j in range(4) for m in (dict(role='user', content=f'q{i} {j}'), dict(role='assistant', content=f'a{i} {j}'))]
    records = [r for i in range(30) for r in data.row_records(dict(messages=talk(i)), 'talks')]
    assert len(records) == 120
    parts = data.split(records, dict(test=20, train=.7), seed=1)
    assert not {r['group'] for r in parts['test']} & {r['group'] for r in parts['train']}
    assert len(parts['test']) == 20 and len(parts['train']) == 84


BAD = [('{"prompt": 1, "completion": "x"}', 'prompt is 1'), ('[1, 2]', 'need an object'), ('"x"', 'need an object'), ('{"prompt": "x"}', 'has the fields prompt'),
       ('{"prompt": "x", "completion": "  "}', 'completion is empty'), ('{"prompt": [], "completion": "x"}', 'prompt is []'),
       ('{"prompt": [{"role": "user"}], "completion": "x"}', 'prompt holds'), ('{"prompt": [{"role": "wizard", "content": "x"}], "completion": "x"}', 'wizard'),
       ('{"messages": "hello"}', 'messages must be a list'), ('{"messages": [{"role": "user", "content": "x"}]}', 'no assistant turn'),
       ('{"messages": [{"role": "assistant", "content": "x"}]}', 'no assistant turn'), ('{"prompt": "\\ud800", "completion": "x"}', 'surrogates'),
       ('{"prompt": "x", "completion": null}', 'completion is null'), ('{"conversations": [{"from": "human"}]}', "objects with 'from' and 'value'"),
       ('{}', 'none')]


@pytest.mark.parametrize('line,reason', BAD)
def test_a_bad_row_is_a_value_error_that_says_why(line, reason):
    with pytest.raises(ValueError, match=re.escape(reason)): data.row_records(json.loads(line), 'x')


FORMS = [dict(prompt='Hi', completion='Yo'), dict(prompt=[dict(role='user', content='Hi')], completion=[dict(role='assistant', content='Yo')]),
         dict(messages=[dict(role='user', content='Hi'), dict(role='assistant', content='Yo')]),
         dict(conversations=[{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Yo'}]), dict(instruction='Hi', input='', output='Yo'), dict(instruction='Hi', output='Yo')]

def test_formats_in_the_wild_agree():
    assert len({r['id'] for form in FORMS for r in data.row_records(form, 'x')}) == 1


names = st.sampled_from(['prompt', 'completion', 'messages', 'conversations', 'instruction', 'input', 'output', 'role', 'content', 'from', 'value', 'tools', 'domain'])
anything = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(['user', 'assistant', 'human', 'gpt']), lambda c: st.lists(c, max_size=3) | st.dictionaries(names, c, max_size=5), max_leaves=10)

@settings(max_examples=200, deadline=None)
@given(anything)
@example(row={'prompt': '0', 'completion': '0', 'tools': 1})
@example(row={'instruction': None, 'output': 'x'})
def test_any_json_ends_as_records_or_a_value_error(row):
    try: records = data.row_records(row, 'x')
    except ValueError: return
    assert records and all(isinstance(m['content'], str) for r in records for m in r['prompt'] + r['completion'])
    for r in records: data.encode(r, byte_tokenizer())


@settings(max_examples=100, deadline=None)
@given(anything, st.sampled_from(['pairs', 'alpaca', 'messages', 'sharegpt', {'messages': 'prompt', 'role': 'from'}, {'prompt': '{prompt}', 'completion': '{output[0]} {input?}', 'system': '{domain?}'}, {'alpaca': {'instruction': 'prompt'}}]))
def test_any_row_under_any_map_ends_as_pairs_or_a_value_error(row, map):
    try: pairs = data.map_row(row, map)
    except ValueError: return
    assert pairs and all(2 <= len(p) <= 3 for p in pairs)


columns = st.dictionaries(st.text('abcxyz_', min_size=1, max_size=6), st.text(max_size=12) | st.integers(), min_size=1, max_size=5)

@settings(max_examples=100, deadline=None)
@given(columns, st.data())
def test_a_template_puts_each_value_where_its_column_is_named(row, draw):
    keys = draw.draw(st.lists(st.sampled_from(sorted(row)), max_size=4))
    assert data.fill('|'.join(['', *(f'{{{k}}}' for k in keys), '']), row) == '|'.join(['', *(str(row[k]) for k in keys), ''])
    assert data.fill('|'.join(['', *(f'{{{k}?}}' for k in keys), '{nothing_here?}|']), row) == '|'.join(['', *(str(row[k]) for k in keys), '|'])
