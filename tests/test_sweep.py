"A sweep under what happens to real sweeps: kills, failures, odd values, a second terminal."
import json, subprocess, sys

import pytest
from hypothesis import given, settings, strategies as st

from hydramoe.foundations.core import HydraError
from hydramoe.use.reproduce import Parameter, read_parameters
from hydramoe.use.sweep import combinations, main_numbers, parse_sweep, run_name, run_sweep, sweep_table
from helpers import alive, lines_of, notebook, wait_for

PARAMS = '''scale: str = "toy"  # run
k: int = 2  # how many
lr: float = .5  # rate
mix: bool = False  # or not
name: str = ""  # text
place: str = ""  # for the log
wait: float = 0.0  # seconds'''
WORK = '''import os, time
from pathlib import Path
from hydramoe.use.reproduce import save_result
with (Path(place)/'log').open('a') as f: f.write(f'{k} {os.getpid()}\\n')
if k==13: raise ValueError('thirteen')
time.sleep(wait)
used = dict(scale=scale, k=k, lr=lr, mix=mix, name=name, place=place, wait=wait)
rows = [dict(system='base', domain='macro', ppl=k*lr), dict(system='base', domain='sea', ppl=1.)]
saved = save_result('lesson', scale, used, rows)'''

@pytest.fixture
def nb(tmp_path): return notebook(tmp_path/'lesson.ipynb', PARAMS, WORK)

def sweep(nb, *texts, jobs=1):
    wanted = parse_sweep(read_parameters(nb), [f'place={nb.parent}', *texts])
    return run_sweep(nb, wanted, nb.parent/'sweep', jobs)
def logged(nb): return lines_of(nb.parent/'log')

def start_hydramoe(*argv, **kw):
    command = [sys.executable, '-m', 'hydramoe.use.cli', *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def swept(nb, *given):
    "The command that runs a sweep of a notebook"
    return ['run', nb, *given, '-p', f'place={nb.parent}', '--out', nb.parent/'sweep']


def test_each_combination_has_its_notebook_its_result_and_its_column(nb):
    runs = sweep(nb, 'k=2,3', 'lr=0.5,1', 'mix=true')
    both = [(k, lr) for k in (2, 3) for lr in (.5, 1.)]
    assert [(r.params, r.result.params['mix']) for r in runs]==[(dict(k=k, lr=lr), True) for k, lr in both]
    assert [main_numbers(r.result) for r in runs]==[{'base ppl': k*lr} for k, lr in both]
    notebooks = sorted(p.name for p in (nb.parent/'sweep').glob('*.ipynb'))
    assert notebooks==sorted(f'{run_name(r.params)}.ipynb' for r in runs)
    table = ['| k | 2 | 2 | 3 | 3 |', '| lr | 0.5 | 1 | 0.5 | 1 |', '| base ppl | 1 | 2 | 1.5 | 3 |']
    assert sweep_table(runs).splitlines()[2:]==table

def test_what_is_done_is_skipped_and_what_changed_is_not(nb):
    assert [r.skipped for r in sweep(nb, 'k=2,3')]==[False, False]
    assert [r.skipped for r in sweep(nb, 'k=2,3,4')]==[True, True, False]
    assert len(logged(nb))==3
    (nb.parent/'sweep'/'k=3.json').unlink()
    notebook(nb, PARAMS, WORK+'\n# a comment')
    assert [r.skipped for r in sweep(nb, 'k=2,3,4')]==[True, False, True]
    notebook(nb, PARAMS, WORK.replace('k*lr', '2*k*lr'))
    assert [r.skipped for r in sweep(nb, 'k=2,3,4')]==[False]*3
    # another value of a parameter that doesn't differ
    assert [r.skipped for r in sweep(nb, 'k=2,3,4', 'lr=2')]==[False]*3

def test_a_notebook_without_a_result_is_known_by_its_stamp(tmp_path):
    nb = notebook(tmp_path/'n.ipynb', 'scale: str = "toy"  # run\nk: int = 2  # how many', 'print(k)')
    for skipped in (False, True):
        assert [r.skipped for r in run_sweep(nb, dict(k=[1, 2]), tmp_path/'sweep')]==[skipped]*2
    assert all(r.result is None for r in run_sweep(nb, dict(k=[1, 2]), tmp_path/'sweep'))

def test_a_failure_stops_no_other_and_is_run_again(nb):
    out = start_hydramoe(*swept(nb, '-p', 'k=13,2,3'), '--jobs', 2, '--quiet')
    text, err = out.communicate(timeout=120)
    assert (out.returncode, text, err.count('\n'))==(2, '', 1)
    assert '1 of 3 runs failed' in err
    assert 'thirteen' in err
    assert sorted(p.name for p in (nb.parent/'sweep').glob('*.json'))==['k=2.json', 'k=3.json']
    runs = sweep(nb, 'k=13,2,3')
    assert [(r.skipped, bool(r.error)) for r in runs]==[(False, True), (True, False), (True, False)]

def test_killed_and_run_again_it_goes_on_and_leaves_nothing_running(nb):
    line = [*swept(nb, '-p', 'k=2,3,4,5'), '-p', 'wait=1', '--jobs', 2, '--quiet']
    p = start_hydramoe(*line)
    wait_for(lambda: list((nb.parent/'sweep').glob('*.json')), 120)
    p.kill()
    p.wait()
    for pid in (int(l.split()[1]) for l in logged(nb)): wait_for(lambda: not alive(pid), 30)
    done = {f.name for f in (nb.parent/'sweep').glob('*.json')}
    before = len(logged(nb))
    again = start_hydramoe(*line)
    text, err = again.communicate(timeout=180)
    assert again.returncode==0, err
    assert f'4 runs in {nb.parent/"sweep"}, {len(done)} of them done before' in text
    assert len(logged(nb))==before+4-len(done)
    assert not list((nb.parent/'sweep').glob('.running-*'))

def test_two_terminals_run_each_combination_once(nb):
    line = [*swept(nb, '-p', 'k=2,3'), '--quiet']
    both = [start_hydramoe(*line), start_hydramoe(*line)]
    for p in both: p.communicate(timeout=180)
    assert [p.returncode for p in both]==[0, 0]
    assert len(logged(nb))==2

def test_json_holds_parameters_and_numbers_of_each_run(nb):
    p = start_hydramoe(*swept(nb, '-p', 'k=2,3'), '--json')
    text, err = p.communicate(timeout=120)
    found = [(r['params'], r['numbers']) for r in json.loads(text)['runs']]
    assert found==[(dict(k=2), {'base ppl': 1.}), (dict(k=3), {'base ppl': 1.5})]

def test_one_value_is_no_sweep(nb):
    given = ['-p', 'k=2', '-p', f'place={nb.parent}', '-p', 'name=a,b']
    p = start_hydramoe('run', nb, *given, '--out', nb.parent/'one.ipynb', '--json')
    text, err = p.communicate(timeout=120)
    assert json.loads(text)['result']['params']['name']=='a,b', err


TYPES = dict(k=int, lr=float, mix=bool, name=str, items=list)
DECLARED = {n: Parameter(n, t, t(), '') for n, t in TYPES.items()}

TEXTS = [
    (['k=1,2'], dict(k=[1, 2])), (['lr=1,5e-4'], dict(lr=[1., 5e-4])),
    (['mix=true,false'], dict(mix=[True, False])), (['name=a,b'], dict(name=['a,b'])),
    (['name=a,b', 'name=c'], dict(name=['a,b', 'c'])), (['name='], dict(name=[''])), (['name=a=b'], dict(name=['a=b'])),
    (['items=[1,2]'], dict(items=[[1, 2]])), (['items=[1,2]', 'items=[]'], dict(items=[[1, 2], []])),
    (['k=1', 'k=2', 'k=1'], dict(k=[1, 2])), ([], {})]

@pytest.mark.parametrize('texts,found', TEXTS)
def test_commas_part_numbers_and_never_text(texts, found): assert parse_sweep(DECLARED, texts)==found

@pytest.mark.parametrize('text', ['k=1,', 'k=1,,2', 'k=1.5,2', 'lr=nan,1', 'mix=true,no', 'kk=1,2', 'k'])
def test_values_that_no_parameter_takes_are_refused_before_anything_runs(text):
    with pytest.raises(HydraError): parse_sweep(DECLARED, [text])

VALUES = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text(),
                   st.lists(st.integers()))

@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=6, unique_by=repr))
def test_every_combination_has_a_file_name_of_its_own(values):
    names = [run_name(dict(x=v)) for v in values]
    lower = {str(v) for v in values if str(v)==str(v).lower()}
    assert len({n.lower() for n in names})>=len(lower)
    assert all('/' not in n for n in names)
    assert all(len(n.encode())<200 for n in names)
    assert len(set(names))==len({str(v) for v in values})

def test_combinations_meet_each_other_once():
    assert combinations({})==[{}]
    assert len(combinations(dict(a=[1, 2], b=[3, 4, 5], c=[6])))==6
