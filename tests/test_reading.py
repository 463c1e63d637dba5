"""How the notebooks read: what a reader meets on a line, in a cell, before anything is run; and that imports go one
way.

The limits are what the project has reached. A page that needs more is a page to write anew, not a limit to raise.
"""
import ast, bisect, io, json, re, statistics, tokenize
from collections import defaultdict
from pathlib import Path

import pytest
from helpers import page_name, root

CHAPTERS = 'foundations models data domains experts hydra proof use'.split()  # each imports only from those before it
LIMITS = dict(tokens=12, p90=15, definitions=1.2, unshown=40, exported=450)


def code_cells(path):
    "The sources of a notebook's code cells"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type']=='code' and ''.join(c['source']).strip()]

def exported(cell): return re.search(r'^#\| *export', cell, re.M) is not None
def hidden(cell): return re.search(r'^#\| *hide', cell, re.M) is not None
def tree(cell): return ast.parse(re.sub(r'^[%!].*$', '', cell, flags=re.M))
def functions(cell): return [n for n in ast.walk(tree(cell)) if isinstance(n, ast.FunctionDef)]
def definitions(cell): return [n for n in tree(cell).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
def imports_only(cell): return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree(cell).body)

def body_start(node):
    "The first line of a definition's body, behind its signature and docstring"
    after_docstring = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return after_docstring[0].lineno if after_docstring else node.end_lineno+1

def body_lines(cell):
    "Lines of code without blank lines, directives, signatures and docstrings"
    skipped = set()
    for n in ast.walk(tree(cell)):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and body_start(n)>n.lineno:
            skipped |= set(range(n.lineno, body_start(n)))
    lines = enumerate(cell.splitlines(), 1)
    return [line for number, line in lines if line.strip() and line[0]!='#' and number not in skipped]

def tokens_and_lines(cell):
    "How many tokens of code, on how many lines, stand in the bodies of a cell's functions"
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    rows = [t.start[0] for t in tokenize.generate_tokens(io.StringIO(cell).readline) if t.type in kinds]
    tokens = lines = 0
    for f in functions(cell):
        first, last = body_start(f), f.end_lineno
        if first>last: continue
        tokens += bisect.bisect_right(rows, last)-bisect.bisect_left(rows, first)
        lines += last-first+1
    return tokens, lines

def longest_unshown(cells):
    "The most exported body lines that follow each other before a cell runs something"
    longest = run = 0
    for cell in cells:
        if exported(cell): run += 0 if imports_only(cell) else len(body_lines(cell))
        elif not hidden(cell): run = 0
        longest = max(longest, run)
    return longest

notebooks = sorted(p for c in CHAPTERS for p in (root/'nbs'/c).glob('[0-9]*.ipynb'))
pages = {p: code_cells(p) for p in notebooks}
taught = {p: [c for c in cells if exported(c) and not imports_only(c)] for p, cells in pages.items()}
every = [c for cells in taught.values() for c in cells]


def test_a_line_holds_one_idea():
    counts = [tokens_and_lines(c) for c in every]
    assert sum(t for t, _ in counts)/sum(n for _, n in counts) <= LIMITS['tokens']

def test_lines_fit_a_screen():
    wide = []
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        lines = [line for cell in code_cells(path) for line in cell.splitlines()]
        wide += [f'{path.stem}: {line}' for line in lines if len(line)>120]
    assert not wide

def test_tests_and_benchmarks_fit_a_screen():
    files = [*(root/'tests').rglob('*.py'), *(root/'benchmarks').rglob('*.py')]
    lines = [(f.name, line) for f in files for line in f.read_text(encoding='utf-8').splitlines()]
    assert not [f'{name}: {line}' for name, line in lines if len(line)>120]

def test_cells_are_short():
    sizes = sorted(len(body_lines(c)) for c in every)
    assert sizes[int(.9*len(sizes))] <= LIMITS['p90']

def public_names(path):
    "The functions, classes and constants that a notebook exports; a method that is patched in is no name of its own"
    names = set()
    for node in (node for cell in taught[path] for node in tree(cell).body):
        is_patched = any(ast.unparse(d).startswith('patch') for d in getattr(node, 'decorator_list', []))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not is_patched: names.add(node.name)
        if not isinstance(node, ast.Assign): continue
        targets = [leaf for target in node.targets for leaf in ast.walk(target)]
        names |= {leaf.id for leaf in targets if isinstance(leaf, ast.Name)}
    return {name for name in names if not name.startswith('_')}

def test_a_public_name_is_in_one_module():
    homes = defaultdict(list)
    for path in notebooks:
        for name in public_names(path): homes[name].append(page_name(path))
    assert not {name: where for name, where in homes.items() if len(where)>1}

def test_a_cell_defines_one_thing():
    per_page = [sum(len(definitions(c)) for c in cells)/len(cells) for cells in taught.values()]
    assert statistics.mean(per_page) <= LIMITS['definitions']

@pytest.mark.parametrize('page', notebooks, ids=page_name)
def test_what_is_defined_is_soon_run(page):
    assert longest_unshown(pages[page]) <= LIMITS['unshown']

@pytest.mark.parametrize('page', notebooks, ids=page_name)
def test_a_page_has_one_subject(page):
    assert sum(len(body_lines(c)) for c in taught[page]) <= LIMITS['exported']

def test_a_public_name_stands_in_one_module():
    where = defaultdict(set)
    for file in (root/'hydramoe').rglob('*.py'):
        if file.name[0]=='_': continue
        for n in ast.parse(file.read_text(encoding='utf-8')).body:
            patched = any('patch' in ast.unparse(d) for d in getattr(n, 'decorator_list', []))
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0]!='_' and not patched:
                where[n.name].add(str(file.relative_to(root/'hydramoe')))
    assert not {n: sorted(files) for n, files in where.items() if len(files)>1}


# ---- imports go one way

def default_exp(page): return next(m[1] for c in pages[page] if (m := re.search(r'^#\| *default_exp +(\S+)', c, re.M)))
order = {default_exp(p): (CHAPTERS.index(p.parent.name), p.name) for p in notebooks}

def imported(source):
    "Modules below hydramoe that a text imports, as chapter.room; wherever the import stands, in a function as well"
    for n in ast.walk(tree(source)):
        if isinstance(n, ast.Import): found = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom) and n.module: found = [n.module, *(f'{n.module}.{a.name}' for a in n.names)]
        else: continue
        yield from (m.removeprefix('hydramoe.') for m in found if m.removeprefix('hydramoe.') in order)

def test_each_room_stands_in_the_chapter_of_its_folder():
    assert {default_exp(p) for p in notebooks} == {f'{p.parent.name}.{p.stem.split("_", 1)[1]}' for p in notebooks}
    modules = {p.relative_to(root/'hydramoe') for p in (root/'hydramoe').rglob('*.py') if p.name[0]!='_'}
    assert modules == {Path(m.replace('.', '/')+'.py') for m in order}

@pytest.mark.parametrize('page', notebooks, ids=page_name)
def test_imports_go_one_way(page):
    own = order[default_exp(page)]
    exports = '\n'.join(c for c in pages[page] if exported(c))
    forbidden = {m for m in imported(exports) if order[m]>=own}
    assert not forbidden, 'a room imports from chapters above it, and in its chapter from rooms with a smaller number'

@pytest.mark.parametrize('page', notebooks, ids=page_name)
def test_no_private_name_is_imported(page):
    nodes = [n for c in pages[page] if exported(c) for n in ast.walk(tree(c))]
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('hydramoe.')]
    names = [a.name for n in imports for a in n.names]
    assert not [n for n in names if n[0]=='_'], 'a name that two rooms need is public'
