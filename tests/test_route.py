"Routers: laws that hold for any experts and prompts, and files that are refused"
import json, os, subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression
from hydramoe.domains.discover import Domains
from hydramoe.foundations.core import HydraError, rng
from hydramoe.foundations.files import file_sha256
from hydramoe.hydra.cascade import load_router, make_router, with_abstention, cascade_router, choose_margin
from hydramoe.hydra.cascade import choose_threshold, margin, fit_on_hidden, use_static
from hydramoe.hydra.route import classifier_router, effective_experts, explain_route, plot_route, route_text
from hydramoe.hydra.route import similarity_router, softmax, top_k, uniform_router, calibrate
from hydramoe.hydra.kinds import fixed_router, oracle_router, distilled_router, hindsight_router, knn_router
from hydramoe.hydra.kinds import permute_experts, ridge_router, with_domain, with_prompts, without_domain
from helpers import forge, set_at

def unit(n, d=16, seed=0):
    x = rng(seed, 'unit').normal(size=(n,d))
    return (x/np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

def domains(k=5, d=16, seed=0): return Domains(.7*unit(k, d, seed+1), [f'd{i}' for i in range(k)], 'words')
def labels(n, k): return np.arange(n)%k

x = unit(60)
FIVE = [f'd{i}' for i in range(5)]
LETTERS = list('abcde')
routers = dict(
    similarity=similarity_router(domains()),
    top2=similarity_router(domains(), .1, top_k=2),
    classifier=classifier_router(domains(), x, labels(60,5)),
    uniform=uniform_router(FIVE),
    fixed=fixed_router(LETTERS, 'c'),
    mix=fixed_router(LETTERS, [1,2,3,4,0]),
    oracle=oracle_router(LETTERS, labels(60,5)))
each_router = pytest.mark.parametrize('router', routers.values(), ids=routers)

# --- laws

@each_router
def test_rows_are_weights(router):
    g = router(x=x)
    assert g.shape==(60,5)
    assert g.dtype==np.float32
    assert (g>=0).all()
    assert np.allclose(g.sum(1), 1, atol=1e-6)
    assert ((1-1e-6<=effective_experts(g)) & (effective_experts(g)<=5+1e-6)).all()

@pytest.mark.parametrize('k', range(1,6))
def test_top_k_keeps_k_and_their_proportions(k):
    w = routers['similarity'](x=x).astype(np.float64)
    kept = top_k(w, k)
    assert ((kept>0).sum(1)<=k).all()
    assert np.allclose(kept.sum(1), 1)
    for a,b in zip(w, kept):
        on = b>0
        assert a[on].min()>=a[~on].max(initial=0)
        assert np.allclose(b[on]/b[on].sum(), a[on]/a[on].sum())
    assert k<5 or np.array_equal(kept, w)

@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0,3), min_size=2, max_size=7), st.integers(1,7))
def test_ties_go_to_the_first(scores, k):
    w = softmax(np.array([scores], float))
    k = min(k, len(scores))
    want = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])
    assert np.flatnonzero(top_k(w, k)[0]).tolist()==want

@settings(deadline=None, max_examples=30)
@given(st.permutations(range(5)), st.floats(.01, 10))
def test_shuffled_experts_shuffle_the_weights(turn, T):
    d,turn = domains(),list(turn)
    turned = Domains(d.centroids[turn], [d.names[i] for i in turn], 'words')
    assert np.allclose(similarity_router(turned, T)(x=x), similarity_router(d, T)(x=x)[:,turn], atol=1e-7)

def test_shuffled_experts_shuffle_the_classifier():
    turn = [3,0,4,1,2]
    y = [FIVE[i] for i in labels(60,5)]
    a,b = classifier_router(FIVE, x, y),classifier_router([FIVE[i] for i in turn], x, y)
    assert np.allclose(b(x=x), a(x=x)[:,turn], atol=1e-3)

def test_cold_is_the_nearest_and_hot_is_even():
    assert np.array_equal(similarity_router(domains(), 1e-9)(x=x), np.eye(5, dtype=np.float32)[domains().assign(x)])
    assert np.allclose(similarity_router(domains(), 1e9)(x=x), .2, atol=1e-6)
    for t in (1e-300, 1e300, True): # could be saved, but never be loaded
        with pytest.raises(HydraError, match='temperature'): similarity_router(domains(), t)

def test_top_1_is_the_nearest_at_any_temperature():
    for T in (.01, 1, 100):
        first = similarity_router(domains(), T, top_k=1)(x=x).argmax(1)
        assert np.array_equal(first, domains().assign(x))

def test_equal_domains_share_alike():
    twin = Domains(np.ones((3,4)), list('abc'), 'words')
    assert np.allclose(similarity_router(twin, .01)(x=np.zeros((2,4))), 1/3)
    assert np.array_equal(similarity_router(twin, .01, top_k=1)(x=np.zeros((2,4))), [[1,0,0]]*2)

@each_router
def test_alone_and_in_company_are_the_same_bits(router):
    if router.kind=='oracle': pytest.skip('an oracle answers by position')
    g = router(x=x)
    assert all(np.array_equal(router(x=x[i:i+1])[0], g[i]) for i in range(60))

def test_texts_and_their_embeddings_are_one():
    from hydramoe.domains.examples import lesson_texts
    from hydramoe.domains.discover import cluster_texts
    texts,_ = lesson_texts()
    d,_,e = cluster_texts(texts, 4, encoder='words')
    r = similarity_router(d)
    assert np.array_equal(r(texts), r(x=e))
    assert np.array_equal(r(texts[0]), r(x=e[:1]))
    assert r([]).shape==(0,4)

@pytest.mark.parametrize('k', [1,2,3,7])
@pytest.mark.parametrize('C', [.1,10.])
def test_classifier_is_scikit_learn(k, C):
    y = labels(60,k)
    r = classifier_router([f'd{i}' for i in range(k)], x, y, C=C)
    z = x.astype(np.float64)
    want = np.ones((60,1)) if k==1 else LogisticRegression(C=C, max_iter=5000).fit(z, y).predict_proba(z)
    assert np.allclose(r(x=x), want, atol=1e-6)

def test_a_right_label_gets_right():
    d = domains()
    near = d.centroids[labels(100,5)]+.1*rng(0, 'n').normal(size=(100,16))
    for r in (similarity_router(d), classifier_router(d, near, labels(100,5))):
        right = r(x=near).argmax(1)==labels(100,5)
        assert right.mean()>.95

# --- refusals

@pytest.mark.parametrize('make,message', [
    (lambda: similarity_router(domains(), float('inf')), 'temperature=inf'),
    (lambda: similarity_router(domains(), top_k=0), 'top_k=0 of 5'),
    (lambda: similarity_router(domains(), top_k=1.5), 'top_k=1.5 of 5'),
    (lambda: uniform_router([]), 'no expert names'),
    (lambda: uniform_router(['a','a']), "'a' occurs twice"),
    (lambda: fixed_router(['a','b'], 'c'), "label 'c' is no expert"),
    (lambda: fixed_router(['a','b'], 2), 'label 2 is no expert'),
    (lambda: fixed_router(['a','b'], [0,0]), 'does not weigh'),
    (lambda: fixed_router(['a','b'], [np.nan,1]), 'does not weigh'),
    (lambda: oracle_router(['a','b'], [0,-1]), 'label -1 is no expert'),
    (lambda: classifier_router(['a','b'], x, [0]*60), "no training prompt is labelled 'b'"),
    (lambda: classifier_router(['a','b'], x, [0,1]), '60 embeddings and 2 labels'),
    (lambda: make_router('magic', ['a'], {}, {}), 'choose one of similarity'),
    (lambda: routers['classifier'](x=np.zeros((2,3))), r'need \(N, 16\)'),
    (lambda: routers['similarity'](x=np.full((2,16), np.nan)), 'embedding 0 is not finite'),
    (lambda: routers['oracle'](['one prompt']), 'of 60 prompts')])
def test_refused(make, message):
    with pytest.raises(HydraError, match=message): make()

# --- on disk

@each_router
def test_saved_and_loaded_are_the_same_bits(router, tmp_path):
    back = load_router(router.save(tmp_path))
    assert np.array_equal(back(x=x), router(x=x))
    assert back.params==router.params
    before = [file_sha256(p) for p in sorted(tmp_path.iterdir())]
    back.save(tmp_path)
    assert [file_sha256(p) for p in sorted(tmp_path.iterdir())]==before

@pytest.mark.parametrize('name', ['router.json', 'router.safetensors'])
def test_a_missing_file_is_named(tmp_path, name):
    routers['classifier'].save(tmp_path)
    (tmp_path/name).unlink()
    with pytest.raises(HydraError, match=name): load_router(tmp_path)

@pytest.mark.parametrize('change,message', [
    (lambda a,m: set_at(a, 'weight', 0, np.nan), "'weight' holds a value that is not finite"),
    (lambda a,m: a.pop('bias'), r"need \['bias', 'weight'\]"),
    (lambda a,m: a.update(extra=a['bias']), r"need \['bias', 'weight'\]"),
    (lambda a,m: a.update(bias=a['bias'][:4]), r"'bias' has shape \(4,\)"),
    (lambda a,m: a.update(weight=a['bias']), r"'weight' has shape \(5,\)"),
    (lambda a,m: m['params'].update(temperature='hot'), 'temperature=hot'),
    (lambda a,m: m['params'].update(top_k=6), 'top_k=6 of 5'),
    (lambda a,m: m['params'].pop('encoder'), "needs the parameter 'encoder'"),
    (lambda a,m: m.update(kind='similarity'), r"need \['centroids'\]"),
    (lambda a,m: m.update(names=['a','b','c','d','../e']), 'cannot name a folder')])
def test_what_fits_but_is_wrong_is_refused(tmp_path, change, message):
    routers['classifier'].save(tmp_path)
    forge(tmp_path, 'router', lambda a,b: change(a, b['meta']), shapes=True)
    with pytest.raises(HydraError, match=message): load_router(tmp_path)

def test_an_oracle_on_disk_cannot_point_outside(tmp_path):
    routers['oracle'].save(tmp_path)
    forge(tmp_path, 'router', lambda a,b: set_at(a, 'labels', 0, 9), shapes=True)
    with pytest.raises(HydraError, match='label .*9.* is no expert'): load_router(tmp_path)

def test_loading_needs_no_scikit_learn_model_and_runs_no_code(tmp_path):
    routers['classifier'].save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir())==['router.json', 'router.safetensors']
    code = f"""
from hydramoe.hydra.cascade import load_router
import numpy as np
print(load_router({str(tmp_path)!r})(x=np.ones((1,16))).tobytes().hex())
"""
    env = os.environ|dict(PYTHONHASHSEED='7')
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert r.stdout.split()[-1]==routers['classifier'](x=np.ones((1,16))).tobytes().hex(), r.stderr

# --- explained

@pytest.mark.parametrize('kind', ['similarity','top2','classifier','uniform','fixed','mix'])
def test_an_explanation_is_plain_data_that_agrees_with_the_weights(kind):
    import matplotlib.pyplot as plt
    r = routers[kind]
    e = explain_route(r, 'a prompt', x=x[:1])
    assert json.loads(json.dumps(e))==e
    assert {c['name']: c['weight'] for c in e['experts']}==dict(zip(r.names, r(x=x[:1])[0].astype(float)))
    weights = [c['weight'] for c in e['experts']]
    assert weights==sorted(weights, reverse=True)
    assert all(c['name'] in route_text(e) for c in e['experts'])
    assert '"a prompt"' in route_text(e)
    plot_route(e)
    assert not plt.get_fignums()

def test_a_long_prompt_is_cut_and_many_experts_are_summed():
    r = uniform_router([f'd{i}' for i in range(40)])
    lines = route_text(explain_route(r, 'word\n'*500), most=3).splitlines()
    assert len(lines)==6
    assert max(map(len, lines))<100
    assert '37 more, 92.5% together' in lines[-1]

# --- in closed form: what comes and goes leaves no trace

from dataclasses import replace
from hydramoe.hydra.vectors import static_vectors

y = labels(60, 5)
def means(names, x, y):
    middles = np.stack([x[np.asarray(y)==n].mean(0) for n in names])
    return similarity_router(Domains(middles, names, 'words'))
def ridge_on_hidden(names, x, y): return fit_on_hidden(ridge_router, names, x, y, 3)
def fitted(make, names, x=x, y=y):
    "A router fitted on the rows of these domains alone"
    own = np.isin(y, [FIVE.index(n) for n in names])
    return make(names, x[own], [FIVE[i] for i in y if FIVE[i] in names])
def equal(a, b):
    "Whether two routers are the same to the bit"
    if a.names!=b.names or a.params!=b.params or a.arrays.keys()!=b.arrays.keys(): return False
    return all(np.array_equal(a.arrays[n], b.arrays[n]) for n in a.arrays)

@pytest.mark.parametrize('make', [means, ridge_router, knn_router])
@pytest.mark.parametrize('gone', [0, 2, 4])
def test_a_domain_more_or_less_is_a_refit(make, gone):
    left = [n for i,n in enumerate(FIVE) if i!=gone]
    without = fitted(make, left)
    new = with_domain(without, FIVE[gone], x[y==gone])
    assert equal(new, fitted(make, [*left, FIVE[gone]]))
    assert equal(without_domain(new, FIVE[gone]), without)
    assert equal(without_domain(fitted(make, FIVE), FIVE[gone]), without)

def test_a_domain_leaves_a_standardised_router_without_a_trace():
    r = ridge_on_hidden(FIVE, 50*x+np.arange(16), y)
    assert equal(without_domain(with_domain(r, 'more', 50*x[:9]+np.arange(16)), 'more'), r)

@settings(deadline=None, max_examples=20)
@given(st.permutations(range(60)), st.integers(6, 54), st.floats(1e-6, 1.))
def test_more_prompts_in_any_order_are_a_refit(turn, cut, size):
    z,turn = (size*x).astype(np.float32),np.array(turn)
    first,rest = turn[:cut],turn[cut:]
    if len(set(y[first]))<5: return
    assert equal(with_prompts(ridge_router(FIVE, z[first], y[first]), z[rest], y[rest]), ridge_router(FIVE, z, y))

def test_ridge_is_least_squares_on_labels():
    from sklearn.linear_model import Ridge
    want = Ridge(alpha=.3).fit(x.astype(np.float64), np.eye(5)[y]).predict(x.astype(np.float64))
    assert np.allclose(ridge_router(FIVE, x, y).scores(x=x), want, atol=1e-3)

def test_a_saved_ridge_router_can_still_be_refitted(tmp_path):
    back = load_router(fitted(ridge_router, FIVE[:4]).save(tmp_path))
    assert equal(with_domain(back, 'd4', x[y==4]), ridge_router(FIVE, x, y))

# --- neighbours, losses, calibration

def test_neighbours_vote_by_distance():
    r = knn_router(FIVE, x, y, k=7, temperature=.3)
    d = ((x[:5,None].astype(float)-x[None])**2).sum(-1)
    for row,g in zip(d, r(x=x[:5])):
        near = sorted(range(60), key=lambda i: row[i])[:7]
        v = np.exp(-row[near]/.3)
        votes = [v[[y[i]==e for i in near]].sum() for e in range(5)]
        assert np.allclose(g, [vote/v.sum() for vote in votes], atol=1e-5)

@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.floats(.02, 2), st.floats(1e-4, .1))
def test_taught_by_losses_is_the_least_kl(seed, tau, l2):
    L = rng(seed, 'losses').normal(size=(60,5))
    r = distilled_router(FIVE, x, L, tau, l2)
    z = np.c_[x, np.ones(60)].astype(float)
    w = np.c_[r.arrays['weight'], r.arrays['bias']]
    q = softmax(-L/tau)
    def kl(w): return (np.logaddexp.reduce(z@w.T, 1)-(q*(z@w.T)).sum(1)).mean()+l2/2*(w**2).sum()
    grad = (softmax(z@w.T)-q).T@z/60+l2*w
    assert np.abs(grad).max()<1e-4
    assert all(kl(w)<=kl(w+.01*rng(i, 'step').normal(size=w.shape)) for i in range(5))

def test_small_tau_is_the_best_expert_and_equal_losses_are_no_opinion():
    L = rng(3, 'losses').normal(size=(16,5))
    def taught(losses): return distilled_router(FIVE, x, losses)(x=x)
    assert (distilled_router(FIVE, x[:16], L, 1e-4, 1e-9)(x=x[:16]).argmax(1)==L.argmin(1)).all()
    assert np.allclose(taught(np.full((60,5), 2.)), .2, atol=1e-6)
    same = L[np.zeros(60,int)]
    assert np.allclose(taught(same+np.arange(60)[:,None]), taught(same), atol=1e-5)

def test_held_still_it_stays_where_it_began():
    start = routers['classifier']
    losses = rng(0, 'l').normal(size=(60,5))
    assert np.allclose(distilled_router(FIVE, x, losses, l2=1e6, start=start)(x=x), start(x=x), atol=1e-3)

def test_calibration_lowers_the_nll_and_changes_no_first_choice():
    far = x+.5*rng(1, 'blur').normal(size=x.shape)
    fits = (classifier_router(FIVE, x, y, C=1e4), ridge_router(FIVE, x, y), means(FIVE, x, np.array(FIVE)[y]),
            distilled_router(FIVE, x, -np.eye(5)[y]))
    for r in fits:
        mild = calibrate(r, far, y)
        def nll(r): return -np.log(np.maximum(r(x=far)[np.arange(60),y], 1e-9)).mean()
        assert nll(mild)<=nll(r)+1e-6
        assert (mild(x=far).argmax(1)==r(x=far).argmax(1)).all()
        def warmer(f): return replace(mild, params=dict(mild.params, temperature=mild.params['temperature']*f))
        assert all(nll(mild)<=nll(warmer(f))+1e-6 for f in (.7, 1.4))

# --- controls

@pytest.mark.parametrize('kind', ['similarity', 'classifier', 'ridge', 'knn', 'oracle', 'mix'])
def test_permuted_routes_are_the_same_in_another_order(kind):
    r = dict(routers, ridge=ridge_router(FIVE, x, y), knn=knn_router(FIVE, x, y))[kind]
    turn = rng(7, 'permuted').permutation(5)
    assert np.allclose(permute_experts(r, 7)(x=x), r(x=x)[:,turn], atol=1e-6)
    assert permute_experts(r, 7).names==r.names
    assert (turn!=np.arange(5)).any()

def test_hindsight_is_the_least_loss():
    L = rng(0, 'l').normal(size=(60,5))
    assert (hindsight_router(FIVE, L)(x=x).argmax(1)==L.argmin(1)).all()

# --- abstention

@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 10), min_size=30, max_size=200), st.sampled_from([.05, .1, .3]))
def test_a_threshold_loses_no_more_than_asked(d, lose):
    d = np.array(d)
    t = choose_threshold(d, lose)
    assert (d>t).mean()<=lose
    assert t in d
    assert (d>=t).mean()>=lose-1/len(d)

def test_a_threshold_holds_for_new_prompts_on_average():
    draws = [rng(i, 'd').normal(size=80)**2 for i in range(400)]
    lost = np.mean([d[40:]>choose_threshold(d[:40], .1) for d in draws])
    assert .07<lost<=.105

@pytest.mark.parametrize('make', [means, ridge_router, knn_router])
def test_far_prompts_go_to_the_base_and_the_others_where_they_went(make, tmp_path):
    r = fitted(make, FIVE)
    t = float(np.median(with_abstention(r, 1.).distance(x=x)))
    careful = with_abstention(r, t)
    g,far = careful(x=x),careful.distance(x=x)>t
    assert 0<far.sum()<60
    assert (g[far]==0).all()
    assert np.array_equal(g[~far], r(x=x)[~far])
    assert np.array_equal(load_router(careful.save(tmp_path))(x=x), g)
    assert (effective_experts(g[far])==0).all()

def test_a_row_of_zeros_is_a_gate():
    import torch
    from hydramoe.models.base import tiny_base
    from hydramoe.experts.stack import LoraSpec
    from hydramoe.experts.model import gated
    b = tiny_base()
    ids = torch.randint(3, 90, (2,6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = b.model(input_ids=ids).logits
        model = gated(b, 5, LoraSpec(2))
        model.stack.theta.normal_(std=.2, generator=torch.Generator().manual_seed(0))
        out = model(input_ids=ids, gates=torch.tensor([[0.]*5, [0,.5,0,.5,0]])).logits
    assert torch.allclose(out[0], bare[0], atol=1e-5)
    assert not torch.allclose(out[1], bare[1], atol=1e-3)

def test_abstaining_grows_with_its_domains():
    r = with_abstention(fitted(ridge_router, FIVE[:4]), .9)
    assert equal(with_domain(r, 'd4', x[y==4]), with_abstention(ridge_router(FIVE, x, y), .9))

# --- other vectors

def pretended(seed=0):
    pairs = zip('red green blue'.split()*8, 'cat dog'.split()*12)
    texts = [f'{a} {b} word{i}' for i,(a,b) in enumerate(pairs)]
    vectors = rng(seed, 'v').normal(size=(30_000,16)).astype(np.float16)
    return texts, dict(seen=np.arange(0, 30_000, dtype=np.int64), vectors=vectors, middle=np.zeros(16, np.float32))

@pytest.fixture
def wordpiece(monkeypatch):
    "A tokenizer that needs no asset"
    from tokenizers import Tokenizer, models, pre_tokenizers
    import hydramoe.hydra.vectors as vectors
    words = ['?','red','green','blue','cat','dog']
    t = Tokenizer(models.WordLevel({w: i for i,w in enumerate(words)}, unk_token='?'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    monkeypatch.setattr(vectors, '_wordpiece', lambda: t)

def test_static_vectors_are_the_sum_of_their_tokens(wordpiece):
    t,a = pretended()
    v = static_vectors(t, a)
    assert np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5)
    assert all(np.array_equal(static_vectors([s], a)[0], u) for s,u in zip(t, v))
    s = a['vectors'].astype(float)[[1,4,0]].sum(0)
    assert np.allclose(v[0], s/np.linalg.norm(s), atol=1e-5)
    assert np.array_equal(static_vectors(['cat red word9'], a)[0], v[0])

def test_a_static_router_is_kept_whole(wordpiece, tmp_path):
    t,a = pretended()
    r = use_static(replace(routers['similarity'], params=dict(routers['similarity'].params, encoder='minilm')), a)
    back = load_router(r.save(tmp_path))
    assert np.array_equal(back(t), r(t))
    assert back.params['encoder']=='static'

def test_hidden_states_are_measured_by_the_rule_of_the_first_fit(tmp_path):
    h = 50*x+np.arange(16)*100
    r = ridge_on_hidden(FIVE, h, y)
    assert np.allclose(ridge_on_hidden(FIVE, h*4-7, y)(x=h*4-7), r(x=h), atol=1e-3)
    assert np.array_equal(load_router(r.save(tmp_path))(x=h), r(x=h))
    with pytest.raises(HydraError, match='after layer 3: give it as x'): r(['one'])

# --- cascade

@settings(deadline=None, max_examples=25)
@given(st.floats(-1, 1))
def test_a_cascade_is_the_cheap_router_where_it_leads_and_the_good_one_elsewhere(most):
    cheap,good = routers['similarity'],ridge_router(FIVE, x, y)
    g,w = cascade_router(cheap, good, most)(x=(x, x)),cheap(x=x)
    ask = margin(w)<=most
    assert np.array_equal(g[ask], good(x=x)[ask])
    assert np.array_equal(g[~ask], w[~ask])

@pytest.mark.parametrize('agree', [.8, .9, .97, 1.])
def test_a_margin_is_the_least_that_agrees(agree):
    cheap,good = routers['similarity'],ridge_router(FIVE, x, y)
    w,chosen = cheap(x=x),good(x=x).argmax(1)
    m = choose_margin(w, chosen, agree)
    def same(m): return ((w.argmax(1)==chosen)|(margin(w)<=m)).mean()
    assert same(m)>=agree
    assert not [n for n in [-1, *margin(w)] if n<m and same(n)>=agree]
    assert (cascade_router(cheap, good, m)(x=(x, x)).argmax(1)==chosen).mean()>=agree

def test_a_cascade_is_kept_whole(tmp_path):
    r = cascade_router(routers['similarity'], ridge_router(FIVE, x, y), .4)
    back = load_router(r.save(tmp_path))
    assert np.array_equal(back(x=(x, x)), r(x=(x, x)))
    assert back.names==FIVE

@pytest.mark.parametrize('make,message', [
    (lambda: ridge_router(FIVE, x, y, lam=0), 'lam=0'),
    (lambda: knn_router(FIVE, x, y, k=0), 'k=0 neighbours'),
    (lambda: ridge_router(FIVE, x*1e8, y), 'too many to be summed exactly'),
    (lambda: with_domain(routers['classifier'], 'new', x), 'fitted on all prompts at once'),
    (lambda: with_domain(ridge_router(FIVE, x, y), 'd0', x), "'d0' occurs twice"),
    (lambda: without_domain(ridge_router(FIVE, x, y), 'd9'), 'choose one of d0'),
    (lambda: with_prompts(routers['uniform'], x, y), 'keeps no sums'),
    (lambda: distilled_router(FIVE, x, np.ones((60,4))), r'need \(60, 5\)'),
    (lambda: distilled_router(FIVE, x, np.ones((60,5)), tau=0), 'tau must be above 0'),
    (lambda: distilled_router(FIVE, x, np.full((60,5), np.nan)), 'all finite'),
    (lambda: choose_threshold(np.ones(5), .05), 'give at least 19'),
    (lambda: with_abstention(routers['uniform'], 1.), 'reads no vectors'),
    (lambda: with_abstention(routers['classifier'], 1.), 'does not know where its domains are'),
    (lambda: use_static(routers['similarity'], {}), "reads words"),
    (lambda: cascade_router(routers['similarity'], uniform_router(list('abcde')), .1), 'must weigh the same experts'),
    (lambda: permute_experts(cascade_router(routers['similarity'], routers['similarity'], .1)),
        'permute the two routers')])
def test_more_refused(make, message):
    with pytest.raises(HydraError, match=message): make()

def test_a_cascade_with_an_array_of_nobody_is_refused(tmp_path):
    cascade_router(routers['similarity'], ridge_router(FIVE, x, y), .4).save(tmp_path)
    forge(tmp_path, 'router', lambda a,b: a.update(third=a['first.centroids']), shapes=True)
    with pytest.raises(HydraError, match="'third'"): load_router(tmp_path)

# --- what of a prompt is read

def test_whole_prompts_are_read_whole_saved_or_in_a_cascade(tmp_path):
    """Asked conversations, a router on whole prompts gives what their vectors give; any other hears the user's words
    alone"""
    from hydramoe.models.base import tiny_base
    from hydramoe.models.hidden import pooled_state
    from hydramoe.domains.embed import embed, whole_text
    from hydramoe.hydra.cascade import bind_base, use_whole_prompt
    tiny, kinds = tiny_base(), [0]*3+[1]*3
    rules, asked = ('You are a pirate.', 'You may call get_time().'), ('Hello', 'What now?', 'Who?')
    talks = [[dict(role='system', content=s), dict(role='user', content=t)] for s in rules for t in asked]
    z = pooled_state([dict(prompt=t) for t in talks], tiny, 1)
    words = embed([whole_text(dict(prompt=t)) for t in talks], 'words')
    good = use_whole_prompt(fit_on_hidden(ridge_router, ['a','b'], z, kinds, 1))
    cheap = use_whole_prompt(ridge_router(['a','b'], words, kinds, encoder='words'))
    for most, one in ((2., good), (-1., cheap)):
        both = load_router(cascade_router(cheap, good, most).save(tmp_path/str(most)))
        want = one(x=z if one is good else words)
        assert np.array_equal(bind_base(both, tiny)(talks), want)
        assert np.array_equal(both(x=(words, z)), want)
        assert (want.argmax(1)==kinds).all()
    deaf = bind_base(replace(good, params=dict(good.params, whole=False)), tiny)
    assert np.array_equal(deaf(talks)[:3], deaf(talks)[3:])
    assert np.array_equal(deaf(talks)[:3], deaf([t[1]['content'] for t in talks[:3]]))
