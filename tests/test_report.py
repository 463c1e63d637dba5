"Tables, numbers and pages whatever the data hold."
import html, re, shutil, subprocess
from html.parser import HTMLParser
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.report import (figure_uri, html_bars, html_code, html_details, html_facts, html_figure, html_page, html_table, html_text, interval, latex_name, latex_numbers,
                             latex_table, latex_text, markdown_table)

cells = st.none() | st.text() | st.integers() | st.floats()
tables = st.lists(st.fixed_dictionaries({'a': cells, 'b': cells, 'c': cells}), min_size=1, max_size=4)

class Page(HTMLParser):
    def __init__(self, text): super().__init__(); self.stack, self.tags, self.attrs = [], [], []; self.feed(text); self.close(); assert not self.stack
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag); self.attrs += attrs
        if tag not in ('meta', 'img', 'br', 'hr'): self.stack.append(tag)
    def handle_endtag(self, tag): assert self.stack.pop()==tag

@given(tables)
@settings(max_examples=60, deadline=None)
def test_every_table_has_its_shape(rows):
    md = markdown_table(rows).split('\n')[:-1]
    assert len(md)==len(rows)+2
    for line in md: assert len(re.findall(r'(?<!\\)(?:\\\\)*\|', line))==4, line
    page = Page(html_table(rows))
    assert page.tags.count('td')==3*len(rows) and page.tags.count('th')==3 and 'script' not in page.tags
    tex = [l for l in latex_table(rows).split('\n') if l.endswith(r'\\')]
    assert len(tex)>=len(rows)+1

@given(st.text())
@settings(max_examples=60, deadline=None)
def test_any_text_stays_text(text):
    page = html_page(text, [text, html_code(text), html_facts({text: text}), html_details(text, [text]), html_bars({text: .3}), [{'x': text}]], lead=text, footer=text)
    assert not {'script', 'iframe', 'link', 'object', 'img'} & set(Page(page).tags)

@pytest.mark.parametrize('text', ['<img src=x onerror=alert(1)>', '"><script>alert(1)</script>', '[a](javascript:alert(1))', '![x](https://example.org/a.png)', '</pre><script>', '<svg/onload=alert(1)>'])
def test_hostile_text(text):
    page = Page(html_page('t', [text, html_code(text), [{'x': text}], html_bars({text: 1.})]))
    assert not {'script', 'img', 'svg', 'iframe'} & set(page.tags)
    assert not [a for a in page.attrs if a[0].startswith('on') or (a[1] or '').startswith('javascript')]

def test_nothing_is_fetched():
    page = html_page('t', ['text', html_figure('data:image/png;base64,iVBORw0KGgo=', 'c')])
    assert not re.search(r'(src|href)="(?!data:)', page) and 'url(' not in page and '@import' not in page

def test_numbers_of_every_kind():
    row = dict(f=1.5, i=2, n=np.float32(.25), k=np.int64(3), none=None, nan=float('nan'), s='x', b=True)
    assert markdown_table([row]).splitlines()[2]=='| 1.50 | 2 | 0.25 | 3 | – | – | x | True |'
    assert markdown_table([row]).splitlines()[1]=='| --: | --: | --: | --: | :-- | --: | :-- | :-- |'
    assert interval((-.25, .5), '.2f')=='[−0.25, 0.50]'

def test_empty_and_ragged_tables():
    assert markdown_table([], ['a'])=='| a |\n| :-- |\n'
    assert markdown_table([{'a': 1}, {'b': 2}], ['a', 'b']).splitlines()[2:]==['| 1 | – |', '| – | 2 |']
    with pytest.raises(HydraError, match="no row has the column 'c'; there are a, b"): html_table([{'a': 1, 'b': 2}], ['c'])

def test_latex_names():
    assert [latex_name(k) for k in ('ppl', 'macro ppl', 'Top-2', 'e3_gain', 'K9')]==['ppl', 'macroPpl', 'topTwo', 'eThreeGain', 'kNine']
    with pytest.raises(HydraError, match='both be'): latex_numbers({'a_b': 1, 'aB': 2})

@pytest.mark.skipif(not shutil.which('pdflatex'), reason='no pdflatex here')
def test_latex_compiles(tmp_path):
    rows = [dict(name=''.join(map(chr, range(32, 127))), gain=-1.5), dict(name='αβλτΔΣ×·±≤≥≈→−–—…', gain=None)]
    doc = r'\documentclass{article}\usepackage{booktabs}'+latex_numbers({'gain': -1.5, 'n tokens': 12345, 'who': 'a_b & c'})+r'\begin{document}\gain\nTokens\who'+latex_table(rows, caption='100 %', label='t')+r'\end{document}'
    (tmp_path/'t.tex').write_text(doc)
    r = subprocess.run(['pdflatex', '-halt-on-error', '-interaction=nonstopmode', 't.tex'], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode==0, r.stdout[-2000:]

def test_figures_are_reproducible():
    from matplotlib.figure import Figure
    fig = Figure(figsize=(2, 1)); fig.subplots().plot([0, 1])
    assert figure_uri(fig)==figure_uri(fig)
    assert len(figure_uri(fig, dpi=50))<len(figure_uri(fig, dpi=200))
    with pytest.raises(HydraError): html_figure('x.png')
