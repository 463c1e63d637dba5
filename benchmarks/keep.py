"""Measure, and publish what was measured: `python benchmarks/keep.py train [options]`.

Runs `benchmarks/train.py --json [options]`, writes what it prints to benchmarks/results/train.json, and enters the file
in the list beside it. A file that came any other way, or was edited later, fails the tests; so nothing but a
measurement gets there.
"""
import json, subprocess, sys
from pathlib import Path
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import write_bytes
from hydramoe.use.publish import write_sums

here = Path(__file__).parent
NAMES = sorted(p.stem for p in here.glob('*.py') if p.stem!='keep')

def keep(name, options=(), to=here/'results'):
    "Run a benchmark and publish what it prints"
    if name not in NAMES: raise HydraError(f"{name!r} is no benchmark; choose one of {', '.join(NAMES)}")
    out = subprocess.run([sys.executable, here/f'{name}.py', '--json', *options], stdout=subprocess.PIPE, text=True)
    if out.returncode: raise HydraError(f'{name}.py failed; nothing is published')
    json.loads(out.stdout)
    f = write_bytes(Path(to)/f'{name}.json', out.stdout.encode())
    write_sums([f])
    return f

if __name__=='__main__':
    try: print(keep(*sys.argv[1:2] or [''], sys.argv[2:]))
    except HydraError as e: sys.exit(str(e))
