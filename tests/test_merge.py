"Merges against mergekit, PEFT, the papers' recipes written out, and themselves; what is refused"
import json, shutil, warnings
from contextlib import contextmanager
from itertools import combinations
import numpy as np
import pytest, torch
from hypothesis import assume, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from hydramoe.foundations.core import HydraError, derive_seed
from hydramoe.foundations.files import read_json
from hydramoe.models.base import tiny_base
from hydramoe.experts.stack import LoraSpec, Stack
from hydramoe.experts.model import GatedCausalLM, GatedLinear
from hydramoe.experts.adapters import with_adapters
from hydramoe.hydra.deltas import (Deltas, compress, cosines, inner_products, row_basis, sign_conflict, stack_deltas,
                                   to_core)
from hydramoe.hydra.ties import TIES_VARIANTS, dare, dare_ties, drop, kth_largest, prune, ties, trim
from hydramoe.hydra.subspace import iso_c, iso_cts, knots, lego, polar, tsv_m
from hydramoe.hydra.merge import (METHOD_PARAMS, MERGES, average, default_space, expert_lengths, expert_overlap,
                                  expert_thresholds, linear, merge_experts, merge_layers, merged_stack, named_weights,
                                  save_merge, seed_factors)
from helpers import files_in, set_fields
from stacks import batch, fill, filled, forked_model, peft, rand

few = settings(deadline=None, max_examples=12)
seeds = st.integers(0, 9999)
weightings = st.lists(st.floats(-3, 3).filter(lambda w: abs(w)>.05), min_size=1, max_size=9)
positive = st.lists(st.floats(.1, 3), min_size=1, max_size=6)
densities = st.sampled_from([.11, .2, .35, .5, .77, .9, 1.])

def noise(seed, *shape): return torch.randn(*shape, generator=rand(seed), dtype=torch.float64)

def experts(n=3, r=2, m=7, k=9, seed=0):
    "n experts of rank r on a layer of m x k"
    return Deltas(noise(seed, n, r, k), noise(seed+1, n, m, r))

def as_deltas(matrices):
    "Experts whose products are these matrices, to the bit"
    eye = torch.eye(matrices.shape[1], dtype=matrices.dtype)
    return Deltas(matrices, eye.expand(len(matrices), -1, -1))

def weights_of(values): return torch.tensor(values, dtype=torch.float64)

def in_space(method, deltas, weights, **params):
    "A merge in the space that is the method's own, seen where the layer is"
    if default_space(method)=='full': return MERGES[method](deltas, weights, **params)
    core = to_core(deltas)
    return core.lift(MERGES[method](core.deltas, weights, **params))

def same(a, b, tolerance=1e-10): torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)

def differ(a, b, by=1e-2): assert (a-b).norm()>by*b.norm()

@contextmanager
def lots(seed):
    "Within it torch.bernoulli draws from one generator, whoever asks: two sides in two of these get the same lots"
    draw,own = torch.bernoulli,rand(seed)
    def fixed(chance, generator=None): return draw(chance.double().round(decimals=5), generator=own).to(chance.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'bernoulli', fixed)
        yield

# ---- against mergekit

def by_mergekit(name, products, weights, densities=None, **params):
    "mergekit's own method on these products, the base being zero"
    pytest.importorskip('mergekit')
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.registry import registered_methods
    method, = [m for m in registered_methods() if m.spec.name==name]
    params = dict(weight=list(weights), **params)
    if densities is not None: params['density'] = densities
    if name=='linear': return method([TensorGroup.from_tensors(products)], parameters=params)[0]
    tensors = [torch.zeros_like(products[0]), *products]
    return method([TensorGroup.from_tensors(tensors, base_index=0)], parameters=params)[0]

shapes = st.sampled_from([(5, 7), (6, 8), (1, 33), (9, 3)]) # most with an odd number of entries

@few
@given(weightings, shapes, seeds)
def test_linear_is_mergekits_task_arithmetic_and_average_its_linear(w, shape, seed):
    deltas,weights = experts(len(w), 2, *shape, seed),weights_of(w)
    products = list(deltas.products())
    same(linear(deltas, weights), by_mergekit('task_arithmetic', products, w), 1e-12)
    same(linear(deltas, weights), by_mergekit('linear', products, w, normalize=False), 1e-12)
    assume(abs(sum(w))>.1)
    same(average(deltas, weights), by_mergekit('linear', products, w), 1e-11)

@few
@given(weightings, shapes, densities, seeds)
def test_ties_is_mergekits_ties(w, shape, density, seed):
    deltas = experts(len(w), 2, *shape, seed)
    assume(int(density*shape[0]*shape[1])>0)
    got = ties(deltas, weights_of(w), density, 'mergekit')
    same(got, by_mergekit('ties', list(deltas.products()), w, density), 1e-11)

@few
@given(weightings, shapes, densities, seeds)
def test_dare_is_mergekits_dare_with_and_without_a_vote(w, shape, density, seed):
    deltas,weights = experts(len(w), 2, *shape, seed),weights_of(w)
    products = list(deltas.products())
    for name, mine in dict(dare_linear=lambda: dare(deltas, weights, density, keep_sum=True),
                           dare_ties=lambda: dare_ties(deltas, weights, density, variant='mergekit')).items():
        with lots(seed): got = mine()
        with lots(seed): want = by_mergekit(name, products, w, density)
        same(got, want, 2e-6) # mergekit scales in float32

def test_an_entry_that_the_lot_empties_is_kept_by_nobody():
    "All lots lost: mergekit's rescaling must not divide by zero, and ours neither"
    deltas = experts(2, 1, 1, 2)
    for seed in range(200):
        with lots(seed): want = by_mergekit('dare_linear', list(deltas.products()), [1., 1.], .1)
        with lots(seed): got = dare(deltas, torch.ones(2).double(), .1, keep_sum=True)
        same(got, want, 1e-6)

# ---- against PEFT's functions on products

@few
@given(weightings, shapes, densities.filter(lambda d: d<1), seeds)
@pytest.mark.filterwarnings('ignore')
def test_merges_of_products_are_what_peft_makes_of_the_same_products(w, shape, density, seed):
    from peft.utils import merge_utils as theirs
    deltas,weights = experts(len(w), 2, *shape, seed),weights_of(w)
    assume(int(density*shape[0]*shape[1])>0)
    products = list(deltas.products())
    same(linear(deltas, weights), theirs.task_arithmetic(products, weights), 1e-12)
    same(prune(deltas, weights, density), theirs.magnitude_prune(products, weights, density), 1e-12)
    same(ties(deltas, weights, density, 'peft'), theirs.ties(products, weights, density), 1e-12)
    for mine, their in (dare, theirs.dare_linear), (lambda *a: dare_ties(*a, variant='peft'), theirs.dare_ties):
        with lots(seed): got = mine(deltas, weights, density)
        with lots(seed): want = their(products, weights, density)
        same(got, want, 1e-11)

# ---- against adapters that PEFT merged itself

ADAPTERS = dict( # ranks, alphas, scales and layers of all kinds
    wide=dict(r=4, lora_alpha=6, target_modules=['q_proj', 'up_proj', 'down_proj']),
    steady=dict(r=3, lora_alpha=2, target_modules=['q_proj', 'up_proj', 'down_proj'], use_rslora=True),
    patterned=dict(r=6, lora_alpha=9, target_modules=['q_proj', 'up_proj', 'down_proj'],
                   rank_pattern={'up_proj': 2, r'layers\.0\.self_attn\.q_proj': 1}, alpha_pattern={'down_proj': 4}),
    narrow=dict(r=2, lora_alpha=3, target_modules=['o_proj', 'up_proj']),
    twin=dict(r=4, lora_alpha=10, target_modules=['q_proj', 'up_proj', 'down_proj']))
ALIKE = ['wide', 'steady', 'patterned'] # on the same layers
MIXED = ['wide', 'narrow', 'steady', 'patterned']

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder of adapters with noise in all numbers, by name"
    from peft import LoraConfig, get_peft_model
    root = tmp_path_factory.mktemp('made')
    for seed, (name, kw) in enumerate(ADAPTERS.items()):
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings(action='ignore'):
            torch.manual_seed(seed)
            model = get_peft_model(tiny_base().model, LoraConfig(task_type='CAUSAL_LM', **kw))
            for n, p in model.named_parameters():
                if 'lora_' in n: p.copy_(.2*torch.randn(p.shape))
            model.save_pretrained(root/name)
    return root

@pytest.fixture(scope='module')
def mixed(made):
    "A stack of experts of other ranks, scales and layers"
    return with_adapters(tiny_base(), {name: made/name for name in MIXED}).stack

def both_sides(made, names):
    "The same adapters in a stack of ours and in PEFT"
    theirs = peft(tiny_base().model, made/names[0])
    for name in names: theirs.load_adapter(made/name, name)
    return with_adapters(tiny_base(), {name: made/name for name in names}).stack, theirs

def peft_deltas(model, names, weights, kind, seed=0, **kw):
    "Each layer's change, from an adapter that PEFT has merged"
    with lots(seed), warnings.catch_warnings(action='ignore'):
        model.add_weighted_adapter(names, weights, 'merged', combination_type=kind, **kw)
    adapted = {n: m for n, m in model.named_modules() if 'merged' in getattr(m, 'lora_A', {})}
    return {n.removeprefix('base_model.model.'): m.get_delta_weight('merged').detach() for n, m in adapted.items()}

def expert_deltas(stack, merge): return {stack.layers[i].name: B@A for i, (A, B) in merge.expert().items()}

def layer_results(layers, stack): return {stack.layers[layer.i].name: layer.full().float() for layer in layers}

def same_layers(got, want, tolerance=1e-5):
    assert got.keys()==want.keys()
    for name in want: torch.testing.assert_close(got[name], want[name], atol=tolerance, rtol=tolerance, msg=name)

KINDS = [('svd', 'linear', {}), ('ties_svd', 'ties', dict(density=.3, variant='peft')),
         ('magnitude_prune_svd', 'prune', dict(density=.3)), ('dare_linear_svd', 'dare', dict(density=.4)),
         ('dare_ties_svd', 'dare_ties', dict(density=.4, variant='peft'))]

# with DARE only on the same layers: PEFT draws no lot for an adapter that leaves a layer alone
SIDES = [(ALIKE, *case) for case in KINDS]+[(MIXED, *case) for case in KINDS if 'dare' not in case[0]]

@pytest.mark.parametrize('names, kind, method, params', SIDES, ids=[f'{len(s[0])}-{s[1]}' for s in SIDES])
def test_a_merge_is_the_delta_weight_of_pefts_weighted_adapter(made, names, kind, method, params):
    weights = dict(zip(names, [.8, -.5, 1.7, .3]))
    stack,theirs = both_sides(made, names)
    kept = {k: v for k, v in params.items() if k=='density'}
    want = peft_deltas(theirs, names, list(weights.values()), kind, svd_rank=64, **kept)
    with lots(0): got = layer_results(merge_layers(stack, method, weights, **params), stack)
    same_layers(got, want)
    with lots(0): merge = merge_experts(stack, method, weights, rank=64, **params)
    assert merge.receipt['energy_lost']<1e-9
    same_layers(expert_deltas(stack, merge), want)

@pytest.mark.parametrize('kind, method, params', KINDS[:3], ids=[k for k, _, _ in KINDS[:3]])
def test_at_a_rank_that_loses_something_it_is_the_same_best_approximation(made, kind, method, params):
    weights = dict(zip(ALIKE, [.8, -.5, 1.7]))
    stack,theirs = both_sides(made, ALIKE)
    kept = {k: v for k, v in params.items() if k=='density'}
    want = peft_deltas(theirs, ALIKE, list(weights.values()), kind, svd_rank=5, **kept)
    merge = merge_experts(stack, method, weights, rank=5, **params)
    assert merge.receipt['energy_lost']>.01 and merge.receipt['rank']==5
    same_layers(expert_deltas(stack, merge), want)

def test_concat_is_pefts_cat(made):
    weights = dict(zip(MIXED, [.8, -.5, 1.7, .3]))
    stack,theirs = both_sides(made, MIXED)
    merge = merge_experts(stack, 'concat', weights)
    assert merge.receipt['rank']<=sum(ADAPTERS[name]['r'] for name in MIXED)
    same_layers(expert_deltas(stack, merge), peft_deltas(theirs, MIXED, list(weights.values()), 'cat'))

def test_concat_keeps_factors_to_the_bit(made, mixed):
    merge = merge_experts(mixed, 'concat', dict(wide=1., narrow=1.))
    for i, (A, B) in merge.factors.items():
        own = stack_deltas(mixed, i, [0, 1])
        rows = own.A.flatten(0, 1)
        assert all((row==rows).all(1).any() for row in A) and A.any(1).all() and B.any(0).all()

def test_peft_makes_it_longer_by_the_root_of_the_rank_if_the_first_adapter_is_rank_stabilised(made):
    "It takes the first adapter's configuration with alpha=r, and that is a scale of 1 for plain LoRA only"
    names = ['steady', 'wide']
    stack,theirs = both_sides(made, names)
    got = expert_deltas(stack, merge_experts(stack, 'linear', dict(steady=.5, wide=.5), rank=9))
    same_layers({n: 3*d for n, d in got.items()}, peft_deltas(theirs, names, [.5, .5], 'svd', svd_rank=9), 1e-4)

def factor_wise(deltas, weights):
    "What PEFT's 'linear' computes, scales being in B"
    root = weights.abs().sqrt()[:,None,None]
    return (root*deltas.B).sum(0)@(root*weights.sign()[:,None,None]*deltas.A).sum(0)

def test_pefts_linear_averages_factors_and_is_far_from_the_merge(made):
    names,weights = ['wide', 'twin'],torch.tensor([.5, .5])
    stack,theirs = both_sides(made, names)
    want = peft_deltas(theirs, names, [.5, .5], 'linear')
    for i in stack.upper_layers:
        deltas,name = stack_deltas(stack, i),stack.layers[i].name
        # PEFT keeps A of an adapter apart from its scale s, and takes the root of w·s on both sides
        roots = stack.scale.sqrt()[:,None,None]
        even = Deltas(deltas.A*roots, deltas.B/roots)
        torch.testing.assert_close(factor_wise(even, weights), want[name], atol=1e-5, rtol=1e-5)
        exact = deltas.mix(weights)
        assert (want[name]-exact).norm()>.1*exact.norm()

@pytest.mark.parametrize('n', [2, 3])
def test_copies_merged_factor_wise_come_out_once_for_each_copy(made, n):
    names = [f'copy{e}' for e in range(n)]
    theirs = peft(tiny_base().model, made/'wide')
    for name in names: theirs.load_adapter(made/'wide', name)
    want = peft_deltas(theirs, names, [1/n]*n, 'linear')
    stack = with_adapters(tiny_base(), {name: made/'wide' for name in names}).stack
    same_layers({k: n*d for k, d in expert_deltas(stack, merge_experts(stack)).items()}, want)

# ---- what such merges must do, whoever makes them

def test_all_weight_on_one_expert_gives_it_back(mixed):
    for method in ('linear', 'concat', 'average', 'tsv_m', 'lego'):
        for layer in merge_layers(mixed, method, dict(narrow=1., wide=0.)):
            want = stack_deltas(mixed, layer.i, [mixed.names.index('narrow')]).product(0)
            torch.testing.assert_close(layer.full().float(), want, atol=1e-5, rtol=1e-5)

def test_a_negative_weight_takes_away(mixed):
    for method in ('linear', 'concat'):
        whole = merge_experts(mixed, method, dict(wide=1., steady=1.))
        without = merge_experts(mixed, method, dict(wide=1., steady=-1.))
        for i in mixed.upper_layers:
            total = whole.factors[i][1]@whole.factors[i][0]+without.factors[i][1]@without.factors[i][0]
            torch.testing.assert_close(total, 2*stack_deltas(mixed, i, [0]).product(0), atol=1e-5, rtol=1e-5)

def test_the_sum_of_all_weights_is_what_counts_for_equal_experts():
    one = experts(1)
    three = Deltas(one.A.repeat(3, 1, 1), one.B.repeat(3, 1, 1))
    same(linear(three, weights_of([.2, .5, -.1])), .6*one.product(0))
    same(average(three, weights_of([2., 5., 1.]), .25), .25*one.product(0))

def test_a_rank_above_all_that_a_layer_has_loses_nothing_and_adds_nothing(mixed):
    small,large = (merge_experts(mixed, 'ties', density=.3, rank=rank) for rank in (64, 1000))
    assert small.receipt['rank']==large.receipt['rank']==64
    for i in mixed.upper_layers: torch.testing.assert_close(small.factors[i], large.factors[i])

def test_more_rank_loses_less_and_the_receipt_says_what_is_lost(mixed):
    whole = layer_results(merge_layers(mixed, 'ties', density=.3), mixed)
    lost = []
    for rank in (1, 4, 16, 64):
        merge = merge_experts(mixed, 'ties', density=.3, rank=rank)
        got = expert_deltas(mixed, merge)
        rest = sum((got[n]-whole[n]).square().sum() for n in whole)
        energy = sum(whole[n].square().sum() for n in whole)
        assert merge.receipt['energy_lost']==pytest.approx((rest/energy).item(), abs=1e-5)
        assert merge.receipt['rank']==max(len(A) for A, _ in merge.factors.values())==rank
        lost.append(merge.receipt['energy_lost'])
    assert lost==sorted(lost, reverse=True) and lost[-1]<1e-9

def test_lengths_in_the_receipt_are_lengths_of_products(mixed):
    merge = merge_experts(mixed, 'linear', dict(wide=2., narrow=-1.), scale=.5)
    def length(products): return sum(p.square().sum() for p in products).sqrt().item()
    own = [length(stack_deltas(mixed, i, [e]).product(0) for i in mixed.upper_layers) for e in (0, 1)]
    assert list(merge.receipt['experts'].values())==pytest.approx(own, rel=1e-5)
    assert merge.receipt['length']==pytest.approx(length(expert_deltas(mixed, merge).values())/np.mean(own), rel=1e-5)
    assert merge.receipt['scale']==.5 and merge.receipt['weights']==dict(wide=2., narrow=-1.)
    again = merge.scaled(-4.)
    assert (again.receipt['scale'], again.receipt['length'])==(-2., pytest.approx(4*merge.receipt['length']))
    for i, (A, B) in merge.factors.items(): torch.testing.assert_close(again.factors[i], (A, -4*B))

def test_density_one_keeps_everything():
    deltas,weights = experts(4, 3),weights_of([1., 2., .5, 1.])
    for method in (prune, dare): same(method(deltas, weights, 1.), linear(deltas, weights))
    for variant in ('reference', 'peft'): # mergekit's has no divisor
        same(dare_ties(deltas, weights, 1., variant=variant), ties(deltas, weights, 1., variant))
    assert all(torch.equal(trim(p, 1.), p) for p in deltas.products())

def test_average_takes_ratios_and_lies_between_base_and_experts():
    deltas = experts(3)
    same(average(deltas, weights_of([1., 2., 3.])), average(deltas, weights_of([10., 20., 30.])))
    assert not average(deltas, weights_of([1., 2., 3.]), 0.).any()
    same(average(deltas, weights_of([1., 2., 3.]), .5), linear(deltas, weights_of([1., 2., 3.]))/12)

# ---- properties of all methods

PARAMS = dict(prune=dict(density=.4), ties=dict(density=.4), dare=dict(density=.4), dare_ties=dict(density=.4),
              knots=dict(density=.4), iso_cts=dict(common=.5)) # what is not told is each method's default
BY_PLACE = 'dare', 'dare_ties', 'lego' # lots and the start of a clustering go by the place of an expert

@pytest.mark.parametrize('method', [m for m in MERGES if m not in BY_PLACE])
@few
@given(positive, seeds, st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(method, w, seed, random):
    deltas,weights = experts(len(w), 2, 17, 15, seed),weights_of(w)
    order = random.sample(range(len(w)), len(w))
    turned = Deltas(deltas.A[order], deltas.B[order])
    params = PARAMS.get(method, {})
    same(in_space(method, turned, weights[order], **params), in_space(method, deltas, weights, **params), 1e-8)

def test_a_lot_belongs_to_a_place_in_the_stack_and_not_to_the_order_of_weights(mixed):
    deltas,weights = experts(3),weights_of([1., 2., -1.])
    lot = [drop(p, .4, rand(derive_seed(5, 'dare', e))) for e, p in enumerate(deltas.products())]
    same(dare(deltas, weights, .4, seed=5), sum(w*kept for w, kept in zip(weights, lot)))
    there,back = dict(wide=1., steady=.5, narrow=2.),dict(narrow=2., steady=.5, wide=1.)
    for method in BY_PLACE:
        pairs = zip(merge_layers(mixed, method, there), merge_layers(mixed, method, back))
        assert all(torch.equal(a.full(), b.full()) for a, b in pairs)

def test_dare_is_right_on_average_and_draws_anew_for_each_layer(mixed):
    deltas,weights = experts(3),weights_of([1., 2., -1.])
    draws = torch.stack([dare(deltas, weights, .5, seed=s) for s in range(3000)])
    assert (draws.mean(0)-linear(deltas, weights)).abs().max()<5*draws.std(0).max()/3000**.5
    dropped = [layer.full()==0 for layer in merge_layers(mixed, 'dare', dict(wide=1.), density=.5)]
    pairs = [(a, b) for a, b in combinations(dropped, 2) if a.shape==b.shape and not a.all() and not b.all()]
    assert pairs and not any(torch.equal(a, b) for a, b in pairs)

@few
@given(positive, seeds)
def test_lego_with_a_cluster_for_each_unit_is_the_sum_in_any_order(w, seed):
    deltas,weights = experts(len(w), 2, 17, 15, seed),weights_of(w)
    want = linear(deltas, weights/weights.mean())/len(w)**.5
    same(lego(deltas, weights, clusters=2*len(w)), want, 1e-6)
    turned = Deltas(deltas.A.flip(0), deltas.B.flip(0))
    same(lego(turned, weights.flip(0), clusters=2*len(w)), want, 1e-6)

@few
@given(positive, densities, seeds)
def test_copies_of_an_expert(w, density, seed):
    one,weights,n = experts(1, 3, 8, 10, seed),weights_of(w),len(w)
    copies,product = Deltas(one.A.repeat(n, 1, 1), one.B.repeat(n, 1, 1)),one.product(0)
    kept = trim(product, density)
    same(linear(copies, weights), weights.sum()*product)
    same(average(copies, weights), product)
    same(prune(copies, weights, density), weights.sum()*kept)
    for variant in ('reference', 'mergekit'): same(ties(copies, weights, density, variant), kept)
    same(ties(copies, weights, density, 'peft'), weights.mean()*kept)
    same(in_space('knots', copies, weights, density=1.), product)
    same(in_space('lego', copies, torch.ones(n)), product, 1e-6)
    S = torch.linalg.svdvals(in_space('iso_c', copies, weights))[:3]
    same(S, (weights.sum()*torch.linalg.svdvals(product)[:3].mean()).expand(3))

@pytest.mark.parametrize('method', MERGES)
@few
@given(positive, seeds, st.sampled_from([.25, 4., 16.]))
def test_experts_that_are_longer_give_a_merge_that_is_longer_by_as_much(method, w, seed, c):
    deltas,weights,params = experts(len(w), 2, 17, 15, seed),weights_of(w),PARAMS.get(method, {})
    longer = Deltas(deltas.A, c*deltas.B)
    same(in_space(method, longer, weights, **params)/c, in_space(method, deltas, weights, **params), 1e-8)

ALONE = ['linear', 'concat', 'average', 'tsv_m', 'lego', *(('prune', 'dare', 'ties', 'dare_ties', 'knots'))]

@pytest.mark.parametrize('method', ALONE)
@few
@given(seeds)
def test_one_expert_alone_comes_back(method, seed):
    deltas,one = experts(1, 3, 8, 10, seed),torch.ones(1).double()
    asked = dict(density=1.) if 'density' in METHOD_PARAMS[method] else {}
    same(in_space(method, deltas, one, **asked), deltas.product(0), 1e-6 if method=='lego' else 1e-10)
    if 'variant' in METHOD_PARAMS[method]:
        for variant in TIES_VARIANTS: same(in_space(method, deltas, one, **asked, variant=variant), deltas.product(0))

@pytest.mark.parametrize('method', ['iso_c', 'iso_cts'])
@few
@given(seeds)
def test_one_expert_alone_is_flattened_by_isotropic_merges(method, seed):
    "Its directions and its nuclear norm stay; its singular values become their mean"
    deltas = experts(1, 3, 8, 10, seed)
    merged = in_space(method, deltas, torch.ones(1).double())
    U,S,Vh = torch.linalg.svd(deltas.product(0), full_matrices=False)
    same(merged, S[:3].mean()*U[:,:3]@Vh[:3])
    differ(merged, deltas.product(0))

ABSENT = [('linear', {}), ('concat', {}), ('average', {}), ('prune', dict(density=.4)), ('dare', dict(density=.4)),
          ('iso_c', {}), ('ties', dict(density=.4)), ('ties', dict(density=.4, variant='mergekit')),
          ('dare_ties', dict(density=.4)), ('dare_ties', dict(density=.4, variant='mergekit'))]

@pytest.mark.parametrize('method, params', ABSENT, ids=str)
@few
@given(positive, seeds)
def test_an_expert_of_weight_zero_is_as_if_absent(method, params, w, seed):
    "For iso_c of full rank: else it takes its mean over directions that nobody uses"
    deltas = experts(len(w)+1, 7, 7, 9, seed)
    others = Deltas(deltas.A[:-1], deltas.B[:-1])
    same(MERGES[method](deltas, weights_of([*w, 0.]), **params), MERGES[method](others, weights_of(w), **params), 1e-8)

def test_pefts_ties_counts_experts_of_weight_zero():
    deltas = experts(3)
    two = Deltas(deltas.A[:2], deltas.B[:2])
    differ(ties(deltas, weights_of([1., 1., 0.]), .9, 'peft'), ties(two, weights_of([1., 1.]), .9, 'peft'), .1)

VARIED = [(m, v) for m in MERGES for v in (TIES_VARIANTS if 'variant' in METHOD_PARAMS[m] else [None])]

@pytest.mark.parametrize('method, variant', VARIED)
def test_in_a_stack_who_weighs_nothing_takes_no_part_in_any_merge(mixed, method, variant):
    params = PARAMS.get(method, {})|(dict(variant=variant) if variant else {})
    pairs = zip(merge_layers(mixed, method, dict(wide=1., patterned=2.), **params),
                merge_layers(mixed, method, dict(wide=1., narrow=0., patterned=2.), **params))
    assert all(torch.equal(a.full(), b.full()) for a, b in pairs)

# ---- ranks and layers of all kinds

def padded(deltas, by):
    "The same experts with rows and columns of zeros"
    n,_,k = deltas.A.shape
    m = deltas.B.shape[1]
    A = torch.cat([deltas.A, deltas.A.new_zeros(n, by, k)], 1)
    return Deltas(A, torch.cat([deltas.B, deltas.B.new_zeros(n, m, by)], 2))

def uneven_experts(seed=0):
    "Experts of ranks 4, 1 and 2, padded to one"
    deltas = experts(3, 4, 17, 15, seed)
    for e, r in enumerate((4, 1, 2)): deltas.A[e,r:],deltas.B[e,:,r:] = 0.,0.
    return deltas

@pytest.mark.parametrize('method', MERGES)
@few
@given(seeds)
def test_padding_changes_nothing(method, seed):
    deltas,weights,params = uneven_experts(seed),weights_of([1., 2., .5]),PARAMS.get(method, {})
    same(in_space(method, padded(deltas, 3), weights, **params), in_space(method, deltas, weights, **params), 1e-8)

@pytest.mark.parametrize('method', [m for m in MERGES if m not in ('lego', 'knots')])
@few
@given(seeds)
def test_only_the_product_counts_and_not_its_factors(method, seed):
    "A change of basis between A and B; LEGO takes experts apart into rows and columns, and depends on these"
    deltas,weights,params = uneven_experts(seed),weights_of([1., 2., .5]),PARAMS.get(method, {})
    turn = noise(seed+7, 3, 4, 4)+4*torch.eye(4)
    turned = Deltas(turn@deltas.A, deltas.B@torch.linalg.inv(turn))
    assert (turned.A[1]!=0).all()
    same(in_space(method, turned, weights, **params), in_space(method, deltas, weights, **params), 1e-6)

@few
@given(seeds)
def test_knots_depends_on_products_only_where_the_layer_is(seed):
    "It votes in the coordinates of the inputs, and in core space these are made from the factors"
    deltas,weights = uneven_experts(seed),weights_of([1., 2., .5])
    turn = noise(seed+7, 3, 4, 4)+4*torch.eye(4)
    turned = Deltas(turn@deltas.A, deltas.B@torch.linalg.inv(turn))
    same(knots(turned, weights, .4), knots(deltas, weights, .4), 1e-6)
    differ(in_space('knots', turned, weights, density=.4), in_space('knots', deltas, weights, density=.4))

@pytest.mark.parametrize('method', MERGES)
def test_an_expert_of_zeros_breaks_nothing(method):
    deltas,weights,params = experts(3, 2, 7, 9),weights_of([1., 2., .5]),PARAMS.get(method, {})
    deltas.A[2],deltas.B[2] = 0.,0.
    merged = in_space(method, deltas, weights, **params)
    assert merged.isfinite().all() and merged.any()
    nobody = Deltas(0*deltas.A, 0*deltas.B)
    assert not MERGES[method](nobody, weights, **params).any()
    if method in ('average', 'tsv_m', 'iso_cts', 'lego', 'knots'): return # they ask how many experts there are
    two = Deltas(deltas.A[:2], deltas.B[:2])
    same(merged, in_space(method, two, weights[:2], **params), 1e-8)

@pytest.mark.parametrize('method', MERGES)
def test_layers_that_only_some_experts_adapt(mixed, method):
    "Who leaves a layer alone adds zeros there; a layer that nobody adapts stays as it is"
    on = {e: set(mixed.adapted(e)) for e in range(mixed.slots)}
    weights,params = dict(wide=1., narrow=2.),PARAMS.get(method, {})
    seen = set()
    for layer in merge_layers(mixed, method, weights, **params):
        who = [e for e in (0, 1) if layer.i in on[e]]
        full = layer.full().float()
        assert full.isfinite().all() and full.any()==bool(who)
        seen.add(tuple(who))
        if method in ('linear', 'concat') and len(who)==1:
            want = [1., 2.][who[0]]*stack_deltas(mixed, layer.i, who).product(0)
            torch.testing.assert_close(full, want, atol=1e-5, rtol=1e-5)
    assert seen=={(0,), (1,), (0, 1)}
    alone = {layer.i: layer.full() for layer in merge_layers(mixed, method, dict(narrow=1.), **params)}
    assert {i for i, M in alone.items() if M.any()}==on[1]
    merge = merge_experts(mixed, method, dict(narrow=1.), **params)
    stack = merged_stack(merge, tiny_base().model, mixed)
    assert set(stack.adapted(0))==on[1]

@pytest.mark.parametrize('method', MERGES)
def test_experts_that_are_still_untrained_merge_to_one_that_adds_nothing(method):
    stack = Stack(tiny_base().model, 3, LoraSpec(4))
    for e in range(3): stack.init_expert(e, e, f'expert{e}')
    merge = merge_experts(stack, method)
    assert (merge.receipt['length'], merge.receipt['energy_lost'])==(0, 0)
    own = merged_stack(merge, tiny_base().model, stack)
    assert not any((B@A).any() for A, B in own.leaves)

# ---- core space and the best rank

@few
@given(st.integers(1, 5), st.integers(1, 4), st.integers(4, 20), st.integers(4, 20), seeds)
def test_core_space_is_exact(n, r, m, k, seed):
    deltas,weights = experts(n, r, m, k, seed),noise(seed+2, n)
    core = to_core(deltas)
    def exact(a, b): torch.testing.assert_close(a, b, atol=1e-12*b.abs().max().item(), rtol=1e-12)
    assert core.deltas.shape==(min(m, n*r), min(k, n*r))
    exact(core.Q_A.T@core.Q_A, torch.eye(core.Q_A.shape[1]).double())
    exact(core.Q_B.T@core.Q_B, torch.eye(core.Q_B.shape[1]).double())
    for mine, product in zip(core.deltas.products(), deltas.products()): exact(core.lift(mine), product)
    exact(core.lift(linear(core.deltas, weights)), linear(deltas, weights))
    exact(inner_products(core.deltas), inner_products(deltas))
    products = torch.stack(list(deltas.products())).flatten(1)
    exact(inner_products(deltas), products@products.T)
    cosine = cosines(inner_products(deltas))
    assert cosine.abs().max()<1+1e-12 and torch.allclose(cosine.diagonal(), torch.ones(n).double())

@few
@given(st.integers(1, 6), st.floats(1e-6, 1e6), seeds)
def test_a_basis_has_the_rank_of_its_rows_however_long_they_are(rank, length, seed):
    rows = noise(seed, 9, rank)@noise(seed+1, rank, 12)
    rows[0] *= length
    rows[1] = 0.
    Q = row_basis(rows)
    assert Q.shape==(12, rank)
    torch.testing.assert_close(rows@Q@Q.T, rows, atol=1e-9*rows.abs().max().item(), rtol=1e-9)

@few
@given(st.integers(1, 12), st.integers(2, 16), st.integers(2, 16), seeds)
def test_compress_is_the_best_of_its_rank_and_says_what_is_lost(rank, m, n, seed):
    M = noise(seed, m, n)
    A,B,lost = compress(M, rank)
    U,S,Vh = torch.linalg.svd(M, full_matrices=False)
    r = min(rank, m, n)
    assert (A.shape, B.shape)==((r, n), (m, r))
    same(B@A, U[:,:r]@(S[:r,None]*Vh[:r]), 1e-6)
    assert (M-B@A).norm().item()==pytest.approx(S[r:].norm().item(), rel=1e-9, abs=1e-9)
    assert lost==pytest.approx((S[r:].square().sum()/S.square().sum()).item(), rel=1e-9, abs=1e-12)

def test_compress_of_a_large_matrix_is_as_good_and_the_same_every_time():
    "Above 2,048 on both sides a randomised search takes over"
    U,V = (torch.linalg.qr(noise(s, 2100, 30)).Q for s in (0, 1))
    S = torch.linspace(3, .1, 30).double()
    M = U@(S[:,None]*V.T)
    A,B,lost = compress(M, 8)
    assert lost==pytest.approx((S[8:].square().sum()/S.square().sum()).item(), rel=1e-6)
    assert torch.equal(A, compress(M, 8)[0])

def test_sign_conflict_is_the_losers_share():
    M = noise(0, 5, 6, 7)
    up,down = M.clamp_min(0).sum(0),-M.clamp_max(0).sum(0)
    want = torch.minimum(up, down).sum()/(up+down).sum()
    assert sign_conflict(as_deltas(M))==pytest.approx(want.item(), rel=1e-12)
    assert sign_conflict(as_deltas(torch.stack([M[0], -M[0]])))==.5 and sign_conflict(as_deltas(M[:1]))==0
    assert sign_conflict(as_deltas(0*M))==0

# ---- by entry: thresholds, and TIES as the paper writes it

def flat(stack, e): return torch.cat([stack_deltas(stack, i, [e]).product(0).flatten() for i in stack.upper_layers])

@few
@given(st.floats(.01, 1), st.sampled_from(['full', 'core']), seeds)
def test_a_threshold_over_all_layers_is_what_sorting_finds(density, space, seed):
    stack = fill(Stack(tiny_base().model, 2, LoraSpec(3)), seed)
    def products(i, e): return stack_deltas(stack, i) if space=='full' else to_core(stack_deltas(stack, i)).deltas
    for e, found in enumerate(expert_thresholds(stack, [0, 1], density, space)):
        sizes = torch.cat([products(i, e).product(e).flatten() for i in stack.upper_layers]).abs().float()
        assert found==sizes.sort(descending=True).values[int(density*len(sizes))-1].item()

@pytest.mark.parametrize('space', ['full', 'core'])
@pytest.mark.parametrize('density', [.11, .3, .77])
def test_of_all_layers_together_as_many_entries_are_kept_as_the_density_says(space, density):
    "Core space is of float64 and thresholds are of float32: the entry that is the threshold must not be lost"
    stack = fill(Stack(tiny_base().model, 1, LoraSpec(3)))
    merged = [layer.M for layer in merge_layers(stack, 'ties', space=space, density=density)]
    assert sum(int((M!=0).sum()) for M in merged)==int(density*sum(M.numel() for M in merged))

@few
@given(st.integers(1, 40), seeds)
def test_the_kth_largest_is_what_sorting_finds_also_among_equals(k, seed):
    sizes = noise(seed, 5, 8).abs().round(decimals=1)
    assert kth_largest(sizes, k)==sizes.flatten().sort(descending=True).values[k-1].item()

def test_equal_entries_are_kept_together():
    M = torch.tensor([[3., -2., 2., 1.]])
    assert trim(M, .5).tolist()==[[3., -2., 2., 0.]]

def ties_of_the_paper(vectors, weights, density):
    "Yadav et al. (2023), Algorithm 1, on whole task vectors (E,P); the mean over those who agree is weighted"
    k = int(density*vectors.shape[1])
    kept = torch.zeros_like(vectors)
    for e, vector in enumerate(vectors):
        top = vector.abs().topk(k).indices
        kept[e,top] = vector[top]
    elected = torch.where(kept.sum(0)>=0, 1., -1.)
    agree = (kept.sign()==elected)*weights[:,None]
    return (kept*agree).sum(0)/agree.sum(0).clamp_min(1e-12)

@few
@given(st.lists(st.floats(.1, 3), min_size=3, max_size=3), densities, seeds)
def test_reference_ties_is_the_papers_algorithm_on_whole_task_vectors(w, density, seed):
    stack = fill(Stack(tiny_base().model, 3, LoraSpec(3)), seed)
    with torch.no_grad(): # layers of other lengths, so that trimming all together is something else
        for i, (_, B) in enumerate(stack.leaves): B.mul_(1+i)
    want = ties_of_the_paper(torch.stack([flat(stack, e) for e in range(3)]), torch.tensor(w), density)
    layers = list(merge_layers(stack, 'ties', dict(zip(stack.names, w)), density=density))
    got = torch.cat([layer.full().flatten() for layer in layers])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    if density==1: return # there is nothing to trim
    by_layer = torch.cat([ties(stack_deltas(stack, i), torch.tensor(w), density).flatten() for i in stack.upper_layers])
    differ(by_layer, want)

@few
@given(st.lists(st.floats(-3, 3).filter(lambda w: abs(w)>.1), min_size=2, max_size=6), seeds)
def test_what_weights_do_in_each_variant_of_ties(w, seed):
    deltas,weights = experts(len(w), 2, 7, 9, seed),weights_of(w)
    same(ties(deltas, 5*weights, .4, 'peft'), 5*ties(deltas, weights, .4, 'peft'))
    same(ties(deltas, 5*weights, .4, 'mergekit'), ties(deltas, weights, .4, 'mergekit'))
    same(ties(deltas, 5*weights.abs(), .4), ties(deltas, weights.abs(), .4))
    ones = torch.ones(len(w))
    for variant in TIES_VARIANTS: same(ties(deltas, ones, .4, variant), ties(deltas, ones, .4))
    kept = torch.stack([trim(p, .4) for p in deltas.products()])
    elected = dict(reference=kept.sum(0), peft=kept.sum(0), mergekit=(kept*weights.abs()[:,None,None]).sum(0))
    for variant in TIES_VARIANTS: # who weighs more decides in mergekit's alone
        assert (ties(deltas, weights.abs(), .4, variant)*elected[variant]>=0).all()

# ---- by directions, against the papers' recipes on whole matrices

@few
@given(positive, seeds, densities.filter(lambda d: d>.3))
def test_knots_turns_with_the_outputs_and_ties_does_not(w, seed, density):
    deltas,weights = experts(len(w), 2, 13, 15, seed),weights_of(w)
    R = torch.linalg.qr(noise(seed+5, 13, 13)).Q
    turned = Deltas(deltas.A, R@deltas.B)
    merged = in_space('knots', deltas, weights, density=density)
    same(in_space('knots', turned, weights, density=density), R@merged, 1e-8)
    if density<1: differ(ties(turned, weights, density), R@ties(deltas, weights, density))

def whitened(X):
    P,_,Qh = torch.linalg.svd(X, full_matrices=False)
    return P@Qh

def tsv_of_the_paper(products, weights):
    "Gargiulo et al. (2025), Algorithm 1: the k-th part of each one's SVD, side by side, whitened"
    k = min(products[0].shape)//len(products)
    parts = [torch.linalg.svd(p, full_matrices=False) for p in products]
    U = whitened(torch.cat([U[:,:k] for U, _, _ in parts], 1))
    V = whitened(torch.cat([Vh[:k].T for _, _, Vh in parts], 1))
    S = torch.cat([w*S[:k] for w, (_, S, _) in zip(weights, parts)])
    return U@torch.diag(S)@V.T

def iso_of_the_paper(products, weights, common=None):
    "Marczak et al. (2025), the sum's spectrum made flat; with `common` only its first part, and each one's own"
    total = sum(w*p for w, p in zip(weights, products))
    U,S,Vh = torch.linalg.svd(total, full_matrices=False)
    if common is None: return S.mean()*U@Vh
    own = (len(S)-common)//len(products)
    Us,Ss,Vs = [U[:,:common]],[S[:common]],[Vh[:common].T]
    for w, p in zip(weights, products):
        rest = w*(p-U[:,:common]@U[:,:common].T@p)
        u,s,vh = torch.linalg.svd(rest, full_matrices=False)
        Us.append(u[:,:own]); Ss.append(s[:own]); Vs.append(vh[:own].T)
    return torch.cat(Ss).mean()*whitened(torch.cat(Us, 1))@whitened(torch.cat(Vs, 1)).T

@few
@given(st.sampled_from([(8, 8), (10, 8), (8, 11)]), st.integers(1, 4), seeds)
def test_spectral_merges_of_full_experts_are_the_papers(shape, n, seed):
    "Experts of full rank: core space is the whole space, turned"
    deltas,w = experts(n, 8, *shape, seed),noise(seed+3, n).abs()+.1
    products = list(deltas.products())
    for place in ('as it is', 'core'):
        core = to_core(deltas)
        def merged(method, **kw):
            if place=='as it is': return method(deltas, w, **kw)
            return core.lift(method(core.deltas, w, **kw))
        same(merged(tsv_m), tsv_of_the_paper(products, w), 1e-8)
        same(merged(iso_c), iso_of_the_paper(products, w), 1e-8)
        for common in (4, 8): # half, and all
            own = (8-common)//n
            same(merged(iso_cts, common=common/8), iso_of_the_paper(products, w, 8-n*own), 1e-8)

def apart(n, r, m, k, seed):
    "Experts that share no direction, with singular values 1, 2, … of their own"
    left,right = torch.linalg.qr(noise(seed, m, n*r)).Q,torch.linalg.qr(noise(seed+1, k, n*r)).Q
    lengths = torch.arange(1, n*r+1).double()
    return Deltas(right.T.reshape(n, r, k), (left*lengths).T.reshape(n, r, m).mT.contiguous())

@few
@given(st.integers(1, 4), st.integers(1, 3), seeds)
def test_experts_that_share_no_direction_are_added_or_made_equal(n, r, seed):
    deltas,ones = apart(n, r, 14, 16, seed),torch.ones(n).double()
    products = list(deltas.products())
    same(in_space('tsv_m', deltas, ones), sum(products))
    same(tsv_m(deltas, ones), sum(products)) # in the whole space there is room for all as well
    strength = torch.arange(1, n*r+1).double().mean()
    flat_sum = strength*sum(whitened_part(p, r) for p in products)
    same(in_space('iso_c', deltas, ones), flat_sum)
    same(in_space('iso_cts', deltas, ones, common=0.), flat_sum)

def whitened_part(p, r):
    U,_,Vh = torch.linalg.svd(p, full_matrices=False)
    return U[:,:r]@Vh[:r]

@few
@given(positive, seeds)
def test_the_singular_values_of_tsv_m_are_those_of_the_experts(w, seed):
    deltas,n = experts(len(w), 2, 17, 15, seed),len(w)
    core = to_core(deltas).deltas
    own = torch.stack([x*torch.linalg.svdvals(p)[:2] for x, p in zip(w, deltas.products())])
    got = torch.linalg.svdvals(tsv_m(core, weights_of(w)))
    same(got, own.flatten().sort(descending=True).values, 1e-8)
    kept = torch.linalg.svdvals(tsv_m(core, weights_of(w), keep=1))
    same(kept[:n], own[:,0].sort(descending=True).values, 1e-8)
    assert (kept[n:]<1e-9).all()

def test_iso_c_of_a_rank_and_more_experts_than_directions():
    deltas,ones = experts(3, 2, 9, 10),torch.ones(3).double()
    core = to_core(deltas).deltas
    S = torch.linalg.svdvals(linear(core, ones))
    same(torch.linalg.svdvals(iso_c(core, ones, keep=2)), torch.cat([S[:2].mean().expand(2), torch.zeros(4)]))
    many = tsv_m(experts(9, 1, 4, 5), torch.ones(9).double())
    assert torch.linalg.matrix_rank(many)==4

@pytest.mark.parametrize('room, n', [(5, 1), (10, 2), (20, 4), (35, 7)])
def test_the_share_of_common_directions_is_met_to_the_last(room, n):
    "A fifth of 5 is 1, though 5·(1-.8) is a little less: the experts' own directions must be in the merge"
    A,B = noise(0, n, room, room),noise(1, n, room, room)
    deltas,ones = Deltas(A, B),torch.ones(n).double()
    same(iso_cts(deltas, ones), iso_of_the_paper(list(deltas.products()), ones, room-n), 1e-8)
    if n>1: differ(iso_cts(deltas, ones), iso_cts(deltas, ones, common=1.), 1e-3)

def test_polar_is_nearest():
    X = noise(0, 7, 4)
    Q = polar(X)
    same(Q.T@Q, torch.eye(4).double(), 1e-12)
    others = [torch.linalg.qr(Q+.1*noise(s, 7, 4)).Q for s in range(1, 20)]
    assert all((X-Q).norm()<(X-o).norm() for o in others)

def test_lego_has_the_rank_that_is_asked_for():
    deltas,ones = experts(4, 3, 17, 15),torch.ones(4).double()
    for rank in (1, 3, 7, 12, 50): assert torch.linalg.matrix_rank(lego(deltas, ones, rank))==min(rank, 12)
    assert torch.linalg.matrix_rank(lego(deltas, ones))==3
    assert torch.equal(lego(deltas, ones, 5, seed=3), lego(deltas, ones, 5, seed=3))
    same(lego(deltas, 7*ones), lego(deltas, ones)) # only ratios count

# ---- what is refused

@pytest.fixture()
def two(made, tmp_path):
    "Two adapters to damage"
    return {name: shutil.copytree(made/name, tmp_path/name) for name in ('wide', 'narrow')}

def refused_before_merging(folders, *words):
    base = tiny_base()
    with pytest.raises(HydraError) as e: with_adapters(base, folders)
    assert all(w in str(e.value) for w in words), e.value
    assert not any(isinstance(m, GatedLinear) for m in base.model.modules())

@pytest.mark.parametrize('field, value', [
    ('use_dora', True), ('bias', 'all'), ('modules_to_save', ['lm_head']), ('lora_bias', True)])
def test_other_arithmetic_is_refused_by_name(two, field, value):
    set_fields(two['narrow']/'adapter_config.json', **{field: value})
    refused_before_merging(two, str(two['narrow']), field)

KEY = 'base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight'
def put(value): return lambda tensors: tensors[KEY].view(-1)[2:3].fill_(value)

@pytest.mark.parametrize('change, words', [
    (put(float('nan')), [KEY]), (put(float('inf')), [KEY]), (lambda t: t.pop(KEY), [KEY, 'lacks']),
    (lambda t: t.update({KEY: torch.zeros(3, 2)}), [KEY, '(3, 2)']),
    (lambda t: t.update({'base_model.model.lm_head.weight': torch.zeros(4)}), ['lm_head'])],
    ids=['nan', 'inf', 'half', 'shape', 'whole module'])
def test_tensors_that_do_not_fit_are_refused_by_name(two, change, words):
    file = two['narrow']/'adapter_model.safetensors'
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    refused_before_merging(two, str(two['narrow']), *words)

def test_an_adapter_of_another_base_is_refused(two, tmp_path):
    other = fill(Stack(tiny_base(width=128).model, 1, LoraSpec(2))).save_peft(tmp_path/'other', 0, 'tiny-128')
    refused_before_merging(two|dict(other=other), str(other), 'another base')
    deep = fill(Stack(tiny_base(layers=4).model, 1, LoraSpec(2))).save_peft(tmp_path/'deep', 0, 'tiny-4')
    refused_before_merging(two|dict(deep=deep), str(deep), 'layers.', 'another')

REFUSED = [
    (dict(method='tie'), "did you mean 'ties'"),
    (dict(method=None), 'is not known'),
    (dict(method='ties', density=0), 'density=0'),
    (dict(method='ties', density=1.01), 'density=1.01'),
    (dict(method='dare', density=-.1), 'density=-0.1'),
    (dict(method='prune', density=float('nan')), 'density=nan'),
    (dict(method='ties', density='half'), "density='half'"),
    *((dict(method=m, density=1e-9), 'keeps none of') for m in ('ties', 'prune', 'knots')),
    (dict(method='linear', density=.5), "no parameter 'density'; it has none"),
    (dict(method='ties', drop=.5), "no parameter 'drop'; it has density, variant"),
    (dict(method='ties', variant='peff'), "did you mean 'peft'"),
    (dict(method='ties', space='half'), 'space'),
    (dict(method='iso_c', keep=0), 'keep=0'),
    (dict(method='tsv_m', keep=1.5), 'keep=1.5'),
    (dict(method='iso_cts', common=1.5), 'common=1.5'),
    (dict(method='average', share=2), 'share=2'),
    (dict(method='dare', seed='x'), "seed='x'"),
    (dict(rank=0), 'rank=0'),
    (dict(rank=-3), 'rank=-3'),
    (dict(rank=2.5), 'rank=2.5'),
    (dict(scale=float('inf')), 'scale=inf'),
    (dict(weights=dict(wid=1.)), "did you mean 'wide'"),
    (dict(weights=dict(wide=0, narrow=0.)), 'every weight is 0'),
    (dict(weights={}), 'every weight is 0'),
    *((dict(weights=dict(wide=w)), 'the weight of wide') for w in (float('nan'), '1', 1e9)),
    (dict(method='ties', weights=dict(wide=1., narrow=-1.)), 'knows no negative weight'),
    (dict(method='average', weights=dict(wide=1., narrow=-1.)), 'sum to zero')]

@pytest.mark.parametrize('asked, words', REFUSED, ids=str)
def test_a_merge_that_cannot_be_is_refused_by_name(mixed, asked, words):
    theta = mixed.theta.clone()
    with pytest.raises(HydraError) as e: merge_experts(mixed, **asked)
    assert words in str(e.value), e.value
    assert torch.equal(mixed.theta, theta)

def test_a_layer_below_the_fork_has_nothing_to_merge():
    with pytest.raises(HydraError, match='lies below the fork'): stack_deltas(forked_model().stack, 0)
    with pytest.raises(HydraError, match='rank=0'): compress(torch.ones(2, 2), 0)

def test_weights_are_those_of_names_and_equal_if_none_are_told():
    assert named_weights(['a', 'b', 'c', 'd'])=={n: .25 for n in 'abcd'}
    assert list(named_weights(['a', 'b', 'c'], dict(c=1, a=-2, b=0)).items())==[('a', -2.), ('c', 1.)]

# ---- as an adapter

def mixture(model, weights, x):
    "What a mix by gates gives, which is the linear merge inside the forward"
    rows = torch.tensor([weights.get(n, 0.) for n in model.stack.names]).expand(len(x['input_ids']), -1)
    with torch.no_grad(): return model(**x, gates=rows).logits

def alike(got, want, x):
    keep = x['attention_mask'].bool()
    torch.testing.assert_close(got[keep], want[keep], atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('method', ['linear', 'concat', 'ties', 'tsv_m'])
def test_a_saved_merge_is_an_adapter_that_peft_opens(made, tmp_path, method):
    m,x = with_adapters(tiny_base(), {n: made/n for n in MIXED}),batch()
    weights = dict(wide=.7, narrow=.4, patterned=.5)
    merge = merge_experts(m.stack, method, weights)
    own = merged_stack(merge, tiny_base().model, m.stack, 'both')
    folder = save_merge(merge, tmp_path/'a', own, 'tiny-0')
    assert {p.name for p in folder.iterdir()}=={'adapter_config.json', 'adapter_model.safetensors', 'receipt.json'}
    assert read_json(folder/'receipt.json')==json.loads(json.dumps(merge.receipt))
    assert json.loads((folder/'adapter_config.json').read_text())['r']==merge.receipt['rank']
    again = merge_experts(m.stack, method, weights)
    same_again = merged_stack(again, tiny_base().model, m.stack, 'both')
    assert files_in(save_merge(again, tmp_path/'b', same_again, 'tiny-0'))==files_in(folder)
    with torch.no_grad():
        ours = GatedCausalLM(tiny_base().model, own)(**x, gates=torch.ones(3, 1)).logits
        alike(peft(tiny_base().model, folder)(**x).logits, ours, x)
        alike(with_adapters(tiny_base(), dict(both=folder))(**x, gates=torch.ones(3, 1)).logits, ours, x)
    assert own.names==['both'] and (ours-tiny_base().model(**x).logits)[x['attention_mask'].bool()].abs().max()>.1
    if method in ('linear', 'concat'): alike(ours, mixture(m, weights, x), x)

@pytest.mark.parametrize('method, rank', [('linear', None), ('concat', None), ('linear', 16), ('ties', 3)])
def test_a_merge_of_a_forked_stack_keeps_the_trunk(tmp_path, method, rank):
    m,x = forked_model(),batch()
    weights = dict(expert0=.7, expert2=-.4) if method!='ties' else dict(expert0=.7, expert2=.4)
    merge = merge_experts(m.stack, method, weights, rank)
    own = merged_stack(merge, tiny_base(layers=4).model, m.stack)
    folder = save_merge(merge, tmp_path/'a', own, 'tiny-0')
    with torch.no_grad():
        ours = GatedCausalLM(tiny_base(layers=4).model, own)(**x, gates=torch.ones(3, 1)).logits
        alike(peft(tiny_base(layers=4).model, folder)(**x).logits, ours, x)
    if method!='ties': alike(ours, mixture(m, weights, x), x)
    assert min(merge.factors)==m.stack.n_trunk_layers>0
    for i in range(m.stack.n_trunk_layers):
        (A, B), (own_A, own_B) = m.stack.leaves[i], own.leaves[i]
        torch.testing.assert_close(own.trunk_scale*own_B@own_A, m.stack.trunk_scale*B@A)

def test_a_scaled_merge_is_as_much_longer(mixed):
    one,three = merge_experts(mixed, 'ties', density=.3),merge_experts(mixed, 'ties', density=.3, scale=3.)
    for i, (A, B) in one.factors.items(): torch.testing.assert_close(three.factors[i][1]@three.factors[i][0], 3*B@A)
    assert three.receipt['length']==pytest.approx(3*one.receipt['length'])

def test_how_experts_lie_to_each_other_is_symmetric_and_says_conflicts_of_all_layers(mixed):
    told = expert_overlap(mixed)
    grid = torch.tensor(told['cosines'])
    torch.testing.assert_close(grid, grid.T)
    torch.testing.assert_close(grid.diagonal(), torch.ones(4))
    vectors = torch.stack([flat(mixed, e) for e in range(4)])
    unit = vectors/vectors.norm(dim=1, keepdim=True)
    torch.testing.assert_close(grid, unit@unit.T, atol=1e-5, rtol=0)
    assert list(told['conflicts'])==[mixed.layers[i].name for i in mixed.upper_layers]
    assert all(0<=c<=.5 for c in told['conflicts'].values())

# ---- since a seed expert

@pytest.fixture()
def branched(tmp_path):
    "Experts that branched from a seed expert, and its factors"
    m = filled(3)
    one = fill(Stack(tiny_base().model, 1, LoraSpec(4, 12)), 7)
    folder = one.save_peft(tmp_path/'seed', 0)
    return m.stack, one, seed_factors(m.stack, folder)

@pytest.mark.parametrize('method', ['linear', 'concat', 'average'])
def test_a_linear_merge_whose_weights_sum_to_one_is_the_same_since_a_seed(branched, method):
    stack,_,seed = branched
    weights = dict(expert0=.7, expert1=-.2, expert2=.5)
    plain,since = merge_experts(stack, method, weights),merge_experts(stack, method, weights, rank=16, since=seed)
    same_layers(expert_deltas(stack, since), expert_deltas(stack, plain))
    assert since.receipt['since'] is True and plain.receipt['since'] is False
    lengths = expert_lengths(stack, [0, 1, 2], seed)
    assert list(since.receipt['experts'].values())==pytest.approx(lengths.tolist())

def test_scaling_since_a_seed_scales_what_was_learned_and_not_the_seed(branched):
    stack,one,seed = branched
    merge = merge_experts(stack, 'linear', dict(expert0=1.), rank=16, since=seed)
    half = merge.scaled(.5)
    for i in stack.upper_layers:
        own,start = stack_deltas(stack, i, [0]).product(0),stack_deltas(one, i).product(0)
        A,B = half.expert()[i]
        torch.testing.assert_close(B@A, (own+start)/2, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('method', [m for m in MERGES if m!='lego'])
def test_copies_of_the_seed_merged_since_it_are_the_seed(tmp_path, method):
    "LEGO sees units, and a difference of zero is still two of them"
    seed = fill(Stack(tiny_base().model, 1, LoraSpec(4, 12)), 7)
    folder = seed.save_peft(tmp_path/'seed', 0, 'tiny-0')
    stack = with_adapters(tiny_base(), dict(a=folder, b=folder)).stack
    merge = merge_experts(stack, method, since=seed_factors(stack, folder))
    assert merge.receipt['scale']==1 and merge.receipt['since'] is True
    want = {seed.layers[i].name: stack_deltas(seed, i).product(0) for i in seed.upper_layers}
    same_layers(expert_deltas(stack, merge), want)
    saved = save_merge(merge, tmp_path/'merged', merged_stack(merge, tiny_base().model, stack), 'tiny-0')
    x = batch()
    with torch.no_grad(): merged,start = (peft(tiny_base().model, f)(**x).logits for f in (saved, folder))
    alike(merged, start, x)
