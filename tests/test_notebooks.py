"One test for each notebook, in a fresh process; and the package is what the notebooks say."
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

from hydramoe.reproduce import Graph, read_parameters, run_scale

root = Path(__file__).parents[1]
nbs = sorted(p for p in (root/'nbs').rglob('*.ipynb') if p.name[0] not in '_.' and '.ipynb_checkpoints' not in p.parts)
experiments = [p for p in nbs if p.parent.name=='experiments']
library = [p for p in nbs if p not in experiments]
bin = Path(sys.executable).parent

def rel(p): return str(p.relative_to(root/'nbs'))
def run(*args, cwd=root): return subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True, text=True, timeout=900)
def cells(nb): return json.loads(nb.read_text())['cells']


@pytest.mark.parametrize('nb', library, ids=rel)
def test_notebook(nb):
    # `nbdev_test` leaks state from one notebook into the next when they share a process, and a path that matches nothing
    # is a success to it: hence one process a notebook, and the look at what it prints
    r = run(bin/'nbdev_test', '--path', nb, '--n_workers', 0)
    assert r.returncode==0 and 'Success' in r.stdout, r.stdout+r.stderr


@pytest.fixture(scope='session')
def toy_runs(tmp_path_factory): return tmp_path_factory.mktemp('runs')

@pytest.mark.parametrize('nb', experiments, ids=rel)
def test_experiment_runs_at_toy_scale(nb, toy_runs):
    results = run_scale('toy', until=nb.stem, graph=Graph(runs=toy_runs))
    r = results[nb.stem]
    assert r.name==nb.stem and r.scale=='toy' and r.rows and r.made and r.run['seconds']>0
    assert set(r.inputs.values()) >= {results[u].seal for u in Graph().needs[nb.stem]}, "a result names what it came from: pass each upstream in `inputs`"


@pytest.mark.parametrize('nb', experiments, ids=rel)
def test_one_parameters_cell(nb):
    # `nbdev_clean` drops the tag unless settings.ini keeps it, and then papermill silently runs the defaults
    p = read_parameters(nb)
    assert p['scale'].default=='toy' and p['scale'].type is str
    assert all(x.help for x in p.values()), f"no help for {[x.name for x in p.values() if not x.help]}"
    assert len(p) <= 25
    directives = [c for c in cells(nb) if '#|' in ''.join(c['source'])]
    assert not directives, "papermill knows no nbdev directives: it runs cells that say `eval: false`"


@pytest.fixture(scope='session')
def copy(tmp_path_factory):
    "The sources in a folder of their own, so that a test which runs nbdev's commands never touches the checkout"
    to = tmp_path_factory.mktemp('copy')
    shutil.copy(root/'settings.ini', to)
    for d in ('nbs', 'hydramoe'): shutil.copytree(root/d, to/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    return to

def test_package_is_exported(copy):
    before = {p.name: p.read_text() for p in (root/'hydramoe').glob('*.py') if p.name!='_modidx.py'}
    r = run(bin/'nbdev_export', cwd=copy)
    assert r.returncode==0, r.stderr
    after = {p.name: p.read_text() for p in (copy/'hydramoe').glob('*.py') if p.name!='_modidx.py'}
    changed = [n for n in before.keys() | after.keys() if before.get(n)!=after.get(n)]
    assert not changed, f"{changed} are not what the notebooks export; run `make export` and commit"

def test_notebooks_are_clean(copy):
    r = run(bin/'nbdev_clean', cwd=copy)
    assert r.returncode==0, r.stderr
    dirty = [rel(p) for p in nbs if (copy/'nbs'/rel(p)).read_text()!=p.read_text()]
    assert not dirty, f"{dirty} are not clean; run `nbdev_clean`, or `make hooks` once"


@pytest.mark.parametrize('nb', nbs, ids=rel)
def test_starts_with_a_title_and_a_sentence(nb):
    first = [l for l in ''.join(cells(nb)[0]['source']).splitlines() if l]
    assert first[0].startswith('# ') and first[1].startswith('> ') and len(first)==2

@pytest.mark.parametrize('nb', nbs, ids=rel)
def test_keeps_its_outputs(nb):
    # a page without outputs teaches half; one with an error teaches the wrong thing
    outputs = [o for c in cells(nb) for o in c.get('outputs', [])]
    assert outputs and not [o for o in outputs if o['output_type']=='error']
    assert nb.stat().st_size < 2_000_000, "images too heavy to be read in a review"
