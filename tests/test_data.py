"Records, rows and splits: what does not fit a lesson (TRL's own rendering, hash seeds, damaged rows)"
import copy, json, random, re, subprocess, sys
import pytest
from hypothesis import example, given, settings, strategies as st
from hydramoe.models.encode import encode
from hydramoe.data.records import record
from hydramoe.data.rows import fill_template, map_row, row_records
from hydramoe.data.splits import sides, split
from hydramoe.data.toy import toy_records
from hydramoe.models.template import Refused, byte_tokenizer, chatml, render_split, render, fold_system_turns
from hydramoe.models.packaged import gemma_chat, smollm2_dir
from hydramoe.models.load import check_base
from hydramoe.foundations.core import HydraError
from rows import BAD, FORMS
from strategies import utf8
from templates import IN_TURN, NO_SYSTEM, SAYS_SO, SILENT, SPACE, STRIPS, THINKS, TURNS, with_template


@pytest.fixture(scope='module')
def smol():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(smollm2_dir())


def user_turn(text): return dict(role='user', content=text)
def bot_turn(text): return dict(role='assistant', content=text)
def system_turn(text): return dict(role='system', content=text)

RECORDS = [record('Hi', 'Hello', 'x'), record('  What\r\nis this? ', 'Ünïcode ✓ 你好', 'x'),
           record([system_turn('Be brief.'), user_turn('a'), bot_turn('b'), user_turn('c')], 'd\n\ne', 'x'),
           record('<|im_end|> in text', 'x <|im_start|> y', 'x'), *toy_records(2)]


@pytest.mark.parametrize('which', ['byte', 'smol'])
def test_encode_equals_trl(which, request, tmp_path):
    "The ids and labels that TRL's SFTTrainer makes of the same rows"
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from hydramoe.models.base import tiny_base
    base = tiny_base()
    tok = base.tokenizer if which == 'byte' else request.getfixturevalue('smol')
    rows = Dataset.from_list([dict(prompt=r['prompt'], completion=r['completion']) for r in RECORDS])
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to='none', max_length=None,
                     shuffle_dataset=False)
    got = SFTTrainer(model=base.model, args=args, train_dataset=rows, processing_class=tok).train_dataset
    assert len(got) == len(RECORDS)
    for r, g in zip(RECORDS, got):
        e = encode(r, tok, 1000, 1000)
        assert e.ids == g['input_ids']
        assert g['labels'] == [-100]*e.n_prompt + e.ids[e.n_prompt:]


def test_tools_are_seen_by_every_template(smol):
    r = record('Area?', '[]', 'x', tools=[dict(name='area_of_rectangle', description='d', parameters={})])
    for tok in (smol, byte_tokenizer()): assert 'area_of_rectangle' in tok.decode(encode(r, tok).ids)


WRITE_TOYS = """
import sys
from hydramoe.foundations.files import write_jsonl
from hydramoe.data.toy import toy_records
write_jsonl(sys.argv[1]+"/toys.jsonl", toy_records(30, 5))
"""

def test_hash_seed_and_row_order_do_not_matter(in_two_processes):
    "The same rows from another process with another PYTHONHASHSEED"
    outs = in_two_processes(WRITE_TOYS)
    assert outs[0] == outs[1]
    rows = toy_records(30)
    parts = split(rows, dict(test=40, dev=30, train=.5), seed=3)
    for s in range(3):
        shuffled = random.Random(s).sample(rows, len(rows))
        assert split(shuffled, dict(test=40, dev=30, train=.5), seed=3) == parts


def test_split_is_disjoint_and_keeps_conversations_whole():
    def talk(i): return [turn for j in range(4) for turn in (user_turn(f'q{i} {j}'), bot_turn(f'a{i} {j}'))]
    records = [r for i in range(30) for r in row_records(dict(messages=talk(i)), 'talks')]
    assert len(records) == 120
    parts = split(records, dict(test=20, train=.7), seed=1)
    assert not {r['group'] for r in parts['test']} & {r['group'] for r in parts['train']}
    assert len(parts['test']) == 20
    assert len(parts['train']) == 84


@pytest.mark.parametrize('line,reason', BAD)
def test_a_bad_row_is_a_value_error_that_says_why(line, reason):
    with pytest.raises(ValueError, match=re.escape(reason)): row_records(json.loads(line), 'x')


def test_formats_in_the_wild_agree():
    assert len({r['id'] for form in FORMS for r in row_records(form, 'x')}) == 1


names = st.sampled_from(['prompt', 'completion', 'messages', 'conversations', 'instruction', 'input', 'output', 'role',
                         'content', 'from', 'value', 'tools', 'domain'])
any_text = st.text(max_size=5) | st.sampled_from(['user', 'assistant', 'human', 'gpt'])
any_leaf = st.none() | st.booleans() | st.integers() | any_text

def nested(inner): return st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5)

any_value = st.recursive(any_leaf, nested, max_leaves=10)

@settings(max_examples=200, deadline=None)
@given(any_value)
@example(row={'prompt': '0', 'completion': '0', 'tools': 1})
@example(row={'instruction': None, 'output': 'x'})
def test_any_json_ends_as_records_or_a_value_error(row):
    try: records = row_records(row, 'x')
    except ValueError: return
    assert records
    assert all(isinstance(m['content'], str) for r in records for m in r['prompt'] + r['completion'])
    for r in records: encode(r, byte_tokenizer())


any_map = st.sampled_from([
    'pairs', 'alpaca', 'messages', 'sharegpt', {'messages': 'prompt', 'role': 'from'},
    {'prompt': '{prompt}', 'completion': '{output[0]} {input?}', 'system': '{domain?}'},
    {'alpaca': {'instruction': 'prompt'}}])

@settings(max_examples=100, deadline=None)
@given(any_value, any_map)
def test_any_row_under_any_map_ends_as_pairs_or_a_value_error(row, map):
    try: pairs = map_row(row, map)
    except ValueError: return
    assert pairs
    assert all(2 <= len(p) <= 3 for p in pairs)


column_name, cell = st.text('abcxyz_', min_size=1, max_size=6), st.text(max_size=12) | st.integers()
columns = st.dictionaries(column_name, cell, min_size=1, max_size=5)

@settings(max_examples=100, deadline=None)
@given(columns, st.data())
def test_a_template_puts_each_value_where_its_column_is_named(row, draw):
    keys = draw.draw(st.lists(st.sampled_from(sorted(row)), max_size=4))
    def filled(holes, behind): return fill_template('|'.join(['', *holes, behind]), row)
    values = [str(row[k]) for k in keys]
    assert filled([f'{{{k}}}' for k in keys], '') == '|'.join(['', *values, ''])
    assert filled([f'{{{k}?}}' for k in keys], '{nothing_here?}|') == '|'.join(['', *values, '|'])


# --- a row in the light of its base ----------------------------------------------------------------------------------

def ids_of(tok, text): return tok(text, add_special_tokens=False)['input_ids']

@pytest.mark.parametrize('which', ['byte', 'smol'])
@pytest.mark.parametrize('template', [
    SPACE, THINKS, SILENT, STRIPS, SAYS_SO, NO_SYSTEM+THINKS, NO_SYSTEM+IN_TURN+SPACE])
def test_the_boundary_is_made_where_generation_begins(which, template, request):
    """Case 5: whatever a template writes where the answer begins, the prompt's ids are those that generation is given,
    and the answer is learned to its end"""
    tok = with_template(byte_tokenizer() if which == 'byte' else request.getfixturevalue('smol'), template)
    answers = ('e', '<|im_end|>', 'Goethe. Goethe.', '12')
    for r in RECORDS[:3] + [record('q', a, 'x') for a in answers]:
        e, said = encode(r, tok, 1000, 1000), r['completion'][0]['content']
        assert e.ids[:e.n_prompt] == ids_of(tok, render(tok, r['prompt']))
        assert tok.decode(e.ids[e.n_prompt:]) == said+'<|im_end|>\n'

@pytest.mark.parametrize('template', [THINKS, SILENT, STRIPS, SAYS_SO])
def test_thoughts_in_an_answer_are_learned_once(template):
    tok = with_template(byte_tokenizer(), template)
    thought = 'Hm.\n</think>\n\nGoethe.'
    if template!=SAYS_SO: thought = '<think>\n'+thought
    e = encode(record('Who?', thought, 'x'), tok)
    text = tok.decode(e.ids)
    assert text.count('Hm.') == 1
    assert text.endswith('Goethe.<|im_end|>\n')
    assert template == SILENT or text.count('<think>') == 1

spoken = st.text(utf8, min_size=1, max_size=30).filter(str.strip)

@pytest.fixture(scope='module')
def packaged(smol):
    gemma = with_template(byte_tokenizer(), gemma_chat)
    gemma.add_special_tokens(dict(eos_token='<end_of_turn>')) # one token there, as in Gemma's own vocabulary
    return [smol, byte_tokenizer(), gemma, with_template(smol, chatml)]

@settings(max_examples=40, deadline=None)
@given(spoken, spoken, st.booleans())
def test_the_packaged_bases_are_read_as_ever(packaged, q, a, system):
    "For their templates the ids are those of the whole text at once, so nothing that was published changes"
    prompt = [*([dict(role='system', content='Be brief.')] if system else []), dict(role='user', content=q)]
    r = record(prompt, a, 'x')
    for tok in packaged:
        e = encode(r, tok, 10**6, 10**6)
        whole = tok.apply_chat_template([*r['prompt'], *r['completion']], tokenize=False)
        assert e.ids == ids_of(tok, whole)
        asked = tok.apply_chat_template(r['prompt'], tokenize=False, add_generation_prompt=True)
        assert render(tok, r['prompt']) == asked

FAUST = [system_turn('Be brief.'), user_turn('Who wrote Faust?')]
DROPS = TURNS.replace("{% for m in messages %}", "{% for m in messages if m['role']!='system' %}")
ODD_TEMPLATES = [
    "{{ 1/0 if messages[0]['role']=='system' else '' }}",
    "{{ messages[0]['nothing']['x'] if messages[0]['role']=='system' else '' }}",
    "{% if messages[0]['role']=='system' %}{{ 1 + 'a' }}{% endif %}"]

@pytest.mark.parametrize('template', [NO_SYSTEM+SPACE, DROPS, *(o+SPACE for o in ODD_TEMPLATES)])
def test_a_system_turn_that_is_not_taken_is_said_by_the_user(template):
    """Case 3, in training and in answering alike, whether the template raises an error of any kind or drops it in
    silence"""
    tok = with_template(byte_tokenizer(), template)
    folded = [dict(role='user', content='Be brief.\n\nWho wrote Faust?')]
    assert fold_system_turns(tok, FAUST) == folded
    assert render(tok, FAUST) == render(tok, folded)
    assert encode(record(FAUST, 'Goethe.', 'x'), tok).ids == encode(record(folded, 'Goethe.', 'x'), tok).ids
    assert fold_system_turns(byte_tokenizer(), FAUST) == FAUST

def test_tools_of_a_template_without_system_turns_reach_the_user():
    tok = with_template(byte_tokenizer(), NO_SYSTEM+SPACE)
    text = render(tok, FAUST, tools=[dict(name='library')])
    assert text.startswith('User: Be brief.')
    assert 'library' in text
    assert text.endswith('Who wrote Faust?<|im_end|>\nAssistant: ')

NOT_IN_TURN = [
    [user_turn('a'), user_turn('b')],
    [*FAUST[1:], bot_turn('call'), dict(role='tool', content='4')],
    [*FAUST, user_turn('b')],
    [user_turn('a'), bot_turn('x'), system_turn('z')]]

@pytest.mark.parametrize('msgs', NOT_IN_TURN)
def test_what_a_template_refuses_is_a_refusal_in_its_own_words(msgs):
    tok = with_template(byte_tokenizer(), NO_SYSTEM+IN_TURN+SPACE)
    with pytest.raises(Refused, match='must alternate|not supported'): render(tok, msgs)
    with pytest.raises(HydraError, match='record x/.*(must alternate|not supported)'):
        encode(record(msgs, 'y', 'x'), tok)

def test_a_template_without_an_answer_is_refused_with_the_true_reason():
    counts = SPACE.replace("m['content']", "m['content']|length|string").replace("'Assistant: '", "'Bot: '")
    goes = "{% if add_generation_prompt %}Go: {% endif %}"
    for template in (counts, goes):
        with pytest.raises(Refused, match='does not write the answer'):
            render_split(with_template(byte_tokenizer(), template), FAUST[1:], [bot_turn('Goethe.')])

def test_pads_are_masked_so_any_id_will_do(smol):
    "Case 7: neither eos nor pad; a pad that the embedding has no row for"
    bare = copy.deepcopy(smol)
    bare.eos_token = bare.pad_token = None
    added = copy.deepcopy(smol)
    added.add_special_tokens(dict(pad_token='[PAD]'))
    assert added.pad_token_id == 49152
    for tok in (bare, added):
        before = encode(RECORDS[1], tok).ids
        assert check_base(tok, 49152).pad_token_id < 49152
        assert tok(['a', 'a b c'], padding=True)['input_ids']
        assert encode(RECORDS[1], tok).ids == before
        assert tok.decode(ids_of(tok, 'Ahoy! #0'), skip_special_tokens=True) == 'Ahoy! #0'
    mute = with_template(bare, chatml.replace('<|im_end|>', ''))
    with pytest.raises(HydraError, match='base here: nothing says where an answer ends'):
        check_base(mute, 49152, 'here')
    with pytest.raises(HydraError, match='base here: it cannot write even one question'):
        check_base(with_template(bare, "{{ raise_exception('no') }}"), 49152, 'here')

def test_records_of_one_conversation_stay_on_one_side_whether_they_say_so_or_not():
    first = record([user_turn('q')], 'a', 'x')
    second = record([user_turn('q'), bot_turn('a'), user_turn('r')], 'c', 'x')
    third = record([user_turn('q'), bot_turn('a'), user_turn('r'), bot_turn('c'), user_turn('s')], 'd', 'x')
    for rows in ([first, second, third], [second, third]): assert len(set(sides(rows))) == 1
    shots = [user_turn('1+1'), bot_turn('2')] # the same examples before every question make no conversation of them
    rows = [record([*shots, user_turn(f'{i}+{i}')], str(2*i), 'x') for i in range(9)]
    assert len(set(sides(rows))) == 9
    assert len(set(sides([r | dict(group=i//3) for i, r in enumerate(rows)]))) == 3
    parts = split([r | dict(group=f'g{i%4}') for i, r in enumerate(rows)], dict(a=.5, b=.5))
    assert not {r['group'] for r in parts['a']} & {r['group'] for r in parts['b']}


# --- imports ---------------------------------------------------------------------------------------------------------

LIGHT_ROOMS = ['records', 'rows', 'splits', 'toy', 'cards', 'sources', 'tools', 'craft', 'load']

def test_cards_are_listed_without_torch_and_transformers():
    rooms = '; '.join(f'import hydramoe.data.{m}' for m in LIGHT_ROOMS)
    code = f'import sys; {rooms}; from hydramoe.data.cards import card_names; assert card_names()'
    heavy = '{"torch", "transformers", "matplotlib", "reasoning_gym"} & set(sys.modules)'
    light = f'assert not {heavy}, sorted(sys.modules)'
    subprocess.run([sys.executable, '-c', f'{code}; {light}'], check=True)
