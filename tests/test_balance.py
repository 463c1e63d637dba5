"Clusters of equal size: within their capacities, near the best, the same bits in any process"
import json, os, subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from hydramoe.domains.balance import assign_balanced, balanced_kmeans
from hydramoe.foundations.core import digest, repo_root, rng
from helpers import printed

def optimum(costs):
    "Least total cost with ⌈n/k⌉ places a cluster, by the Hungarian method"
    places = -(-len(costs)//costs.shape[1])
    by_place = np.repeat(costs, places, axis=1)
    rows,slots = linear_sum_assignment(by_place)
    return by_place[rows,slots].sum()

def cost(costs, labels): return costs[np.arange(len(costs)),labels].sum()

SEEDS = st.integers(0,2**31)
DECIMALS = st.sampled_from([0, 1, 3])
UNITS = st.sampled_from([1e-3, 1, 1e4])

@settings(deadline=None, max_examples=80)
@given(st.integers(1,40), st.integers(1,7), SEEDS, DECIMALS, UNITS)
def test_a_balanced_assignment_is_the_best_within_its_capacities(n, k, seed, decimals, unit):
    costs = unit*rng(seed, 'costs').exponential(size=(n,k)).round(decimals) # few decimals: many ties
    labels = assign_balanced(costs)
    assert labels.shape==(n,)
    assert np.bincount(labels, minlength=k).max()<=-(-n//k)
    assert cost(costs, labels)==pytest.approx(optimum(costs), rel=1e-4, abs=1e-4*unit)

@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_balance_minds_neither_the_order_of_rows_nor_what_a_row_costs_everywhere(seed):
    g = rng(seed, 'costs')
    costs = g.normal(size=(200,6))
    order = g.permutation(200)
    labels = assign_balanced(costs)
    assert np.array_equal(assign_balanced(costs[order]), labels[order])
    shifted = costs+g.normal(size=(200,1)) # each row by one number everywhere
    assert cost(costs, assign_balanced(shifted))==pytest.approx(cost(costs, labels), abs=1e-3)

def test_duplicates_are_shared_out():
    assert np.bincount(assign_balanced(np.zeros((5000,7)))).max()==-(-5000//7)
    x = np.repeat(np.eye(4, dtype=np.float32), [1000,5,5,5], axis=0)
    _,labels = balanced_kmeans(x, 4)
    sizes = np.bincount(labels)
    assert sizes.max()==254

def test_many_rows_are_within_two_percent_of_the_best():
    g = rng(0, 'zipf')
    c = g.normal(size=(20,32))
    w = 1/np.arange(1,21)
    near = g.choice(20, 9000, p=w/w.sum()) # few centres have most rows
    x = (c[near] + g.normal(size=(9000,32))).astype(np.float32)
    costs = ((x[:,None]-c)**2).sum(-1)
    fast,best = assign_balanced(costs),assign_balanced(costs, exact=True)
    assert np.bincount(fast).max()==np.bincount(best).max()==450
    assert cost(costs, best)-.1<=cost(costs, fast)<=1.02*cost(costs, best)

@pytest.mark.parametrize('n,k', [(1,1), (7,7), (100,7), (3000,1), (5001,64)])
def test_balanced_kmeans_of_any_size(n, k):
    x = rng(0, 'x').normal(size=(n,16)).astype(np.float32)
    c,labels = balanced_kmeans(x, k)
    assert c.shape==(k,16)
    assert np.bincount(labels, minlength=k).max()<=-(-n//k)

def test_balanced_kmeans_streams_a_file_and_minds_no_threads(tmp_path):
    x = rng(0, 'x').normal(size=(9000,24)).astype(np.float32)
    file = tmp_path/'x.npy'
    np.save(file, x)
    code = f"""if 1:
        import numpy as np
        from hydramoe.domains.balance import balanced_kmeans
        from hydramoe.foundations.core import digest
        print(digest(list(balanced_kmeans(np.load({str(file)!r}, mmap_mode='r'), 9, block=1000))))"""
    seen = {printed(code, os.environ | dict(OMP_NUM_THREADS=t)).splitlines()[-1] for t in '12'}
    assert seen=={digest(list(balanced_kmeans(x, 9, block=1000)))}

def test_a_common_offset_changes_nothing_that_matters():
    x = rng(0, 'x').normal(size=(3000,16)).astype(np.float32)
    a,b = (balanced_kmeans(x+o, 8) for o in (0, 300))
    def inertia(x, c, l): return ((x-c[l]).astype(np.float64)**2).sum()
    assert inertia(x+300, *b)==pytest.approx(inertia(x, *a), rel=.01)

@pytest.mark.slow
def test_the_benchmark_tells_what_it_should():
    command = [sys.executable, repo_root()/'benchmarks'/'cluster.py', '--fast', '--json']
    r = subprocess.run(command, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    out = json.loads(r.stdout)
    assert {'balanced_vs_plain', 'inertia_vs_plain', 'inertia_vs_optimal', 'speed_vs_auction'} <= set(out)
    assert {'max_over_mean', 'peak_gib', 'seconds_per_million'} <= set(out)
    assert 1-1e-6<=out['mixture_small']['optimum_over_bound']<1.0001
    assert out['inertia_vs_optimal']<=1.02
    assert out['max_over_mean']<=1.1
