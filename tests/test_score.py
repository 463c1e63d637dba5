"Scoring against independent computations: transformers' loss, brute force"
import itertools, math
import numpy as np, pytest, torch
from hydramoe.models.base import tiny_base
from hydramoe.foundations.core import HydraError, rng
from hydramoe.models.encode import Example
from hydramoe.experts.score import (
    Losses, ensemble, hindsight, loss_matrix, micro_batches, pick, record_sums, response_losses)
from hydramoe.experts.stack import LoraSpec
from hydramoe.experts.model import gated

def random_examples(n, seed=0, longest=60):
    g = rng(seed, 'examples')
    sizes = g.integers(2, longest, n)
    def one(i, size):
        ids = g.integers(3, 259, size).tolist()
        return Example(ids=ids, n_prompt=int(g.integers(1, size)), id=f'r{i}', domain='abc'[i%3])
    return [one(i, size) for i,size in enumerate(sizes)]

def random_model(slots=3, quant='fp32', seed=0):
    model = gated(tiny_base(quant=quant), slots=slots, spec=LoraSpec(rank=4))
    noise = torch.randn(model.stack.theta.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(): model.stack.theta.copy_(noise*.05)
    return model

def hf_losses(model, x):
    ids = torch.tensor([x.ids])
    logp = model(input_ids=ids).logits.float().log_softmax(-1)[0]
    return np.array([-logp[t-1, x.ids[t]].item() for t in range(x.n_prompt, len(x.ids))])

@pytest.mark.parametrize('quant', ['fp32', 'nf4'])
def test_losses_equal_the_logits_of_transformers(quant):
    base, xs = tiny_base(quant=quant), random_examples(12)
    theirs = [hf_losses(base.model, x) for x in xs]
    model = gated(base, slots=2, spec=LoraSpec(rank=4))
    close = 1e-4 if quant=='fp32' else .15
    for a,b in zip(response_losses(model, xs, max_tokens=150), theirs): np.testing.assert_allclose(a, b, atol=close)

def test_own_gates_for_each_example():
    model, xs = random_model(), random_examples(9)
    g = torch.softmax(torch.randn(9, 3, generator=torch.Generator().manual_seed(1)), -1)
    together = response_losses(model, xs, g)
    for i,x in enumerate(xs):
        alone = response_losses(model, [x], g[i])[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-4)

def padded_cost(batches, lengths, overhead): return sum(len(b)*max(lengths[i] for i in b)+overhead for b in batches)

@pytest.mark.parametrize('seed', range(20))
def test_micro_batches_are_the_best_cut(seed):
    lengths = rng(seed, 'cut').integers(1, 40, 9).tolist()
    limit = 90
    ordered = sorted(lengths, reverse=True)
    def cuts():
        for k in range(9):
            for at in itertools.combinations(range(1, 9), k):
                parts = [ordered[a:b] for a,b in zip((0, *at), (*at, 9))]
                if all(len(p)*p[0]<=limit or len(p)==1 for p in parts): yield sum(len(p)*p[0]+16 for p in parts)
    ours = micro_batches(lengths, limit, overhead=16)
    assert padded_cost(ours, lengths, 16)==min(cuts())
    assert sorted(sum(ours, []))==list(range(9))

def test_micro_batches_of_nothing_and_of_giants():
    assert micro_batches([], 100)==[]
    assert sorted(micro_batches([500, 3, 700], 100))==[[0], [1], [2]]

def test_loss_matrix_names_the_sick_column():
    model = random_model()
    model.stack.theta[1,0] = float('nan')
    with pytest.raises(HydraError, match='sick'):
        loss_matrix(model, random_examples(3), dict(base=None, sick=torch.tensor([0.,1.,0.])))

def planted(n=300, columns=4, seed=0):
    g = rng(seed, 'planted')
    sizes = g.integers(1, 9, n)
    nll = g.gamma(2, 1., (columns, sizes.sum())).astype(np.float32)
    ids, domains = [f'r{i}' for i in range(n)], [('x','y','z')[i%3] for i in range(n)]
    return Losses(nll, np.cumsum([0, *sizes]), ids, domains, list('abcd')[:columns])

def test_ensemble_directly_and_at_the_limits():
    l = planted(40)
    w = rng(1, 'w').dirichlet(np.ones(4), 40)
    for i in range(40):
        a,b = l.offsets[i:i+2]
        directly = -np.log(w[i]@np.exp(-l.nll[:,a:b].astype(float)))
        np.testing.assert_allclose(ensemble(l, l.columns, w)[a:b], directly, rtol=1e-9)
    l.nll[0] = 2000. # underflows as a probability, not here
    np.testing.assert_allclose(ensemble(l, ['a'], np.ones((40, 1))), 2000.)
    np.testing.assert_allclose(ensemble(l, ['a','b'], [.5,.5]), l['b']+math.log(2), rtol=1e-6)
    with pytest.raises(HydraError, match='no column'): ensemble(l, ['e'], [1.])

def test_hindsight_is_the_best_choice_of_all():
    l = planted(60)
    def lost(choice): return record_sums(pick(l, l.columns, choice), l.offsets)
    best = lost(hindsight(l, l.columns))
    for s in range(10): assert (best <= lost(rng(s).integers(0, 4, 60))+1e-9).all()
