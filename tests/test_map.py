"Maps: labels that can be read, and no text that breaks out"
from html.parser import HTMLParser
import numpy as np
from hypothesis import given, settings, strategies as st
from hydramoe.domains.map import _densest_point, _separate_labels, map_html, plot_map
from hydramoe.foundations.core import rng
from helpers import blobs

def test_map_takes_few_texts_many_domains_and_a_sample():
    import matplotlib.pyplot as plt
    x,truth = blobs(n=300, k=12)
    assert len(plot_map(x[:3], truth[:3], ['a','b','c']).axes)==1
    fig = plot_map(x, truth, [f'domain-{i}' for i in range(12)], truth=[f't{i%5}' for i in range(300)], most=120)
    assert sum(len(c.get_offsets()) for c in fig.axes[0].collections)==120
    assert not plt.get_fignums()

def test_labels_on_the_map_do_not_touch():
    p = np.array([[0,0],[0,0],[.1,.01],[5,0],[0,9.]])
    q = _separate_labels(p, np.full(5, .5), .2)
    near = [(i,j) for i in range(5) for j in range(i) if abs(q[i,0]-q[j,0])<.5]
    assert all(abs(q[i,1]-q[j,1])>=.2-1e-6 for i,j in near)
    assert np.array_equal(q[3:], p[3:]) and np.array_equal(q[:,0], p[:,0])

def test_a_label_stands_in_a_group_of_two_halves_not_between():
    p = np.concatenate([rng(0, 'a').normal(size=(20,2)), [100,0]+rng(0, 'b').normal(size=(30,2))])
    assert abs(_densest_point(p)[0]-100)<5

# --- to explore

@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=40), min_size=3, max_size=6))
def test_no_text_breaks_out_of_the_map(rows):
    page = map_html(np.eye(len(rows)), np.zeros(len(rows), int), ['a'], rows).data
    assert page.count('<script>')==page.count('</script>')==1 and page.count('<title>')==len(rows)
    tags = []
    reader = HTMLParser(); reader.handle_starttag = lambda tag,attrs: tags.append(tag)
    reader.feed(page)
    assert set(tags)<={'figure','svg','g','text','title','circle','figcaption','script'} and tags.count('script')==1
