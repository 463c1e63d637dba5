"Files and directories that are whole or absent, locks and JSON, beyond what the lesson shows."
import errno, os, subprocess, sys, tempfile, textwrap, threading
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from hydramoe.foundations.core import HydraError, canonical
from hydramoe.foundations.files import (
    check_writable, locked, read_json, read_jsonl, remove_stale_lock, write_bytes, write_json, write_jsonl, writing,
    writing_dir)
from helpers import killed_at, parts_are_whole, write_parts
from strategies import scalars

# --- one file ---

@given(st.lists(st.dictionaries(st.text(), scalars, max_size=3), max_size=5))
@settings(max_examples=30, deadline=None)
def test_jsonl_round_trip(rows):
    with tempfile.TemporaryDirectory() as d: assert read_jsonl(write_jsonl(Path(d)/'r.jsonl', rows))==rows

def test_killed_while_writing(tmp_path):
    f = tmp_path/'r.json'
    write_json(f, 'old')
    seen = set()
    for k in range(60):
        killed = killed_at(k, lambda: write_json(f, 'new'*1000))
        seen.add(read_json(f))
        write_json(f, 'old')
        if not killed: break
    assert seen=={'old', 'new'*1000}

def test_many_writers_one_whole_file(tmp_path):
    f = tmp_path/'r.json'
    texts = [str(i)*20_000 for i in range(8)]
    def write(text):
        for _ in range(5): write_json(f, text)
    threads = [threading.Thread(target=write, args=(t,)) for t in texts]
    for t in threads: t.start()
    while any(t.is_alive() for t in threads):
        if f.exists(): assert read_json(f) in texts
    for t in threads: t.join()
    assert read_json(f) in texts
    assert [p.name for p in tmp_path.iterdir()]==['r.json']

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    f = write_bytes(tmp_path/'x', b'old')
    def full(*args): raise OSError(28, 'No space left on device')
    for call in ('fsync', 'replace'):
        with monkeypatch.context() as m:
            m.setattr(os, call, full)
            with pytest.raises(OSError): write_bytes(f, b'new')
        assert f.read_bytes()==b'old'
        assert [p.name for p in tmp_path.iterdir()]==['x']

@given(st.integers(1, 100_000), st.sampled_from(['[]', '{}', 'both']))
@settings(max_examples=20, deadline=None)
def test_json_of_any_depth_is_read_or_refused(depth, kind):
    a, b = {'[]': ('[', ']'), '{}': ('{"a":', '}'), 'both': ('[{"a":', '}]')}[kind]
    with tempfile.TemporaryDirectory() as d:
        for f,read in ((Path(d)/'x.json', read_json), (Path(d)/'x.jsonl', read_jsonl)):
            f.write_text(a*depth + '1' + b*depth)
            if depth*(1+(kind=='both'))<=100: canonical(read(f))
            else:
                with pytest.raises(HydraError, match='nested more than'): read(f)

def test_a_place_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path/'file').write_text('x')
    (tmp_path/'folder').mkdir()
    (tmp_path/'dangling').symlink_to(tmp_path/'gone')
    before = sorted(p.name for p in tmp_path.rglob('*'))
    for good in ('new', 'a/b/c', 'folder/x', 'file'): check_writable(tmp_path/good)
    for bad in ('folder', 'file/x', 'file/x/y', 'dangling/x', 'n'*250, 'a/'+'n'*300+'/b', '\udcff', 'a\0b'):
        with pytest.raises(HydraError): check_writable(tmp_path/bad)
    for bad in ('/', '/proc/x/y', ''):
        with pytest.raises(HydraError): check_writable(bad)
    assert sorted(p.name for p in tmp_path.rglob('*'))==before

@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_streamed_file_is_whole_or_the_old_one(parts, fail_at):
    with tempfile.TemporaryDirectory() as d:
        f = write_bytes(Path(d)/'x', b'old')
        fails = fail_at<len(parts)
        try:
            with writing(f) as out:
                for i,part in enumerate(parts):
                    if i==fail_at: raise KeyboardInterrupt
                    out.write(part)
        except KeyboardInterrupt: assert fails
        assert f.read_bytes()==(b'old' if fails else b''.join(parts))
        assert [p.name for p in f.parent.iterdir()]==['x']

# --- a directory ---

def fill_dir(d, text='hydra'):
    with writing_dir(d, if_taken=lambda path: None) as out: write_parts(out, text)

def test_a_directory_is_whole_or_absent_wherever_its_maker_is_killed(tmp_path):
    for k in range(100):
        d = tmp_path/str(k)/'d'
        d.parent.mkdir()
        killed = killed_at(k, lambda: fill_dir(d))
        assert not d.exists() or parts_are_whole(d), f'half a directory after operation {k}'
        fill_dir(d)
        assert parts_are_whole(d), f'operation {k}'
        assert [p.name for p in d.parent.iterdir()]==['d'], f'operation {k}'
        if not killed: break
    assert 10 < k < 99

def test_a_place_that_is_taken_is_the_callers_to_judge(tmp_path):
    (tmp_path/'d').mkdir()
    (tmp_path/'d'/'thesis.tex').write_text('years of work')
    asked = []
    with writing_dir(tmp_path/'d', asked.append) as out: write_parts(out)
    with pytest.raises(HydraError, match='d exists already'):
        with writing_dir(tmp_path/'d') as out: write_parts(out)
    def refuse(path): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        with writing_dir(tmp_path/'d', refuse) as out: write_parts(out)
    assert asked==[tmp_path/'d']
    assert [p.name for p in tmp_path.rglob('*')]==['d', 'thesis.tex']

def test_an_error_of_the_rename_itself_goes_through(tmp_path, monkeypatch):
    def broken(*args, **kw): raise OSError(errno.EIO, 'Input/output error')
    monkeypatch.setattr(os, 'rename', broken)
    with pytest.raises(OSError, match='Input/output'): fill_dir(tmp_path/'d')
    assert list(tmp_path.iterdir())==[]

# --- locks ---

HOLDER = textwrap.dedent('''
    import sys, time
    from hydramoe.foundations.files import locked
    with locked(sys.argv[1], on_wait=lambda: print('waiting', flush=True)):
        print('mine', flush=True)
        if sys.argv[2]=='hold': time.sleep(60)
''')

def start_holder(*args):
    command = [sys.executable, '-c', HOLDER, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

def test_a_lock_goes_with_its_process(tmp_path):
    first = start_holder(tmp_path/'lock', 'hold')
    assert first.stdout.readline()=='mine\n'
    remove_stale_lock(tmp_path/'lock')
    assert (tmp_path/'lock').exists(), 'it is held'
    second = start_holder(tmp_path/'lock', 'go')
    assert second.stdout.readline()=='waiting\n'
    first.kill()
    first.communicate()
    assert second.communicate()[0]=='mine\n'
    assert list(tmp_path.iterdir())==[]

def test_what_is_locked_runs_one_at_a_time(tmp_path):
    code = textwrap.dedent('''
        import sys
        from pathlib import Path
        from hydramoe.foundations.files import locked
        n = Path(sys.argv[1])/'n'
        for _ in range(50):
            with locked(n.with_name('lock')): n.write_text(str(int(n.read_text())+1))
    ''')
    (tmp_path/'n').write_text('0')
    ps = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path)]) for _ in range(3)]
    assert [p.wait() for p in ps]==[0]*3
    assert (tmp_path/'n').read_text()=='150'

def test_a_file_system_without_locks(tmp_path, no_locks):
    with locked(tmp_path/'lock'): fill_dir(tmp_path/'d')
    assert parts_are_whole(tmp_path/'d')
    assert [p.name for p in tmp_path.iterdir()]==['d']
