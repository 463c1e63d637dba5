"The runner under what happens to real runs: kills, neighbours, edits."
import ast, json, os, signal, subprocess, sys

import pytest
from hypothesis import given, settings, strategies as st

from hydramoe.use import reproduce
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import write_json
from hydramoe.use.publish import check_sums, write_sums
from hydramoe.use.reproduce import (
    Graph, Parameter, RunFailed, check_parameters, code_digests, load_result, parse_assignments, run_notebook,
    run_scale)
from helpers import alive, lines_of, notebook, root, wait_for

SCALE = 'scale: str = "toy"  # run'
ONE = '''from pathlib import Path
import os, time
from hydramoe.use.reproduce import save_result
log = Path(place)/'log'
with log.open('a') as f: f.write(f'first {os.getpid()}\\n')
time.sleep(wait)
'''
TWO = '''from pathlib import Path
from hydramoe.use.reproduce import save_result, upstream
first = upstream('e1_first', scale)
with (Path(first.params['place'])/'log').open('a') as f: f.write('second\\n')
'''
SAVE_ONE = ('save_result("e1_first", scale, dict(scale=scale, place=place, wait=wait), '
            '[dict(system="base", ppl=2.)])')
SAVE_TWO = ('save_result("e2_second", scale, dict(scale=scale), '
            '[dict(system="base", ppl=first.rows[0]["ppl"]+1)], inputs=dict(first=first))')

@pytest.fixture
def graph(tmp_path):
    lab = tmp_path/'lab'
    parameters = f'{SCALE}\nplace: str = ""  # for the log\nwait: float = 0.0  # seconds'
    notebook(lab/'e1_first.ipynb', parameters, ONE, SAVE_ONE)
    notebook(lab/'e2_second.ipynb', SCALE, TWO, SAVE_TWO)
    set_first(lab, tmp_path)
    (lab/'params'/'e2_second-demo.yaml').write_text('')
    return Graph(lab, tmp_path/'runs')

def set_first(lab, place, wait=0.):
    (lab/'params').mkdir(exist_ok=True)
    (lab/'params'/'e1_first-demo.yaml').write_text(f'place: {place}\nwait: {wait}\n')

def log(graph): return lines_of(graph.runs.parent/'log')

def start_runner(graph):
    made = f'Graph({str(graph.folder)!r}, {str(graph.runs)!r})'
    code = f"from hydramoe.use.reproduce import Graph, run_scale\nrun_scale('demo', graph={made})"
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

def test_killed_runner_goes_on(graph):
    whole = {n: r.seal for n,r in run_scale('demo', graph=graph).items()}
    set_first(graph.folder, graph.runs.parent, wait=30)
    n = len(log(graph))
    p = start_runner(graph)
    wait_for(lambda: len(log(graph))>n)
    kernel = int(log(graph)[-1].split()[1])
    p.kill()
    p.wait()
    wait_for(lambda: not alive(kernel), 30)  # a kernel does not outlive its runner
    # the older result stands until a new one is whole
    assert load_result(graph.runs/'demo'/'e1_first.json').seal==whole['e1_first']
    set_first(graph.folder, graph.runs.parent)
    again = {n: r.seal for n,r in run_scale('demo', graph=graph).items()}
    assert again==whole
    assert not list((graph.runs/'demo').glob('.running-*'))

def test_kernel_killed_from_outside_is_a_failed_run(graph):
    set_first(graph.folder, graph.runs.parent, wait=60)
    p = start_runner(graph)
    wait_for(lambda: log(graph))
    os.kill(int(log(graph)[-1].split()[1]), signal.SIGKILL)
    _, err = p.communicate(timeout=60)
    assert p.returncode!=0
    assert 'RunFailed' in err
    assert not (graph.runs/'demo'/'e1_first.json').exists()
    assert not (graph.runs/'demo'/'e1_first.ipynb').exists()
    assert 'second' not in log(graph)

def test_two_runners_make_each_result_once(graph):
    set_first(graph.folder, graph.runs.parent, wait=2)
    both = [start_runner(graph), start_runner(graph)]
    errors = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both]==[0, 0], errors
    assert len(log(graph))==2  # one line from each experiment

def test_unchanged_costs_no_kernel_and_no_torch(graph):
    run_scale('demo', graph=graph)
    code = f'''import sys
from hydramoe.use.reproduce import Graph, run_scale
run_scale('demo', graph=Graph({str(graph.folder)!r}, {str(graph.runs)!r}))
assert not {{'torch', 'papermill', 'nbclient', 'matplotlib'}} & set(sys.modules), 'imported without need'
'''
    subprocess.run([sys.executable, '-c', code], check=True, timeout=30)
    assert len(log(graph))==2

def test_an_edited_result_is_made_again(graph):
    run_scale('demo', graph=graph)
    f = graph.runs/'demo'/'e2_second.json'
    f.write_text(f.read_text().replace('3.0', '2.5'))
    assert run_scale('demo', graph=graph)['e2_second'].rows[0]['ppl']==3.
    assert len(log(graph))==3

def test_missing_upstream_is_made_first(graph, monkeypatch):
    # what happens when a reader opens the second notebook first: by hand, not by the runner
    set_first(graph.folder, graph.runs.parent)
    monkeypatch.setattr(reproduce, 'Graph', lambda: Graph(graph.folder, graph.runs))
    monkeypatch.setenv('HYDRAMOE_RUNS', str(graph.runs))
    assert reproduce.upstream('e1_first', 'demo').rows[0]['ppl']==2.
    assert len(log(graph))==1

NO_SAVE = 'from hydramoe.use.reproduce import upstream\nupstream("e1_first", scale)'

def test_without_save_result_there_is_no_result(graph):
    notebook(graph.folder/'e2_second.ipynb', SCALE, NO_SAVE)
    with pytest.raises(RunFailed, match='without `save_result`'):
        run_scale('demo', graph=Graph(graph.folder, graph.runs))

def test_rings_and_strangers_are_refused(tmp_path):
    def ask(n): return f'from hydramoe.use.reproduce import upstream\nupstream("{n}", scale)'
    notebook(tmp_path/'a.ipynb', SCALE, ask('b'))
    with pytest.raises(HydraError, match="upstream of a='b' is not known"): Graph(tmp_path, tmp_path)
    notebook(tmp_path/'b.ipynb', SCALE, ask('a'))
    with pytest.raises(HydraError, match='in a ring'): Graph(tmp_path, tmp_path)

BAR = '''import sys
for i in range(300): print(f"\\r{i} of 299", end="", file=sys.stderr)
print(file=sys.stderr)'''

def test_progress_bars_leave_one_line(tmp_path):
    nb = notebook(tmp_path/'p.ipynb', SCALE, BAR)
    out = json.loads(run_notebook(nb, tmp_path/'out.ipynb').read_text())
    text = ''.join(''.join(o['text']) for c in out['cells'] for o in c['outputs'])
    assert text.strip().endswith('299 of 299')
    assert len(text) < 3000


def papermill(nb, out, *given):
    "papermill as anybody calls it, without our runner"
    command = [sys.executable, '-m', 'papermill', '-k', 'python3', '--no-progress-bar', str(nb), str(out), *given]
    path = os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])
    env = os.environ | dict(HYDRAMOE_RUNS=str(out.parent/'runs'), PYTHONPATH=path)
    return subprocess.run(command, cwd=out.parent, capture_output=True, text=True, timeout=300, env=env)

GIVEN = [
    (('-p', 'k', '5', '-p', 'lr', '1', '-r', 'name', '7'), None),
    (('-p', 'unknown', '5'), "parameter='unknown' is not known"),
    (('-p', 'k', 'five'), "k='five' is a str"), (('-p', 'lr', 'nan'), 'finite float')]

@pytest.mark.parametrize('given,refused', GIVEN)
def test_a_notebook_refuses_what_plain_papermill_would_run_with(given, refused, tmp_path):
    parameters = f'{SCALE}\nk: int = 2  # how many\nlr: float = .5  # rate\nname: str = ""  # text'
    imports = 'from hydramoe.use.reproduce import check_given'
    nb = notebook(tmp_path/'n.ipynb', parameters, imports, 'check_given()', 'print(f"ran {k}")')
    r = papermill(nb, tmp_path/'out.ipynb', *given)
    cells = json.loads((tmp_path/'out.ipynb').read_text())['cells']
    outputs = [o for c in cells for o in c.get('outputs', [])]
    ran = any('ran ' in ''.join(o.get('text', '')) for o in outputs)
    assert (r.returncode==0)==ran==(refused is None), r.stderr
    if refused: assert refused in r.stderr

EXPERIMENTS = sorted((root/'nbs'/'experiments').glob('e*.ipynb'))

@pytest.mark.parametrize('nb', EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_looks_at_what_it_was_given_before_it_works(nb):
    cells = [c for c in json.loads(nb.read_text())['cells'] if c['cell_type']=='code']
    n = next(i for i,c in enumerate(cells) if 'parameters' in c['metadata'].get('tags', []))
    parameters, imports, check = (''.join(c['source']) for c in cells[n:n+3])
    assert n==0
    assert check=='check_given()'
    assert all(isinstance(x, (ast.Import, ast.ImportFrom)) for x in ast.parse(imports).body)

def test_plain_papermill_runs_an_experiment_with_another_value(tmp_path):
    r = papermill(EXPERIMENTS[0], tmp_path/'out.ipynb', '-p', 'k', '5')
    assert r.returncode==0, r.stderr
    found = load_result(tmp_path/'runs'/'toy'/'e1_domains.json')
    assert found.params['k']==5
    assert len(found.extra['names'])==5

def test_an_experiment_refuses_what_plain_papermill_would_run_with(tmp_path):
    r = papermill(EXPERIMENTS[0], tmp_path/'out.ipynb', '-p', 'unknown', '5')
    assert r.returncode!=0
    assert "parameter='unknown' is not known" in r.stderr
    assert not (tmp_path/'runs').exists()


def test_a_benchmark_is_kept_with_its_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(root/'benchmarks'))
    import keep
    def ends(code, said):
        monkeypatch.setattr(subprocess, 'run', lambda *a, **kw: subprocess.CompletedProcess(a, code, stdout=said))
    ends(0, '{"b": 1.5,\n "a": 2}\n')
    assert keep.keep('train', to=tmp_path).read_text()=='{"b": 1.5,\n "a": 2}\n'
    assert check_sums(tmp_path)==['train.json']
    with pytest.raises(HydraError, match="'trian' is no benchmark"): keep.keep('trian', to=tmp_path)
    ends(1, '')
    with pytest.raises(HydraError, match='nothing is published'): keep.keep('fork', to=tmp_path)
    assert check_sums(tmp_path)==['train.json']

HARM = [
    (lambda d: (d/'a.json').unlink(), 'a.json is gone'),
    (lambda d: (d/'a.json').write_text('{"seconds":61}\n'), 'a.json was edited'),
    (lambda d: (d/'c.json').write_text('{}'), 'c.json is not listed'),
    (lambda d: (d/'a.json').rename(d/'c.json'), 'a.json is gone; c.json is not listed'),
    (lambda d: [f.unlink() for f in d.iterdir()], 'the list is empty')]

@pytest.mark.parametrize('harm,said', HARM)
def test_published_files_stay_what_they_were(harm, said, tmp_path):
    for n in 'ab': write_sums([write_json(tmp_path/f'{n}.json', dict(seconds=60))])
    assert check_sums(tmp_path)==['a.json', 'b.json']
    harm(tmp_path)
    with pytest.raises(HydraError, match=said): check_sums(tmp_path)

@pytest.mark.parametrize('edit,changes', [('"Other words"', False), ('"A docstring"; x = 2', True)])
def test_a_docstring_is_not_code(tmp_path, edit, changes):
    nb = notebook(tmp_path/'n.ipynb', SCALE, 'from hydramoe.data.tiny import f')
    write_module(tmp_path, 'data.tiny', 'from .deep import g\ndef f():\n    "A docstring"')
    for m in ('data.deep', 'data.other'): write_module(tmp_path, m, 'def g(): return 1')
    before = code_digests(nb, tmp_path)
    write_module(tmp_path, 'data.tiny', f'from .deep import g\ndef f():\n    {edit}')
    after = code_digests(nb, tmp_path)
    assert set(before['package'])=={'data.tiny', 'data.deep'}
    assert (before!=after)==changes

def write_module(package, name, code):
    f = package.joinpath(*name.split('.')).with_suffix('.py')
    f.parent.mkdir(parents=True, exist_ok=True)
    f.write_text(code+'\n')

MODULES = {
    'a.one': 'x = 1', 'a.two': 'from .one import x',
    'b.three': 'from ..a.two import x\ndef f():\n    from ..c import four', 'b.five': 'import os',
    'c.four': 'y = 4', 'c.six': 'import hydramoe.b.five'}

LINES = [ # of a notebook, and the modules behind each
    ('from hydramoe.a.one import x', 'a.one'), ('from hydramoe.a.two import x', 'a.one a.two'),
    ('from hydramoe.b.three import f', 'a.one a.two b.three c.four'),
    ('from hydramoe.b import three', 'a.one a.two b.three c.four'),
    ('import hydramoe.c.six', 'b.five c.six'), ('import hydramoe.c.six as six, os', 'b.five c.six'),
    ('def g():\n    from hydramoe.c import six', 'b.five c.six'),
    ('from hydramoe import Hydra', 'a.one a.two b.three b.five c.four c.six'),
    ('import hydramoe', ''), ('from hydramoe import __version__', ''),
    ('%pip list\n!ls\nfrom hydramoe.a import one', 'a.one'), ('from elsewhere.a.one import x', '')]

@pytest.mark.parametrize('line,wanted', LINES)
def test_code_is_followed_through_the_chapters(tmp_path, line, wanted):
    for name, code in MODULES.items(): write_module(tmp_path, name, code)
    (tmp_path/'a'/'__init__.py').write_text('')
    nb = notebook(tmp_path/'n.ipynb', SCALE, line)
    assert set(code_digests(nb, tmp_path)['package'])==set(wanted.split())

@pytest.mark.parametrize('edited,changes', [('a.one', True), ('c.four', True), ('b.five', False)])
def test_an_edit_anywhere_behind_a_notebook_is_seen(tmp_path, edited, changes):
    for name, code in MODULES.items(): write_module(tmp_path, name, code)
    nb = notebook(tmp_path/'n.ipynb', SCALE, 'from hydramoe.b.three import f')
    before = code_digests(nb, tmp_path)
    write_module(tmp_path, edited, MODULES[edited]+'\nz = 9')
    assert (code_digests(nb, tmp_path)!=before)==changes

@pytest.mark.parametrize('nb', EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_depends_on_code_of_several_chapters_and_not_on_what_publishes(nb):
    found = set(code_digests(nb)['package'])
    assert {'foundations.core', 'data.records', 'use.reproduce'} <= found
    assert not found & {'use.publish', 'use.sweep', 'use.cli'}

TYPED = {int: st.integers(), float: st.floats(allow_nan=False, allow_infinity=False), str: st.text(),
         bool: st.booleans(), list: st.lists(st.integers())}

@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(TYPED)).flatmap(lambda t: st.tuples(st.just(t), TYPED[t])))
def test_every_value_survives_the_command_line(tv):
    kind, value = tv
    declared = dict(x=Parameter('x', kind, value, ''))
    text = value if kind is str else json.dumps(value)
    got = parse_assignments(declared, [f'x={text}'])['x']
    assert got==value
    assert type(got) is kind

@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(TYPED)), st.one_of(*TYPED.values(), st.none(), st.just(float('nan'))))
def test_a_value_of_another_type_is_refused(kind, value):
    declared = dict(x=Parameter('x', kind, kind(), ''))
    of_its_kind = type(value) is kind and value==value
    # a float holds no larger whole number for sure
    whole_float = kind is float and type(value) is int and abs(value)<=2**53
    if of_its_kind or whole_float: assert check_parameters(declared, dict(x=value))['x']==value
    else:
        with pytest.raises(HydraError, match='takes a'): check_parameters(declared, dict(x=value))
