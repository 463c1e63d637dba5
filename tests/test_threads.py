"How the threads of torch wait: asleep after a moment, wherever torch is imported, unless the user has said otherwise."
import json, os

import pytest

from hydramoe.use.reproduce import run_notebook
from helpers import notebook, printed

LOOK = "import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"

def environment(policy=None):
    env = {k: v for k,v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
    return env if policy is None else env | dict(OMP_WAIT_POLICY=policy)

@pytest.mark.parametrize('module', ['hydramoe', 'hydramoe.use.cli', 'hydramoe.models.base'])
def test_they_sleep_once_hydramoe_is_imported(module):
    assert printed(f'import {module}; {LOOK}', environment()).split()==['PASSIVE', '1000']

def test_the_policy_stands_before_torch_is_imported():
    # torch reads it at import: too late is as good as never
    watch = """
import builtins, os
old, seen = builtins.__import__, []
def spy(name, *a, **k):
    if name=='torch' and not seen: seen.append(os.environ.get('OMP_WAIT_POLICY'))
    return old(name, *a, **k)
builtins.__import__ = spy
import hydramoe.experts.stack
print(*seen)
"""
    assert printed(watch, environment()).split()==['PASSIVE']

def test_a_user_who_says_otherwise_is_heard():
    assert printed(f'import hydramoe.use.cli; {LOOK}', environment('ACTIVE')).split()==['ACTIVE', 'None']

def test_what_hydramoe_starts_inherits_it():
    # workers are started by `local` and `ray` from this process's environment
    code = f"import hydramoe, subprocess, sys; subprocess.run([sys.executable, '-c', {LOOK!r}], check=True)"
    assert printed(code, environment()).split()==['PASSIVE', '1000']

def test_a_notebook_that_hydramoe_runs_inherits_it(tmp_path):
    source = notebook(tmp_path/'look.ipynb', 'scale: str = "toy"  # names the run', LOOK)
    out = json.loads(run_notebook(source, tmp_path/'out.ipynb', {}).read_text())
    texts = [o['text'] for c in out['cells'] for o in c.get('outputs', [])]
    assert 'PASSIVE' in ''.join(t if isinstance(t, str) else ''.join(t) for t in texts)
