"Builds: killed, repeated, changed; and which rows go in"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from hydramoe.models.base import tiny_base
from hydramoe.models.load import load_base
from hydramoe.domains.examples import lesson_texts
from hydramoe.domains.embed import prompt_text
from hydramoe.foundations.core import HydraError, digest
from hydramoe import Hydra
from hydramoe.hydra.bundle import BundleError, check_bundle
from hydramoe.hydra.chat import Chat
from hydramoe.hydra.cascade import load_router
from helpers import TINY, files_in, here
from hydras import Fickle, fickle, save_base
from rows import jsonl, row
from templates import IN_TURN, NO_SYSTEM

# --- building --------------------------------------------------------------------------------------------------------

BUILD = """
import sys
sys.path.insert(0, {tests!r})
from test_build import build
build(sys.argv[1], shared=int(sys.argv[2]))
"""

def lesson_rows(answers=2):
    texts, topics = lesson_texts()
    about = dict(domain='user', source='mine', license='mine')
    return [row(t, ' '.join([a]*answers), id=str(i), **about) for i, (t, a) in enumerate(zip(texts, topics))]

BUILD_QUICKLY = dict(base='tiny', quant='fp32', encoder='words', k=3, epochs=6, tokens=20_000, shared=0)

def build(out, **kw):
    "Plain experts, without a shared one: `test_shared_build` has those that have one"
    return Hydra.build(lesson_rows(), out, **(BUILD_QUICKLY | kw))

def start_build(out, cache, seed='0', shared=0):
    code = BUILD.format(tests=str(Path(__file__).parent))
    env = os.environ | dict(HYDRAMOE_CACHE=str(cache), PYTHONHASHSEED=seed, HYDRAMOE_QUIET='1')
    return subprocess.Popen([sys.executable, '-c', code, str(out), str(shared)], env=env)

def test_build_does_not_depend_on_the_order_of_rows(tmp_path, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    a = build(tmp_path/'a', epochs=1)
    shuffled = lesson_rows()[::-1] + lesson_rows()[:5]
    b = Hydra.build(shuffled, tmp_path/'b', **(BUILD_QUICKLY | dict(epochs=1)))
    assert sorted(a.names) == sorted(b.names)

WISHES = [(dict(k=0), 'k=0'), (dict(k=99), 'k=99'), (dict(tokens=3), 'tokens=3'), (dict(max_length=1), 'max_length=1'),
          (dict(targets='no_proj'), 'no_proj'), (dict(rank=0), 'rank=0'), (dict(fork=2), 'can fork at 0 to 1'),
          (dict(fork=-1), 'fork=-1')]

def test_wishes_that_cannot_be_met(tmp_path, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path))
    for kw, words in WISHES:
        with pytest.raises(HydraError, match=words): build(None, **kw)
    assert not list((tmp_path/'stages').glob('seed_expert-*/seal.json'))
    with pytest.raises(HydraError, match='no records'): Hydra.build([], base='tiny')

@pytest.mark.slow
def test_killed_at_any_moment_the_bundle_is_the_same(tmp_path):
    assert start_build(tmp_path/'whole', tmp_path/'cache', '1').wait() == 0
    want, rounds = files_in(tmp_path/'whole'), 0
    for wait in (4, 6, 7, 8, 9, 10, 11):
        p = start_build(tmp_path/'killed', tmp_path/'cache2', '2')
        time.sleep(wait)
        rounds += p.poll() is None
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert rounds
    assert start_build(tmp_path/'killed', tmp_path/'cache2', '3').wait() == 0
    assert files_in(tmp_path/'killed') == want
    assert not list(tmp_path.glob('.writing-killed*')) or check_bundle(tmp_path/'killed')

ABILITIES = ['sings', 'swims', 'hunts mice', 'cannot fly', 'migrates', 'talks']
BIRDS = [row(f'Which bird {w}?', 'birds', id=f'b{i}', domain='user', source='mine', license='mine')
         for i,w in enumerate(ABILITIES)]

def sealed(bundle, *parts):
    "The files below these folders, and their digests"
    return {f: sha for f,sha in check_bundle(bundle)['files'].items() if f.startswith(parts)}

def test_one_more_and_one_less(tmp_path, monkeypatch):
    """The others keep every bit; the router is what fitting from scratch on these domains gives; taken out again,
    nothing is left of it"""
    from hydramoe.domains.embed import embed, prompt_text
    from hydramoe.domains.discover import Domains
    from hydramoe.hydra.change import add_expert, remove_expert
    from hydramoe.hydra.route import similarity_router
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    old = build(tmp_path/'old', epochs=1)
    add_expert(tmp_path/'old', BIRDS, 'birds', tmp_path/'new')
    before, after = sealed(tmp_path/'old', 'experts/'), sealed(tmp_path/'new', 'experts/')
    assert before.items()<=after.items()
    assert {f.split('/')[1] for f in after.keys()-before}=={'birds'}
    was, now = (load_router(tmp_path/b/'router') for b in ('old', 'new'))
    centroids = {n: was.arrays['centroids'][i] for i,n in enumerate(was.names)}
    centroids['birds'] = embed([prompt_text(r) for r in BIRDS], 'words').mean(0)
    domains = Domains(np.stack(list(centroids.values())), list(centroids), 'words')
    scratch = similarity_router(domains, was.params['temperature'])
    assert now.names==scratch.names
    assert now.params==scratch.params
    assert np.allclose(now.arrays['centroids'], scratch.arrays['centroids'], atol=1e-6)
    assert (now.arrays['centroids'][:-1]==was.arrays['centroids']).all()
    remove_expert(tmp_path/'new', 'birds', tmp_path/'back')
    assert sealed(tmp_path/'back', 'experts/', 'router/')==sealed(tmp_path/'old', 'experts/', 'router/')
    gone = old.names[1]
    remove_expert(tmp_path/'new', gone, tmp_path/'less')
    left = [n for n in now.names if n!=gone]
    r = load_router(tmp_path/'less'/'router')
    assert r.names==left
    stayed = np.stack([now.arrays['centroids'][now.names.index(n)] for n in left])
    assert (r.arrays['centroids']==stayed).all()
    assert sealed(tmp_path/'less', 'experts/').items()<=after.items()
    again = add_expert(tmp_path/'old', BIRDS, 'birds', tmp_path/'again')
    assert check_bundle(tmp_path/'again')['seal']==check_bundle(tmp_path/'new')['seal']
    assert again.names[-1]=='birds'
    fresh = add_expert(tmp_path/'old', BIRDS, 'birds', tmp_path/'fresh', start='fresh', root=tmp_path/'elsewhere')
    assert not torch.equal(fresh.model.stack.theta[-1], again.model.stack.theta[-1])

def test_a_router_that_cannot_grow_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    from hydramoe.domains.embed import embed, prompt_text
    from hydramoe.hydra.change import add_expert, remove_expert
    from hydramoe.hydra.route import classifier_router
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    h = build(tmp_path/'h', epochs=1)
    x = embed([prompt_text(r) for r in lesson_rows()], 'words')
    h.router = classifier_router(h.names, x, [h.names[i%3] for i in range(len(x))], encoder='words')
    h.save(tmp_path/'odd')
    made = set((tmp_path/'cache'/'stages').iterdir())
    def more(): add_expert(tmp_path/'odd', BIRDS, 'birds', tmp_path/'x')
    def less(): remove_expert(tmp_path/'odd', h.names[0], tmp_path/'x')
    for change in (more, less):
        with pytest.raises(HydraError, match='a classifier router is fitted on all prompts'): change()
    assert set((tmp_path/'cache'/'stages').iterdir())==made
    assert not (tmp_path/'x').exists()

def test_a_forked_build(tmp_path, monkeypatch):
    "The trunk is the seed expert below the fork, computed once for the experts; whoever joins later stands on it too"
    from hydramoe.experts import stages
    from hydramoe.hydra.change import add_expert, find_seed, remove_expert
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    cached, make = [], stages.cache_trunk
    def counted(*a, **kw):
        cached.append(1)
        return make(*a, **kw)
    monkeypatch.setattr(stages, 'cache_trunk', counted)
    plain = build(tmp_path/'plain', epochs=1)
    assert not cached
    h = build(tmp_path/'h', epochs=1, fork=.5)
    man = check_bundle(tmp_path/'h')
    assert len(cached)==1
    assert man['fork']==h.model.stack.fork==1
    assert man['built']['spec']['fork']==.5
    seed = load_file(find_seed(man['built'])/'seed'/'adapter_model.safetensors')
    above = {k for k in seed if '.layers.1.' in k}
    for n in h.names:
        own = load_file(tmp_path/'h'/'experts'/n/'adapter_model.safetensors')
        assert {k for k in seed if not torch.equal(seed[k], own[k])}==above
        assert own.keys()==seed.keys()
    more = add_expert(tmp_path/'h', BIRDS, 'birds', tmp_path/'more')
    assert len(cached)==2
    assert torch.equal(more.model.stack.trunk, h.model.stack.trunk)
    assert check_bundle(tmp_path/'more')['fork']==1
    assert sealed(tmp_path/'h', 'experts/').items()<=sealed(tmp_path/'more', 'experts/').items()
    remove_expert(tmp_path/'more', 'birds', tmp_path/'back')
    assert sealed(tmp_path/'back', 'experts/', 'router/')==sealed(tmp_path/'h', 'experts/', 'router/')
    first = tmp_path/'h'/'experts'/h.names[0]
    sibling = add_expert(tmp_path/'h', BIRDS, 'birds', tmp_path/'sibling', start=first, root=tmp_path/'elsewhere')
    assert torch.equal(sibling.model.stack.trunk, h.model.stack.trunk)
    starts = [
        ('fresh', 'does not stand on the trunk'),
        (tmp_path/'plain'/'experts'/plain.names[0], f'{plain.names[0]} is of another seed expert.*layers.0'),
        (tmp_path/'none', 'none.adapter_config.json does not exist')]
    for start, words in starts:
        with pytest.raises(HydraError, match=words):
            add_expert(tmp_path/'h', BIRDS, 'birds', tmp_path/'x', start=start)
    assert len(cached)==3
    with pytest.raises(BundleError, match='holds another Hydra'): build(tmp_path/'plain', epochs=1, fork=.5)

def test_a_build_without_a_fork_is_recorded_as_ever(tmp_path, monkeypatch):
    from hydramoe.hydra.spec import BuildSpec
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    build(tmp_path/'a', epochs=1, fork=0)
    man = check_bundle(tmp_path/'a')
    assert 'fork' not in man
    assert 'fork' not in man['built']['spec']
    assert BuildSpec(**man['built']['spec']).fork==0
    build(tmp_path/'a', epochs=1) # found whole

TRIED = {'similarity': 3, 'ridge': 4, 'ridge on states': 8, 'uniform': 10} # which candidate is made the best

@pytest.mark.parametrize('which', TRIED)
def test_whichever_router_a_build_keeps_experts_join_and_leave(which, tmp_path, monkeypatch):
    "The one of least perplexity is kept, saved and named on the card; one expert more and out again leaves not a bit"
    from hydramoe.hydra import build as built
    from hydramoe.hydra.model import explain_bundle
    from hydramoe.hydra.change import add_expert, remove_expert
    from hydramoe.hydra.cascade import needs_base
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    best, kind = TRIED[which], which.split()[0]
    seen = []
    def told(model, examples, gates):
        seen.append(gates)
        return 1. if len(seen)-1==best else 2.
    monkeypatch.setattr(built, 'routed_perplexity', told)
    old = build(tmp_path/'old', epochs=1, dev=.5)
    assert len(seen)==12==2+sum(map(len, built.TEMPERATURES.values()))
    assert seen[-1] is None
    assert old.router.kind==kind==load_router(tmp_path/'old'/'router').kind
    assert needs_base(old.router)==('states' in which)
    card = (tmp_path/'old'/'README.md').read_text()
    tried = [s['system'] for s in check_bundle(tmp_path/'old')['built']['scores']]
    assert len(tried)==12
    assert all(f'| {n} |' in card for n in tried)
    assert f'The {tried[1+best]} was chosen by them' in card
    assert (seen[best]==seen[10]).all()==(kind=='uniform')
    add_expert(tmp_path/'old', BIRDS, 'birds', tmp_path/'new')
    new = Hydra.load(tmp_path/'new')
    assert explain_bundle(tmp_path/'new', 'Which bird?')[0]==new.explain('Which bird?')
    assert new.router.kind==kind
    assert new.router.names==[*old.names, 'birds']
    if kind!='uniform': assert new.gates([prompt(r) for r in BIRDS])[:,-1].mean()>.5
    remove_expert(tmp_path/'new', 'birds', tmp_path/'back')
    assert sealed(tmp_path/'back', 'experts/', 'router/')==sealed(tmp_path/'old', 'experts/', 'router/')
    assert 'was chosen by them' not in (tmp_path/'back'/'README.md').read_text()

def prompt(r): return r['prompt'][0]['content']

def test_a_tie_goes_to_the_simplest_and_few_rows_choose_nothing(tmp_path, monkeypatch):
    from hydramoe.hydra import build as built
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(built, 'routed_perplexity', lambda *_: 2.)
    tied = build(tmp_path/'tied', epochs=1, dev=.5).router
    assert (tied.kind, tied.params['temperature'])==('similarity', .02)
    asked = iter(range(99))
    def less_each_time(*_): return float(-next(asked))
    monkeypatch.setattr(built, 'routed_perplexity', less_each_time)
    few = build(tmp_path/'few', epochs=1).router
    assert (few.kind, few.params['temperature'])==('similarity', .05)
    assert 'chosen by them' not in (tmp_path/'few'/'README.md').read_text()

def test_what_was_measured_is_what_is_kept(tmp_path, monkeypatch):
    "Nothing pretended: the router in the bundle is the first of least perplexity"
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    h = build(tmp_path/'h', epochs=3, dev=.5, lr=5e-3)
    scores = {s['system']: s['ppl'] for s in h.about['built']['scores'] if s['system']!='base'}
    best = min(scores, key=scores.get)
    assert best.startswith(h.router.kind)
    assert h.router.kind=='uniform' or best.endswith(f" {h.router.params['temperature']}")

@pytest.mark.slow
def test_groups_and_workers(tmp_path, monkeypatch):
    "Three experts in groups of two by a small memory: the same bundle here and in two processes"
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    memory = 2*20*17_000/1e9
    a = build(tmp_path/'a', epochs=1, memory=memory, root=tmp_path/'one')
    two = tmp_path/'two'
    b = build(tmp_path/'b', epochs=1, memory=memory, root=two, run=dict(executor='local', workers=2))
    assert len(list(two.glob('experts_stage-*/seal.json')))==2
    assert len(list(two.glob('collect_experts_stage-*/seal.json')))==1
    assert files_in(tmp_path/'a')==files_in(tmp_path/'b')
    assert a.names==b.names

# --- rows in the light of the base, and on which side of the split ----------------------------------------------------

def strict_base(to, change=lambda t: t, refuses=NO_SYSTEM+IN_TURN):
    "The tiny base in a folder, with a template that refuses system turns and roles that do not alternate"
    b = tiny_base()
    b.tokenizer.chat_template = refuses + b.tokenizer.chat_template
    change(b.tokenizer)
    return str(save_base(b, to))

def lines(file, rows):
    file.write_text(jsonl(rows)+'\n')
    return file

GOOD = [dict(prompt=f'What is {i} plus {i}?', completion=str(2*i)) for i in range(40)]
ASK_TOOL = [dict(role='user', content='2+2?'), dict(role='assistant', content='add(2, 2)'),
            dict(role='tool', content='4')]
TOOL = dict(prompt=ASK_TOOL, completion='It is 4.')
TWO_EXPERTS = dict(quant='fp32', encoder='words', k=2, epochs=1, rank=2)

def test_rows_that_a_template_refuses_are_folded_or_named_and_the_rest_is_trained_on(tmp_path):
    """Case 3: one row with a system turn is repaired and counted, one with a tool's answer is a reject with file, line
    and the template's words, a long one and those beyond the budget are named"""
    from hydramoe.hydra.spec import BuildSpec
    from hydramoe.hydra.rows import gather_rows, left_out
    base = strict_base(tmp_path/'base')
    brief = dict(system='Be brief.', prompt='Who wrote Faust?', completion='Goethe.')
    f = lines(tmp_path/'mine.jsonl', [*GOOD, brief, TOOL, dict(prompt='long', completion='x'*400)])
    how = dict(base=base, tokens=900, **TWO_EXPERTS)
    h = Hydra.build(f, tmp_path/'h', tmp_path/'stages', **how)
    dealt = 'dealt by conversation, whole, and rows with one prompt count as one: 4 rows of 4 conversations'
    assert dealt in (tmp_path/'h'/'README.md').read_text()
    c = h.about['built']['counts']
    assert (c['rows'], c['refused'], c['folded'], c['too_long']) == (43, 1, 1, 1)
    assert c['beyond_tokens'] > 0
    assert c['rows'] == c['train']+c['dev']+c['refused']+c['too_long']+c['beyond_tokens']+c['twice']
    lost = {r['line']: r for r in left_out(gather_rows(f)[0], BuildSpec(**how), tmp_path/'stages')}
    assert len(lost) == c['rows']-c['train']-c['dev']
    for r in lost.values():
        assert r['file'] == str(f)
        assert json.loads(r['raw'])['prompt']
    assert 'Conversation roles must alternate' in lost[42]['reason']
    assert lost[43]['reason'] == 'longer than max_length=300: answer has 402 tokens'
    assert {r['reason'] for n, r in lost.items() if n < 42} == {'beyond tokens=900'}

def test_a_system_turn_is_heard_alike_by_everyone(tmp_path):
    """ask, chat, explain, the router and the model of transformers see the folded turn; what the template refuses is
    one HydraError in its words"""
    from hydramoe.hydra.auto import HydraForCausalLM
    base = load_base(strict_base(tmp_path/'base'), 'fp32', 'cpu')
    h, seen = fickle(base), []
    class Told(Fickle):
        def __call__(self, prompts):
            seen.extend(prompts)
            return super().__call__(prompts)
    h.router = Told()
    asked = [dict(role='system', content='law'), dict(role='user', content='sea?')]
    folded = [dict(role='user', content='law\n\nsea?')]
    answer = h.ask(asked, max_new_tokens=6)
    assert answer == h.ask(folded, max_new_tokens=6)
    assert answer == h.ask(folded, expert='law', max_new_tokens=6)
    chat = Chat(h, 'law')
    assert chat('sea?', max_new_tokens=6) == answer
    more = chat('more?', max_new_tokens=6)
    assert more == h.ask(chat.messages[:-1], expert=chat.turns[-1]['experts'], max_new_tokens=6)
    x = base.tokenizer.apply_chat_template(folded, add_generation_prompt=True, return_tensors='pt', return_dict=True)
    assert torch.equal(HydraForCausalLM(h).gates_for(x['input_ids']), h.gates([asked]))
    assert seen
    for p in seen:
        assert p[0]['role'] == 'user'
        assert p[0]['content'].startswith('law\n\n')
    words = 'chat template refuses .*Conversation roles must alternate.*give turns'
    def generate(p): return h.generate([p, 'hi'])
    for bad in ([*asked, dict(role='user', content='x')], TOOL['prompt']):
        for f in (h.ask, generate):
            with pytest.raises(HydraError, match=words): f(bad)

def test_if_the_base_refuses_every_row_the_first_are_named_by_line(tmp_path):
    from hydramoe.hydra.spec import BuildSpec
    from hydramoe.hydra.rows import run_deal, gather_rows
    base = strict_base(tmp_path/'base')
    f = lines(tmp_path/'mine.jsonl', [TOOL | dict(completion=str(i)) for i in range(5)])
    words = (r'of 5 rows none is left to train on: 5 are refused.*mine.jsonl line 1: .*must alternate.*'
             r'mine.jsonl line 2')
    with pytest.raises(HydraError, match=words): Hydra.build(f, root=tmp_path/'stages', base=base, **TWO_EXPERTS)
    strict_base(tmp_path/'base', refuses='') # the way out: another template, and no stale stage in the way
    assert run_deal(gather_rows(f)[0], BuildSpec(base=base), tmp_path/'stages')[1]['train'] == 5

def without_ends(t):
    t.eos_token = None
    t.pad_token = None

def ends_by_configuration(t):
    "Its config.json says where an answer ends"
    t.eos_token = None
    t.chat_template = t.chat_template.replace('<|im_end|>', '')

def ends_beyond_embedding(t):
    t.add_tokens('<|end|>', special_tokens=True)
    t.chat_template = t.chat_template.replace('im_end', 'end')

CHANGES = [
    (lambda t: without_ends(t), True), (lambda t: t.add_special_tokens(dict(pad_token='[PAD]')), True),
    (lambda t: ends_by_configuration(t), True),
    (lambda t: ends_beyond_embedding(t), r"writes '<\|end\|>' \(token 259\), and the embedding has 259 rows: enlarge")]

@pytest.mark.parametrize('change,works', CHANGES)
def test_a_pad_is_found_and_a_base_that_cannot_serve_is_refused_before_training(tmp_path, change, works):
    "Case 7"
    from hydramoe.models.hidden import pooled_state
    base = strict_base(tmp_path/'base', change)
    f = lines(tmp_path/'mine.jsonl', GOOD)
    if works is True:
        b = load_base(base, 'fp32', 'cpu')
        ask = [dict(prompt=[dict(role='user', content=t)]) for t in ('a', 'a longer prompt')]
        assert b.tokenizer.pad_token_id < 259
        alone = np.concatenate([pooled_state([p], b, 1) for p in ask])
        assert np.allclose(pooled_state(ask, b, 1), alone, atol=1e-5)
        h = fickle(b)
        prompts = [p['prompt'] for p in ask]
        assert h.generate(prompts, max_new_tokens=4) == [h.ask(p, max_new_tokens=4) for p in prompts]
        return
    with pytest.raises(HydraError, match=works): Hydra.build(f, root=tmp_path/'stages', base=base, **TWO_EXPERTS)
    with pytest.raises(HydraError, match=works): load_base(base, 'fp32', 'cpu')
    assert not list((tmp_path/'stages').glob('*/seal.json'))

def test_a_token_without_an_embedding_costs_its_row_and_not_the_build(tmp_path):
    from hydramoe.hydra.spec import BuildSpec
    from hydramoe.hydra.rows import gather_rows, left_out
    base = strict_base(tmp_path/'base', lambda t: t.add_tokens('[NEW]', special_tokens=True))
    f = lines(tmp_path/'mine.jsonl', [*GOOD, dict(prompt='What is [NEW]?', completion='new')])
    lost, = left_out(gather_rows(f)[0], BuildSpec(base=base), tmp_path/'stages')
    h = fickle(load_base(base, 'fp32', 'cpu'))
    assert lost['line'] == 41
    assert "holds '[NEW]' (token 259), and the embedding of the base has 259 rows" in lost['reason']
    for f in (h.ask, h.explain, Chat(h)):
        with pytest.raises(HydraError, match=r"the prompt holds '\[NEW\]'"): f('[NEW]')

def talk(i, turns):
    "A conversation of which nothing is said twice"
    said = [dict(role=r, content=f'{r} says {i} and {t}') for t in range(turns) for r in ('user', 'assistant')]
    return dict(messages=said)

def parts(d):
    "The rows on both sides of the split"
    def read(p): return [json.loads(l) for l in (d/f'{p}.jsonl').read_text().splitlines()]
    return {p: read(p) for p in ('train', 'dev')}

@pytest.mark.parametrize('grouped', [True, False])
def test_one_conversation_one_side(tmp_path, grouped):
    """Case 6: 25 conversations of 4 turns; no development row has its conversation in training, also where the records
    do not say what they share"""
    from hydramoe.hydra.spec import BuildSpec
    from hydramoe.hydra.rows import run_deal, gather_rows
    rows = gather_rows(lines(tmp_path/'talks.jsonl', [talk(i, 4) for i in range(25)]))[0]
    if not grouped: rows = [{k: v for k, v in r.items() if k != 'group'} for r in rows]
    for seed in range(4):
        d, counts = run_deal(rows, BuildSpec(base='tiny', seed=seed), tmp_path/'stages')
        p = parts(d)
        trained, held = ({prompt(r) for r in p[side]} for side in ('train', 'dev'))
        assert not held & trained
        assert 8 <= len(p['dev']) <= 12
        said = {m['content'] for r in p['train'] for m in r['prompt']}
        assert not [r for r in p['dev'] if r['completion'][0]['content'] in said]
        assert (counts['groups'], counts['dev_groups']) == (25, len(held))

def test_rows_without_conversations_are_dealt_as_ever(tmp_path):
    from hydramoe.hydra.spec import BuildSpec
    from hydramoe.hydra.rows import row_digest, run_deal
    rows = [row(f'q{i}', f'a{i}', domain='d') for i in range(90)]
    order = sorted(map(row_digest, rows), key=lambda i: digest([5, i]))
    p = parts(run_deal(rows, BuildSpec(base='tiny', dev=.2, seed=5), tmp_path)[0])
    assert [r['id'] for r in p['dev']] == order[:18]
    assert [r['id'] for r in p['train']] == order[18:]

@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=25), st.floats(0, .5), st.integers(0, 3))
def test_groups_are_dealt_whole_and_about_so_many_as_were_asked_for(sizes, dev, seed):
    from hydramoe.hydra.rows import choose_dev
    side = {f'{i} {j}': str(i) for i, n in enumerate(sizes) for j in range(n)}
    held, groups, taken = choose_dev(side, dev, seed)
    whole = [i for i in range(len(sizes)) if f'{i} 0' in held]
    assert len(held) == sum(sizes[i] for i in whole)
    assert taken == len(whole)
    assert groups == len(sizes)
    assert len(held) < len(side)
    wished = min(200, int(dev*len(side)))
    assert abs(len(held)-wished) <= max(sizes)

def test_one_group_alone_is_trained_on_and_answers_to_one_prompt_stay_together(tmp_path):
    from hydramoe.hydra.spec import BuildSpec
    from hydramoe.hydra.rows import run_deal, keep_records
    rows = [row(f'q{i}', f'a{i}', domain='d') for i in range(30)]
    one = [dict(r, group='mine') for r in rows]
    assert keep_records(one, tmp_path) != keep_records(rows, tmp_path)
    counts = run_deal(one, BuildSpec(base='tiny', dev=.4), tmp_path)[1]
    assert (counts['train'], counts['dev'], counts['groups']) == (30, 0, 1)
    twice = [dict(r, completion=[dict(role='assistant', content=a)]) for r in rows for a in 'xy']
    p = parts(run_deal(twice, BuildSpec(base='tiny', dev=.3), tmp_path)[0])
    assert len(p['dev']) == 18
    trained, held = ({prompt_text(r) for r in p[side]} for side in ('train', 'dev'))
    assert not held & trained

def test_too_few_prompts_for_the_default_k(tmp_path):
    """A hundred answers to three prompts make at most three domains; what cannot be built is refused by a dry run
    too"""
    from hydramoe.use.build_commands import dry_run
    from hydramoe.hydra.spec import BuildSpec, resolve_spec
    from hydramoe.hydra.rows import run_deal
    from hydramoe.hydra.build import run_discovery
    prompts = ['sea', 'law', ' LAW ', 'sum of it']
    rows = [row(prompts[i%4], str(i), domain='d') for i in range(100)]
    how = dict(base='tiny', quant='fp32', encoder='words', rank=2, dev=0.)
    d, c = run_deal(rows, BuildSpec(**how), tmp_path)
    spec = resolve_spec(BuildSpec(**how), c['train'], c['prompts'])
    run_discovery(d, c, spec, tmp_path) # the clusters of a build
    assert spec.k == 3
    assert dry_run(rows, BuildSpec(**how))[1]['spec']['k'] == 3
    words = 'k=4 experts cannot be made from 100 training rows, of whose prompts 3 differ'
    with pytest.raises(HydraError, match=words): dry_run(rows, BuildSpec(k=4, **how))

def test_the_command_names_what_the_base_refuses(tmp_path):
    base = strict_base(tmp_path/'base')
    lines(tmp_path/'mine.jsonl', [*GOOD, TOOL, dict(nothing=1)])
    rejects = tmp_path/'mine-hydra.rejects.jsonl'
    build = ['build', 'mine.jsonl', *TINY, '--base', base, '--k', 1, '--epochs', 1, '--rank', 2]
    for more in (['--dry-run'], []):
        out = here(*build, *more, cwd=tmp_path)
        assert out.returncode == 0
        assert '2 rows were refused or left out' in out.stderr
        lost = {r['line']: r for r in map(json.loads, rejects.read_text().splitlines())}
        assert set(lost) == {41, 42}
        assert 'must alternate' in lost[41]['reason']
        assert lost[41]['file'] == lost[42]['file'] == 'mine.jsonl'
        rejects.unlink()
    out = here('add', 'mine-hydra', 'mine.jsonl', '--name', 'more', cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert (tmp_path/'mine-hydra-with-more.rejects.jsonl').read_text().count('\n') == 2, out.stderr
    lines(tmp_path/'bad.jsonl', [TOOL, dict(nothing=1)])
    out = here('build', 'bad.jsonl', '--base', base, cwd=tmp_path)
    assert out.returncode == 2
    assert 'bad.jsonl line 1' in out.stderr
    assert (tmp_path/'bad-hydra.rejects.jsonl').read_text().count('\n') == 2
