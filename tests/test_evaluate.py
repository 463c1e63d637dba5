"""Systems as lm-eval asks them: equal to lm-eval's own model on merged weights, one by one or in batches;
kept, resumed, compared"""
import json, os, signal, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy import stats

lm_eval = pytest.importorskip('lm_eval')
from lm_eval.api.instance import Instance # noqa: E402
from lm_eval.api.model import CachingLM # noqa: E402
from lm_eval.models.huggingface import HFLM # noqa: E402

from hydramoe.foundations.core import HydraError, rng # noqa: E402
from hydramoe.foundations.files import read_json, read_jsonl, write_bytes, write_jsonl # noqa: E402
from hydramoe.models.base import tiny_base # noqa: E402
from hydramoe.models.load import load_base # noqa: E402
from hydramoe.models.template import render # noqa: E402
from hydramoe.hydra import Hydra # noqa: E402
from hydramoe.hydra.adopt import adopt # noqa: E402
from hydramoe.proof.evaluate import hydra_lm, hydra_lm_class, last_question, route_texts, score_pairs # noqa: E402
from hydramoe.proof.systems import System, answer_rows, build_requests, comparison, evaluate_systems # noqa: E402
from hydramoe.proof.systems import evaluate_task, first_system, forecast_evaluation, item_values # noqa: E402
from hydramoe.proof.systems import load_tasks, lm_answers_stage # noqa: E402
from hydramoe.proof.systems import mean_interval, open_lm, paired_interval, request_rows, run_system_stage # noqa: E402
from hydramoe.proof.systems import ratio_interval, sample_requests, systems_of, write_results # noqa: E402
from hydramoe.use.command import run_shell # noqa: E402
from hydramoe.use.eval_command import EVAL_COMMANDS # noqa: E402
from helpers import files_in, forked, root # noqa: E402
from hydras import NAMES, TEXTS, by_hand, fickle, save_base # noqa: E402

CHOICES = ['yes', 'no', 'perhaps', 'a long answer', 'A', 'B']
PAIRS = [(f'{text}:', f' {choice}') for text in TEXTS for choice in CHOICES]+[('', 'nothing before it')]
LONG = [('law '*9,), ('sea',), ('a sum of numbers, and a few more of them',)]
# no letter of the template's marks, where lm-eval would stop too
STOP = dict(until=['\n', '['], max_gen_toks=7, do_sample=False)
KINDS = dict(loglikelihood=PAIRS, loglikelihood_rolling=LONG, generate_until=[(text, STOP) for text in TEXTS])

def ask(lm, kind, arguments=None):
    "What a model of lm-eval answers"
    requests = [Instance(kind, {}, one, i) for i, one in enumerate(arguments or KINDS[kind])]
    return getattr(lm, kind)(requests)

def same(kind, a, b, within=1e-4):
    "Are two lists of answers the same? Numbers within a little, flags and texts exactly"
    if len(a)!=len(b): return False
    if kind=='generate_until': return a==b
    a = np.array(a, float)
    b = np.array(b, float)
    if kind=='loglikelihood' and (a[:,1]!=b[:,1]).any(): return False
    return np.abs(a-b).max()<=within

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Bundles of noise, and their experts merged by PEFT"
    d = tmp_path_factory.mktemp('evaluate')
    by_hand().save(d/'b')
    by_hand(fork=1).save(d/'forked')
    adopt({name: d/'b'/'experts'/name for name in NAMES}, d/'gated', 'tiny', 'fp32', 'lag')
    return d

def reference(made, bundle='b', expert='sea', **how):
    "lm-eval's own class on an expert that PEFT merged"
    base = tiny_base()
    model = base.model
    if expert!='base': model = PeftModel.from_pretrained(model, made/bundle/'experts'/expert).merge_and_unload()
    return HFLM(model, 'causal', tokenizer=base.tokenizer, **how)

# ---- a fixed expert is the merged model

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', [1, 3, 16])
@pytest.mark.parametrize('bundle, expert', [('b', 'sea'), ('forked', 'law'), ('b', 'base'), ('forked', 'base')])
def test_a_fixed_expert_answers_as_the_merged_model(made, kind, size, bundle, expert):
    ours = ask(hydra_lm(Hydra.load(made/bundle), expert, size), kind)
    assert same(kind, ours, ask(reference(made, bundle, expert), kind))
    if expert!='base': # the expert does something
        assert not same(kind, ours, ask(reference(made, bundle, 'base'), kind))

def test_a_greedy_answer_is_called_so(made):
    hydra = Hydra.load(made/'b')
    context = hydra.base.tokenizer.encode(TEXTS[0])
    gates = hydra.gates(['any'], 'sea')
    whole = hydra.model.generate(torch.tensor([context]), gates=gates, max_new_tokens=3, do_sample=False)
    said = whole[0,len(context):].tolist()
    answers = [said, [*said[:-1], said[-1]+1], [said[0]+1, *said[1:]]] # the last one is fed another token
    scores = dict(score_pairs(hydra.model, [(context, answer) for answer in answers], [gates[0]]*3, 2048))
    assert [scores[i][1] for i in range(3)]==[True, False, False]

@pytest.mark.parametrize('kind', ['loglikelihood', 'loglikelihood_rolling'])
def test_what_is_too_long_is_cut_as_lm_eval_cuts_it(made, kind):
    ours = hydra_lm(Hydra.load(made/'b'), 'sea', max_length=16)
    arguments = KINDS[kind][:18]
    assert same(kind, ask(ours, kind, arguments), ask(reference(made, max_length=16), kind, arguments))
    assert not same(kind, ask(ours, kind, arguments), ask(reference(made), kind, arguments))
    with pytest.raises(HydraError, match='the base reads 16'):
        ask(ours, 'loglikelihood', [('short', 'an answer that is longer')])

def test_a_gate_answers_as_its_own_forward(made):
    hydra = Hydra.load(made/'gated')
    lm = hydra_lm(hydra, batch_size=4)
    scores = ask(lm, 'loglikelihood')
    context, answer = lm._encode_pair(*PAIRS[0])
    with torch.no_grad(): out = hydra.model(torch.tensor([context+answer]), gates=hydra.gate).logits[0].log_softmax(-1)
    alone = sum(out[len(context)+i-1, token].item() for i, token in enumerate(answer))
    assert abs(scores[0][0]-alone)<1e-4
    assert not same('loglikelihood', scores, ask(hydra_lm(hydra, 'base'), 'loglikelihood'))
    assert len(ask(lm, 'generate_until'))==len(TEXTS)

# ---- batches of several experts

@pytest.mark.parametrize('fork', [0, 1])
@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_of_several_experts_is_as_one_by_one(kind, fork):
    hydra = fickle(fork=fork)
    repeats = [f'{name} and {"more "*i}' for i, name in enumerate([*NAMES, 'none'])]
    arguments = KINDS[kind]+[(text, *KINDS[kind][0][1:]) for text in repeats]
    together = ask(hydra_lm(hydra, batch_size=5), kind, arguments)
    alone = [ask(hydra_lm(hydra, batch_size=1), kind, [one])[0] for one in arguments]
    assert same(kind, together, alone)
    for name in ('law', 'sea', 'base'): # and it isn't one expert for all
        assert not same(kind, together, ask(hydra_lm(hydra, name), kind, arguments))

def test_equal_rows_of_different_experts_are_not_taken_for_one():
    lm = hydra_lm(fickle())
    lm.reads = {'ab': 'law', 'abc': 'sea'} # ab|cd and abc|d are fed the same tokens
    together = ask(lm, 'loglikelihood', [('ab', 'cd'), ('abc', 'd')])
    alone = [ask(lm, 'loglikelihood', [one])[0] for one in [('ab', 'cd'), ('abc', 'd')]]
    assert same('loglikelihood', together, alone)
    lm.routes.clear()
    lm.reads = dict.fromkeys(lm.reads, 'law')
    assert not same('loglikelihood', together, ask(lm, 'loglikelihood', [('ab', 'cd'), ('abc', 'd')]))

def test_answers_that_differ_in_the_last_token_are_one_forward():
    hydra = by_hand()
    sizes = []
    def count_rows(module, args, kwargs, out): sizes.append(len(kwargs['input_ids']))
    hook = hydra.model.base.base_model.register_forward_hook(count_rows, with_kwargs=True)
    ask(hydra_lm(hydra, 'law'), 'loglikelihood', [('which?', c) for c in 'ABCD'])
    hook.remove()
    assert sizes==[1]

def test_the_router_is_asked_once_for_a_context(monkeypatch):
    hydra = fickle()
    read = []
    gates = hydra.gates
    def noted(prompts, expert=None):
        read.extend(prompts)
        return gates(prompts, expert)
    monkeypatch.setattr(hydra, 'gates', noted, raising=False)
    lm = hydra_lm(hydra)
    for kind in KINDS: ask(lm, kind)
    asked = {one[0] for arguments in KINDS.values() for one in arguments}-{''}
    assert sorted(read)==sorted(asked)

# ---- what the router reads

def test_the_last_turn_of_the_user_is_read(tiny):
    turns = [dict(role='user', content='first'), dict(role='assistant', content='second'),
             dict(role='user', content='last\n\none')]
    assert last_question(tiny.tokenizer, render(tiny.tokenizer, turns))=='last\n\none'
    assert last_question(tiny.tokenizer, 'Q: one\n\nQ: two')=='Q: one\n\nQ: two'

@pytest.mark.parametrize('chat', [False, True])
def test_of_a_task_the_question_is_read_without_examples_and_template(made, tmp_path, chat):
    tasks = load_tasks([task_of(tmp_path, shots=2)])
    template = open_lm(System('b', str(made/'b'))).apply_chat_template if chat else None
    rows = request_rows(tasks, build_requests(tasks['toy'], 3, template))
    assert [row['read'] for row in rows[::2]]==[f'{TEXTS[i]}?' for i in range(3)]
    assert all(row['read'] in row['args'][0] and len(row['args'][0])>len(row['read']) for row in rows)
    assert ('<|im_start|>' in rows[0]['args'][0])==chat

def test_nothing_to_read_is_all_experts_alike_and_no_weight_is_the_base():
    assert np.allclose(route_texts(fickle(), [''])[0], 1/3)
    assert route_texts(fickle(), ['none of them', 'law'])[0] is None

# ---- lm-eval's cache

def test_lm_evals_response_cache_is_filled_and_read(tmp_path):
    lm = hydra_lm(fickle())
    cached = CachingLM(lm, str(tmp_path/'kept.db'))
    before = {kind: ask(cached, kind) for kind in KINDS}
    lm.hydra = None # whoever is asked now fails
    assert {kind: ask(cached, kind) for kind in KINDS}==before

@pytest.mark.parametrize('kind', KINDS)
def test_each_answer_is_kept_when_it_is_known(kind):
    lm = hydra_lm(fickle(), batch_size=2)
    kept = {}
    def keep(attr, args, answer): kept[json.dumps([attr, *args])] = answer
    lm.cache_hook = SimpleNamespace(add_partial=keep)
    answers = ask(lm, kind)
    assert kept=={json.dumps([kind, *args]): answer for args, answer in zip(KINDS[kind], answers)}

# ---- systems and tasks

def task_of(folder, name='toy', shots=0, n=9, **more):
    "A task of two choices about the texts"
    rows = [dict(q=f'{TEXTS[i%3]}?', right=i%2) for i in range(n)]
    file = write_jsonl(folder/f'{name}.jsonl', rows)
    metric = dict(metric='acc', aggregation='mean', higher_is_better=True)
    return dict(task=name, dataset_path='json', test_split='test', dataset_kwargs=dict(data_files=dict(test=str(file))),
                output_type='multiple_choice', doc_to_text='{{q}}', doc_to_choice=['yes', 'perhaps'],
                doc_to_target='right', num_fewshot=shots, fewshot_split='test', metric_list=[metric])|more

GENERATED = dict(output_type='generate_until', doc_to_choice=None, doc_to_target='q', generation_kwargs=STOP,
                 metric_list=[dict(metric='exact_match', aggregation='mean', higher_is_better=True)])

def test_a_word_is_a_system(made, tmp_path):
    first = first_system(str(made/'b'))
    adapter = made/'b'/'experts'/'sum'
    found = systems_of(first, ['base', 'law', f'single={adapter}', f'other={made}/forked', 'model=tiny'])
    assert [s.name for s in found]==['b', 'base', 'law', 'single', 'other', 'model']
    assert (found[1].expert, found[2].expert, found[3].adapter)==('base', 'law', str(adapter))
    assert found[4].bundle==f'{made}/forked'
    assert found[5].bundle is None
    assert found[5].base=='tiny'
    for words, said in [(['lwa'], "did you mean 'law'"), (['law', 'law'], 'two systems')]:
        with pytest.raises(HydraError, match=said): systems_of(first, words)
    with pytest.raises(HydraError, match='has no experts'): systems_of(first_system('tiny'), ['base'])

def test_systems_that_are_the_same_model_answer_the_same(made):
    first = first_system(str(made/'b'))
    systems = systems_of(first, ['base', 'sum', f'single={made}/b/experts/sum', 'model=tiny'])
    answers = {s.name: ask(open_lm(s), 'loglikelihood') for s in systems}
    assert same('loglikelihood', answers['sum'], answers['single'])
    assert same('loglikelihood', answers['base'], answers['model'])
    assert not same('loglikelihood', answers['sum'], answers['base'])

def test_any_model_of_transformers_is_a_system(made, tmp_path):
    save_base(tiny_base(), tmp_path/'model')
    task = load_tasks([task_of(tmp_path)])['toy']
    found = [evaluate_task(first_system(str(place)), task, root=tmp_path/'s') for place in ('tiny', tmp_path/'model')]
    assert found[0]['results']==found[1]['results']

def test_a_changed_bundle_at_the_same_place_is_opened_anew(made, tmp_path):
    system = System('x', str(tmp_path/'x'))
    by_hand().save(tmp_path/'x')
    before = ask(open_lm(system), 'loglikelihood')
    (tmp_path/'x').rename(tmp_path/'y')
    by_hand(fork=1).save(tmp_path/'x')
    assert not same('loglikelihood', ask(open_lm(system), 'loglikelihood'), before)

def test_tasks_are_dicts_or_files_of_a_folder_that_was_named(tmp_path):
    write_bytes(tmp_path/'tasks'/'mine.yaml', json.dumps(task_of(tmp_path, 'mine')).encode())
    assert list(load_tasks([task_of(tmp_path), 'mine'], tmp_path/'tasks'))==['toy', 'mine']
    unsafe = task_of(tmp_path, unsafe_code=True)
    missing = task_of(tmp_path, dataset_kwargs=dict(data_files=dict(test='/no.jsonl')))
    with pytest.raises(HydraError, match='--allow-code'): load_tasks([unsafe])
    with pytest.raises(HydraError, match='is no folder'): load_tasks(['mine'], include=tmp_path/'no')
    with pytest.raises(HydraError, match='could not load it'): load_tasks([missing])
    assert list(load_tasks([task_of(tmp_path, unsafe_code=True)], allow_code=True))==['toy']

@pytest.mark.slow # lm-eval reads its whole index
def test_an_unknown_task_and_a_path_are_refused_with_what_is_near(tmp_path):
    file = write_bytes(tmp_path/'mine.yaml', json.dumps(task_of(tmp_path, 'mine')).encode())
    with pytest.raises(HydraError, match='did you mean .*arc_easy'): load_tasks(['arc_eazy'])
    with pytest.raises(HydraError, match='not known'): load_tasks([str(file)])

# ---- answers that are kept

def test_scores_are_lm_evals_own_on_the_merged_model(made, tmp_path):
    for task in (task_of(tmp_path, shots=2), task_of(tmp_path, 'said', **GENERATED)):
        system = System('sea', str(made/'b'), expert='sea')
        ours = evaluate_task(system, load_tasks([task])[task['task']], root=tmp_path/'s')
        from lm_eval.tasks import TaskManager
        manager = TaskManager(include_defaults=False)
        how = dict(task_manager=manager, bootstrap_iters=0, fewshot_random_seed=0)
        theirs = lm_eval.simple_evaluate(reference(made), tasks=[task], **how)
        assert ours['results']==theirs['results']
        for a, b in zip(ours['samples'][task['task']], theirs['samples'][task['task']]):
            assert a['doc_hash']==b['doc_hash']
            assert a['prompt_hash']==b['prompt_hash']

def test_all_systems_are_asked_the_same_worked_examples(made, tmp_path):
    tasks = load_tasks([task_of(tmp_path, shots=3)])
    found = evaluate_systems(systems_of(first_system(str(made/'b')), ['base']), tasks, root=tmp_path/'s')['toy']
    prompts = [[sample['prompt_hash'] for sample in results['samples']['toy']] for results in found.values()]
    assert prompts[0]==prompts[1]
    assert len(set(prompts[0]))>1

def stages_in(root): return sorted(p.name for p in Path(root).iterdir() if p.name[0]!='.')

def test_a_change_of_scoring_asks_nothing_and_one_of_a_prompt_everything(made, tmp_path):
    def run(place='b', batch_size=8, expert=None, **more):
        "How many sealed answers there are after an evaluation"
        system = System('any name', str(made/place), expert=expert)
        tasks = load_tasks([task_of(tmp_path, **more)])
        evaluate_task(system, tasks['toy'], batch_size=batch_size, root=tmp_path/'s')
        return len(stages_in(tmp_path/'s'))
    assert run()==1
    assert run(doc_to_target=0)==1
    assert run(metric_list=[dict(metric='acc_norm', aggregation='mean', higher_is_better=True)])==1
    assert run(doc_to_text='{{q}}!')==2
    assert run(place='forked')==3
    assert run(batch_size=2)==4
    assert run(expert='law')==5
    assert run(n=5)==6
    assert run()==6

def killed_or_done(made, tmp_path, root, at=None):
    "Answer a task in a child, which is killed when it asks for the at-th time; whether it was killed"
    tasks = load_tasks([task_of(tmp_path)])
    rows = request_rows(tasks, build_requests(tasks['toy']))
    def work():
        own = hydra_lm_class().loglikelihood
        asked = [0]
        def counted(self, requests, **how):
            asked[0] += 1
            if asked[0]==at: os.kill(os.getpid(), signal.SIGKILL)
            return own(self, requests, **how)
        hydra_lm_class().loglikelihood = counted
        run_system_stage(lm_answers_stage, System('b', str(made/'b')), 'loglikelihood', rows, 1, root)
        if at=='never again': assert asked[0]==1, asked # all but the last chunk were there
    status = forked(work)
    assert os.WIFSIGNALED(status) or status==0
    return os.WIFSIGNALED(status)

def test_a_killed_run_goes_on_and_holds_the_same_bytes(made, tmp_path):
    assert not killed_or_done(made, tmp_path, tmp_path/'whole')
    assert killed_or_done(made, tmp_path, tmp_path/'killed', 3)
    assert stages_in(tmp_path/'killed')==[]
    assert len(list((tmp_path/'killed').glob('.work-*/*.json')))==2
    assert not killed_or_done(made, tmp_path, tmp_path/'killed', 'never again')
    (a,) = stages_in(tmp_path/'whole')
    (b,) = stages_in(tmp_path/'killed')
    assert a==b
    contents = [read_jsonl(root/a/'answers.jsonl') for root in (tmp_path/'whole', tmp_path/'killed')]
    assert contents[0]==contents[1]
    assert len(contents[0])==18
    assert (tmp_path/'whole'/a/'answers.jsonl').read_bytes()==(tmp_path/'killed'/a/'answers.jsonl').read_bytes()
    assert not list((tmp_path/'killed').glob('.work-*'))

def test_what_is_drawn_depends_on_no_state(tmp_path):
    lm = hydra_lm(fickle())
    drawn = dict(until=['\0'], max_gen_toks=5, do_sample=True, temperature=1.)
    rows = [dict(args=[text, drawn], read=text) for text in TEXTS]
    state = torch.random.get_rng_state()
    a = answer_rows(lm, 'generate_until', rows, tmp_path/'a', 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(77)
    assert answer_rows(lm, 'generate_until', rows, tmp_path/'b', 2)==a

def test_answers_come_in_the_order_of_the_requests(tmp_path):
    lm = SimpleNamespace(loglikelihood=lambda requests: [len(request.args[0]) for request in requests])
    rows = [dict(args=['x'*n, ''], read='') for n in rng(0, 'lengths').integers(0, 50, 33).tolist()]
    assert answer_rows(lm, 'loglikelihood', rows, tmp_path/'w', 4)==[len(row['args'][0]) for row in rows]

def test_the_forecast_counts_every_request_and_is_measured_once(made, tmp_path):
    tasks = load_tasks([task_of(tmp_path), task_of(tmp_path, 'said', **GENERATED)])
    two = systems_of(first_system(str(made/'b')), ['base'])
    expected = forecast_evaluation(two, tasks, limit=4, batch_size=2, root=tmp_path/'s')
    assert [row['requests'] for row in expected]==[4*2+4]*2
    assert all(row['seconds']>0 for row in expected)
    assert forecast_evaluation(two, tasks, limit=4, batch_size=2, root=tmp_path/'s')==expected
    rows = [dict(args=['x'*n]) for n in range(20)]
    assert [len(row['args'][0]) for row in sample_requests(rows[::-1], 3)]==[0, 10, 19]

# ---- intervals

def test_the_interval_of_a_share_is_wilsons_and_of_a_mean_students():
    right = np.array([1.]*7+[0.]*3)
    z = stats.norm.ppf(.975)
    n = 10
    p = .7
    middle = (p+z*z/2/n)/(1+z*z/n)
    reach = z*np.sqrt(p*(1-p)/n+z*z/4/n/n)/(1+z*z/n)
    assert np.allclose(mean_interval(right), (middle-reach, middle+reach))
    assert mean_interval(np.ones(5))[0]<1
    values = rng(0, 'values').normal(size=30)
    assert np.allclose(mean_interval(values), stats.ttest_1samp(values, 0).confidence_interval())
    other = values+rng(1, 'values').normal(size=30)
    assert np.allclose(paired_interval(values, other), stats.ttest_rel(values, other).confidence_interval())

def test_the_paired_interval_knows_pairs():
    draw = rng(0, 'pairs')
    a, b = draw.integers(0, 2, (2, 60)).astype(float)
    low, high = paired_interval(a, b)
    assert np.allclose(paired_interval(b, a), (-high, -low))
    assert np.allclose(paired_interval(a[::-1], b[::-1]), (low, high))
    low, high = paired_interval(a, a)
    assert low<0<high
    assert high<paired_interval(a, draw.permutation(a))[1] # of equal shares, but not of pairs
    assert paired_interval(np.ones(60), np.zeros(60))[0]>.9

def test_the_table_is_what_the_items_say(made, tmp_path):
    tasks = load_tasks([task_of(tmp_path, n=12)])
    found = evaluate_systems(systems_of(first_system(str(made/'b')), ['base', 'law']), tasks, root=tmp_path/'s')
    rows = comparison(found)
    assert [row['system'] for row in rows]==['b', 'base', 'law']
    assert 'difference' not in rows[0]
    items = {name: item_values(results, 'toy') for name, results in found['toy'].items()}
    for row in rows:
        assert row['n']==12
        assert row['chance']==.5
        assert np.isclose(row['score'], items[row['system']].mean())
        assert row['low']<=row['score']<=row['high']
    for row in rows[1:]:
        assert np.isclose(row['difference'], row['score']-rows[0]['score'])
        assert row['difference_low']<=row['difference']<=row['difference_high']

def test_a_perplexity_has_an_interval_by_rows(made, tmp_path):
    metrics = [dict(metric='word_perplexity', aggregation='weighted_perplexity', higher_is_better=False)]
    task = task_of(tmp_path, output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='{{q}}',
                   doc_to_choice=None, metric_list=metrics)
    systems = systems_of(first_system(str(made/'b')), ['base', 'model=tiny'])
    found = evaluate_systems(systems, load_tasks([task]), root=tmp_path/'s')
    rows = comparison(found)
    assert all(row['low']<row['score']<row['high'] and row['chance'] is None for row in rows)
    assert np.isclose(rows[1]['score'], rows[2]['score'])
    assert np.isclose(rows[1]['difference_low'], rows[2]['difference_low'])
    def total(values): return values.sum(0)[0]/values.sum(0)[1]
    draw = rng(0, 'ratio').normal(3, 1, (50, 2))
    low, high = ratio_interval(draw, total, draw)
    assert low==high==0 # paired: a system differs in nothing from itself

def test_texts_that_are_scored_together_have_no_interval(made, tmp_path):
    metric = dict(metric='chrf', aggregation='chrf', higher_is_better=True)
    tasks = load_tasks([task_of(tmp_path, **GENERATED|dict(metric_list=[metric]))])
    systems = systems_of(first_system(str(made/'b')), ['base'])
    rows = comparison(evaluate_systems(systems, tasks, root=tmp_path/'s'))
    assert [row['low'] for row in rows]==[None, None]
    assert rows[1]['difference_low'] is None
    assert rows[0]['score']>=0

def test_results_are_written_whole_and_twice_the_same(made, tmp_path):
    def run(name):
        systems = systems_of(first_system(str(made/'b')), ['base'])
        found = evaluate_systems(systems, load_tasks([task_of(tmp_path)]), root=tmp_path/name)
        return files_in(write_results(tmp_path/f'{name}-results', found))
    first = run('one')
    of_systems = {f'{s}/{f}' for s in ('b', 'base') for f in ('results_toy.json', 'samples_toy.jsonl')}
    assert set(first)=={'table.json', *of_systems}
    assert run('two')==first

# ---- the command

@pytest.fixture
def place(made, tmp_path, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    monkeypatch.chdir(tmp_path)
    (tmp_path/'b').symlink_to(made/'b')
    write_bytes(tmp_path/'tasks'/'toy.yaml', json.dumps(task_of(tmp_path)).encode())
    write_bytes(tmp_path/'tasks'/'code.yaml', json.dumps(task_of(tmp_path, 'code', unsafe_code=True)).encode())
    return tmp_path

def command(*argv): return run_shell(EVAL_COMMANDS, 'eval', *argv)

TOY = ['--tasks', 'toy', '--include', 'tasks']

def test_the_command_says_how_long_and_prints_a_table(place):
    three = ['b', *TOY, '--against', 'base,law', '--limit', 6]
    code, out, err = command(*three)
    assert code==0
    assert 'requests take about' in err
    assert err.count('\n')<=1+err.count('chunk')
    lines = [line for line in out.splitlines() if line.startswith('| toy')]
    assert [line.split('|')[5].strip() for line in lines]==['b', 'base', 'law']
    assert 'against b' in out
    assert '50.0 %' in out
    table = read_json(place/'b-eval'/'table.json')
    code, out, err = command(*three, '--json', '--quiet', '--out', 'x')
    assert (code, err)==(0, '')
    assert json.loads(out)['table']==table
    assert json.loads(out)['out']=='x'

WRONG = [
    (['b', '--tasks', 'toy,,', '--include', 'tasks'], 'empty word'),
    (['b', '--tasks', 'code', '--include', 'tasks'], '--allow-code'),
    (['b', *TOY, '--limit', 0], '--limit'),
    (['b', *TOY, '--against', 'lwa'], 'law'),
    (['nothing', *TOY], 'nothing'),
    (['tasks', *TOY], 'config.json'),
    (['--tasks', 'toy'], 'what shall be evaluated'),
    (['b', *TOY, '--out', 'tasks'], 'exists'),
    (['b', *TOY, '--against', 'x=tasks'], 'config.json')]

@pytest.mark.parametrize('argv, said', WRONG)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(place, argv, said):
    before = sorted(os.listdir('.'))
    code, out, err = command(*argv, '--quiet')
    assert (code, out, err.count('\n'))==(2, '', 1), err
    assert said in err, err
    assert [name for name in sorted(os.listdir('.')) if name!='cache']==before

def test_without_lm_eval_its_extra_is_named(place, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    code, out, err = command('b', *TOY, '--quiet')
    assert (code, out)==(2, '')
    assert "pip install 'hydramoe[eval]'" in err

def test_code_in_a_task_file_is_run_only_from_the_folder_that_was_named(place):
    write_bytes(place/'evil'/'run.py', b"open('ran', 'w').close()\ndef f(doc): return doc['q']\n")
    task = json.dumps(dict(task_of(place, 'evil'), doc_to_text='F')).replace('"F"', '!function run.f')
    write_bytes(place/'evil'/'evil.yaml', task.encode())
    assert command('b', *TOY, '--quiet')[0]==0
    assert not (place/'ran').exists()
    assert command('b', '--tasks', 'evil', '--include', 'evil', '--quiet', '--out', 'x')[0]==0
    assert (place/'ran').exists()

def test_naming_the_tasks_needs_no_torch():
    code = ("import sys; from hydramoe.use.command import run_command; "
            "from hydramoe.use.eval_command import EVAL_COMMANDS\n"
            "try: run_command(EVAL_COMMANDS, ['eval', '--help'])\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'lm_eval'} & set(sys.modules)")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode==0

# ---- the real model

@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_experts_of_a_real_model_answer_as_merged(kind):
    small = root/'tests'/'data'/'small_hydra'
    base = load_base('smollm2', 'fp32')
    dense = PeftModel.from_pretrained(base.model, small/'experts'/'sql-elements-result').merge_and_unload()
    theirs = ask(HFLM(dense, 'causal', tokenizer=base.tokenizer, batch_size=4), kind)
    assert same(kind, ask(hydra_lm(Hydra.load(small, quant='fp32'), 'sql-elements-result', 4), kind), theirs)
