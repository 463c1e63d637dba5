"Sealed directories under kill -9, races, broken disks and every kind of damage; stages and their keys."
import errno, functools, importlib, inspect, json, os, resource, shutil, subprocess, sys, tempfile, textwrap, time
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hydramoe.foundations import store
from hydramoe.foundations.core import HydraError, canonical
from hydramoe.foundations.store import SEAL, SealError, is_sealed, open_sealed, seal_id, sealing, stage, work_dir
from helpers import forked, killed_at, parts_are_whole, write_parts

def litter(folder): return sorted(p.name for p in Path(folder).iterdir() if p.name.startswith('.'))

def started(code, *args, **env):
    "A fresh interpreter that runs `code`"
    call = [sys.executable, '-c', textwrap.dedent(code), *map(str, args)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.path.dirname(__file__), **env}
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

# --- killed ---

@pytest.fixture
def memory(tmp_path):
    "A folder where fsync costs nothing, so that hundreds of deaths take seconds"
    shm = Path('/dev/shm')
    if not (shm.is_dir() and os.access(shm, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm) as d: yield Path(d)

def test_killed_at_every_file_operation_of_sealing(memory):
    for k in range(200):
        d = memory/str(k)/'d'
        d.parent.mkdir()
        killed = killed_at(k, lambda: _seal_into(d))
        if d.exists(): assert parts_are_whole(d) and open_sealed(d), f'half a directory after operation {k}'
        _seal_into(d)
        assert parts_are_whole(d) and open_sealed(d), f'operation {k}'
        assert litter(d.parent)==[], f'operation {k}'
        if not killed: break
    assert 15 < k < 199

def _seal_into(d):
    with sealing(d, {'of': 'test'}) as out: write_parts(out)

def checkpointed(out, steps=3):
    for s in range(steps):
        if not is_sealed(work_dir(out)/str(s)):
            with sealing(work_dir(out)/str(s), {}) as c: (c/'state').write_text(str(s))
    for s in range(steps): open_sealed(work_dir(out)/str(s))
    write_parts(out)

def test_killed_at_every_file_operation_of_a_stage_with_checkpoints(memory):
    for k in range(0, 600, 3):
        root = memory/str(k)
        killed = killed_at(k, lambda: stage(checkpointed, {}, root=root))
        for d in root.glob('checkpointed-*'):
            assert parts_are_whole(d)
            assert open_sealed(d)
        d = stage(checkpointed, {}, root=root)
        assert parts_are_whole(d), f'operation {k}: {litter(root)}'
        assert litter(root)==[], f'operation {k}: {litter(root)}'
        if not killed: break
        shutil.rmtree(root)
    assert 30 < k < 599

def test_kill_by_the_clock(tmp_path):
    code = '''
    import sys, time
    from pathlib import Path
    from hydramoe.foundations.store import sealing
    print('ready', flush=True)
    while True:
        with sealing(Path(sys.argv[1])/'d', {}) as out:
            for i in range(4): (out/f'part{i}').write_text('hydra'*(i+1))
        import shutil; shutil.rmtree(Path(sys.argv[1])/'d')
    '''
    for i in range(8):
        p = started(code, tmp_path)
        assert p.stdout.readline()=='ready\n', p.stderr.read()
        time.sleep(.003*i)
        p.kill()
        p.communicate()
        d = tmp_path/'d'
        seems_whole = d.exists() and (d/SEAL).exists() and len(list(d.iterdir()))==5
        if seems_whole:
            assert parts_are_whole(d)
            assert open_sealed(d)
        shutil.rmtree(d, ignore_errors=True)   # the child's own rmtree may have been cut short
    _seal_into(tmp_path/'d')
    assert litter(tmp_path)==[]
    assert parts_are_whole(tmp_path/'d')

def test_a_maker_at_work_is_not_swept_and_nothing_foreign_is(tmp_path):
    (tmp_path/'.writing-mine').mkdir()
    (tmp_path/'.tmp-x').mkdir()
    (tmp_path/'.writing-x-0123456789ab').write_text('a file')
    before = litter(tmp_path)
    with sealing(tmp_path/'slow', {}) as out:
        write_parts(out)
        assert forked(lambda: _seal_into(tmp_path/'quick'))==0
        assert out.is_dir()
    assert parts_are_whole(tmp_path/'slow')
    assert parts_are_whole(tmp_path/'quick')
    assert litter(tmp_path)==before

# --- two at once ---

RACE = '''
import os, sys, time
from pathlib import Path
from helpers import write_parts
from test_store import slow
from hydramoe.foundations.store import seal_id, sealing, stage
root = Path(sys.argv[1])
print('ready', flush=True)
while not (root/'go').exists(): time.sleep(.001)
if sys.argv[2]=='stage': d = stage(slow, dict(text='hydra', log=str(root/'calls')), root=root/'stages')
else:
    d = root/'d'
    with sealing(d, {}) as out:
        write_parts(out)
        time.sleep(.05)
print(d, seal_id(d))
'''

def slow(out, text, log):
    with open(log, 'a') as f: f.write('x')
    time.sleep(.3)
    write_parts(out, text)

@pytest.mark.parametrize('how', ['stage', 'sealing'])
def test_race(tmp_path, how):
    ps = [started(RACE, tmp_path, how) for _ in range(4)]
    for p in ps: assert p.stdout.readline()=='ready\n', p.stderr.read()
    (tmp_path/'go').touch()
    outs = [p.communicate() for p in ps]
    assert [p.returncode for p in ps]==[0]*4, outs
    assert len({o for o,_ in outs})==1, outs
    d = Path(outs[0][0].split()[0])
    assert parts_are_whole(d)
    assert open_sealed(d)
    assert litter(d.parent)==[]
    if how=='stage':
        assert (tmp_path/'calls').read_text()=='x', 'the others should have waited'
        assert sum('waiting for another process' in e for _,e in outs)==3

def test_a_waiter_takes_over_when_the_maker_is_killed(tmp_path):
    first = started(RACE, tmp_path, 'stage')
    first.stdout.readline()
    (tmp_path/'go').touch()
    while not (tmp_path/'calls').exists(): time.sleep(.005)
    second = started(RACE, tmp_path, 'stage')
    second.stdout.readline()
    first.kill()
    first.communicate()
    out, err = second.communicate()
    assert second.returncode==0, err
    assert parts_are_whole(Path(out.split()[0])), err
    assert litter(tmp_path/'stages')==[]

def test_without_locks_the_rename_decides(tmp_path, no_locks):
    assert parts_are_whole(stage(write_parts, dict(text='hydra'), root=tmp_path))
    assert litter(tmp_path)==[]

# --- disks ---

@pytest.mark.parametrize('call', ['mkdir', 'fsync', 'rename', 'open'])
@pytest.mark.parametrize('error', [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_errors_leave_the_old_thing(tmp_path, monkeypatch, call, error):
    _seal_into(tmp_path/'old')
    name = seal_id(tmp_path/'old')
    def broken(*args, **kw): raise OSError(error, os.strerror(error))
    with monkeypatch.context() as m:
        m.setattr(os, call, broken)
        with pytest.raises(SealError, match='could not be made'):
            with sealing(tmp_path/'new', {}) as out: write_parts(out)
        try:
            with sealing(tmp_path/'old', {'of': 'test'}) as out: write_parts(out, 'another')
        except SealError as e: assert 'could not be made' in str(e)
    assert seal_id(tmp_path/'old')==name
    assert parts_are_whole(tmp_path/'old')
    assert not (tmp_path/'new').exists()
    _seal_into(tmp_path/'new')
    assert litter(tmp_path)==[]

def test_a_file_too_large_for_the_disk(tmp_path):
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with sealing(tmp_path/'d', {}) as out: (out/'big').write_bytes(b'x'*5000)
        except SealError as e: os._exit(7 if 'too large' in str(e) else 8)
    assert os.waitstatus_to_exitcode(forked(run))==7
    assert list(tmp_path.iterdir())==[]

@pytest.mark.skipif(os.geteuid()!=0, reason='needs root to become someone else')
def test_a_cache_that_may_only_be_read(tmp_path):
    for p in (tmp_path, *tmp_path.parents): # pytest's folders, one more under xdist, are their owner's alone
        if not p.stat().st_mode & 0o001: p.chmod(0o755)
    made = stage(write_parts, dict(text='hydra'), root=tmp_path/'stages')
    (tmp_path/'stages').chmod(0o555)
    made.chmod(0o555)
    def run():
        os.seteuid(65534)
        assert stage(write_parts, dict(text='hydra'), root=tmp_path/'stages')==made
        try: stage(write_parts, dict(text='other'), root=tmp_path/'stages')
        except HydraError as e: os._exit(7 if 'ermission' in str(e) else 8)
    assert os.waitstatus_to_exitcode(forked(run))==7

# --- damage ---

def truncate(d): os.truncate(d/'sub'/'b', 1)
def lose(d): (d/'sub'/'b').unlink()
def lose_folder(d): shutil.rmtree(d/'sub')
def extra(d): (d/'sub'/'c').write_text('')
def extra_hidden(d): (d/'.DS_Store').write_text('')

def flip(d):
    p = d/'sub'/'b'
    flipped = bytearray(p.read_bytes())
    flipped[0] ^= 1
    p.write_bytes(flipped)

def swap(d):
    (d/'a').rename(d/'t')
    (d/'sub'/'b').rename(d/'a')
    (d/'t').rename(d/'sub'/'b')

def link(d):
    (d/'sub'/'b').rename(d.parent/'b')
    (d/'sub'/'b').symlink_to(d.parent/'b')

def link_folder(d):
    (d/'sub').rename(d.parent/'sub')
    (d/'sub').symlink_to(d.parent/'sub')

def pipe(d):
    (d/'sub'/'b').unlink()
    os.mkfifo(d/'sub'/'b')

def now_a_folder(d):
    (d/'sub'/'b').unlink()
    (d/'sub'/'b').mkdir()

DAMAGES = [(truncate, 'sub/b'), (flip, 'sub/b'), (lose, 'sub/b'), (lose_folder, 'sub/b'), (swap, 'a'), (link, 'sub/b'),
           (link_folder, 'sub'), (pipe, 'sub/b'), (now_a_folder, 'sub/b'), (extra, 'sub/c'),
           (extra_hidden, '.DS_Store')]

@pytest.mark.parametrize('damage, named', DAMAGES)
def test_damage_is_named(tmp_path, damage, named):
    d = tmp_path/'d'
    with sealing(d, {}) as out:
        (out/'a').write_text('alpha')
        (out/'sub').mkdir()
        (out/'sub'/'b').write_text('betas')
    assert is_sealed(d)
    damage(d)
    with pytest.raises(SealError) as e: open_sealed(d)
    assert str(e.value).startswith(f'{d/named} ')
    assert is_sealed(d)==(damage in (flip, swap)), 'a glance sees all but changed bytes of the same number'

def test_damage_to_the_seal(tmp_path):
    d = tmp_path/'d'
    _seal_into(d)
    good = (d/SEAL).read_text()
    changes = (dict(meta={'of': 'else'}), dict(format=2), dict(files={}), dict(sizes={}), dict(id='0'*64),
               dict(files=None))
    for change in changes:
        (d/SEAL).write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(SealError, match='seal.json is altered'): open_sealed(d)
        with pytest.raises(SealError): seal_id(d)
    for text in ('', good[:50], '[]', 'null'):
        (d/SEAL).write_text(text)
        assert not is_sealed(d)
    (d/SEAL).write_text(good)
    assert open_sealed(d)
    (d/SEAL).rename(tmp_path/SEAL)
    (d/SEAL).symlink_to(tmp_path/SEAL)
    with pytest.raises(SealError): open_sealed(d)

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_is_named(tmp_path, data):
    d = tmp_path/'d'
    if not d.exists(): _seal_into(d)
    p = d/data.draw(st.sampled_from([f'part{i}' for i in range(4)]))
    good = bytearray(p.read_bytes())
    at = data.draw(st.integers(0, len(good)-1))
    bit = data.draw(st.integers(0, 7))
    bad = bytearray(good)
    bad[at] ^= 1<<bit
    p.write_bytes(bad)
    try:
        with pytest.raises(SealError, match=f'{p.name} is altered'): open_sealed(d)
    finally: p.write_bytes(good)
    assert open_sealed(d)

NOT_SEALED = dict(link='symbolic link', seal="the seal's own", pipe='neither file nor folder')

@pytest.mark.parametrize('bad', ['link', 'seal', 'pipe'])
def test_what_cannot_be_sealed_is_refused(tmp_path, bad):
    with pytest.raises(SealError, match=NOT_SEALED[bad]):
        with sealing(tmp_path/'d', {}) as out:
            if bad=='link': (out/'a').symlink_to('/etc/hostname')
            if bad=='seal': (out/SEAL).write_text('{}')
            if bad=='pipe': os.mkfifo(out/'a')
    assert list(tmp_path.iterdir())==[]

def test_a_place_that_is_taken(tmp_path):
    (tmp_path/'d').mkdir()
    (tmp_path/'d'/'thesis.tex').write_text('years of work')
    with pytest.raises(SealError, match='never sealed'): _seal_into(tmp_path/'d')
    assert (tmp_path/'d'/'thesis.tex').read_text()=='years of work'
    (tmp_path/'f').write_text('a file')
    with pytest.raises(SealError, match='not a directory'): _seal_into(tmp_path/'f')

# --- stages ---

def test_names_of_stages(tmp_path):
    with pytest.raises(SealError, match='cannot be called'): stage(lambda out: None, {}, root=tmp_path)
    four_parts = functools.partial(write_parts, parts=4)
    assert parts_are_whole(stage(four_parts, dict(text='hydra'), root=tmp_path, name='parts'))

@pytest.mark.parametrize('parameter', store.KEY_FUNCTIONS)
def test_what_a_parameter_names_is_read_by_a_function_that_exists(parameter):
    module, _, name = store.KEY_FUNCTIONS[parameter].partition(':')
    assert callable(getattr(importlib.import_module(module), name))

# --- a default is not part of a key ---

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
plain_values = st.none() | st.booleans() | numbers | st.text(max_size=3) | st.lists(st.integers(), max_size=2)

def named(names): return st.dictionaries(st.sampled_from(names), plain_values, max_size=len(names))

def with_parameters(required, defaults):
    "A function that has these parameters, as far as `inspect` can tell"
    def f(**kw): pass
    parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in required]
    parameters += [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v) for n,v in defaults.items()]
    f.__signature__ = inspect.Signature(parameters)
    return f

@given(named('abc'), named('xyz'), named('xyz'))
def test_a_parameter_equal_to_its_default_leaves_the_description_as_it_was(given_before, defaults, given_later):
    before = with_parameters(given_before, {})
    after = with_parameters(given_before, defaults)
    assert store._drop_defaults(before, given_before)==store._drop_defaults(after, given_before)==given_before
    assert store._drop_defaults(after, given_before | defaults)==given_before
    changed = {n: v for n,v in given_later.items() if n in defaults and canonical(v)!=canonical(defaults[n])}
    assert store._drop_defaults(after, given_before | defaults | changed)==given_before | changed

def test_defaults_and_keys_of_stages(tmp_path):
    def brief(out, x): (out/'x').write_text(str(x))
    def long(out, x, y=1, spec=(1, 2)): (out/'x').write_text(str(x))
    def run(make, **params): return stage(make, params, root=tmp_path, name='s')
    assert run(long, x=1)==run(long, x=1, y=1)==run(long, x=1, spec=[1, 2])!=run(long, x=1, y=2)
    others = {run(long, x=1, y=1.), run(long, x=1, y=True), run(long, x=1, spec=[1]), run(brief, x=1)}
    assert len({run(long, x=1), *others})==5
    old, new = (open_sealed(run(make, x=3))['meta'] for make in (brief, long))
    assert {k for k in old if old[k]!=new[k]}=={'source', 'key'}
    def object_default(out, x, y=object()): (out/'x').write_text(str(x))
    assert run(object_default, x=1)!=run(object_default, x=1, y=None)

def test_a_default_that_names_something_is_read(tmp_path, monkeypatch):
    "Whether a name is passed or is the default, what is behind it is part of the key"
    behind = ['one']
    monkeypatch.setitem(store.KEY_FUNCTIONS, 'encoder', 'test_store:behind_it')
    monkeypatch.setattr(sys.modules[__name__], 'behind_it', lambda name: behind[0], raising=False)
    monkeypatch.setitem(sys.modules, 'test_store', sys.modules[__name__])
    def embed(out, encoder='minilm'): (out/'x').write_text(encoder)
    first = stage(embed, {}, root=tmp_path)
    assert first==stage(embed, dict(encoder='minilm'), root=tmp_path)
    behind[0] = 'another'
    assert stage(embed, {}, root=tmp_path)!=first

def copied(out, src): shutil.copy(src/'part0' if src.is_dir() else src, out/'copy')

def test_inputs_are_named_by_content(tmp_path):
    for name,text in (('x', 'a'), ('y', 'a'), ('z', 'b')): stage(write_parts, dict(text=text), root=tmp_path/name)
    x, y, z = (next((tmp_path/n).iterdir()) for n in 'xyz')
    got = [stage(copied, {}, dict(src=d), root=tmp_path/'out') for d in (x, y, z)]
    assert got[0]==got[1]!=got[2]
    a = tmp_path/'a.txt'
    b = tmp_path/'b.txt'
    a.write_text('same')
    b.write_text('same')
    assert stage(copied, {}, dict(src=a), root=tmp_path/'out')==stage(copied, {}, dict(src=b), root=tmp_path/'out')
    b.write_text('other')
    assert stage(copied, {}, dict(src=a), root=tmp_path/'out')!=stage(copied, {}, dict(src=b), root=tmp_path/'out')

def test_a_damaged_input_is_not_used(tmp_path):
    d = stage(write_parts, dict(text='a'), root=tmp_path)
    (d/'part0').write_text('b')
    with pytest.raises(SealError, match='part0 is altered'): stage(copied, {}, dict(src=d), root=tmp_path)
    with pytest.raises(SealError, match="input 'src'"): stage(copied, {}, dict(src=tmp_path/'nowhere'), root=tmp_path)

def test_a_sealed_stage_under_another_name(tmp_path):
    d = stage(write_parts, dict(text='a'), root=tmp_path)
    e = stage(write_parts, dict(text='b'), root=tmp_path)
    shutil.rmtree(e)
    shutil.copytree(d, e)
    with pytest.raises(SealError, match='something else than its name says'):
        stage(write_parts, dict(text='b'), root=tmp_path)

def test_work_survives_failure_and_goes_with_success(tmp_path, monkeypatch):
    def make(out):
        (work_dir(out)/'note').write_text('kept')
        if os.environ['FAILS']=='yes': raise RuntimeError('boom')
    monkeypatch.setenv('FAILS', 'yes')
    for _ in range(2):
        with pytest.raises(RuntimeError): stage(make, {}, root=tmp_path)
    assert [p.name[:6] for p in tmp_path.iterdir()]==['.work-']
    monkeypatch.setenv('FAILS', 'no')
    made = stage(make, {}, root=tmp_path)
    assert list(tmp_path.iterdir())==[made]

NOTEBOOK = '''
from hydramoe.foundations.store import stage
from hydramoe.foundations.files import write_json
from dataclasses import dataclass
SCALE = 3
@dataclass
class Spec:
    x:int
    by:int = 1
    def __call__(self): return self.x*self.by
def scaled(x): return Spec(SCALE, x)()
def make(out, x): write_json(out/'y.json', scaled(x))
d = stage(make, dict(x=2), root={root!r})
open({root!r}+'/name', 'a').write(d.name+chr(10))
'''

def test_a_stage_of_a_notebook(tmp_path):
    import nbformat
    from nbclient import NotebookClient
    def run(source):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in source.split('\n\n')])
        NotebookClient(nb, timeout=60, kernel_name='python3').execute()
    source = NOTEBOOK.format(root=str(tmp_path))
    run(source)
    commented = source.replace('return Spec(SCALE, x)()', '"Doc"; return Spec(SCALE, x)()  # the same')
    run('"a new first cell"\n\n'+commented)
    by_two = ('d2 = stage(make, dict(x=3), root=d.parent)\nSpec.by = 2\n'
              'assert stage(make, dict(x=3), root=d.parent)!=d2\n')
    run(source.replace('SCALE = 3', 'SCALE = 4').replace('open(', by_two+'open('))
    names = (tmp_path/'name').read_text().split()
    assert names[0]==names[1]!=names[2]
    def made(name): return json.loads((tmp_path/name/'y.json').read_text())
    assert made(names[0])==6
    assert made(names[2])==8
