"""The suite of nine domains: what is asked, that nobody was trained on it, and that lm-eval counts as it counts its
own tasks."""
import functools, json, sqlite3, subprocess, sys
from pathlib import Path

import pytest
from hydramoe.foundations.core import HydraError, rng
from hydramoe.foundations.files import read_json, read_jsonl, write_jsonl
from hydramoe.data.cards import card_names, load_card
from hydramoe.data.check import same_rows
from hydramoe.data.leaks import find_leaks
from hydramoe.data.load import load
from hydramoe.data.parts import part_of
from hydramoe.data.records import DOMAINS
from hydramoe.data.sources import as_csv
from hydramoe.data.splits import prompt_key
from hydramoe.models.base import tiny_base
from hydramoe.proof import items as items_room
from hydramoe.proof.items import chance_of, choice_item, in_drawn_order, most_frequent, truth_choices, unseen_rows
from hydramoe.proof.suite import MOST_TOKENS, MOST_WRITTEN, SUITE, measured
from hydramoe.proof.suite import pass_at_k, run_items, score_choices, score_program, suite_names, suite_rows
from hydramoe.proof.suite import suite_tasks, write_suite

lm_eval = pytest.importorskip('lm_eval')
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml


@pytest.fixture(scope='module', autouse=True)
def copies(tmp_path_factory):
    "Where `datasets` keeps its copies of rows"
    import datasets
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp('datasets')
    yield
    datasets.config.HF_DATASETS_CACHE = before

@pytest.fixture(scope='module')
def model():
    base = tiny_base()
    return HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=8)

def ask(model, tasks, limit=6, **more):
    alone = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=tasks, limit=limit, task_manager=alone, bootstrap_iters=10, **more)

made = functools.cache(run_items)
def items_of(name): return read_jsonl(made(name)/'items.jsonl')


# ---- what is asked

@pytest.mark.parametrize('name', suite_names(written=None))
def test_items_are_whole(name):
    items = items_of(name)
    about = read_json(made(name)/'about.json')
    assert about['n']==len(items)==len({item['id'] for item in items})>=50
    for item in items:
        assert item['query'] or SUITE[name].make.func.__name__=='gap_items'
        if 'choices' in item:
            assert all(item['choices'])
            assert 0<=item['gold']<len(item['choices'])
    if SUITE[name].is_written:
        assert len(items)<=MOST_WRITTEN
        assert all(item['reference'] for item in items)
    if 'chance' in about:
        assert 0<about['chance']<1
        assert about['chance']==pytest.approx(chance_of(items))

def test_every_domain_has_a_likelihood_task_and_a_written_one():
    assert {SUITE[name].domain for name in suite_names()}==set(DOMAINS)
    assert set(DOMAINS)-{SUITE[name].domain for name in suite_names(written=True)}=={'roleplay'}
    assert all(name.startswith('hydra_') for name in SUITE) # never the name of a task of lm-eval's own

def test_items_are_the_same_whatever_order_they_came_in():
    items = items_of('hydra_openbookqa')
    bare = [{key: value for key, value in item.items() if key!='id'} for item in items]
    shuffled = [bare[i] for i in rng(0, 'shuffle').permutation(len(bare))]
    assert in_drawn_order(shuffled)==items
    assert in_drawn_order(shuffled, 7)==items[:7]

def test_right_answers_are_in_no_favoured_place():
    for name in ('hydra_sql', 'hydra_reply', 'hydra_scene', 'hydra_function'):
        items = items_of(name)
        share = sum(item['gold']==0 for item in items)/len(items)
        assert abs(share-chance_of(items))<.1

def test_the_true_reply_is_among_replies_of_the_same_play():
    records = load('scenes_held')
    play = {r['completion'][0]['content']: items_room.speaker_of(r)[1] for r in records}
    true = {items_room.prompt_as_text(r, items_room.speaker_of(r)[0]): r['completion'][0]['content'] for r in records}
    for item in items_of('hydra_scene'):
        assert len(set(item['choices']))==4
        assert item['choices'][item['gold']]==true[item['query']]
        assert len({play[reply] for reply in item['choices']})==1

def test_wrong_queries_return_other_rows_and_the_right_one_the_right_rows():
    records = load('element_sql')
    answers = {r['prompt'][-1]['content']: r['completion'][0]['content'].partition(';\n\n')[2] for r in records}
    for item in items_of('hydra_sql')[:60]:
        con = sqlite3.connect(':memory:')
        con.executescript(item['tables'])
        rows = [con.execute(query).fetchall() for query in item['choices']]
        right = rows.pop(item['gold'])
        assert as_csv(None, right)==answers[item['query']]
        assert not any(same_rows(other, right, False) and same_rows(other, right, True) for other in rows)

def test_whoever_always_calls_or_never_is_at_chance():
    items = items_of('hydra_whether')
    assert sum(item['gold'] for item in items)*2==len(items)
    assert most_frequent(items)==.5

def test_an_item_needs_a_right_choice():
    for choices, gold in ((['cold'], 0), (['cold', 'warm'], 2), ([], 0)):
        with pytest.raises(HydraError, match='needs two choices'): choice_item('Ice is', choices, gold)


# ---- nobody was trained on it

def test_cards_are_for_evaluation_or_only_their_test_part_is_asked():
    trained = {card for task in SUITE.values() for card in task.cards if load_card(card)['use']=='train'}
    assert trained=={'preferred', 'passage_tasks', 'element_sql', 'xsum'}
    assert not {'sciq', 'logiqa', 'mbpp'} & trained

@pytest.mark.parametrize('card', ['passage_tasks', pytest.param('xsum', marks=pytest.mark.slow)])
def test_no_unseen_row_leaks_to_a_row_that_is_trained_on(card):
    rows = unseen_rows(card)
    trained = items_room.trained_rows('writing')
    assert {part_of(r) for r in rows}=={'test'}
    assert set(find_leaks(rows, trained))=={''}
    planted = dict(trained[0], prompt=rows[0]['prompt'])
    assert 'prompt' in find_leaks(rows, [*trained, planted])

def test_no_comparison_is_one_that_is_trained_on():
    trained = {items_room.prompt_as_text(r) for r in items_room.trained_rows('writing')}
    assert trained
    assert not trained & {item['query'] for item in items_of('hydra_preference')}

@pytest.mark.extern
def test_no_prompt_of_the_suite_is_in_what_any_domain_is_trained_on():
    cards = {card for name in suite_names(written=None) for card in SUITE[name].cards}
    held = {prompt_key(r) for card in cards for r in unseen_rows(card, forms=True)}
    evaluated = [r for card in card_names(use='evaluate') for r in load(card)]
    for card in card_names(use='train'):
        rows = [r for r in load(card) if part_of(r)!='test']
        shared = [r for r in rows if prompt_key(r) in held]
        assert all(find_leaks(shared, evaluated)), card # the clean set leaves these out


# ---- lm-eval counts as for its own tasks

def upstream(path, rows, folder):
    "A task of lm-eval's own, on rows of ours"
    file = folder/f'{Path(path).stem}.jsonl'
    write_jsonl(file, rows)
    config = load_yaml(Path(lm_eval.__file__).parent/'tasks'/path, resolve_func=True)
    for key in ('dataset_name', 'training_split', 'validation_split', 'tag'): config.pop(key, None)
    return config | dict(dataset_path='json', dataset_kwargs=dict(data_files=dict(test=str(file))), test_split='test')

def as_arc(item, column='question'):
    labels = list('ABCDE'[:len(item['choices'])])
    question = item['query'].removeprefix('Question: ').removesuffix('\nAnswer:')
    return {column: question, 'choices': dict(text=item['choices'], label=labels), 'answerKey': labels[item['gold']]}

def as_openbook(item): return as_arc(item, 'question_stem')

def as_winogrande(item):
    start = len(common_start(item['choices']))
    one, two = (choice[start:] for choice in item['choices'])
    sentence = f"{item['choices'][0][:start]}_ {item['ending']}"
    return dict(sentence=sentence, option1=one, option2=two, answer=str(item['gold']+1))

def common_start(texts):
    "What two texts begin with, up to a word's beginning"
    n = 0
    while n<min(map(len, texts)) and texts[0][n]==texts[1][n]: n += 1
    return texts[0][:texts[0].rfind(' ', 0, n)+1]

UPSTREAM = dict(
    hydra_arc_easy=('arc/arc_easy.yaml', as_arc), hydra_openbookqa=('openbookqa/openbookqa.yaml', as_openbook),
    hydra_winogrande=('winogrande/default.yaml', as_winogrande))

@pytest.mark.parametrize('name', UPSTREAM)
def test_the_number_is_that_of_the_task_upstream(model, tmp_path, name):
    path, as_row = UPSTREAM[name]
    theirs = upstream(path, [as_row(item) for item in items_of(name)[:12]], tmp_path)
    ours = ask(model, suite_tasks([name]), 12)['samples'][name]
    others = ask(model, [theirs], 12)['samples'][theirs['task']]
    assert [s['arguments'] for s in ours]==[s['arguments'] for s in others]
    for score in {'acc', 'acc_norm'} & set(others[0]['metrics']):
        assert [s[score] for s in ours]==[s[score] for s in others]
    assert 0<sum(s['acc'] for s in ours)<12 # both happened

NOTHING = 'Nothing in particular happens'
WRONG = ['You die', 'You turn green', 'It rains']
TRUTHFUL = [dict(question=f'What happens if you {what}?', best_answer=NOTHING,
                 correct_answers=[NOTHING, f'You did {what}'], incorrect_answers=WRONG[:n])
            for n, what in ((3, 'sing'), (2, 'whistle'), (3, 'read at night'), (1, 'sneeze'))]

@pytest.mark.parametrize('which', ['mc1', 'mc2'])
def test_truthfulness_is_counted_as_upstream(model, tmp_path, monkeypatch, which):
    monkeypatch.setattr(items_room, 'hub_rows', lambda card: TRUTHFUL)
    name = f'hydra_truthfulqa_{which}'
    ours = ask(model, suite_tasks([name], out=tmp_path/'stages'))['samples'][name]
    asked = {s['doc']['query'] for s in ours}
    rows = []
    for s in ours: # in our order
        row = next(r for r in TRUTHFUL if s['doc']['query'].endswith(f"Q: {r['question']}\nA:"))
        targets = {}
        for key, item in dict(mc1=truth_choices([row])[0], mc2=truth_choices([row], True)[0]).items():
            targets[f'{key}_targets'] = dict(choices=item['choices'], labels=item['labels'])
        rows.append(dict(question=row['question'], **targets))
    theirs = upstream(f'truthfulqa/truthfulqa_{which}.yaml', rows, tmp_path)
    others = ask(model, [theirs])['samples'][f'truthfulqa_{which}']
    assert len(asked)==4
    assert [s['arguments'] for s in ours]==[s['arguments'] for s in others]
    assert [s['acc'] for s in ours]==pytest.approx([s['acc'] for s in others], abs=1e-6)

def test_a_set_on_the_hub_says_so(monkeypatch, tmp_path):
    import datasets
    def fail(*args, **how): raise ConnectionError('no network')
    monkeypatch.setattr(datasets, 'load_dataset', fail)
    with pytest.raises(HydraError, match='truthfulqa/truthful_qa could not be read from the Hub'):
        run_items('hydra_truthfulqa_mc1', tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name[0]!='.'] # nothing half written

def test_every_likelihood_task_can_be_asked(model):
    names = suite_names()
    found = ask(model, suite_tasks(names), 2)
    assert set(found['results'])==set(names)
    for row in suite_rows(dict(tiny=found)):
        value, low, high = row['tiny']
        assert low<=value<=high

def test_a_reference_is_scored_as_one_text(model):
    "bits per byte of a task are those of one forward pass over query and reference"
    import torch
    def tokens(text): return model.tokenizer(text, add_special_tokens=False)['input_ids']
    name = 'hydra_human_eval_reference'
    found = ask(model, suite_tasks([name]), 3)['samples'][name]
    for sample in found:
        query = sample['doc']['query']
        reference = sample['doc']['choices'][0]
        ids = torch.tensor([tokens(query+reference)])[:, -(model.max_length+1):] # a long query loses its beginning
        blank = query[len(query.rstrip()):] # lm-eval counts white space at the end of a query to the answer
        n = len(tokens(blank+reference))
        with torch.no_grad(): log_p = model.model(ids[:, :-1]).logits.log_softmax(-1)[0]
        expected = log_p.gather(-1, ids[0, 1:, None])[-n:].sum()
        nats, size = sample['bits_per_byte']
        assert nats==pytest.approx(float(expected), rel=1e-4)
        assert size==len(reference.encode())


# ---- written answers

class Reciter(lm_eval.api.model.LM):
    "Writes what it is told to, by the question"
    def __init__(self, answers):
        super().__init__()
        self.answers = answers
        self.kwargs = []
    def loglikelihood(self, requests): raise NotImplementedError
    def loglikelihood_rolling(self, requests): raise NotImplementedError
    def generate_until(self, requests):
        self.kwargs += [request.args[1] for request in requests]
        return [self.answers(request.doc) for request in requests]

def called(doc):
    "A call that is accepted, as JSON"
    calls = []
    for call in json.loads(doc['calls']):
        (name, accepted), = call.items()
        arguments = {key: values[0] for key, values in accepted.items() if '' not in values}
        calls.append(dict(name=name, arguments=arguments))
    return json.dumps(calls)

RIGHT = dict(hydra_gsm8k=lambda doc: doc['reference'], hydra_math_500=lambda doc: doc['reference'],
    hydra_arc_letters=lambda doc: 'ABCDE'[doc['gold']], hydra_commonsense_letters=lambda doc: 'ABCDE'[doc['gold']],
    hydra_xsum=lambda doc: doc['reference'], hydra_truthful=lambda doc: doc['reference'],
    hydra_sql_rows=lambda doc: f"```sql\n{doc['reference']};\n```", hydra_no_calls=lambda doc: '[]')

@pytest.mark.parametrize('name', RIGHT)
def test_right_answers_are_right_and_others_wrong(name):
    reciter = Reciter(RIGHT[name])
    tasks = suite_tasks([name])
    found = ask(reciter, tasks, 40)
    metric = found['configs'][name]['metric_list'][0]['metric']
    assert found['results'][name][f'{metric},none']==1
    assert all(how['max_gen_toks']==MOST_TOKENS and not how['do_sample'] for how in reciter.kwargs)
    wrong = '[{"name": "x", "arguments": {}}]' if name=='hydra_no_calls' else 'I could not say.'
    assert ask(Reciter(lambda doc: wrong), suite_tasks([name]), 40)['results'][name][f'{metric},none']<.1

def test_accepted_calls_are_right():
    found = ask(Reciter(called), suite_tasks(['hydra_calls']), 80)
    assert found['results']['hydra_calls']['acc,none']>.95 # an accepted value of an object may hold alternatives inside
    assert ask(Reciter(lambda doc: '[]'), suite_tasks(['hydra_calls']))['results']['hydra_calls']['acc,none']==0

def test_programs_run_only_if_told_so():
    task = suite_tasks(['hydra_human_eval'], samples=2)
    def half_right(doc, left=[0]):
        left[0] += 1
        return doc['reference'] if left[0]%2 else '    return None\n'
    with pytest.raises(ValueError, match='unsafe'): ask(Reciter(half_right), task, 2)
    name = 'hydra_human_eval'
    found = ask(Reciter(half_right), suite_tasks([name], samples=2), 2, confirm_run_unsafe_code=True)
    assert found['results'][name]['pass@1,none']==.5
    assert found['results'][name]['pass@2,none']==1

def test_a_program_may_be_written_anew():
    tests = 'def check(candidate):\n    assert candidate(4)==8'
    doc = dict(query='def double(x):\n    """Twice x"""\n', tests=tests, entry='double')
    assert score_program(doc, ['    return 2*x\n'])=={'pass@1': 1.}
    assert score_program(doc, ['Gladly:\n```python\ndef double(x):\n    return x+x\n```'])=={'pass@1': 1.}
    assert score_program(doc, ['def double(x):\n    return x*x\n'])=={'pass@1': 0.}

def test_pass_at_k_is_what_drawing_gives():
    g = rng(0, 'draw')
    drawn = [g.permutation([1]*3+[0]*7)[:4].any() for _ in range(4000)]
    assert abs(sum(drawn)/4000-pass_at_k(10, 3, 4))<.03
    assert pass_at_k(5, 0, 3)==0
    assert pass_at_k(5, 5, 1)==1


# ---- chance and intervals

def test_bits_interval_holds_the_truth():
    "Counted over draws; each is a set of items whose nats are noisy"
    g = rng(0, 'bits')
    held = 0
    for _ in range(100):
        sizes = g.integers(5, 60, 80)
        answers = [(-.8*n-.3*n**.5*g.normal(), n) for n in sizes]
        samples = [dict(filter='none', doc_id=i, bits_per_byte=answer) for i, answer in enumerate(answers)]
        found = dict(results=dict(task={'bits_per_byte,none': 0.}), samples=dict(task=samples))
        _, low, high = measured(found, 'task', 'bits_per_byte')
        held += low<=.8/0.6931471805599453<=high
    assert 87<=held<=99

def results(acc, n=100, chance=.25, constant=.1):
    "As lm-eval's, of one task"
    about = dict(domain='science', chance=chance, constant=constant)
    config = dict(metadata=about, metric_list=[dict(metric='acc'), dict(metric='bits_per_byte')])
    samples = [dict(filter='none', doc_id=i, acc=float(i<acc*n), bits_per_byte=(-3.-i%3, 4)) for i in range(n)]
    scores = {'acc,none': acc, 'bits_per_byte,none': 1.4}
    return {'results': dict(hydra_arc_easy=scores), 'configs': dict(hydra_arc_easy=config),
            'samples': dict(hydra_arc_easy=samples), 'n-samples': dict(hydra_arc_easy=dict(effective=n))}

def test_a_row_is_informative_if_any_system_leaves_chance():
    row, = suite_rows(dict(a=results(.27), b=results(.5)))
    assert row['informative']
    assert row['measure']=='acc'
    assert row['b'][0]==.5
    row, = suite_rows(dict(a=results(.27), b=results(.3)))
    assert row['informative'] is False
    assert row['measure']=='bits_per_byte'
    assert row['a'][0]==1.4
    assert row['a'][1]<row['a'][2]
    row, = suite_rows(dict(a=results(.62, constant=.62))) # no better than one who always says the same
    assert row['informative'] is False
    assert row['to_beat']==.62

def test_systems_that_were_asked_different_tasks_are_not_compared():
    other = results(.5)
    other['results'] = dict(hydra_boolq={'acc,none': .5})
    with pytest.raises(HydraError, match='ask all the same tasks'): suite_rows(dict(a=results(.5), b=other))

def test_a_short_choice_has_no_advantage_by_character():
    doc = dict(query='', choices=['a', 'b'*10], gold=1)
    scores = score_choices(doc, [(-3., False), (-5., False)])
    assert (scores['acc'], scores['acc_norm'])==(0, 1)

def test_an_unknown_task_names_the_nearest():
    with pytest.raises(HydraError, match='hydra_boolq'): suite_tasks(['hydra_bolq'])
    with pytest.raises(HydraError, match='domain'): suite_names('maths')


# ---- files

def test_lm_eval_validates_the_files_and_reads_them_as_ours(tmp_path, model):
    names = ['hydra_openbookqa', 'hydra_winogrande', 'hydra_human_eval', 'hydra_sql_rows']
    folder = write_suite(tmp_path/'suite', names)
    call = [sys.executable, '-m', 'lm_eval', 'validate', '--tasks', ','.join(names), '--include_path', str(folder)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    assert 'All tasks found and valid' in done.stdout, done.stderr
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    assert manager.all_subtasks==sorted(names)
    assert 'hydra_reasoning' in manager.all_tags
    def asked(tasks):
        return lm_eval.simple_evaluate(model, tasks=tasks, limit=4, task_manager=manager, bootstrap_iters=10)
    from_files = asked(names[:2])
    from_dicts = ask(model, suite_tasks(names[:2]), 4)
    for name in names[:2]:
        assert from_files['results'][name]==from_dicts['results'][name]
        assert from_files['configs'][name]['metadata']['chance']==from_dicts['configs'][name]['metadata']['chance']
    assert manager.load(['hydra_human_eval'])['tasks']['hydra_human_eval'].UNSAFE_CODE

def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(HydraError): write_suite(tmp_path/'suite', ['hydra_scene', 'hydra_nothing'])
    assert not list(tmp_path.iterdir())
    write_suite(tmp_path/'suite', ['hydra_scene'])
    with pytest.raises(HydraError, match='exists already'): write_suite(tmp_path/'suite', ['hydra_scene'])
