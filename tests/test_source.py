"What a source hash notices, what it does not, and what it refuses."
import functools, importlib, os, subprocess, sys, time
import pytest
from hydramoe.foundations.source import SourceError, source_hash

def write_part(out, text='hydra'): (out/'part').write_text(text)

PACKAGE = {'__init__': '', 'low': '''
SCALE = 2
TABLE = {'a': 1}
TABLE['b'] = 2
def helper(x):
    "Doc"
    return x*SCALE
def unused(x): return x
class Thing:
    size = 3
    def grow(self): return helper(self.size)
@patch
def shrink(self:Thing): return 1
''', 'mid': '''
from . import low
from .low import Thing as T
import package_x.far as distant
def middle(x:int=1):
    def inner(y): return low.helper(y)
    return inner(x)
def thing(): return T()
def lazy():
    from package_x.lazy import answer as a
    return a()
def away(): return distant.f()
''', 'far': '''
try: from json import dumps
except ImportError: dumps = None
def f(): return dumps(1)
''', 'lazy': '''
def answer(): return 42
''', 'top': '''
import functools
from package_x.mid import middle, thing, lazy, away
from package_x.low import TABLE
@functools.lru_cache
def make(out): return middle(), thing(), lazy(), away(), TABLE
'''}

@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path/'package_x'
    folder.mkdir()
    for name,text in PACKAGE.items(): (folder/f'{name}.py').write_text(text)
    low = folder/'low.py'
    text = low.read_text().replace('self:Thing', 'self:"Thing"').replace('"Thing"', 'Thing')
    low.write_text('def patch(f): return f\n'+text)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for m in [m for m in sys.modules if m.split('.')[0]=='package_x']: del sys.modules[m]

def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    os.utime(file, ns=(time.time_ns(), time.time_ns()+1))

def top(): return importlib.import_module('package_x.top').make

CHANGES = [
    ('low', 'x*SCALE', 'x+SCALE'), ('low', 'SCALE = 2', 'SCALE = 3'), ('low', "['b'] = 2", "['b'] = 3"),
    ('low', 'size = 3', 'size = 4'), ('low', 'helper(self.size)', 'helper(1)'), ('low', 'return 1', 'return 2'),
    ('mid', 'x:int=1', 'x:int=2'), ('mid', 'low.helper(y)', 'low.helper(y+1)'),
    ('far', 'dumps(1)', 'dumps(2)'), ('far', 'dumps = None', 'dumps = 0'),
    ('lazy', '42', '43'), ('top', 'thing(), ', '')]

@pytest.mark.parametrize('file, old, new', CHANGES)
def test_a_change_is_noticed(package, file, old, new):
    before = source_hash(top())
    edit(package/f'{file}.py', old, new)
    assert source_hash(top())!=before

NO_CHANGES = [
    ('low', '"Doc"', '"Better words"'), ('low', '    "Doc"\n', ''),
    ('low', 'def unused(x): return x', 'def unused(x): return 2*x'), ('low', 'x*SCALE', '(x * SCALE)  # why'),
    ('mid', 'def thing(): return T()', '\n\ndef thing():\n    return T()'),
    ('low', 'class Thing:', 'class Thing:\n    "A thing"')]

@pytest.mark.parametrize('file, old, new', NO_CHANGES)
def test_what_changes_nothing_is_not_noticed(package, file, old, new):
    before = source_hash(top())
    edit(package/f'{file}.py', old, new)
    assert source_hash(top())==before

def test_the_same_hash_in_every_process():
    code = '''
from hydramoe.foundations.source import source_hash
from hydramoe.foundations.store import stage
from hydramoe.foundations.core import run_record
print(source_hash(stage), source_hash(run_record))
'''
    def run(seed):
        env = {**os.environ, 'PYTHONHASHSEED': seed}
        return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env).stdout
    outs = set(map(run, '012'))
    assert len(outs)==1
    assert len(outs.pop().split())==2

def test_a_module_edited_under_a_running_process(tmp_path, monkeypatch):
    file = tmp_path/'hydramoe_edited.py'
    file.write_text('def make(out): return helper()\ndef helper(): return "one"\n')
    monkeypatch.syspath_prepend(tmp_path)
    make = importlib.import_module('hydramoe_edited').make
    before = source_hash(make)
    edit(file, 'def make', '# a comment\ndef make')
    assert source_hash(make)==before
    edit(file, '"one"', '"two"')
    with pytest.raises(SourceError, match='helper differs.*restart'): source_hash(make)
    del sys.modules['hydramoe_edited']

def test_functions_closures_partials_and_hidden_inputs():
    def outer(n):
        def make(out): return n
        return make
    assert source_hash(outer(1))==source_hash(outer(1))!=source_hash(outer(2))
    assert source_hash(functools.partial(write_part, text='a'))!=source_hash(functools.partial(write_part, text='b'))
    with pytest.raises(SourceError, match="may not take 'n' from around it"): source_hash(outer(object()))
