"Names: unique, fit for folders, and about the cluster"
import numpy as np
from hypothesis import given, settings, strategies as st
from hydramoe.domains.discover import cluster_texts
from hydramoe.domains.examples import lesson_texts
from hydramoe.domains.name import name_domains, top_words
from hydramoe.foundations.core import check_names

LESSON = lesson_texts()[0]

@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.text(max_size=30), st.integers(0,3)), min_size=1, max_size=12))
def test_any_texts_get_unique_names_that_name_folders(rows):
    names = name_domains([t for t,_ in rows], np.array([c for _,c in rows]))
    assert len(names)==1+max(c for _,c in rows)
    assert check_names(names)==names

def test_names_follow_the_clusters_not_their_numbers():
    _,labels,_ = cluster_texts(LESSON, 5, encoder='words')
    turn = np.array([2,0,3,1,4])
    assert [name_domains(LESSON, turn[labels])[turn[c]] for c in range(5)]==name_domains(LESSON, labels)

def test_a_word_that_is_everywhere_names_nothing():
    rows = [f'please {w} now' for w in ('apple','apple','tiger','tiger')]
    assert top_words(rows, [0,0,1,1])[0][0]=='apple' and 'please' not in top_words(rows, [0,0,1,1])[0][:1]
