"Clusters: repeatable in any process, as many as asked for, no better than chance where there is nothing"
import os
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hydramoe.domains.cluster import agreement, choose_k, hierarchical, kmeans, membership, random_domains
from hydramoe.domains.discover import Domains
from hydramoe.foundations.core import HydraError, rng
from hydramoe.foundations.files import file_sha256
from helpers import blobs, printed

# --- clustering

def test_separate_heaps_are_found_whatever_their_order():
    x,truth = blobs()
    order = rng(1, 'order').permutation(len(x))
    for rows in (np.arange(len(x)), order):
        assert agreement(kmeans(x[rows], 3)[1], truth[rows]) == dict(nmi=1.0, ari=1.0, purity=1.0)

def test_the_same_in_two_processes_with_other_threads_and_hash_seeds(tmp_path):
    code = """if 1:
        from hydramoe.domains.examples import lesson_texts
        from hydramoe.domains.discover import cluster_texts
        from hydramoe.domains.map import project_2d
        from hydramoe.foundations.core import digest
        texts,_ = lesson_texts()
        domains,labels,x = cluster_texts(texts, 5, encoder='words')
        domains.save({!r})
        print(digest([domains.names, domains.centroids, labels, project_2d(x)]))"""
    def run(seed, threads):
        environment = os.environ | dict(PYTHONHASHSEED=seed, OMP_NUM_THREADS=threads)
        return printed(code.format(str(tmp_path/seed)), environment).splitlines()[-1]
    seen = {run('1', '1'), run('2', '2')}
    assert len(seen)==1
    assert len({file_sha256(p) for p in tmp_path.glob('*/domains.json')})==1
    assert len({file_sha256(p) for p in tmp_path.glob('*/domains.safetensors')})==1

def test_another_seed_may_differ_but_one_seed_never_does():
    x = rng(0, 'noise').normal(size=(200,6))
    same = [kmeans(x, 7, seed=3) for _ in range(2)]
    assert np.array_equal(same[0][0], same[1][0])
    assert np.array_equal(same[0][1], same[1][1])
    assert not np.array_equal(same[0][1], kmeans(x, 7, seed=4)[1])

@pytest.mark.parametrize('k', [0, 4])
def test_impossible_k(k):
    with pytest.raises(HydraError, match=f'k={k} clusters'): kmeans(np.eye(3), k)

def test_one_cluster_is_everything():
    x,_ = blobs()
    centroids,labels = kmeans(x, 1)
    assert not labels.any()
    assert np.allclose(centroids[0], x.mean(0), atol=1e-4)

def test_distances_are_the_same_alone_and_in_company():
    d = Domains(rng(0, 'c').normal(size=(9,384)), [f'd{i}' for i in range(9)])
    x = rng(0, 'x').normal(size=(50,384)).astype(np.float32)
    assert all(np.array_equal(d.distances(x[i:i+1])[0], row) for i,row in enumerate(d.distances(x)))
    assert np.allclose(d.distances(x), ((x[:,None]-d.centroids)**2).sum(-1), rtol=1e-5)

# --- controls

@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0,20), min_size=1, max_size=9), st.integers(0,2**40))
def test_random_clusters_have_the_given_sizes(sizes, seed):
    labels = random_domains(sum(sizes), sizes, seed)
    assert np.bincount(labels, minlength=len(sizes)).tolist()==sizes

def test_random_clusters_know_nothing():
    truth = np.arange(900)%9
    assert np.mean([agreement(random_domains(900, 9, s), truth)['ari'] for s in range(20)])==pytest.approx(0, abs=.005)

# --- how many, soft, in two cuts

def test_silhouette_and_stability_find_the_heaps():
    x,_ = blobs(n=200, k=5)
    best,found = choose_k(x, range(2, 9), draws=3)
    assert best==5
    assert next(r['stability'] for r in found if r['k']==5)==1
    assert all(-1<=r['silhouette']<=1 for r in found)
    assert all(r['low']<=r['stability']<=r['high'] for r in found)

@settings(deadline=None, max_examples=50)
@given(st.integers(1,9), st.integers(1,5), st.floats(1e-6, 1e6), st.integers(0,2**31))
def test_membership_adds_up_and_keeps_the_order(n, k, temperature, seed):
    d = rng(seed, 'd').exponential(size=(n,k))
    for top in (None, 1, k):
        w = membership(d, temperature, top)
        assert np.allclose(w.sum(1), 1)
        assert (w>=0).all()
        assert np.array_equal(w.max(1), w[np.arange(n),d.argmin(1)])
    assert np.array_equal(membership(d, temperature, 1).argmax(1), d.argmin(1))

@settings(deadline=None, max_examples=15)
@given(st.integers(1,40), st.booleans(), st.integers(0,99))
def test_two_cuts_make_k_clusters(k, balanced, seed):
    x,_ = blobs(n=120, seed=seed)
    c,labels,group = hierarchical(x, k, seed, balanced=balanced)
    assert c.shape==(k,8)
    assert group.shape==(k,)
    assert labels.max()<k
    if not balanced: assert len(np.unique(labels))==k
