"What holds for all tests: one thread, and hypothesis draws the same examples in every run."
import errno, os, subprocess, sys, time
from pathlib import Path

import hydramoe # noqa: F401, sets OMP_WAIT_POLICY before torch is imported

# what tests compute is small, and a second thread that waits for its core costs more than it brings
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest # noqa: E402
from hypothesis import settings # noqa: E402

settings.register_profile('same', derandomize=True)
settings.register_profile('search', max_examples=2000, deadline=None) # HYPOTHESIS_PROFILE=search looks for new ones
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'same'))

def together(nodeid):
    """What stays with one worker when `make test` deals tests to several: a file, since its fixtures cost.

    But each notebook of the library is dealt alone, because these take longest; and so is each of an experiment's slow
    runs, one for each parameter.
    """
    file, test = nodeid.split('::', 1)
    alone = test.startswith(('test_notebook[', 'test_every_parameter_is_used['))
    return nodeid if alone else file

@pytest.hookimpl(optionalhook=True) # of xdist; `--dist loadgroup` of xdist 3.8 does nothing under pytest 9.2
def pytest_xdist_make_scheduler(config, log):
    "Deal tests by `together`"
    from xdist.scheduler import LoadScopeScheduling
    class ByCost(LoadScopeScheduling):
        def _split_scope(self, nodeid): return together(nodeid)
    return ByCost(config, log)

def pytest_addoption(parser):
    parser.addoption('--record', metavar='FILE', help='write a dated table of what passed and failed')

def pytest_terminal_summary(terminalreporter, config):
    file = config.getoption('--record')
    if not file: return
    today = time.strftime('%d %B %Y', time.gmtime())
    title = '# Oracles that are asked now and then'
    made = f'Made by `make test-extern` on {today}, hydramoe {hydramoe.__version__}.'
    lines = [f'{title}\n\n{made}\n', '| test | outcome | seconds |', '| :-- | :-- | --: |']
    for outcome in ('passed', 'failed'):
        for r in terminalreporter.stats.get(outcome, []):
            lines.append(f'| `{r.nodeid}` | {outcome} | {r.duration:.0f} |')
    Path(file).write_text('\n'.join(lines)+'\n')

@pytest.fixture(autouse=True)
def same_environment():
    "A command that runs in this process may set variables, such as HYDRAMOE_QUIET; the next test must not see them"
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)

@pytest.fixture
def in_two_processes(tmp_path):
    "Runs code that fills the folder sys.argv[1] under two values of PYTHONHASHSEED; file name → bytes, twice"
    def run(code):
        outs = []
        for seed in ('1', '2'):
            out = tmp_path/seed
            out.mkdir()
            env = os.environ | dict(PYTHONHASHSEED=seed)
            subprocess.run([sys.executable, '-c', code, str(out)], env=env, check=True)
            outs.append({p.name: p.read_bytes() for p in out.iterdir()})
        return outs
    return run

@pytest.fixture
def no_locks(monkeypatch):
    "A file system that knows no locks"
    from hydramoe.foundations import files
    def none(*args): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(files.fcntl, 'flock', none)

@pytest.fixture(scope='module')
def tiny():
    "The tiny base, one for all tests of a file"
    from hydramoe.models.base import tiny_base
    return tiny_base()
