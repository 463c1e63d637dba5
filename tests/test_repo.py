"What the repository promises: pins, commands, pages made from other files."
import ast, configparser, json, os, re, subprocess, sys, tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from packaging.utils import canonicalize_name

from hydramoe.use.reproduce import Graph, first_seed, load_result, experiments_at, split_scale
from hydramoe.use.publish import SCALES, check_sums, published, read_older
from hydramoe.use.tables import SPEEDS
from hydramoe.use.paper import numbers, paper_files, paper_results
from hydramoe.use.pages import PAGES as MADE, notebooks_page, render_page
from hydramoe.foundations.report import latex_name
from helpers import root, text
from prose import PAGES, project, unsupported

lines_of_pins = [l for l in text('constraints.txt').splitlines() if l and l[0]!='#']
pins = {canonicalize_name(l.split('==')[0]): l.split('==')[1] for l in lines_of_pins}
extras = project['optional-dependencies']


def test_torch_is_pinned_for_every_build(): assert pins['torch']=='2.13.0'

def test_nbdev_reads_settings_ini():
    c = configparser.ConfigParser()
    c.read(root/'settings.ini')
    assert pins['nbdev']=='2.4.14'
    assert c['DEFAULT']['allowed_cell_metadata_keys']=='tags'
    version = re.search(r"__version__ = ['\"](.+)['\"]", text('hydramoe', '__init__.py'))[1]
    assert c['DEFAULT']['version']==version
    assert f'## {version}' in text('CHANGELOG.md')

@pytest.mark.parametrize('extra', [None, *extras])
def test_every_dependency_is_pinned_within_its_bounds(extra):
    for r in map(Requirement, extras[extra] if extra else project['dependencies']):
        pin = pins[canonicalize_name(r.name)]
        assert r.specifier.contains(pin), f'{r} is pinned to {pin}'

installed_by_make = re.search(r'(?m)^EXTRAS := (.+)$', text('Makefile'))[1].split(',')

def test_make_setup_installs_what_the_project_is_named_for():
    assert {'merge', 'eval'} <= set(installed_by_make) <= set(extras)
    assert "-e '.[$(EXTRAS)]'" in text('Makefile')
    assert {'mergekit', 'lm-eval'} <= {Requirement(r).name for e in installed_by_make for r in extras[e]}

def test_all_that_make_setup_installs_is_pinned():
    by_extras = [r for e in installed_by_make for r in extras[e]]
    todo, seen = [Requirement(r) for r in (*project['dependencies'], *by_extras)], {}
    while todo:
        r = todo.pop()
        name = canonicalize_name(r.name)
        if name.startswith(('nvidia-', 'cuda-', 'triton')): continue  # torch's CUDA build brings its own
        if name in seen and r.extras <= seen[name]: continue
        seen[name] = seen.get(name, set()) | r.extras
        for d in map(Requirement, metadata.requires(name) or []):
            if not d.marker or any(d.marker.evaluate(dict(extra=e)) for e in ('', *r.extras)): todo.append(d)
    assert not seen.keys()-pins.keys(), 'these come with `make setup`; pin them in constraints.txt'
    other = {n: metadata.version(n) for n in seen if Version(metadata.version(n)).public!=pins[n]}
    assert not other, 'installed otherwise than pinned; run `make setup`'

def test_what_is_imported_is_declared():
    texts = [f.read_text() for f in (root/'hydramoe').rglob('*.py')]
    imported = [n for t in texts for n in re.findall(r'^\s*(?:import|from) ([a-z_][\w.]*)', t, re.M)]
    names = {n.split('.')[0] for n in imported} - set(sys.stdlib_module_names) - {'hydramoe'}
    dists = metadata.packages_distributions()
    groups = (project['dependencies'], *extras.values())
    declared = {canonicalize_name(Requirement(d).name) for group in groups for d in group}
    foreign = {n: {canonicalize_name(d) for d in dists[n]} for n in names if n in dists}
    missing = {n for n,ds in foreign.items() if not ds & declared}
    # these come with what is declared, and cannot be absent where that is present
    assert missing <= {'numpy', 'mistune', 'tokenizers', 'nbclient', 'nbformat', 'traitlets', 'IPython',
                       'huggingface_hub', 'httpx', 'scipy', 'packaging', 'threadpoolctl'}


def test_exported_code_is_documented_and_has_no_star_imports():
    bad = []
    for f in (root/'hydramoe').rglob('*.py'):
        if f.name.startswith('_'): continue
        for n in ast.parse(f.read_text()).body:
            if isinstance(n, ast.ImportFrom) and n.names[0].name=='*': bad.append(f'{f.name}: star import')
            public = isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0]!='_'
            if public and not ast.get_docstring(n): bad.append(f'{f.name}: {n.name} has no docstring')
    assert not bad

LIGHT = [f'foundations.{m}' for m in ('core', 'files', 'source', 'store', 'fetch', 'report', 'page')]
LIGHT += [f'data.{m}' for m in ('records', 'cards', 'load', 'formats', 'stream', 'parts')]
LIGHT += [f'use.{m}' for m in ('reproduce', 'publish', 'tables', 'paper', 'pages', 'run_report', 'sweep', 'cli')]

@pytest.mark.parametrize('room', LIGHT)
def test_light_rooms_import_without_torch(room):
    light = '"torch" not in sys.modules and "papermill" not in sys.modules'
    code = f'import sys, hydramoe.{room}; assert {light}, sorted(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=root)

def test_the_names_that_people_use_are_at_the_top():
    import hydramoe
    from hydramoe.hydra.model import Hydra  # as model cards of older bundles say it
    assert hydramoe.Hydra is Hydra
    assert all(getattr(hydramoe, n).__name__==n for n in hydramoe._LAZY)

def test_the_wheel_holds_every_chapter():
    packages = tomllib.loads(text('pyproject.toml'))['tool']['setuptools']['packages']
    assert set(packages) >= {'.'.join(f.parent.relative_to(root).parts) for f in (root/'hydramoe').rglob('__init__.py')}


@pytest.mark.parametrize('page', MADE)
def test_a_page_is_its_notebook(page):
    assert text(page)==render_page(page), 'run `make readme` and commit'

def test_the_page_of_notebooks_names_them_all():
    assert text('nbs', 'README.md')==notebooks_page(), 'run `make readme` and commit'

@pytest.mark.parametrize('nb', MADE.values())
def test_a_page_puts_out_what_its_sources_hold(nb):
    # a stored output is no source: each is made again, from the notebooks, results/ and benchmarks/results of today
    names = {}
    for c in json.loads(text('nbs', nb))['cells']:
        if c['cell_type']!='code': continue
        *first, last = ast.parse(''.join(c['source'])).body
        exec(compile(ast.Module(first, []), 'index', 'exec'), names)
        if not isinstance(last, ast.Expr):
            exec(compile(ast.Module([last], []), 'index', 'exec'), names)
            continue
        made = eval(compile(ast.Expression(last.value), 'index', 'eval'), names).data
        assert made.strip()==''.join(c['outputs'][0]['data']['text/markdown']).strip(), 'run `make readme` and commit'

@pytest.mark.parametrize('page', PAGES)
def test_every_number_in_prose_has_a_source(page):
    wrong = unsupported(*PAGES[page]())
    assert not wrong, 'enter it in tests/prose.py, or make it from results'

def test_functions_are_as_short_as_promised():
    median, most = map(int, re.search(r'median under (\d+) lines, none over (\d+)', text('CONTRIBUTING.md')).groups())
    trees = [ast.parse(f.read_text()) for f in (root/'hydramoe').rglob('*.py') if f.name[0]!='_']
    lines = sorted(n.end_lineno-n.lineno+1 for t in trees for n in ast.walk(t) if isinstance(n, ast.FunctionDef))
    assert lines[len(lines)//2]<median
    assert lines[-1]<=most

def test_readme_names_what_exists():
    page = text('README.md') + text('CONTRIBUTING.md')
    targets = set(re.findall(r'^([a-z-]+):', text('Makefile'), re.M))
    for line in re.findall(r'(?:^|`)\s*make ([a-z -]+?)(?:\s{2,}|`|$)', page, re.M):
        assert set(line.split()) <= targets, f'make {line}'
    for file in ('README.md', *(p.relative_to(root) for p in root.glob('*/README.md'))):
        for link in re.findall(r'\]\((?!\w+:|#)([^)]+)\)', text(file)):
            assert ((root/file).parent/link).exists(), f'{file}: {link}'

def test_readme_commands_are_commands():
    from hydramoe.use.cli import make_parser
    lines = re.findall(r'^\.venv/bin/hydramoe ([^#\n]+)', text('README.md'), re.M)
    assert len(lines) >= 5
    import shlex
    for line in lines: make_parser().parse_args(shlex.split(line))

def test_makefile_help_lists_every_target():
    out = subprocess.run(['make', 'help'], cwd=root, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r'^  make ([a-z-]+) ', out, re.M))
    assert listed==set(re.search(r'^\.PHONY: (.+)$', text('Makefile'), re.M)[1].split())
    assert subprocess.run(['make'], cwd=root, capture_output=True, text=True, check=True).stdout==out

def test_ci_script_can_be_run():
    assert os.access(root/'.ci'/'run', os.X_OK)
    subprocess.run(['bash', '-n', root/'.ci'/'run'], check=True)


results = sorted((root/'results').glob('*.json'))

@pytest.mark.parametrize('folder', ['results', 'benchmarks/results'])
def test_what_is_published_is_whole(folder):
    check_sums(root/folder)  # any byte edited, a file gone, or one that nobody published

def test_all_that_the_pages_are_made_from_is_published():
    assert {f'{f}.json' for f,*_ in SPEEDS} <= set(check_sums(root/'benchmarks'/'results'))
    assert results

@pytest.mark.skipif(not results, reason='nothing is published in results/')
def test_paper_agrees_with_results():
    for name,content in paper_files().items():
        assert text('papers', 'hydra', 'generated', name)==content, 'run `make results` and commit'

@pytest.mark.skipif(not results, reason='nothing is published in results/')
def test_every_number_the_paper_names_is_there():
    named = set(re.findall(r'\\result\{(\w+)\}', text('papers', 'hydra', 'main.tex')))
    assert named <= {latex_name(k) for k in numbers(paper_results())}

def test_results_of_older_code_are_published_ones_and_the_readme_says_so():
    listed = read_older()
    assert set(listed) <= {f.stem for f in results}
    named = {f'{r.name}-{r.scale}' for r in published().values()}
    told = named & set(listed) & {f'{n}-{s}' for n in ('e3_routing', 'e7_routers') for s in SCALES}
    pages = text('README.md')+text('results', 'README.md')
    assert all(f'Made before {listed[n]}.' in pages for n in told)

@pytest.mark.parametrize('f', results, ids=lambda f: f.name)
def test_a_result_is_whole_and_portable(f):
    r = load_result(f)
    assert f.stem==f"{r.name}-{r.scale}"
    assert split_scale(r.scale)[0] in SCALES
    assert r.made, 'edited, or not made by the runner'
    assert r.run['seal']==r.seal, 'edited, or not made by the runner'
    assert not re.search(r'"/(?:\w[\w.-]*/)+', f.read_text()), 'a path of one machine'
    # what it was made from may have been published anew, and params/ may have changed since
    if f.stem in read_older(): return
    graph = Graph()
    for name,seal in r.made['upstream'].items():
        assert load_result(root/'results'/f'{name}-{graph.read_at(name, r.scale)}.json').seal==seal
    declared = experiments_at(graph, r.scale)
    # a parameter that the notebook has learnt since is no reason to doubt an older result; a changed value is
    changed = {k: (v, declared[r.name].get(k)) for k,v in r.params.items() if declared[r.name].get(k)!=v}
    assert not changed, f'params/ has changed since; run the scale again: {changed}'

ROUTINGS = [f for f in results if f.name.startswith('e3_routing')]

@pytest.mark.parametrize('f', ROUTINGS, ids=lambda f: f.name)
def test_e3_names_its_systems_by_kind(f):
    always = ('base', 'seed', 'single', 'similarity', 'classifier', 'ensemble', 'uniform', 'hindsight')
    kinds = (*always, 'random', 'oracle', 'gate', 'shared')
    result = load_result(f)
    rows = result.rows
    assert all(r['system'].startswith(kinds) for r in rows)
    found = {re.match(r'\w+', r['system'])[0] for r in rows}
    if first_seed(result.scale)==result.scale: assert set(always) <= found
    else: assert {'base', 'single', 'similarity', 'shared'} <= found # only what decides
    assert all(set(r) >= {'system', 'domain', 'nll', 'ppl', 'lo', 'hi'} for r in rows)
    assert all(r['lo']<=r['ppl']<=r['hi'] for r in rows)


def tracked():
    "The files that git knows"
    out = subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True, check=True).stdout
    return out.split('\n')[:-1]

@pytest.mark.skipif(not (root/'.git').exists(), reason='not a checkout')
def test_no_path_of_one_machine_is_committed():
    def names_a_path(f): return re.search(rb'(?<![\w.])/(?:home|Users|root)/[\w.-]+/', f.read_bytes())
    bad = [f for f in tracked() if (root/f).is_file() and names_a_path(root/f)]
    assert not bad

@pytest.mark.skipif(not (root/'.git').exists(), reason='not a checkout')
def test_nothing_heavy_or_pickled_is_committed():
    def heavy(f): return (root/f).is_file() and (root/f).stat().st_size > 2_000_000
    assert not [f for f in tracked() if heavy(f) or f.endswith(('.pkl', '.bin', '.pt'))]
