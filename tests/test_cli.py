"The command as a shell sees it: exit codes, streams, signals, speed"
import contextlib, io, json, os, shlex, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest

from hydramoe.cli import main
from hydramoe.cluster import lesson_texts
from hydramoe.core import HydraError

COMMANDS = ['build', 'domains', 'ask', 'explain', 'check', 'chat', 'run', 'reproduce', 'data list', 'data show', 'data prepare', 'data check', 'data card']
TINY = ['--base', 'tiny', '--quant', 'fp32', '--encoder', 'words']

def hydramoe(*argv, **kw):
    "In a process of its own"
    return subprocess.run([sys.executable, '-m', 'hydramoe.cli', *map(str, argv)], capture_output=True, text=True, **kw)

def here(*argv, cwd, input=''):
    "In this process, which has torch in memory already: what a shell would see"
    out, err, stdin, old, env = io.StringIO(), io.StringIO(), sys.stdin, os.getcwd(), dict(os.environ)
    os.chdir(cwd)
    sys.stdin = io.StringIO(input)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: code = main([str(a) for a in argv])
            except SystemExit as e: code = e.code
    finally:
        os.chdir(old)
        sys.stdin = stdin
        os.environ.clear(); os.environ.update(env)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('cli')
    lines = [json.dumps(dict(prompt=t, completion=a)) for t, a in zip(*lesson_texts())]
    (d/'mine.jsonl').write_text('\n'.join([*lines[:3], '{"prompt": "half', *lines[3:]]))
    old, os.environ['HYDRAMOE_CACHE'] = os.environ.get('HYDRAMOE_CACHE'), str(d/'cache')
    yield d, hydramoe('build', 'mine.jsonl', *TINY, '--k', 2, cwd=d)
    os.environ.pop('HYDRAMOE_CACHE') if old is None else os.environ.update(HYDRAMOE_CACHE=old)

def test_help_is_quick_and_lists_every_command():
    began = time.monotonic()
    out = hydramoe('--help')
    assert out.returncode == 0 and time.monotonic()-began < 5
    for c in COMMANDS: assert c.split()[0] in out.stdout

@pytest.mark.parametrize('command', COMMANDS)
def test_help_has_examples(command):
    out = here(*command.split(), '--help', cwd='.')
    assert out.returncode == 0 and f'hydramoe {command}' in out.stdout and '--json' in out.stdout

def test_help_imports_no_torch():
    code = "import sys, hydramoe.cli\ntry: hydramoe.cli.main(['build', '--help'])\nexcept SystemExit: pass\nprint(sorted({'torch', 'transformers', 'sklearn', 'sentence_transformers', 'papermill'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.splitlines()[-1] == '[]'

@pytest.mark.parametrize('argv', [[], ['fly'], ['ask'], ['build'], ['build', 'x.jsonl', '--quant', 'int3'], ['data']])
def test_bad_usage_is_exit_2(argv): assert here(*argv, cwd='.').returncode == 2

@pytest.mark.parametrize('argv', [['ask', 'nowhere', 'hi'], ['check', 'nowhere'], ['explain', '.', 'hi'], ['build', 'nowhere.jsonl'], ['run', 'nowhere.ipynb'], ['data', 'show', 'nothing']])
def test_errors_are_one_line(argv, tmp_path):
    out = here(*argv, cwd=tmp_path)
    assert (out.returncode, out.stdout) == (2, '')
    assert out.stderr.startswith('hydramoe: ') and out.stderr.count('\n') == 1 and 'Traceback' not in out.stderr

def test_build_reports_the_broken_line_and_makes_the_rest(made):
    d, out = made
    assert out.returncode == 0, out.stderr
    assert 'line 4' in out.stderr
    assert [json.loads(l)['line'] for l in (d/'mine-hydra.rejects.jsonl').read_text().splitlines()] == [4]
    assert (d/'mine-hydra'/'hydra.json').is_file() and 'hydramoe ask mine-hydra' in out.stdout

def test_the_command_it_suggests_works(made):
    d, out = made
    line = out.stdout.rsplit('try it: hydramoe ', 1)[1]
    again = here(*shlex.split(line), '--max-new-tokens', 4, cwd=d)
    assert again.returncode == 0, again.stderr

def test_built_again_it_is_the_same(made):
    d, _ = made
    before = json.loads(here('check', 'mine-hydra', '--json', cwd=d).stdout)['seal']
    assert here('build', 'mine.jsonl', *TINY, '--k', 2, '--quiet', cwd=d).returncode == 0
    assert json.loads(here('check', 'mine-hydra', '--json', cwd=d).stdout)['seal'] == before
    other = here('build', 'mine.jsonl', *TINY, '--k', 3, '--quiet', cwd=d)
    assert other.returncode == 2 and 'another Hydra' in other.stderr

def test_a_base_that_is_named_is_taken_and_none_is_left_to_those_who_know(tmp_path, monkeypatch):
    from hydramoe import hydra
    def caught(name):
        def f(*a, **kw): seen.append((name, kw.get('base') if name!='adopt' else a[2])); raise HydraError('enough')
        return f
    for name in ('adopt', 'add_expert', 'remove_expert', 'propose_domains'): monkeypatch.setattr(hydra, name, caught(name))
    monkeypatch.setattr(hydra.Hydra, 'build', caught('build'))
    (tmp_path/'x.jsonl').write_text('{"prompt": "a", "completion": "b"}')
    seen, commands = [], (['build', '--from', 'a', 'b', '--out', 'c'], ['build', 'c', '--add', 'x.jsonl'], ['build', 'c', '--remove', 'law'], ['domains', 'x.jsonl'], ['build', 'x.jsonl', '--quiet'])
    for said in ([], ['--base', 'smollm2'], ['--base', 'tiny']):
        for c in commands: assert here(*c, *said, cwd=tmp_path).returncode == 2
    names = ['adopt', 'add_expert', 'remove_expert', 'propose_domains', 'build']
    assert seen == [*zip(names, [None]*4+['smollm2'])] + [(n, b) for b in ('smollm2', 'tiny') for n in names]

def test_json_is_all_that_is_on_stdout(made):
    d, _ = made
    for argv in (['ask', 'mine-hydra', 'hi', '--max-new-tokens', 3], ['explain', 'mine-hydra', 'hi'], ['check', 'mine-hydra'], ['data', 'list'], ['build', 'mine.jsonl', *TINY, '--dry-run']):
        out = here(*argv, '--json', cwd=d)
        assert out.returncode == 0, out.stderr
        json.loads(out.stdout)

def test_a_prompt_from_standard_input(made):
    d, _ = made
    a = here('ask', 'mine-hydra', '-', '--max-new-tokens', 4, cwd=d, input='What is 2+2?')
    b = here('ask', 'mine-hydra', 'What is 2+2?', '--max-new-tokens', 4, cwd=d)
    assert (a.returncode, a.stdout) == (0, b.stdout)
    assert here('ask', 'mine-hydra', ' ', cwd=d).returncode == 2

def test_chat_ends_with_its_input(made):
    d, _ = made
    out = here('chat', 'mine-hydra', '--max-new-tokens', 4, cwd=d, input='hi\nand you?\n')
    assert out.returncode == 0 and out.stdout.strip().endswith('2 turns')

def test_ctrl_c_is_130(made):
    d, _ = made
    p = subprocess.Popen([sys.executable, '-m', 'hydramoe.cli', 'chat', 'mine-hydra'], cwd=d, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a test run started in the background ignores it, and children inherit that
    p.stdin.write(b'hi\n'); p.stdin.flush()
    p.stdout.readline()
    p.send_signal(signal.SIGINT); time.sleep(.5); p.send_signal(signal.SIGINT)
    assert p.wait(60) == 130
