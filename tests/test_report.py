"Tables and numbers whatever the data hold."
import re, shutil, subprocess
import numpy as np
import pytest
from hypothesis import given, settings
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.report import interval, latex_name, latex_numbers, latex_table, markdown_table
from strategies import tables

@given(tables)
@settings(max_examples=60, deadline=None)
def test_every_table_has_its_shape(rows):
    md = markdown_table(rows).split('\n')[:-1]
    assert len(md)==len(rows)+2
    for line in md: assert len(re.findall(r'(?<!\\)(?:\\\\)*\|', line))==4, line
    tex = [l for l in latex_table(rows).split('\n') if l.endswith(r'\\')]
    assert len(tex)>=len(rows)+1

def test_numbers_of_every_kind():
    row = dict(f=1.5, i=2, n=np.float32(.25), k=np.int64(3), none=None, nan=float('nan'), s='x', b=True)
    assert markdown_table([row]).splitlines()[2]=='| 1.50 | 2 | 0.25 | 3 | – | – | x | True |'
    assert markdown_table([row]).splitlines()[1]=='| --: | --: | --: | --: | :-- | --: | :-- | :-- |'
    assert interval((-.25, .5), '.2f')=='[−0.25, 0.50]'

def test_empty_and_ragged_tables():
    assert markdown_table([], ['a'])=='| a |\n| :-- |\n'
    assert markdown_table([{'a': 1}, {'b': 2}], ['a', 'b']).splitlines()[2:]==['| 1 | – |', '| – | 2 |']
    with pytest.raises(HydraError, match="no row has the column 'c'; there are a, b"):
        markdown_table([{'a': 1, 'b': 2}], ['c'])

def test_latex_names():
    names = ('ppl', 'macro ppl', 'Top-2', 'e3_gain', 'K9')
    assert [latex_name(k) for k in names]==['ppl', 'macroPpl', 'topTwo', 'eThreeGain', 'kNine']
    with pytest.raises(HydraError, match='both be'): latex_numbers({'a_b': 1, 'aB': 2})

@pytest.mark.skipif(not shutil.which('pdflatex'), reason='no pdflatex here')
def test_latex_compiles(tmp_path):
    rows = [dict(name=''.join(map(chr, range(32, 127))), gain=-1.5),
            dict(name='αβλτΔΣ×·±≤≥≈→−–—…', gain=None)]
    head = r'\documentclass{article}\usepackage{booktabs}'
    numbers = latex_numbers({'gain': -1.5, 'n tokens': 12345, 'who': 'a_b & c'})
    body = r'\begin{document}\gain\nTokens\who'+latex_table(rows, caption='100 %', label='t')+r'\end{document}'
    (tmp_path/'t.tex').write_text(head+numbers+body)
    command = ['pdflatex', '-halt-on-error', '-interaction=nonstopmode', 't.tex']
    r = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode==0, r.stdout[-2000:]

