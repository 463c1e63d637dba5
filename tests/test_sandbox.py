"""Programs of strangers: what each attack finds, and what is left of it; every attack is let loose outside as well
where that does no harm"""
import json, os, socket, subprocess, sys, tempfile, time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from hydramoe.foundations import sandbox
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.sandbox import MOST_PROCESSES, bubblewrap_command, isolation, limit_command, read_bounded
from hydramoe.foundations.sandbox import readable_paths, run_program, unshare_command
from helpers import root

WAYS = [way for way in ('bubblewrap', 'unshare') if sys.platform=='linux' and sandbox._works(way)]
NO_ISOLATION = 'programs cannot be isolated on this machine'
isolated = pytest.mark.skipif(isolation() is None, reason=NO_ISOLATION)
slow_machine = 20 # seconds; no test waits that long where all is well

@pytest.fixture(params=WAYS or [pytest.param(None, marks=pytest.mark.skip(reason=NO_ISOLATION))])
def inside(request):
    "Run a program in each way that works here"
    def run(source, stdin='', seconds=slow_machine, memory_mb=512, most_output=10_000):
        return sandbox._run(request.param, source, stdin, seconds, memory_mb, most_output)
    run.way = request.param
    return run

def outside(source):
    "Run a program as anybody would; only for programs that do no harm"
    return subprocess.run([sys.executable, '-c', source], capture_output=True, text=True, timeout=60)

def is_running(mark):
    "Does a process have this among its arguments?"
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try: arguments = path.read_bytes()
        except OSError: continue
        if mark.encode() in arguments.split(b'\0'): return True
    return False

def wait_for(condition):
    deadline = time.monotonic()+slow_machine
    while not condition() and time.monotonic()<deadline: time.sleep(.05)
    return condition()


# what is refused

@pytest.mark.parametrize('consent', [False, None, 1, 'yes'])
def test_nothing_runs_unless_asked(consent, monkeypatch):
    monkeypatch.setattr(sandbox, '_run', lambda *_: pytest.fail('it ran'))
    with pytest.raises(HydraError, match='--allow-code'): run_program('print(1)', allow_code=consent)

def test_nothing_runs_without_isolation(monkeypatch):
    monkeypatch.setattr(sandbox, 'isolation', lambda: None)
    monkeypatch.setattr(subprocess, 'Popen', lambda *_, **__: pytest.fail('it ran'))
    with pytest.raises(HydraError, match='install bubblewrap'): run_program('print(1)', allow_code=True)

def test_without_tools_on_another_system_or_without_rights_there_is_no_isolation(monkeypatch):
    monkeypatch.setattr(sandbox, '_PATH', '/nonexistent')
    assert isolation.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert isolation.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, '_command', lambda *_: ['sh', '-c', 'echo Operation not permitted >&2; exit 1'])
    assert isolation.__wrapped__() is None

NO_LIMITS = [dict(seconds=0), dict(seconds='5'), dict(seconds=float('nan')), dict(memory_mb=1), dict(memory_mb=64.5),
             dict(most_output=0), dict(most_output=True)]

@pytest.mark.parametrize('limit', NO_LIMITS)
def test_limits_are_numbers_in_their_range(limit):
    with pytest.raises(HydraError, match=next(iter(limit))): run_program('print(1)', allow_code=True, **limit)

def test_text_that_is_none_is_refused():
    with pytest.raises(HydraError, match='UTF-8'): run_program('print("\ud800")', allow_code=True)
    with pytest.raises(HydraError, match='UTF-8'): run_program('print(1)', '\ud800', allow_code=True)

@isolated
def test_a_sandbox_that_does_not_start_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setattr(sandbox, '_command', lambda *_: ['sh', '-c', 'echo Operation not permitted >&2; exit 1'])
    with pytest.raises(HydraError, match='did not start .Operation not permitted'):
        run_program('print(1)', allow_code=True)
    assert not list(tmp_path.iterdir())


# what a program can do

def test_programs_say_what_they_say(inside):
    assert inside('print(sum(map(int, input().split())))', '1 2 3').stdout=='6\n'
    assert inside('import sys\nprint(len(sys.stdin.read()))', 'x'*3_000_000).stdout=='3000000\n'
    assert inside('print("ä→😀")').stdout=='ä→😀\n'
    modules = 'json, math, re, collections, dataclasses, itertools, ctypes, hashlib, datetime, decimal'
    assert inside(f'import {modules}').status=='ok'

FAILING = ('1/0', 'exit(3)', 'import sys; sys.exit(3)', 'import os; os.abort()', 'import os; os.kill(os.getpid(), 9)',
           'def', 'import ctypes; ctypes.string_at(0)', 'import hydramoe', 'import numpy')
ENDING_WELL = ('', 'exit(0)', 'quit()', 'import sys\nsys.exit()', 'pass', 'assert __name__=="__main__" and __file__')

def test_status_tells_how_it_ended(inside):
    for source in FAILING: assert inside(source).status=='error', source
    for source in ENDING_WELL: assert inside(source).status=='ok', source
    # what we start it with leaves no names
    assert inside('sys.exit()').stderr.rstrip().endswith("NameError: name 'sys' is not defined")
    assert inside('1/0').stderr.splitlines()[-1]=='ZeroDivisionError: division by zero'

def test_the_same_program_says_the_same(inside):
    source = 'print({str(i) for i in range(50)})'
    assert inside(source).stdout==inside(source).stdout
    assert outside(source).stdout!=outside(source).stdout

def test_nothing_is_left_behind(inside, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    for source in ('open("/tmp/x", "w").write("x")', '1/0', 'while True: print("x"*1000)'): inside(source, seconds=2)
    assert not list(tmp_path.iterdir())


# time

LOOPS = [
    'while True: pass', 'import time\ntime.sleep(60)', 'import os\nos.close(1)\nos.close(2)\nwhile True: pass',
    'input()\nwhile True: print(end="")',
    'import signal\nfor s in (1, 2, 3, 15, 24):\n    signal.signal(s, signal.SIG_IGN)\nwhile True: pass', '9**9**9']

@pytest.mark.parametrize('source', LOOPS)
def test_loops_end(inside, source):
    outcome = inside(source, '\n', seconds=.3)
    assert outcome.status=='timeout'
    assert .3<=outcome.seconds<slow_machine

def test_time_is_that_of_the_program(inside):
    assert inside('import time\ntime.sleep(.2)', seconds=slow_machine).status=='ok'
    assert inside('import time\ntime.sleep(.2)', seconds=.1).status=='timeout'

DETACHED = '''
import os, sys
if os.fork()==0:
    os.setsid()
    if os.fork()==0:
        for fd in range(3): os.close(fd)
        os.execv('/usr/bin/sleep', ['sleep', '{mark}'])
    os._exit(0)
{then}
'''

@pytest.mark.parametrize('then', ['', 'while True: pass'])
def test_who_detaches_himself_ends_with_the_program(inside, then):
    mark = f'77{time.monotonic_ns()%10**6}.{os.getpid()}'
    inside(DETACHED.format(mark=mark, then='import time\ntime.sleep(.2)\n'+then), seconds=1)
    assert wait_for(lambda: not is_running(mark))

def test_a_program_dies_with_us(inside):
    "Also if we are killed, and can end nothing"
    mark = f'78{time.monotonic_ns()%10**6}.{os.getpid()}'
    source = f"import os\nos.execv('/usr/bin/sleep', ['sleep', '{mark}'])"
    call = f'from hydramoe.foundations import sandbox\nsandbox._run({inside.way!r}, {source!r}, "", 600, 512, 100)'
    us = subprocess.Popen([sys.executable, '-c', call], env=dict(os.environ, PYTHONPATH=str(root)))
    try:
        assert wait_for(lambda: is_running(mark))
        us.kill()
        assert wait_for(lambda: not is_running(mark))
    finally:
        us.kill()
        us.wait()


# processes

COUNT_FORKS = '''
import os, time
n = 0
try:
    for i in range(30):
        if os.fork()==0:
            time.sleep(1)
            os._exit(0)
        n += 1
except OSError as e: print(n, e.strerror)
else: print(n, 'no limit')
'''

def test_a_fork_bomb_has_few_processes(inside, monkeypatch):
    for most in (MOST_PROCESSES, 20): # it is this limit that holds
        monkeypatch.setattr(sandbox, 'MOST_PROCESSES', most)
        forks, why = inside(COUNT_FORKS).stdout.split(maxsplit=1)
        assert most-2<=int(forks)<=most-1 # bubblewrap is one itself
        assert why=='Resource temporarily unavailable\n'

def test_a_fork_bomb_ends(inside):
    bomb = 'import os\nwhile True:\n    try: os.fork()\n    except OSError: pass'
    assert inside(bomb, seconds=.5).status=='timeout'
    assert inside('print(1)').stdout=='1\n'

def test_threads_count_as_processes(inside):
    source = '''
import threading, time
for i in range(30): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
'''
    outcome = inside(source)
    assert outcome.status=='error'
    assert "can't start new thread" in outcome.stderr

def test_a_program_sees_no_process_but_its_own(inside):
    source = 'import os\nprint(len([p for p in os.listdir("/proc") if p.isdigit()]))'
    assert int(inside(source).stdout)<=3 < int(outside(source).stdout)

def test_the_first_process_cannot_be_hurt(inside):
    source = '''
import os, time
for s in (9, 15, 19):
    try: os.kill(1, s)
    except OSError: pass
os.kill(os.getpid(), 0)
time.sleep(.1)
print("here")
'''
    assert inside(source).stdout=='here\n'


# memory

def test_memory_is_limited(inside):
    for source in ('x = [0]\nwhile True: x += x', 'x = bytearray(2**31)', 'x = []\nwhile True: x.append("y"*10**6)'):
        assert inside(source, memory_mb=256).status=='memory', source
    assert inside('x = bytearray(100*2**20)', memory_mb=256).status=='ok'
    assert inside('x = bytearray(100*2**20)', memory_mb=64).status=='memory'

def test_memory_outside_of_a_process_is_limited_too(inside):
    sizes = '''
import os
try:
    fd = os.memfd_create('x')
    for i in range(1000): os.write(fd, b'x'*2**20)
except OSError as e: print(i, e.strerror)
'''
    megabytes, why = inside(sizes).stdout.split(maxsplit=1)
    assert int(megabytes)<=sandbox.DISK_MB
    assert 'large' in why

def test_no_shared_memory_outlives_its_process(inside):
    if inside.way!='unshare' or os.geteuid()!=0: pytest.skip('the kernel may not let others forbid it')
    source = 'import ctypes\nprint(ctypes.CDLL(None).shmget(0, 2**20, 0o1600))'
    assert inside(source).stdout=='-1\n'
    and_removed = '''
import ctypes
l = ctypes.CDLL(None)
i = l.shmget(0, 2**20, 0o1600)
l.shmctl(i, 0, None)
print(i)
'''
    assert int(outside(and_removed).stdout)>=0

def test_recursion_ends(inside):
    recursion = 'def f(n): return f(n+1)\nf(0)'
    assert inside(recursion).stderr.rstrip().endswith('maximum recursion depth exceeded')
    deeper = inside('import sys\nsys.setrecursionlimit(10**9)\n'+recursion, memory_mb=64, seconds=60)
    assert deeper.status in ('error', 'memory')
    assert inside('import json\njson.loads("["*10**6)').status in ('error', 'memory')


# output

@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_a_flood_is_stopped(inside, stream):
    outcome = inside(f'import sys\nwhile True: sys.{stream}.write("x"*100_000)', most_output=5000)
    assert outcome.status=='output'
    assert outcome.seconds<slow_machine
    assert len(outcome.stdout)<=5000
    assert len(outcome.stderr)<=2000
    assert (outcome.stdout or outcome.stderr).strip('x')==''

@pytest.mark.parametrize('n', [0, 1, 99, 100, 101, 300_000])
def test_the_bound_is_exact(inside, n):
    outcome = inside(f'print(end="x"*{n})', most_output=100)
    assert outcome.status==('ok' if n<=100 else 'output')
    assert outcome.stdout=='x'*min(n, 100)

@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=4), st.integers(1, 120))
def test_reading_stops_at_the_bound_and_not_before(pieces, most):
    read, write = os.pipe()
    with os.fdopen(read, 'rb') as pipe:
        for piece in pieces: os.write(write, piece)
        os.close(write)
        said, why = read_bounded([pipe], 60, most)
    whole = b''.join(pieces)
    assert (said, why)==([whole[:most]], 'output' if len(whole)>most else 'end')

def test_what_is_no_text_does_no_harm(inside):
    assert inside('import os\nos.write(1, bytes(range(256)))').status=='ok'


# files

def test_files_of_ours_are_out_of_reach(inside, tmp_path):
    secret = tmp_path/'secret.txt'
    secret.write_text('hush')
    at_home = [os.path.expanduser('~/.ssh'), os.path.expanduser('~/.cache')]
    of_the_system = ['/etc/passwd', '/etc/shadow', '/home', '/var', '/sys', '/run', '/boot']
    places = [str(secret), str(root/'README.md'), *at_home, *of_the_system]
    source = f'import os\nprint([p for p in {places!r} if os.path.exists(p)])'
    assert inside(source).stdout=='[]\n'
    assert str(secret) in outside(source).stdout

def test_only_its_own_folder_can_be_written(inside, tmp_path):
    interpreter = os.path.realpath(sys.executable)
    of_ours = [interpreter, str(Path(interpreter).parent/'x'), str(tmp_path/'x'), str(root/'x')]
    places = ['/x', '/usr/x', '/usr/lib/x', '/dev/x', '/dev/shm/x', '/proc/x', '/program.py', *of_ours, '/etc/x',
              '/bin/x', '/proc/sys/kernel/hostname', '/proc/self/oom_score_adj/x']
    source = f'''
import os
written = []
for place in {places!r}:
    try: os.close(os.open(place, os.O_WRONLY|os.O_CREAT))
    except OSError: continue
    written.append(place)
print(written, os.getcwd(), open('x', 'w').write('mine'))
'''
    assert inside(source).stdout=='[] /tmp 4\n'
    assert not (tmp_path/'x').exists()
    assert not (root/'x').exists()

def test_its_own_folder_is_small(inside):
    source = '''
n = 0
try:
    for i in range(1000):
        with open(f'/tmp/{i}', 'wb') as f: f.write(b'x'*2**20)
        n += 1
except OSError as e: print(n, e.strerror)
'''
    megabytes, why = inside(source).stdout.split(maxsplit=1)
    assert int(megabytes)<=sandbox.DISK_MB
    assert why=='No space left on device\n'

def test_two_programs_do_not_meet(inside):
    assert inside('open("/tmp/note", "w").write("x")').status=='ok'
    assert inside('open("/tmp/note")').status=='error'

def test_the_environment_is_not_inherited(inside, monkeypatch):
    monkeypatch.setenv('HYDRAMOE_TEST_KEY', 'sk-1234')
    source = '''
import os
print("HYDRAMOE_TEST_KEY" in os.environ, [k for k in os.environ if k not in ("PYTHONHASHSEED", "LC_CTYPE")])
'''
    assert inside(source).stdout=='False []\n'
    assert outside(source).stdout.startswith('True')
    others = '''
from pathlib import Path
for p in Path("/proc").glob("[0-9]*/environ"):
    try: print(b"sk-1234" in p.read_bytes())
    except OSError: pass
'''
    assert 'True' not in inside(others).stdout
    assert 'True' in outside(others).stdout


# network

CONNECT = '''
import socket
s = socket.socket({family})
s.settimeout(2)
try:
    s.connect({address!r})
    print("reached")
except OSError as e: print("no")
'''

def test_no_socket_reaches_out(inside, tmp_path):
    unix = socket.AF_UNIX
    with socket.create_server(('127.0.0.1', 0)) as tcp, socket.socket(unix) as abstract, socket.socket(unix) as file:
        name = f'\0hydramoe-{os.getpid()}-{time.monotonic_ns()}'
        path = str(tmp_path/'s')
        for s, address in ((abstract, name), (file, path)):
            s.bind(address)
            s.listen()
        open_here = (('socket.AF_INET', tcp.getsockname()), ('socket.AF_UNIX', name), ('socket.AF_UNIX', path))
        for family, address in open_here:
            source = CONNECT.format(family=family, address=address)
            assert (inside(source).stdout, outside(source).stdout)==('no\n', 'reached\n'), address
    for address in (('192.0.2.1', 80), ('8.8.8.8', 53)):
        assert inside(CONNECT.format(family='', address=address)).stdout=='no\n'
    assert inside('import socket\nsocket.getaddrinfo("localhost.example", 80)').status=='error'


# rights

def test_a_program_has_no_rights(inside):
    status = inside('print(open("/proc/self/status").read())').stdout
    fields = dict(line.split(':\t', 1) for line in status.splitlines() if ':\t' in line)
    for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'): assert int(fields[name], 16)==0, name
    assert fields['NoNewPrivs']=='1'

def test_a_program_makes_no_namespaces_and_mounts_nothing(inside):
    "A new user namespace would give it all rights in there, a mount in memory without a limit among them"
    source = '''
import ctypes
libc = ctypes.CDLL(None)
print([libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000, 0x10000000|0x20000)])
mounted = libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)
print(mounted, libc.chroot(b'/tmp'), libc.setuid(12345), libc.sethostname(b'x', 1))
'''
    assert inside(source).stdout=='[-1, -1, -1, -1]\n-1 -1 -1 -1\n'

def test_raised_limits_are_refused(inside):
    source = '''
import resource as r
for l in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_FSIZE, r.RLIMIT_NOFILE, r.RLIMIT_CORE):
    try: r.setrlimit(l, (r.getrlimit(l)[1]+1, )*2)
    except ValueError: print("no")
'''
    assert inside(source).stdout=='no\n'*5


# the commands

LIMITS = limit_command(5, 512)

def test_bubblewrap_is_told_to_separate_everything(monkeypatch):
    command = bubblewrap_command(Path('/folder'), LIMITS)
    options = command[:command.index('sh')]
    separated = ('--unshare-all', '--unshare-user', '--disable-userns', '--die-with-parent', '--new-session',
                 '--clearenv')
    for option in separated: assert option in options
    assert not {'--bind', '--dev-bind', '--share-net', '--bind-try'} & set(options)
    bound = [options[i+1] for i, option in enumerate(options) if option=='--ro-bind']
    assert sorted(bound)==sorted([p for p in readable_paths() if not os.path.islink(p)]+['/folder/program.py'])
    assert options.index('--size')==options.index('--tmpfs')-2
    assert options[options.index('--cap-drop')+1]=='ALL'
    interpreter = sandbox._interpreter_command()
    assert command[-len(interpreter):]==interpreter
    assert '--nproc=8' in command

def test_root_becomes_nobody_and_others_do_not():
    as_root, as_user = (unshare_command(Path('/folder'), LIMITS, is_root) for is_root in (True, False))
    assert as_root.count('--user')==1
    assert as_user.count('--user')==2
    assert as_user.count('--reuid')==0
    ids = {unshare_command(Path('/folder'), LIMITS, True)[as_root.index('--reuid')+1] for _ in range(20)}
    assert len(ids)>1
    assert all(20_000<=int(i)<60_000 for i in ids)
    for command in (as_root, as_user):
        for option in ('--pid', '--net', '--mount', '--ipc', '--no-new-privs', '--kill-child'): assert option in command

def test_readable_is_the_system_and_the_interpreter_alone():
    prefix = os.path.realpath(sys.base_prefix)
    for path in readable_paths():
        assert path in sandbox._SYSTEM or path in (f'{prefix}/bin', f'{prefix}/lib')
        assert not str(root).startswith(path+'/')
        assert not str(Path.home()).startswith(path+'/')

AS_USER = '''
import json, os
from hydramoe.foundations import sandbox
tests = dict(
    eff="print([l for l in open('/proc/self/status') if l.startswith('CapEff')][0].split()[1])",
    net="import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    write="open('/usr/x', 'w')", top="open('/x', 'w')",
    old="import os; print(os.path.exists('/old'), os.path.exists('/etc/passwd'))",
    memory="x = bytearray(2**31)", ns="import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))")
found = {name: sandbox._run('unshare', source, '', 20, 512, 1000) for name, source in tests.items()}
print(json.dumps(dict(uid=os.geteuid(), **{name: [o.status, o.stdout.strip()] for name, o in found.items()})))
'''

@pytest.mark.skipif('unshare' not in WAYS, reason='no unshare here')
def test_it_holds_for_a_user_who_is_not_root():
    "Root takes part as another user, in a user namespace, where it has root's files but not its rights"
    become = ['unshare', '--user', '--map-user=1000', '--map-group=1000'] if os.geteuid()==0 else []
    env = dict(os.environ, PYTHONPATH=str(root))
    call = [*become, sys.executable, '-c', AS_USER]
    said = subprocess.run(call, env=env, capture_output=True, text=True, timeout=120)
    assert said.returncode==0, said.stderr
    found = json.loads(said.stdout)
    assert found.pop('uid')!=0
    refused = ['error', '']
    assert found==dict(eff=['ok', '0'*16], net=refused, write=refused, top=refused, old=['ok', 'False False'],
                       memory=['memory', ''], ns=['ok', '-1'])
