"Every benchmark still runs. What it measures in a second means nothing, so only the shape of its answer is looked at."
import json, subprocess, sys

import pytest
from helpers import root

FAST = dict(fork=['--fast'], gate=['--fast'], forward=['--fast'], merge=['--fast'], route=['--fast'], scale=['--fast'],
            train='--base tiny --domains 2 --rows 8 --steps 2 --warm 1 --held 2'.split(),
            # one of its processes; all take minutes
            busy='--base tiny --quant fp32 --domains 2 --rows 8 --work score'.split())
ELSEWHERE = {'cluster', 'keep'} # in test_balance.py and test_reproduce.py

def test_all_are_tried():
    scripts = {f.stem for f in (root/'benchmarks').glob('*.py')}
    assert scripts=={*FAST, *ELSEWHERE}

def numbers(found):
    "All numbers of a benchmark's answer, at whatever depth"
    if isinstance(found, dict): found = list(found.values())
    if isinstance(found, list):
        for value in found: yield from numbers(value)
    elif isinstance(found, (int, float)): yield found

@pytest.mark.slow
@pytest.mark.parametrize('name', FAST)
def test_a_benchmark_runs(name):
    command = [sys.executable, root/'benchmarks'/f'{name}.py', '--json', *FAST[name]]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=root)
    assert out.returncode==0, out.stderr[-2000:]
    assert any(x>0 for x in numbers(json.loads(out.stdout)))
