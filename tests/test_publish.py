"What is published: executed notebooks small and without anything of the machine that ran them, tables by chapter."
import base64, io, json, re

import pytest

from hydramoe.foundations.core import HydraError
from hydramoe.use.publish import NOT_SHOWN, PAGE_BYTES, check_sums, fewer_colors, light_notebook, publish, write_page
from hydramoe.use.pages import CHAPTERS, notebooks_table
from hydramoe.use.reproduce import Graph, run_scale
from helpers import notebook, root

SAVE = '''from hydramoe.use.reproduce import save_result
saved = save_result("{0}", scale, dict(scale=scale), [dict(system="base", ppl=1.)])'''
DRAW = '''%matplotlib inline
import sys, matplotlib.pyplot as plt, numpy as np
from IPython.display import HTML, display
print('a warning of ' + '/home' + '/me/x.py', file=sys.stderr)
print('kept')
for _ in range(3): display(HTML('<style>td {color: red}</style><table><tr><td>1</td></tr></table>'))
display(HTML('<div id="m"></div><script>draw()</script>'))
plt.imshow(np.random.default_rng(0).random((300, 300, 3)));'''

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A scale of two experiments that was run"
    d = tmp_path_factory.mktemp('publish')
    notebook(d/'lab'/'e1_first.ipynb', 'scale: str = "toy"  # run', DRAW, SAVE.format('e1_first'))
    notebook(d/'lab'/'e2_second.ipynb', 'scale: str = "toy"  # run', SAVE.format('e2_second'))
    (d/'lab'/'params').mkdir()
    for n in ('e1_first', 'e2_second'): (d/'lab'/'params'/f'{n}-demo.yaml').write_text('')
    graph = Graph(d/'lab', d/'runs')
    run_scale('demo', graph=graph)
    return d, graph

def outputs(f): return [o for c in json.loads(f.read_text())['cells'] for o in c.get('outputs', [])]

def test_publishing_puts_executed_notebooks_beside_results(made, tmp_path):
    d, graph = made
    files = publish('demo', tmp_path, graph)
    pages = [f for f in files if f.suffix=='.ipynb']
    places = [f.relative_to(tmp_path).as_posix() for f in pages]
    assert places==['pages/e1_first-demo.ipynb', 'pages/e2_second-demo.ipynb']
    assert check_sums(tmp_path/'pages')==[f.name for f in pages]
    assert len(check_sums(tmp_path))==2
    assert all(f.stat().st_size<=PAGE_BYTES for f in pages)
    pages[0].write_text(pages[0].read_text().replace('kept', 'lost'))
    with pytest.raises(HydraError, match='e1_first-demo.ipynb was edited'): check_sums(tmp_path/'pages')

def test_a_page_is_light_and_says_nothing_of_the_machine(made, tmp_path):
    d, graph = made
    run = graph.runs/'demo'/'e1_first.ipynb'
    page = write_page(run, tmp_path/'p.ipynb')
    text, found = page.read_text(), outputs(page)
    assert page.stat().st_size<=PAGE_BYTES<run.stat().st_size  # noise of 300 x 300 x 3 bytes is heavy
    assert not [o for o in found if o.get('name')=='stderr']
    assert '/home' + '/me' not in text
    assert str(d) not in text
    assert 'papermill' not in text
    assert any(o.get('text')=='kept\n' or o.get('text')==['kept\n'] for o in found)
    html = [o['data']['text/html'] for o in found if 'text/html' in o.get('data', {})]
    assert [h.count('<style') for h in html]==[1, 0, 0]
    assert all('<td>1</td>' in h for h in html)
    assert [o['data'] for o in found if o.get('data', {}).get('text/plain')==NOT_SHOWN]==[{'text/plain': NOT_SHOWN}]
    assert '<script>draw' not in json.dumps(found)

def test_a_page_is_a_notebook_and_the_same_again(made, tmp_path):
    import nbformat
    d, graph = made
    run = graph.runs/'demo'/'e1_first.ipynb'
    a, b = (write_page(run, tmp_path/n) for n in ('a.ipynb', 'b.ipynb'))
    assert a.read_bytes()==b.read_bytes()
    nbformat.validate(nbformat.read(a, as_version=4))
    full = json.loads(run.read_text())
    before = json.dumps(full)
    light_notebook(full, 16)
    assert json.dumps(full)==before  # what was given is not changed

def test_a_run_whose_notebook_is_another_is_not_published(made, tmp_path):
    d, graph = made
    f = graph.runs/'demo'/'e2_second.ipynb'
    whole = f.read_bytes()
    f.write_bytes(whole+b' ')
    try:
        with pytest.raises(HydraError, match='e2_second not run'): publish('demo', tmp_path, graph)
    finally: f.write_bytes(whole)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', 'L'])
def test_fewer_colors_keep_the_picture(mode):
    from PIL import Image
    image = Image.new('RGB', (80, 40), 'white')
    image.paste((200, 30, 30), (10, 10, 30, 30))
    out = io.BytesIO()
    image.convert(mode).save(out, 'PNG')
    png = base64.b64encode(out.getvalue()).decode()
    small = fewer_colors(png, 16)
    seen = Image.open(io.BytesIO(base64.b64decode(small))).convert('RGB')
    want = image.convert(mode).convert('RGB')
    assert seen.size==want.size
    assert len(small)<=len(png)
    for at in ((0, 0), (20, 20)): assert max(abs(a-b) for a, b in zip(seen.getpixel(at), want.getpixel(at)))<=8

def test_the_table_of_notebooks_goes_by_chapter():
    stems = re.findall(r'\[`(\w+)`\]\(([\w/]+)\.ipynb\)', notebooks_table())
    folders = [path.split('/')[0] for _, path in stems]
    assert folders==sorted(folders, key=CHAPTERS.index)
    assert set(folders)==set(CHAPTERS)
    notebooks = [p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    assert {stem for stem, _ in stems}=={p.stem for p in notebooks if p.stem not in ('index', 'results')}
    firsts = re.findall(r'(?m)^\| (\w+) \|', notebooks_table().replace('| chapter | notebook |', '| head |'))
    assert firsts[1:]==list(dict.fromkeys(folders))
