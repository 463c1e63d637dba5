"Routers: laws that hold for any experts and prompts, and files that are refused"
import json, os, subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from hydramoe.cluster import Domains
from hydramoe.core import HydraError, digest, file_sha256, read_json, rng, write_json
from hydramoe.route import Router, classifier, explain_route, fixed, heard, oracle, plot_route, route_text, similarity, softmax, top_k, uniform

def unit(n, d=16, seed=0):
    x = rng(seed, 'unit').normal(size=(n,d))
    return (x/np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

def domains(k=5, d=16, seed=0): return Domains(.7*unit(k, d, seed+1), [f'd{i}' for i in range(k)], 'words')
def labels(n, k): return np.arange(n)%k

x = unit(60)
routers = dict(similarity=similarity(domains()), top2=similarity(domains(), .1, top_k=2), classifier=classifier(domains(), x, labels(60,5)),
               uniform=uniform([f'd{i}' for i in range(5)]), fixed=fixed(list('abcde'), 'c'), mix=fixed(list('abcde'), [1,2,3,4,0]), oracle=oracle(list('abcde'), labels(60,5)))
every = pytest.mark.parametrize('router', routers.values(), ids=routers)

# --- laws

@every
def test_rows_are_weights(router):
    g = router(x=x)
    assert g.shape==(60,5) and g.dtype==np.float32 and (g>=0).all() and np.allclose(g.sum(1), 1, atol=1e-6)
    assert ((1-1e-6<=heard(g)) & (heard(g)<=5+1e-6)).all()

@pytest.mark.parametrize('k', range(1,6))
def test_top_k_keeps_k_and_their_proportions(k):
    w = routers['similarity'](x=x).astype(np.float64)
    kept = top_k(w, k)
    assert ((kept>0).sum(1)<=k).all() and np.allclose(kept.sum(1), 1)
    for a,b in zip(w, kept):
        on = b>0
        assert a[on].min()>=a[~on].max(initial=0) and np.allclose(b[on]/b[on].sum(), a[on]/a[on].sum())
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
    assert np.allclose(similarity(turned, T)(x=x), similarity(d, T)(x=x)[:,turn], atol=1e-7)

def test_shuffled_experts_shuffle_the_classifier():
    turn = [3,0,4,1,2]
    names = [f'd{i}' for i in range(5)]
    y = [names[i] for i in labels(60,5)]
    a,b = classifier(names, x, y),classifier([names[i] for i in turn], x, y)
    assert np.allclose(b(x=x), a(x=x)[:,turn], atol=1e-3)

def test_cold_is_the_nearest_and_hot_is_even():
    assert np.array_equal(similarity(domains(), 1e-9)(x=x), np.eye(5, dtype=np.float32)[domains().assign(x)])
    assert np.allclose(similarity(domains(), 1e9)(x=x), .2, atol=1e-6)
    assert np.isfinite(similarity(domains(), 1e-300)(x=x)).all()

def test_top_1_is_the_nearest_at_any_temperature():
    for T in (.01, 1, 100): assert np.array_equal(similarity(domains(), T, top_k=1)(x=x).argmax(1), domains().assign(x))

def test_equal_domains_share_alike():
    twin = Domains(np.ones((3,4)), list('abc'), 'words')
    assert np.allclose(similarity(twin, .01)(x=np.zeros((2,4))), 1/3)
    assert np.array_equal(similarity(twin, .01, top_k=1)(x=np.zeros((2,4))), [[1,0,0]]*2)

@every
def test_alone_and_in_company_are_the_same_bits(router):
    if router.kind=='oracle': pytest.skip('an oracle answers by position')
    g = router(x=x)
    assert all(np.array_equal(router(x=x[i:i+1])[0], g[i]) for i in range(60))

def test_texts_and_their_embeddings_are_one():
    from hydramoe.cluster import cluster_texts, lesson_texts
    texts,_ = lesson_texts()
    d,_,e = cluster_texts(texts, 4, encoder='words')
    r = similarity(d)
    assert np.array_equal(r(texts), r(x=e)) and np.array_equal(r(texts[0]), r(x=e[:1]))
    assert r([]).shape==(0,4)

@pytest.mark.parametrize('k', [1,2,3,7])
@pytest.mark.parametrize('C', [.1,10.])
def test_classifier_is_scikit_learn(k, C):
    y = labels(60,k)
    r = classifier([f'd{i}' for i in range(k)], x, y, C=C)
    want = np.ones((60,1)) if k==1 else LogisticRegression(C=C, max_iter=5000).fit(x.astype(np.float64), y).predict_proba(x.astype(np.float64))
    assert np.allclose(r(x=x), want, atol=1e-6)

def test_a_right_label_gets_right():
    d = domains()
    near = d.centroids[labels(100,5)]+.1*rng(0, 'n').normal(size=(100,16))
    for r in (similarity(d), classifier(d, near, labels(100,5))): assert (r(x=near).argmax(1)==labels(100,5)).mean()>.95

# --- refusals

@pytest.mark.parametrize('make,message', [
    (lambda: similarity(domains(), float('inf')), 'temperature=inf'),
    (lambda: similarity(domains(), top_k=0), 'top_k=0 of 5'),
    (lambda: similarity(domains(), top_k=1.5), 'top_k=1.5 of 5'),
    (lambda: uniform([]), 'no expert names'),
    (lambda: uniform(['a','a']), "'a' occurs twice"),
    (lambda: fixed(['a','b'], 'c'), "label 'c' is no expert"),
    (lambda: fixed(['a','b'], 2), 'label 2 is no expert'),
    (lambda: fixed(['a','b'], [0,0]), 'does not weigh'),
    (lambda: fixed(['a','b'], [np.nan,1]), 'does not weigh'),
    (lambda: oracle(['a','b'], [0,-1]), 'label -1 is no expert'),
    (lambda: classifier(['a','b'], x, [0]*60), "no training prompt is labelled 'b'"),
    (lambda: classifier(['a','b'], x, [0,1]), '60 embeddings and 2 labels'),
    (lambda: Router('magic', ['a'], {}, {}), 'choose one of similarity'),
    (lambda: routers['classifier'](x=np.zeros((2,3))), r'need \(N, 16\)'),
    (lambda: routers['similarity'](x=np.full((2,16), np.nan)), 'embedding 0 is not finite'),
    (lambda: routers['oracle'](['one prompt']), 'of 60 prompts')])
def test_refused(make, message):
    with pytest.raises(HydraError, match=message): make()

# --- on disk

@every
def test_saved_and_loaded_are_the_same_bits(router, tmp_path):
    back = Router.load(router.save(tmp_path))
    assert np.array_equal(back(x=x), router(x=x)) and back.params==router.params
    before = [file_sha256(p) for p in sorted(tmp_path.iterdir())]
    back.save(tmp_path)
    assert [file_sha256(p) for p in sorted(tmp_path.iterdir())]==before

@pytest.mark.parametrize('name', ['router.json', 'router.safetensors'])
def test_a_missing_file_is_named(tmp_path, name):
    routers['classifier'].save(tmp_path)
    (tmp_path/name).unlink()
    with pytest.raises(HydraError, match=name): Router.load(tmp_path)

def forge(path, change):
    "Files that fit each other, holding something wrong"
    arrays,body = load_file(path/'router.safetensors'),read_json(path/'router.json')
    change(arrays, body['meta']); body.pop('digest')
    save_file(arrays, path/'router.safetensors')
    body |= dict(sha256=file_sha256(path/'router.safetensors'), shapes={n: list(a.shape) for n,a in arrays.items()})
    write_json(path/'router.json', body | dict(digest=digest(body)))

def put(a, name, v): a[name][0] = v

@pytest.mark.parametrize('change,message', [
    (lambda a,m: put(a, 'weight', np.nan), "'weight' holds a value that is not finite"),
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
    forge(tmp_path, change)
    with pytest.raises(HydraError, match=message): Router.load(tmp_path)

def test_an_oracle_on_disk_cannot_point_outside(tmp_path):
    routers['oracle'].save(tmp_path)
    forge(tmp_path, lambda a,m: put(a, 'labels', 9))
    with pytest.raises(HydraError, match='label .*9.* is no expert'): Router.load(tmp_path)

def test_loading_needs_no_scikit_learn_model_and_runs_no_code(tmp_path):
    routers['classifier'].save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir())==['router.json', 'router.safetensors']
    code = f"from hydramoe.route import Router; import numpy as np; print(Router.load({str(tmp_path)!r})(x=np.ones((1,16))).tobytes().hex())"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ|dict(PYTHONHASHSEED='7'))
    assert r.stdout.split()[-1]==routers['classifier'](x=np.ones((1,16))).tobytes().hex(), r.stderr

# --- explained

@pytest.mark.parametrize('kind', ['similarity','top2','classifier','uniform','fixed','mix'])
def test_an_explanation_is_plain_data_that_agrees_with_the_weights(kind):
    import matplotlib.pyplot as plt
    r = routers[kind]
    e = explain_route(r, 'a prompt', x=x[:1])
    assert json.loads(json.dumps(e))==e
    assert {c['name']: c['weight'] for c in e['experts']}==dict(zip(r.names, r(x=x[:1])[0].astype(float)))
    assert [c['weight'] for c in e['experts']]==sorted((c['weight'] for c in e['experts']), reverse=True)
    assert all(c['name'] in route_text(e) for c in e['experts']) and '"a prompt"' in route_text(e)
    plot_route(e)
    assert not plt.get_fignums()

def test_a_long_prompt_is_cut_and_many_experts_are_summed():
    r = uniform([f'd{i}' for i in range(40)])
    lines = route_text(explain_route(r, 'word\n'*500), most=3).splitlines()
    assert len(lines)==6 and max(map(len, lines))<100 and '37 more, 92.5% together' in lines[-1]
