"What several test files need: processes and commands, files and JSON, heaps of rows, notebooks, numbers in files."
import contextlib, io, json, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import load_file, save_file

from hydramoe.foundations.core import digest, rng
from hydramoe.foundations.files import file_sha256, read_json, write_json
from hydramoe.use.cli import main

root = Path(__file__).parents[1]
TINY = ['--base', 'tiny', '--quant', 'fp32', '--encoder', 'words'] # what makes a command quick

def text(*parts):
    "The text of a file of the repository"
    return root.joinpath(*parts).read_text(encoding='utf-8')

def page_name(page):
    "A notebook by its place below nbs/"
    return str(page.relative_to(root/'nbs'))

# ---- processes

def forked(work):
    "The exit status of `work()` in a forked child"
    pid = os.fork()
    if pid: return os.waitpid(pid, 0)[1]
    try: work(); os._exit(0)
    except BaseException: os._exit(1)

def killed_at(k, work):
    "Kill a child with SIGKILL at its k-th file operation; whether it came to that"
    def run():
        left = [k]
        def hook(event, args):
            if event.split('.')[0] not in ('open', 'os', 'shutil') or left[0]<0: return
            left[0] -= 1
            if left[0]<0: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        work()
    return os.WIFSIGNALED(forked(run))

def printed(code, env=None):
    "What a fresh process that runs `code` prints"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert done.returncode==0, done.stderr
    return done.stdout

def alive(pid):
    "Whether a process runs, and is no zombie"
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    status = Path(f'/proc/{pid}/stat')
    return not status.exists() or status.read_text().rsplit(')', 1)[1].split()[0]!='Z'

def wait_for(what, seconds=60):
    "Wait until `what()` holds"
    end = time.monotonic()+seconds
    while not what():
        assert time.monotonic()<end, 'waited too long'
        time.sleep(.05)

def here(*argv, cwd='.', input=''):
    "The command in this process, which has torch in memory already: what a shell would see"
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

# ---- files

def files_in(folder):
    "The bytes of all files in a folder, by name"
    folder = Path(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

def lines_of(file):
    "The whole lines of a file; none if it isn't there"
    return file.read_text().split('\n')[:-1] if file.exists() else []

def exchange(file, data):
    "Put other bytes of equal number into a file in place; its date stays"
    was = file.stat()
    with open(file, 'r+b') as f: f.write(data)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))

def write_parts(out, text='hydra', parts=4):
    "Fill a folder with a few files"
    for i in range(parts): (out/f'part{i}').write_text(text*(i+1))

def parts_are_whole(folder, text='hydra', parts=4):
    "Whether a folder holds all that `write_parts` wrote"
    return all((folder/f'part{i}').read_text()==text*(i+1) for i in range(parts))

def forge(folder, name, change, shapes=False):
    "Saved arrays whose two files fit each other and hold something wrong; `shapes` are told anew if asked"
    arrays, body = load_file(folder/f'{name}.safetensors'), read_json(folder/f'{name}.json')
    change(arrays, body)
    body.pop('digest')
    save_file(arrays, folder/f'{name}.safetensors')
    body['sha256'] = file_sha256(folder/f'{name}.safetensors')
    if shapes: body['shapes'] = {n: list(a.shape) for n, a in arrays.items()}
    write_json(folder/f'{name}.json', body | dict(digest=digest(body)))

# ---- JSON and arrays

def set_fields(file, **fields):
    "Other values in a JSON file"
    write_json(file, read_json(file) | fields)

def spots(x, at=()):
    "The path of every value in a JSON text"
    yield at
    keys = ()
    if isinstance(x, dict): keys = x
    if isinstance(x, list): keys = range(len(x))
    for k in keys: yield from spots(x[k], at+(k,))

def put(x, at, v):
    "`x` with another value at a path; `...` takes it away"
    if not at: return v
    x = json.loads(json.dumps(x))
    y = x
    for k in at[:-1]: y = y[k]
    if v is ...: del y[at[-1]]
    else: y[at[-1]] = v
    return x

def set_at(arrays, name, at, v):
    "Another number in one of several arrays"
    arrays[name][at] = v

def sign(manifest):
    "A manifest with the seal that fits it"
    body = {k: v for k, v in manifest.items() if k!='seal'}
    return dict(body, seal=digest(body))

def blobs(n=90, k=3, d=8, seed=0):
    "k separate heaps of rows, and the heap of each"
    g = rng(seed, 'blobs')
    truth = np.arange(n)%k
    return (10*g.normal(size=(k,d))[truth] + g.normal(size=(n,d))).astype(np.float32), truth

# ---- notebooks

def notebook(path, *sources):
    "A notebook of these cells; the one that begins with `scale:` holds its parameters"
    cells = [dict(cell_type='code', id=f'c{i}', execution_count=None, outputs=[], source=s,
                  metadata=dict(tags=['parameters']) if s.startswith('scale:') else {}) for i,s in enumerate(sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = dict(name='python3', language='python', display_name='python3')
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    return path
