"One test for each notebook, in a fresh process; and the package is what the notebooks say."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

from hydramoe.foundations.core import cache_dir
from hydramoe.use.reproduce import Graph, load_result, read_parameters, run_notebook, run_scale
from helpers import page_name, root

visible = (p for p in (root/'nbs').rglob('*.ipynb') if p.name[0] not in '_.')
nbs = sorted(p for p in visible if '.ipynb_checkpoints' not in p.parts)
experiments = [p for p in nbs if p.parent.name=='experiments']
lessons = [p for p in nbs if p not in experiments]
bin = Path(sys.executable).parent

def run_command(*args, cwd=root):
    return subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True, text=True, timeout=900)
def cells_of(nb): return json.loads(nb.read_text())['cells']


@pytest.mark.parametrize('nb', lessons, ids=page_name)
def test_notebook(nb):
    # `nbdev_test` leaks state from one notebook into the next when they share a process, and a path that matches
    # nothing is a success to it: hence one process a notebook, and the look at what it prints
    r = run_command(bin/'nbdev_test', '--path', nb, '--n_workers', 0)
    assert r.returncode==0, r.stdout+r.stderr
    assert 'Success' in r.stdout, r.stdout+r.stderr


@pytest.fixture(scope='session')
def toy_runs(tmp_path_factory):
    "One folder of runs for all workers: the runner's lock lets the first make what the others find"
    own = tmp_path_factory.getbasetemp()
    return (own.parent if 'PYTEST_XDIST_WORKER' in os.environ else own)/'toy-runs'

@pytest.mark.parametrize('nb', experiments, ids=page_name)
def test_experiment_runs_at_toy_scale(nb, toy_runs):
    results = run_scale('toy', until=nb.stem, graph=Graph(runs=toy_runs))
    r = results[nb.stem]
    assert r.name==nb.stem
    assert r.scale=='toy'
    assert r.rows
    assert r.made
    assert r.run['seconds']>0
    upstream = {results[u].seal for u in Graph().needs[nb.stem]}
    assert set(r.inputs.values()) >= upstream, "a result names what it came from: pass each upstream in `inputs`"


def elsewhere(tmp_path, name):
    "The environment of a run whose stages and results go to a place of their own; fetched assets are shared"
    cache = tmp_path/name/'cache'
    cache.mkdir(parents=True)
    for shared in ('assets', 'models', 'fingerprints'):
        if (cache_dir()/shared).exists(): (cache/shared).symlink_to(cache_dir()/shared)
    return {**os.environ, 'HYDRAMOE_CACHE': str(cache), 'HYDRAMOE_RUNS': str(tmp_path/name/'runs')}

def start_toy(env):
    code = "from hydramoe.use.reproduce import run_scale; run_scale('toy')"
    return subprocess.Popen([sys.executable, '-c', code], env=env, cwd=root, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

@pytest.mark.slow
def test_killed_again_and_again_the_experiments_end_with_the_same_numbers(tmp_path):
    whole = elsewhere(tmp_path, 'whole')
    began, p = time.monotonic(), start_toy(whole)
    _, err = p.communicate(timeout=600)
    assert p.returncode==0, err
    took, killed = time.monotonic()-began, elsewhere(tmp_path, 'killed')
    for share in (.1, .2, .3, .4, .5, .6):
        p = start_toy(killed)
        try: p.wait(share*took)
        except subprocess.TimeoutExpired: pass
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)  # the runner; kernels see it die and follow
        p.wait()
    p = start_toy(killed)
    _, err = p.communicate(timeout=600)
    assert p.returncode==0, err
    def seals(env):
        runs = Path(env['HYDRAMOE_RUNS'])
        return {n: load_result(runs/'toy'/f'{n}.json').seal for n in Graph().order}
    assert seals(whole)==seals(killed)


# another value for each parameter, as cheap as the toy's; `scale` names the run, and `source` and `base` choose what
# the demo runs on
OTHER = dict(
    splits='4+2', rows='1', rates='0.5', dropouts='0.3', softs='0.5', b_rates='4', decays='0.1', clocks='own',
    singles=False, again='s', temperature=0.5, once='oracle', mixing='similarity', strengths='1', hindsights=False,
    tasks='hydra_boolq', limit=2, written='hydra_calls', written_limit=1, split=1, seed_lr=1e-3,
    seed_lrs='12e-3', scales='1',
    wide_scales='1', wide=False, tokens=1200, dev=2, test=3, max_length=150, k=8, seed=1, quant='bf16', rank=2,
    targets='q_proj,v_proj', lrs='1e-3', single_rows='1', expert_rows='2',
    steps=40, controls='random', temperatures='0.3', gates='lag', precisions='fp32', draws=3, prompt='Name a river.',
    router=2, encoders='minilm', depths='2', ks='3 9', seeds=1,
    forks='0 1', speedups='1 3', builds='0 0.3', epochs=1.5, most=3, threads=2, more=0,
    methods='linear knots', whole='linear', densities='0.5', lengths='1', skills=5, skill_tokens=1000, answer_tokens=3,
    layer=2, rounds=0, near=3, core_rate=3.,
    cards='element_tables', train=5, held=3, max_prompt=600, starts='router', runs=3, place='block', pool=False,
    top_k=2, answers=3, prompts=3, lr=0.1, kl=1., max_new_tokens=4,
    files='experts', places='block', scores='cosine', weighs='sigmoid', tops='2', losses='entropy:0.5', ways='joint',
    rivals='arrow', rival_lrs='1e-2', lot=False)
OF = { # where one name means two things
    ('e9_clusters', 'kinds'): 'diagonal',
    ('e5_gating', 'kinds'): 'linear',
    ('e2_search', 'starts'): 'seed',
    ('e2_shared', 'starts'): 'none'}

VARIED = [(nb, n) for nb in experiments for n in read_parameters(nb) if n not in ('scale', 'source', 'base')]

@pytest.mark.slow
@pytest.mark.parametrize('nb,name', VARIED, ids=lambda x: x if isinstance(x, str) else x.stem)
def test_every_parameter_is_used(nb, name, toy_runs, tmp_path, monkeypatch):
    # a parameter that is bound and never read lets a sweep run ten times the same; the runner cannot see it, the result
    # can
    toy = run_scale('toy', until=nb.stem, graph=Graph(runs=toy_runs))[nb.stem]
    monkeypatch.setenv('HYDRAMOE_RUNS', str(toy_runs))
    other = OF[nb.stem,name] if (nb.stem,name) in OF else OTHER[name]
    changed = load_result(run_notebook(nb, tmp_path/'out.ipynb', {name: other}).with_suffix('.json'))
    def found(r): return r.rows, r.outputs, r.extra
    assert found(changed)!=found(toy), f'{name}={other!r} makes no difference'


@pytest.mark.parametrize('nb', nbs, ids=page_name)
def test_prose_has_no_stray_control_characters(nb):
    "A formula's \\top, written by a program that took it for a tab, is no formula any more"
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    prose = [(c['id'], ''.join(c['source'])) for c in cells if c['cell_type']=='markdown']
    assert not [i for i,text in prose if any(ord(x)<32 and x!='\n' for x in text)]

@pytest.mark.parametrize('nb', experiments, ids=page_name)
def test_one_parameters_cell(nb):
    # `nbdev_clean` drops the tag unless settings.ini keeps it, and then papermill silently runs the defaults
    p = read_parameters(nb)
    assert p['scale'].default=='toy'
    assert p['scale'].type is str
    helpless = [x.name for x in p.values() if not x.help]
    assert not helpless, f"no help for {helpless}"
    assert len(p) <= 25
    directives = [c for c in cells_of(nb) if '#|' in ''.join(c['source'])]
    assert not directives, "papermill knows no nbdev directives: it runs cells that say `eval: false`"


@pytest.fixture(scope='session')
def copy(tmp_path_factory):
    "The sources in a folder of their own, so that a test which runs nbdev's commands never touches the checkout"
    to = tmp_path_factory.mktemp('copy')
    shutil.copy(root/'settings.ini', to)
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for d in ('nbs', 'hydramoe'): shutil.copytree(root/d, to/d, ignore=ignore)
    return to

def test_package_is_exported(copy):
    def modules(at): return {str(p.relative_to(at)): p.read_text() for p in at.rglob('*.py') if p.name!='_modidx.py'}
    before = modules(root/'hydramoe')
    r = run_command(bin/'nbdev_export', cwd=copy)
    assert r.returncode==0, r.stderr
    after = modules(copy/'hydramoe')
    changed = [n for n in before.keys() | after.keys() if before.get(n)!=after.get(n)]
    assert not changed, f"{changed} are not what the notebooks export; run `make export` and commit"

def test_notebooks_are_clean(copy):
    r = run_command(bin/'nbdev_clean', cwd=copy)
    assert r.returncode==0, r.stderr
    dirty = [page_name(p) for p in nbs if (copy/'nbs'/page_name(p)).read_text()!=p.read_text()]
    assert not dirty, f"{dirty} are not clean; run `nbdev_clean`, or `make hooks` once"


@pytest.mark.parametrize('nb', nbs, ids=page_name)
def test_starts_with_a_title_and_a_sentence(nb):
    first = [l for l in ''.join(cells_of(nb)[0]['source']).splitlines() if l]
    assert first[0].startswith('# ')
    assert first[1].startswith('> ')
    assert len(first)==2

@pytest.mark.parametrize('nb', nbs, ids=page_name)
def test_keeps_its_outputs(nb):
    # a page without outputs teaches half; one with an error teaches the wrong thing
    outputs = [o for c in cells_of(nb) for o in c.get('outputs', [])]
    assert outputs
    assert not [o for o in outputs if o['output_type']=='error']
    assert nb.stat().st_size < 2_000_000, "images too heavy to be read in a review"

@pytest.mark.parametrize('nb', experiments, ids=page_name)
def test_an_experiment_is_light_and_shows_no_babble(nb):
    # the outputs are the toy run's, on a random base: plots and tables teach their shape, an answer in random bytes
    # teaches nothing
    outputs = [o for c in cells_of(nb) for o in c.get('outputs', [])]
    text = json.dumps(outputs, ensure_ascii=False)
    assert '\ufffd' not in text
    assert '<script' not in text
    assert not [o for o in outputs if o.get('name')=='stderr']
    assert text.count('<style')<=1
    assert nb.stat().st_size < 200_000
