"The command as a shell sees it: exit codes, streams, signals, speed"
import contextlib, io, json, os, re, shlex, signal, subprocess, sys, time
from pathlib import Path
import pytest

from hydramoe.use.cli import main
from hydramoe.domains.examples import lesson_texts
from hydramoe.foundations.core import HydraError

from hydramoe.hydra import Hydra
from hydramoe.hydra.model import explain_bundle
from hydramoe.hydra.rows import gather_rows
from hydramoe.hydra.propose import propose_domains
from hydramoe.hydra.change import add_expert, remove_expert
from hydramoe.hydra.adopt import adopt
from hydramoe.use import cli, command
from helpers import TINY, here

COMMANDS = ['build', 'domains', 'add', 'remove', 'adopt', 'merge', 'export', 'verdict', 'ask', 'explain', 'check',
            'chat', 'eval', 'run', 'reproduce', 'data list', 'data show', 'data prepare', 'data check', 'data card']

def hydramoe(*argv, **kw):
    "In a process of its own"
    line = [sys.executable, '-m', 'hydramoe.use.cli', *map(str, argv)]
    return subprocess.run(line, capture_output=True, text=True, **kw)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('cli')
    lines = [json.dumps(dict(prompt=t, completion=a)) for t, a in zip(*lesson_texts())]
    (d/'mine.jsonl').write_text('\n'.join([*lines[:3], '{"prompt": "half', *lines[3:]]))
    old = os.environ.get('HYDRAMOE_CACHE')
    os.environ['HYDRAMOE_CACHE'] = str(d/'cache')
    yield d, hydramoe('build', 'mine.jsonl', *TINY, '--k', 2, cwd=d)
    if old is None: os.environ.pop('HYDRAMOE_CACHE')
    else: os.environ['HYDRAMOE_CACHE'] = old

def replace(monkeypatch, f, other):
    "Put another function where the commands import `f` from"
    monkeypatch.setattr(sys.modules[f.__module__], f.__name__, other)

def test_help_is_quick_and_lists_every_command():
    began = time.monotonic()
    out = hydramoe('--help')
    assert out.returncode == 0
    assert time.monotonic()-began < 5
    for c in COMMANDS: assert c.split()[0] in out.stdout

@pytest.mark.parametrize('command', COMMANDS)
def test_help_has_examples(command):
    out = here(*command.split(), '--help', cwd='.')
    assert out.returncode == 0
    assert f'hydramoe {command}' in out.stdout
    assert '--json' in out.stdout

def test_help_and_the_list_of_cards_bring_no_torch():
    lines = [[], *([c, '--help'] for c in COMMANDS), ['data list'], ['data list', '--verified', 'all', '--json']]
    code = f"""import contextlib, io, sys, hydramoe.use.cli
heavy = {{'torch', 'transformers', 'sklearn', 'sentence_transformers', 'matplotlib', 'papermill'}}
for line in {lines!r}:
    argv = [*line[0].split(), *line[1:]] if line else ['--help']
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        with contextlib.suppress(SystemExit): hydramoe.use.cli.main(argv)
    assert out.getvalue()
    print(line, sorted(heavy & set(sys.modules)))"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    out = done.stdout.splitlines()
    assert len(out)==len(lines), out
    assert all(l.endswith(' []') for l in out), out

@pytest.mark.parametrize('argv', [[], ['fly'], ['ask'], ['build'], ['build', 'x.jsonl', '--quant', 'int3'], ['data']])
def test_bad_usage_is_exit_2(argv): assert here(*argv, cwd='.').returncode == 2

ERRORS = [['ask', 'nowhere', 'hi'], ['check', 'nowhere'], ['explain', '.', 'hi'], ['build', 'nowhere.jsonl'],
          ['run', 'nowhere.ipynb'], ['data', 'show', 'nothing']]

@pytest.mark.parametrize('argv', ERRORS)
def test_errors_are_one_line(argv, tmp_path):
    out = here(*argv, cwd=tmp_path)
    assert (out.returncode, out.stdout) == (2, '')
    assert out.stderr.startswith('hydramoe: ')
    assert out.stderr.count('\n') == 1
    assert 'Traceback' not in out.stderr

def test_build_reports_the_broken_line_and_makes_the_rest(made):
    d, out = made
    assert out.returncode == 0, out.stderr
    assert 'line 4' in out.stderr
    assert [json.loads(l)['line'] for l in (d/'mine-hydra.rejects.jsonl').read_text().splitlines()] == [4]
    assert (d/'mine-hydra'/'hydra.json').is_file()
    assert 'hydramoe ask mine-hydra' in out.stdout

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
    assert other.returncode == 2
    assert 'another Hydra' in other.stderr

def test_a_base_that_is_named_is_taken_and_none_is_left_to_those_who_know(tmp_path, monkeypatch):
    seen = []
    def caught(name):
        def f(*a, **kw):
            seen.append((name, kw.get('base') if name!='adopt' else a[2]))
            raise HydraError('enough')
        return f
    functions = dict(adopt=adopt, add=add_expert, remove=remove_expert, domains=propose_domains)
    for name, f in functions.items(): replace(monkeypatch, f, caught(name))
    monkeypatch.setattr(Hydra, 'build', caught('build'))
    (tmp_path/'x.jsonl').write_text('{"prompt": "a", "completion": "b"}')
    commands = (['adopt', 'a', 'b', '--out', 'c'], ['add', 'c', 'x.jsonl'], ['remove', 'c', 'law'],
                ['domains', 'x.jsonl'], ['build', 'x.jsonl', '--quiet'])
    for said in ([], ['--base', 'smollm2'], ['--base', 'tiny']):
        for c in commands: assert here(*c, *said, cwd=tmp_path).returncode == 2
    names = ['adopt', 'add', 'remove', 'domains', 'build']
    without = [*zip(names, [None]*4+['smollm2'])]
    named = [(n, b) for b in ('smollm2', 'tiny') for n in names]
    assert seen == without+named

WITH_JSON = [['ask', 'mine-hydra', 'hi', '--max-new-tokens', 3], ['explain', 'mine-hydra', 'hi'],
             ['check', 'mine-hydra'], ['data', 'list'], ['build', 'mine.jsonl', *TINY, '--dry-run']]

def test_json_is_all_that_is_on_stdout(made):
    d, _ = made
    for argv in WITH_JSON:
        out = here(*argv, '--json', cwd=d)
        assert out.returncode == 0, out.stderr
        json.loads(out.stdout)

@contextlib.contextmanager
def terminal(encoding):
    "Standard output of some terminal; what it was shown"
    old = sys.stdout
    sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    try: yield (shown := [])
    finally:
        sys.stdout.flush()
        shown.append(sys.stdout.buffer.getvalue().decode(encoding))
        sys.stdout = old

@pytest.mark.parametrize('encoding', ['latin-1', 'ascii', 'cp437'])
def test_output_survives_any_terminal(made, encoding, monkeypatch):
    d, _ = made
    monkeypatch.chdir(d)
    monkeypatch.setenv('HYDRAMOE_QUIET', '1')
    for c in COMMANDS:
        with terminal(encoding) as shown, contextlib.suppress(SystemExit): main([*c.split(), '--help'])
        assert f'hydramoe {c}' in shown[0]
    with terminal(encoding) as shown: assert main(['explain', 'mine-hydra', '你好 grüß']) == 0
    assert '\\u4f60' in shown[0]
    asked = ['ask', 'mine-hydra', '你好 grüß', '--max-new-tokens', '6', '--json']
    with terminal(encoding) as shown: assert main(asked) == 0
    assert json.loads(shown[0])['prompt']=='你好 grüß'
    monkeypatch.setattr(sys, 'stdin', io.StringIO('你好\n'))
    with terminal(encoding) as shown: assert main(['chat', 'mine-hydra', '--max-new-tokens', '6']) == 0
    assert '1 turns' in shown[0]

def test_a_shell_of_another_encoding():
    program = [sys.executable, '-m', 'hydramoe.use.cli']
    latin = os.environ | dict(PYTHONIOENCODING='latin-1')
    out = subprocess.run([*program, 'build', '--help'], capture_output=True, env=latin)
    assert out.returncode==0
    assert b'examples:' in out.stdout
    assert not out.stderr
    for argv in (['ask', 'x', b'caf\xe9'], [b'caf\xe9']):
        out = subprocess.run([*program, *argv], capture_output=True)
        assert out.returncode==2, out.stderr
        assert b'Traceback' not in out.stderr, out.stderr
        assert b'UTF-8' in out.stderr, out.stderr

@pytest.mark.parametrize('how', [('utf-8', 'strict'), ('utf-8', 'surrogateescape'), ('ascii', 'strict')])
def test_input_that_is_no_text(made, how, monkeypatch):
    d, _ = made
    monkeypatch.chdir(d)
    monkeypatch.setenv('HYDRAMOE_QUIET', '1')
    for argv in (['ask', 'mine-hydra', '-'], ['chat', 'mine-hydra']):
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'caf\xe9\n'), *how))
        assert main(argv)==2

BUGS = [ZeroDivisionError(), RuntimeError('boom\nand more'), RecursionError(), MemoryError(), TypeError('x\udcff'),
        AssertionError('ä'*5000)]

@pytest.mark.parametrize('error', BUGS, ids=lambda e: type(e).__name__)
def test_the_last_net(error, monkeypatch, tmp_path):
    def bug(a): raise error
    monkeypatch.setitem(cli.COMMANDS, 'bug', command.Command(bug, 'x', (), ()))
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    out = here('bug', cwd=tmp_path)
    assert (out.returncode, out.stdout) == (1, '')
    assert out.stderr.startswith(f'hydramoe: internal error: {type(error).__name__}')
    assert out.stderr.count('\n')==1
    assert len(out.stderr)<600
    trace = Path(out.stderr.split('the trace is in ')[1].strip())
    assert trace.is_relative_to(tmp_path)
    assert 'in bug' in trace.read_text()
    monkeypatch.setenv('HYDRAMOE_CACHE', '/proc/nowhere')
    monkeypatch.setattr('tempfile.gettempdir', lambda: '/proc/nowhere')
    assert here('bug', cwd=tmp_path).returncode==1
    monkeypatch.setenv('HYDRAMOE_TRACE', '1')
    with pytest.raises(type(error)): here('bug', cwd=tmp_path)

BAD_VALUES = dict(
    lr=('-1', '0', 'nan', 'inf'), fork=('nan', 'inf', '-1', '1.5', '7'), memory=('nan', '0', 'inf', '1e300'),
    rank=('0', '65', '-3', '9'*30), k=('0', '-1', '40'), epochs=('0', '-2'), tokens=('0',),
    threads=('0', '9999999'), workers=('0', '-1'), seed=('9'*30,), encoder=('nowhere', '/etc', ''),
    targets=('', 'nope', ','), base=('/etc', '', 'x'*5000, '~nobody-at-all/x'), domains=('nowhere.yaml',))
NUMBERS = [(f'--{name}', value) for name, values in BAD_VALUES.items() for value in values]
NUMBERS += [('--max-length', '0'), ('--top-k', '0')]

@pytest.mark.parametrize('flag, value', NUMBERS, ids=lambda x: x[:12])
def test_a_dry_run_refuses_what_a_build_refuses(made, flag, value):
    d, _ = made
    tiny = {'--encoder': TINY[:4], '--base': TINY[2:]}.get(flag, TINY) # without the option that is tried
    for dry in ([], ['--dry-run']):
        out = here('build', 'mine.jsonl', *tiny, f'{flag}={value}', '--out', 'not', '--quiet', *dry, cwd=d)
        assert out.returncode==2, out.stderr
        assert 'Traceback' not in out.stderr, out.stderr
        assert not (d/'not').exists(), out.stderr
        assert flag[2:].replace('-', '_') in out.stderr.replace('-', '_') or value in out.stderr

def test_here_is_one_process(made):
    d, _ = made
    how = ['--executor', 'here', '--workers', 2, '--out', 'not']
    for dry in ([], ['--dry-run']): assert here('build', 'mine.jsonl', *TINY, *how, *dry, cwd=d).returncode==2

WRITERS = [
    ['build', 'mine.jsonl', *TINY], ['build', 'mine.jsonl', *TINY, '--dry-run'],
    ['add', 'mine-hydra', 'mine.jsonl', '--name', 'x'], ['remove', 'mine-hydra', 'x'], ['adopt', 'x'],
    ['domains', 'mine.jsonl', *TINY[:2]], ['explain', 'mine-hydra', 'hi', '--png']]

@pytest.mark.parametrize('argv', WRITERS, ids=lambda a: ' '.join(a[:3]))
def test_a_place_that_cannot_be_written_is_refused_first(made, argv, monkeypatch):
    d, _ = made
    def late(*a, **kw): raise AssertionError('too late')
    functions = (gather_rows, add_expert, remove_expert, adopt, propose_domains, explain_bundle)
    for f in functions: replace(monkeypatch, f, late)
    (d/'a-file').write_text('')
    before = sorted(d.rglob('*'))
    is_picture = argv[-1]=='--png'
    option = [] if is_picture else ['--out']
    for place in ('/', '.', 'a-file/x', '/proc/x/y', 'a-file', 'n'*250, 'a\0b'):
        ending = '.png' if is_picture and place[-1] in 'xybn' else ''
        out = here(*argv, *option, place+ending, cwd=d)
        assert out.returncode==2, out.stderr
        assert out.stderr.count('\n')==1, out.stderr
    assert sorted(d.rglob('*'))==before

def test_suggestions_can_be_typed(made):
    d, _ = made
    (d/'my rows.jsonl').write_text((d/'mine.jsonl').read_text())
    out = here('build', 'my rows.jsonl', *TINY, '--k', 2, '--out', "Anna's $HOME", '--quiet', cwd=d)
    assert out.returncode==0, out.stderr
    words = shlex.split(out.stdout.rsplit('try it: ', 1)[1])
    assert words[:3]==['hydramoe', 'ask', "Anna's $HOME"]
    assert len(words)==4
    assert here(*words[1:], '--max-new-tokens', 2, cwd=d).returncode==0
    quick = [*TINY[:2], *TINY[4:], '--k', 2]
    out = here('domains', 'my rows.jsonl', *quick, '--out', 'my domains.yaml', '--quiet', cwd=d)
    words = shlex.split(out.stdout.split('then: ')[1].split(', with')[0])
    assert words==['hydramoe', 'build', 'my rows.jsonl', '--domains', 'my domains.yaml']

def test_names_that_no_expert_can_have(made):
    d, _ = made
    for file in ('my new.data.jsonl', 'base.jsonl', 'Base.jsonl'):
        (d/file).write_text((d/'mine.jsonl').read_text())
        out = here('add', 'mine-hydra', file, cwd=d)
        assert out.returncode==2
        assert '--name' in out.stderr
        assert out.stderr.count('\n')==1
    one = next((d/'mine-hydra'/'experts').iterdir())
    taken = (['add', 'mine-hydra', 'mine.jsonl', '--name', 'base'], ['adopt', f'base={one}', '--out', 'x'])
    for argv in taken: assert "'base' is taken" in here(*argv, cwd=d).stderr

CANNOT_BE_ASKED = [
    ['--temperature', 'nan'], ['--temperature=-1'], ['--temperature', 'inf'], ['--temperature', '1e-40'],
    ['--max-new-tokens', '0'], ['--max-new-tokens=-7'], ['--seed', '9'*30], ['--expert', ''], ['--expert', 'poet'],
    ['--base', '/etc']]

@pytest.mark.parametrize('flags', CANNOT_BE_ASKED, ids=' '.join)
def test_what_cannot_be_asked(made, flags):
    d, _ = made
    for c in (['ask', 'mine-hydra', 'hi'], ['chat', 'mine-hydra']):
        out = here(*c, *flags, cwd=d, input='hi\n')
        assert (out.returncode, out.stdout, out.stderr.count('\n'))==(2, '', 1)

def test_pictures_and_notebooks_that_are_none(made):
    d, _ = made
    for png in ('x.xyz', 'x', '.', '/', '..', 'mine-hydra'):
        out = here('explain', 'mine-hydra', 'hi', '--png', png, cwd=d)
        assert (out.returncode, out.stdout, out.stderr.count('\n'))==(2, '', 1)
    no_notebooks = ('[1, 2]', '3', '{}', '{"cells": 3}', '{"cells": [3]}', '{"cells": [{"metadata": []}]}',
                    '['*900+']'*900, '')
    for text in no_notebooks:
        (d/'x.json').write_text(text)
        out = here('run', 'x.json', cwd=d)
        assert (out.returncode, out.stderr.count('\n'))==(2, 1), out.stderr

def test_words_of_a_script_without_spaces(made):
    d, _ = made
    places = '北京 上海 广州 成都'.split()
    days = '今天 明天 后天'.split()
    ways = '简单 仔细 一步一步'.split()
    functions = '正弦 余弦 对数 指数'.split()
    weather = [f'{where}{when}的天气怎么样？' for where in places for when in days]
    maths = [f'请{how}计算{what}的导数。' for how in ways for what in functions]
    lines = [json.dumps(dict(prompt=p, completion='好')) for p in weather+maths]
    (d/'zh.jsonl').write_text('\n'.join(lines))
    out = here('domains', 'zh.jsonl', *TINY[:2], *TINY[4:], '--k', 2, '--out', 'zh.yaml', cwd=d)
    assert out.returncode==0
    assert 'without spaces' in out.stderr
    assert 'sentence-transformers' in out.stderr
    import yaml
    for e in yaml.safe_load((d/'zh.yaml').read_text())['domains']: assert len({'天气' in x for x in e['examples']})==1

def test_a_prompt_from_standard_input(made):
    d, _ = made
    a = here('ask', 'mine-hydra', '-', '--max-new-tokens', 4, cwd=d, input='What is 2+2?')
    b = here('ask', 'mine-hydra', 'What is 2+2?', '--max-new-tokens', 4, cwd=d)
    assert (a.returncode, a.stdout) == (0, b.stdout)
    assert here('ask', 'mine-hydra', ' ', cwd=d).returncode == 2

def test_chat_ends_with_its_input(made):
    d, _ = made
    for said in ('hi\nand you?\n', '\n\nhi\n \t\n\nand you?', 'hi\r\n\r\nand you?\r\n\n'):
        out = here('chat', 'mine-hydra', '--max-new-tokens', 4, cwd=d, input=said)
        assert out.returncode == 0
        assert out.stdout.strip().endswith('2 turns')

def test_ctrl_c_is_130(made):
    d, _ = made
    program = [sys.executable, '-m', 'hydramoe.use.cli', 'chat', 'mine-hydra', '--max-new-tokens', '4']
    # a test run started in the background ignores SIGINT, and children inherit that
    def heed(): signal.signal(signal.SIGINT, signal.SIG_DFL)
    p = subprocess.Popen(program, cwd=d, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         preexec_fn=heed)
    p.stdin.write(b'hi\n')
    p.stdin.flush()
    # The turn is over when it says who answered; from here on it waits for the next line.
    # A second signal would meet a Python that ends.
    while not re.fullmatch(rb'  \[.*\]\n', p.stdout.readline()): assert p.poll() is None
    p.send_signal(signal.SIGINT)
    assert p.wait(60) == 130

def test_options_that_would_be_ignored_are_refused(made):
    d, _ = made
    for flags in (['--name', 'x'], ['--start', 'x'], ['--out', '']):
        out = here('build', 'mine.jsonl', *TINY, *flags, cwd=d)
        assert (out.returncode, out.stdout, out.stderr.count('\n'))==(2, '', 1), flags

BECAME_COMMANDS = [
    (['x', '--add', 'y.jsonl'], 'hydramoe add BUNDLE FILE'), (['x', '--remove', 'law'], 'hydramoe remove BUNDLE NAME'),
    (['--from', 'a', 'b=c', '--out', 'd'], 'hydramoe adopt ADAPTER'), (['x', '--name', 'law'], 'hydramoe add'),
    (['x', '--start', 'fresh'], 'hydramoe add'), (['x', '--gate', 'arrow'], 'hydramoe adopt'),
    (['x', '--top-k', '2'], 'hydramoe adopt')]

@pytest.mark.parametrize('old, new', BECAME_COMMANDS, ids=lambda a: a[-2] if isinstance(a, list) else '')
def test_an_option_that_became_a_command_names_it(old, new, tmp_path):
    out = here('build', *old, cwd=tmp_path)
    assert (out.returncode, out.stdout, out.stderr.count('\n'))==(2, '', 1)
    assert new in out.stderr
    assert not list(tmp_path.iterdir())
    option = next(o for o in old if o.startswith("--"))
    assert f'  {option} ' not in here('build', '--help', cwd=tmp_path).stdout  # help doesn't list it

def test_each_option_is_documented_once():
    "The same option means the same in every command: one sentence, but where a command says its own"
    said = {}
    for name, c in cli.COMMANDS.items():
        for names, how in c.args: said.setdefault(names[-1], set()).add(how.get('help'))
    own = {'--out', '--base', '--encoder', '--name', '--top-k', '--gate', '--domain', '--rows', '--domains',
           'name', 'names', 'file', 'files', 'prompt',
           '--format', '--start', '--rank', '--seed', '--single', '--quant', '--compare'}
    assert {n for n, helps in said.items() if len(helps)>1} <= own

def test_add_takes_several_files_and_remove_takes_it_back(made):
    d, _ = made
    def checked(): return json.loads(here('check', 'mine-hydra', '--json', cwd=d).stdout)
    for name, words in dict(birds=('sings', 'swims'), more=('hunts mice', 'cannot fly')).items():
        lines = [json.dumps(dict(prompt=f'Which bird {w}?', completion='birds')) for w in words]
        (d/f'{name}.jsonl').write_text('\n'.join(lines))
    before = checked()['seal']
    out = here('add', 'mine-hydra', 'birds.jsonl', 'more.jsonl', '--json', cwd=d)
    assert json.loads(out.stdout)['bundle']=='mine-hydra-with-birds', out.stderr
    back = json.loads(here('remove', 'mine-hydra-with-birds', 'birds', '--json', cwd=d).stdout)
    assert back['bundle']=='mine-hydra-with-birds-without-birds'
    assert back['experts']==[e['name'] for e in checked()['experts']]
    assert checked()['seal']==before  # a bundle is never changed
