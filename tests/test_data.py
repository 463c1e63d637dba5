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


RECORDS = [record('Hi', 'Hello', 'x'), record('  What\r\nis this? ', 'Ünïcode ✓ 你好', 'x'),
        record([dict(role='system', content='Be brief.'), dict(role='user', content='a'), dict(role='assistant', content='b'), dict(role='user', content='c')], 'd\n\ne', 'x'),
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
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to='none', max_length=None, shuffle_dataset=False)
    got = SFTTrainer(model=base.model, args=args, train_dataset=rows, processing_class=tok).train_dataset
    assert len(got) == len(RECORDS)
    for r, g in zip(RECORDS, got):
        e = encode(r, tok, 1000, 1000)
        assert e.ids == g['input_ids']
        assert g['labels'] == [-100]*e.n_prompt + e.ids[e.n_prompt:]


def test_tools_are_seen_by_every_template(smol):
    r = record('Area?', '[]', 'x', tools=[dict(name='area_of_rectangle', description='d', parameters={})])
    for tok in (smol, byte_tokenizer()): assert 'area_of_rectangle' in tok.decode(encode(r, tok).ids)


def test_hash_seed_and_row_order_do_not_matter(in_two_processes):
    "The same rows from another process with another PYTHONHASHSEED"
    code = 'import sys; from hydramoe.foundations.files import write_jsonl; from hydramoe.data.toy import toy_records; write_jsonl(sys.argv[1]+"/toys.jsonl", toy_records(30, 5))'
    outs = in_two_processes(code)
    assert outs[0] == outs[1]
    rows = toy_records(30)
    parts = split(rows, dict(test=40, dev=30, train=.5), seed=3)
    for s in range(3):
        shuffled = random.Random(s).sample(rows, len(rows))
        assert split(shuffled, dict(test=40, dev=30, train=.5), seed=3) == parts


def test_split_is_disjoint_and_keeps_conversations_whole():
    talk = lambda i: [m for j in range(4) for m in (dict(role='user', content=f'q{i} {j}'), dict(role='assistant', content=f'a{i} {j}'))]
    records = [r for i in range(30) for r in row_records(dict(messages=talk(i)), 'talks')]
    assert len(records) == 120
    parts = split(records, dict(test=20, train=.7), seed=1)
    assert not {r['group'] for r in parts['test']} & {r['group'] for r in parts['train']}
    assert len(parts['test']) == 20 and len(parts['train']) == 84


@pytest.mark.parametrize('line,reason', BAD)
def test_a_bad_row_is_a_value_error_that_says_why(line, reason):
    with pytest.raises(ValueError, match=re.escape(reason)): row_records(json.loads(line), 'x')


def test_formats_in_the_wild_agree():
    assert len({r['id'] for form in FORMS for r in row_records(form, 'x')}) == 1


names = st.sampled_from(['prompt', 'completion', 'messages', 'conversations', 'instruction', 'input', 'output', 'role', 'content', 'from', 'value', 'tools', 'domain'])
any_value = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(['user', 'assistant', 'human', 'gpt']), lambda c: st.lists(c, max_size=3) | st.dictionaries(names, c, max_size=5), max_leaves=10)

@settings(max_examples=200, deadline=None)
@given(any_value)
@example(row={'prompt': '0', 'completion': '0', 'tools': 1})
@example(row={'instruction': None, 'output': 'x'})
def test_any_json_ends_as_records_or_a_value_error(row):
    try: records = row_records(row, 'x')
    except ValueError: return
    assert records and all(isinstance(m['content'], str) for r in records for m in r['prompt'] + r['completion'])
    for r in records: encode(r, byte_tokenizer())


@settings(max_examples=100, deadline=None)
@given(any_value, st.sampled_from(['pairs', 'alpaca', 'messages', 'sharegpt', {'messages': 'prompt', 'role': 'from'}, {'prompt': '{prompt}', 'completion': '{output[0]} {input?}', 'system': '{domain?}'}, {'alpaca': {'instruction': 'prompt'}}]))
def test_any_row_under_any_map_ends_as_pairs_or_a_value_error(row, map):
    try: pairs = map_row(row, map)
    except ValueError: return
    assert pairs and all(2 <= len(p) <= 3 for p in pairs)


columns = st.dictionaries(st.text('abcxyz_', min_size=1, max_size=6), st.text(max_size=12) | st.integers(), min_size=1, max_size=5)

@settings(max_examples=100, deadline=None)
@given(columns, st.data())
def test_a_template_puts_each_value_where_its_column_is_named(row, draw):
    keys = draw.draw(st.lists(st.sampled_from(sorted(row)), max_size=4))
    assert fill_template('|'.join(['', *(f'{{{k}}}' for k in keys), '']), row) == '|'.join(['', *(str(row[k]) for k in keys), ''])
    assert fill_template('|'.join(['', *(f'{{{k}?}}' for k in keys), '{nothing_here?}|']), row) == '|'.join(['', *(str(row[k]) for k in keys), '|'])


# --- a row in the light of its base ----------------------------------------------------------------------------------

def ids_of(tok, text): return tok(text, add_special_tokens=False)['input_ids']

@pytest.mark.parametrize('which', ['byte', 'smol'])
@pytest.mark.parametrize('template', [SPACE, THINKS, SILENT, STRIPS, SAYS_SO, NO_SYSTEM+THINKS, NO_SYSTEM+IN_TURN+SPACE])
def test_the_boundary_is_made_where_generation_begins(which, template, request):
    "Case 5: whatever a template writes where the answer begins, the prompt's ids are those that generation is given, and the answer is learned to its end"
    tok = with_template(byte_tokenizer() if which == 'byte' else request.getfixturevalue('smol'), template)
    for r in RECORDS[:3] + [record('q', a, 'x') for a in ('e', '<|im_end|>', 'Goethe. Goethe.', '12')]:
        e, said = encode(r, tok, 1000, 1000), r['completion'][0]['content']
        assert e.ids[:e.n_prompt] == ids_of(tok, render(tok, r['prompt']))
        assert tok.decode(e.ids[e.n_prompt:]) == said+'<|im_end|>\n'

@pytest.mark.parametrize('template', [THINKS, SILENT, STRIPS, SAYS_SO])
def test_thoughts_in_an_answer_are_learned_once(template):
    tok = with_template(byte_tokenizer(), template)
    e = encode(record('Who?', '<think>\nHm.\n</think>\n\nGoethe.' if template!=SAYS_SO else 'Hm.\n</think>\n\nGoethe.', 'x'), tok)
    text = tok.decode(e.ids)
    assert text.count('Hm.') == 1 and text.endswith('Goethe.<|im_end|>\n') and (template == SILENT or text.count('<think>') == 1)

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
        assert e.ids == ids_of(tok, whole) and render(tok, r['prompt']) == tok.apply_chat_template(r['prompt'], tokenize=False, add_generation_prompt=True)

FAUST = [dict(role='system', content='Be brief.'), dict(role='user', content='Who wrote Faust?')]
DROPS = TURNS.replace("{% for m in messages %}", "{% for m in messages if m['role']!='system' %}")
ODD_TEMPLATES = ["{{ 1/0 if messages[0]['role']=='system' else '' }}", "{{ messages[0]['nothing']['x'] if messages[0]['role']=='system' else '' }}", "{% if messages[0]['role']=='system' %}{{ 1 + 'a' }}{% endif %}"]

@pytest.mark.parametrize('template', [NO_SYSTEM+SPACE, DROPS, *(o+SPACE for o in ODD_TEMPLATES)])
def test_a_system_turn_that_is_not_taken_is_said_by_the_user(template):
    "Case 3, in training and in answering alike, whether the template raises an error of any kind or drops it in silence"
    tok = with_template(byte_tokenizer(), template)
    folded = [dict(role='user', content='Be brief.\n\nWho wrote Faust?')]
    assert fold_system_turns(tok, FAUST) == folded and render(tok, FAUST) == render(tok, folded)
    assert encode(record(FAUST, 'Goethe.', 'x'), tok).ids == encode(record(folded, 'Goethe.', 'x'), tok).ids
    assert fold_system_turns(byte_tokenizer(), FAUST) == FAUST

def test_tools_of_a_template_without_system_turns_reach_the_user():
    tok = with_template(byte_tokenizer(), NO_SYSTEM+SPACE)
    text = render(tok, FAUST, tools=[dict(name='library')])
    assert text.startswith('User: Be brief.') and 'library' in text and text.endswith('Who wrote Faust?<|im_end|>\nAssistant: ')

@pytest.mark.parametrize('msgs', [[dict(role='user', content='a'), dict(role='user', content='b')], [*FAUST[1:], dict(role='assistant', content='call'), dict(role='tool', content='4')],
                                  [*FAUST, dict(role='user', content='b')], [dict(role='user', content='a'), dict(role='assistant', content='x'), dict(role='system', content='z')]])
def test_what_a_template_refuses_is_a_refusal_in_its_own_words(msgs):
    tok = with_template(byte_tokenizer(), NO_SYSTEM+IN_TURN+SPACE)
    with pytest.raises(Refused, match='must alternate|not supported'): render(tok, msgs)
    with pytest.raises(HydraError, match='record x/.*(must alternate|not supported)'): encode(record(msgs, 'y', 'x'), tok)

def test_a_template_without_an_answer_is_refused_with_the_true_reason():
    for template in (SPACE.replace("m['content']", "m['content']|length|string"), "{% if add_generation_prompt %}Go: {% endif %}"):
        if 'length' in template: template = template.replace("'Assistant: '", "'Bot: '")
        with pytest.raises(Refused, match='does not write the answer'): render_split(with_template(byte_tokenizer(), template), FAUST[1:], [dict(role='assistant', content='Goethe.')])

def test_pads_are_masked_so_any_id_will_do(smol):
    "Case 7: neither eos nor pad; a pad that the embedding has no row for"
    bare = copy.deepcopy(smol); bare.eos_token = bare.pad_token = None
    added = copy.deepcopy(smol); added.add_special_tokens(dict(pad_token='[PAD]'))
    assert added.pad_token_id == 49152
    for tok in (bare, added):
        before = encode(RECORDS[1], tok).ids
        assert check_base(tok, 49152).pad_token_id < 49152
        assert tok(['a', 'a b c'], padding=True)['input_ids'] and encode(RECORDS[1], tok).ids == before
        assert tok.decode(ids_of(tok, 'Ahoy! #0'), skip_special_tokens=True) == 'Ahoy! #0'
    mute = with_template(bare, chatml.replace('<|im_end|>', ''))
    with pytest.raises(HydraError, match='base here: nothing says where an answer ends'): check_base(mute, 49152, 'here')
    with pytest.raises(HydraError, match='base here: it cannot write even one question'): check_base(with_template(bare, "{{ raise_exception('no') }}"), 49152, 'here')

def test_records_of_one_conversation_stay_on_one_side_whether_they_say_so_or_not():
    u, b = (lambda t, role=role: dict(role=role, content=t) for role in ('user', 'assistant'))
    for i in range(2):
        rows = [record([u('q')], 'a', 'x'), record([u('q'), b('a'), u('r')], 'c', 'x'), record([u('q'), b('a'), u('r'), b('c'), u('s')], 'd', 'x')][i:]
        assert len(set(sides(rows))) == 1
    shots = [u('1+1'), b('2')] # the same examples before every question make no conversation of them
    rows = [record([*shots, u(f'{i}+{i}')], str(2*i), 'x') for i in range(9)]
    assert len(set(sides(rows))) == 9
    assert len(set(sides([r | dict(group=i//3) for i, r in enumerate(rows)]))) == 3
    parts = split([r | dict(group=f'g{i%4}') for i, r in enumerate(rows)], dict(a=.5, b=.5))
    assert not {r['group'] for r in parts['a']} & {r['group'] for r in parts['b']}


# --- imports ---------------------------------------------------------------------------------------------------------

LIGHT_ROOMS = ['records', 'rows', 'splits', 'toy', 'cards', 'sources', 'tools', 'craft', 'load']

def test_cards_are_listed_without_torch_and_transformers():
    code = f'import sys; {"; ".join(f"import hydramoe.data.{m}" for m in LIGHT_ROOMS)}; from hydramoe.data.cards import card_names; assert card_names()'
    heavy = 'assert not {"torch", "transformers", "matplotlib", "reasoning_gym"} & set(sys.modules), sorted(sys.modules)'
    subprocess.run([sys.executable, '-c', f'{code}; {heavy}'], check=True)
