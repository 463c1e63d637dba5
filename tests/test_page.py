"Pages and their blocks whatever the data hold."
import re
from html.parser import HTMLParser
import pytest
from hypothesis import given, settings, strategies as st
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.page import (
    Html, figure_uri, html_bars, html_code, html_details, html_facts, html_figure, html_page, html_table)
from strategies import tables

class Page(HTMLParser):
    "The tags and attributes of a page, each of whose tags is closed"
    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.attrs = [], [], []
        self.feed(text)
        self.close()
        assert not self.stack
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs
        if tag not in ('meta', 'img', 'br', 'hr'): self.stack.append(tag)
    def handle_endtag(self, tag): assert self.stack.pop()==tag

@given(st.text())
@settings(max_examples=60, deadline=None)
def test_any_text_stays_text(text):
    blocks = [text, html_code(text), html_facts({text: text}), html_details(text, [text]), html_bars({text: .3}),
              [{'x': text}]]
    page = html_page(text, blocks, lead=text, footer=text)
    assert not {'script', 'iframe', 'link', 'object', 'img'} & set(Page(page).tags)

HOSTILE = [
    '<img src=x onerror=alert(1)>', '"><script>alert(1)</script>', '[a](javascript:alert(1))',
    '![x](https://example.org/a.png)', '</pre><script>', '<svg/onload=alert(1)>']

@pytest.mark.parametrize('text', HOSTILE)
def test_hostile_text(text):
    page = Page(html_page('t', [text, html_code(text), [{'x': text}], html_bars({text: 1.})]))
    assert not {'script', 'img', 'svg', 'iframe'} & set(page.tags)
    assert not [a for a in page.attrs if a[0].startswith('on') or (a[1] or '').startswith('javascript')]

def test_nothing_is_fetched():
    page = html_page('t', ['text', html_figure('data:image/png;base64,iVBORw0KGgo=', 'c')])
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert 'url(' not in page
    assert '@import' not in page

def test_figures_are_reproducible():
    from matplotlib.figure import Figure
    fig = Figure(figsize=(2, 1))
    fig.subplots().plot([0, 1])
    assert figure_uri(fig)==figure_uri(fig)
    assert len(figure_uri(fig, dpi=50))<len(figure_uri(fig, dpi=200))
    with pytest.raises(HydraError): html_figure('x.png')

@given(tables)
@settings(max_examples=60, deadline=None)
def test_every_html_table_has_its_shape(rows):
    page = Page(html_table(rows))
    assert page.tags.count('td')==3*len(rows)
    assert page.tags.count('th')==3
    assert 'script' not in page.tags

@given(tables)
@settings(max_examples=30, deadline=None)
def test_a_notebook_shows_the_same_text_with_styles_in_the_tags(rows):
    block = Html(html_table(rows)+html_facts({'a': rows[0]['a']})+html_bars({'b': .5}))
    shown = block._repr_html_()
    assert '<style' not in shown
    assert 'class=' not in re.sub(r'>[^<]*<', '><', shown)
    assert re.sub(r'<[^>]*>', '', shown)==re.sub(r'<[^>]*>', '', block)
    assert Page(shown).tags==Page(block).tags
