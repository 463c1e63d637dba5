"""Merges of experts, measured against mergekit's and PEFT's: `python benchmarks/merge.py` (20 minutes).

    python benchmarks/merge.py                a table
    python benchmarks/merge.py --json         the numbers below, and what they are made of
    python benchmarks/merge.py --fast         a block of small layers, few rounds: half a minute, and shows no more
                                              than that it runs

Nine experts of rank 8 on the 210 linear layers of SmolLM2-135M, in fp32: random factors, the same in every run. Each
expert's factors are a common part and an own one of equal length, as of experts that branched from one seed expert,
so they agree at many entries and conflict at others. Both sides begin with the factors, form the products inside the
measured time, and end with the same matrices. Each layer is merged by each side in turn, in one process, round after
round; a round is the sum over all layers, and medians of rounds are compared. Imports and a round of warm-up on both
sides are left out.
  ties_vs_mergekit   seconds, mergekit's `merge_group` of its method ties, on a base of zeros, ÷
                     `ties(variant='mergekit')`
  ties_vs_peft       seconds, PEFT's `ties` ÷ `ties(variant='peft')`
  linear_vs_peft     seconds, PEFT's `task_arithmetic` ÷ `linear`; cat_vs_peft: factors side by side, as PEFT's 'cat'
                     makes them
  svd_vs_peft        seconds, what PEFT's `add_weighted_adapter('svd')` does ÷ core space, `linear`, `compress` to
                     rank 8 and back; svd_thin_vs_peft: PEFT with svd_full_matrices=False, which is not its default
  peak_vs_peft       how many times less memory above the experts our TIES of the largest layer needs than PEFT's
  exponent           p in seconds ~ E^p, fitted to our TIES of E = 4 … 64 experts; svd_exponent: to our svd merge
  state_peak         peak above the experts of our TIES of 64 experts of a 7B model, one layer of each
                     shape after the other, in products of the largest (64 of them would be the stack of all)

Before anything is timed, the results are compared on every layer: no entry may differ by more than 1e-5 of the
largest (2e-5 after a truncated SVD, which fp32 computes less exactly). TIES decides by comparisons, and fp32 cannot
decide all of them: a vote that is even but for rounding, or a magnitude that another one equals at the threshold.
Such entries are found in fp64, left out of the comparison, and counted: `undecided`, at most 1 in 10,000. Peaks are
those of the process (VmHWM, reset once the experts are there and a small merge has warmed up): torch, numpy and
LAPACK alike. Each side has a process of its own, whose malloc gives every tensor back when it is freed.
"""
import argparse, json, math, os, statistics, subprocess, sys, time, warnings
from pathlib import Path
import numpy as np
import torch
from hydramoe.hydra.deltas import Deltas, compress, to_core
from hydramoe.hydra.merge import linear
from hydramoe.hydra.ties import ties

RANK = 8
DENSITY = .2
SMOLLM2 = dict(hidden=576, kv=192, mlp=1536)
SMALL = dict(hidden=192, kv=64, mlp=512) # for a test
SEVEN_B = dict(hidden=4096, kv=4096, mlp=11008)
EXPERTS = [4, 8, 16, 32, 64]

def block(hidden, kv, mlp):
    "What the linear layers of a block give and read"
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    return attention+[(mlp, hidden), (mlp, hidden), (hidden, mlp)]

def experts(shape, n_experts, seed):
    "Random experts on a layer that share a part; the same for the same seed"
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    def factor(*size):
        common = torch.randn(1, *size, generator=generator)
        return common+torch.randn(n_experts, *size, generator=generator)
    return Deltas(factor(RANK, n), factor(m, RANK)/100)

def weights_of(n_experts):
    "Unequal weights of sum 1"
    raw = torch.linspace(.5, 1.5, n_experts)
    return raw/raw.sum()

# ---- the other side

def peft_products(d):
    "As PEFT's get_delta_weight forms each; the scale, 1 here, is in B on both sides"
    return [B@A for A, B in zip(d.A, d.B)]

def mergekit_ties(d, weights):
    "mergekit's own TIES, on a base of zeros"
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup
    names = range(1, len(d)+1) # 0 is the base
    group = TensorGroup.from_tensors([torch.zeros(d.shape), *peft_products(d)], base_index=0)
    shared = {'lambda': 1., 'int8_mask': False, 'normalize': True, 'rescale': False}
    weight = dict(zip(names, weights.tolist()))
    density = dict.fromkeys(names, DENSITY)
    return registry.get('ties').merge_group(group, weight=weight, density=density, **shared)

def peft_ties(d, weights):
    "PEFT's own TIES"
    from peft.utils.merge_utils import ties as their_ties
    return their_ties(peft_products(d), weights, DENSITY)

def peft_linear(d, weights):
    "PEFT's weighted sum"
    from peft.utils.merge_utils import task_arithmetic
    return task_arithmetic(peft_products(d), weights)

def peft_cat(d, weights):
    "Factors side by side, the weights in A"
    A = torch.cat([A*weight for A, weight in zip(d.A, weights.tolist())], dim=0)
    return A, torch.cat(list(d.B), dim=1)

def peft_svd(d, weights, full_matrices=True):
    "The lines of PEFT's LoraModel that follow combination_type='svd'"
    U, S, Vh = torch.linalg.svd(peft_linear(d, weights), full_matrices=full_matrices)
    return Vh[:RANK], U[:,:RANK]@torch.diag(S[:RANK])

def peft_svd_thin(d, weights):
    "The same with an option of PEFT's that is not its default"
    return peft_svd(d, weights, full_matrices=False)

# ---- ours

def our_mergekit_ties(d, weights):
    "TIES as mergekit computes it"
    return ties(d, weights, DENSITY, 'mergekit')

def our_peft_ties(d, weights):
    "TIES as PEFT computes it"
    return ties(d, weights, DENSITY, 'peft')

def our_cat(d, weights):
    "Both in new memory, as theirs are"
    B = d.B*weights[:,None,None]
    return d.A.flatten(0, 1).clone(), B.transpose(0, 1).flatten(1)

def our_svd(d, weights):
    "Merged and compressed in core space, then factors again"
    core = to_core(d)
    A, B, _ = compress(linear(core.deltas, weights), RANK)
    return (A@core.Q_A.T).float(), (core.Q_B@B).float()

SIDES = dict(
    mergekit_ties=mergekit_ties, our_mergekit_ties=our_mergekit_ties,
    peft_ties=peft_ties, our_peft_ties=our_peft_ties,
    peft_linear=peft_linear, our_linear=linear,
    peft_cat=peft_cat, our_cat=our_cat,
    peft_svd=peft_svd, peft_svd_thin=peft_svd_thin, our_svd=our_svd)

PAIRS = dict( # a figure: theirs, ours
    ties_vs_mergekit=('mergekit_ties', 'our_mergekit_ties'),
    ties_vs_peft=('peft_ties', 'our_peft_ties'),
    linear_vs_peft=('peft_linear', 'our_linear'),
    cat_vs_peft=('peft_cat', 'our_cat'),
    svd_vs_peft=('peft_svd', 'our_svd'),
    svd_thin_vs_peft=('peft_svd_thin', 'our_svd'))

# ---- the same output

def at_threshold(size):
    "The magnitude from which TIES keeps entries, and which entries are too close to it"
    place = size.numel()-int(DENSITY*size.numel())
    threshold = np.partition(size.flatten().numpy(), place)[place]
    close = (size/threshold-1).abs()<1e-6
    return threshold, close

def decided(d, weights):
    "(m,n) entries that TIES decides by more than the rounding of fp32, for weighted votes and for unweighted ones"
    sure = torch.ones(d.shape, dtype=torch.bool)
    votes = torch.zeros(2, 2, *d.shape, dtype=torch.float64) # weighted or not; sum, sum of magnitudes
    for A, B, weight in zip(d.A.double(), d.B.double(), weights.tolist()):
        product = B@A
        size = product.abs()
        threshold, close = at_threshold(size)
        if close.sum()>1: sure &= ~close # alone, the entry that is the threshold is kept by all
        kept = product*(size>=threshold)
        for vote, say in zip(votes, (weight, 1.)):
            vote[0] += say*kept
            vote[1] += say*kept.abs()
    for total, pushes in votes: sure &= total.abs()>=1e-6*pushes
    return sure

def as_matrix(result):
    "A result as a matrix, also if it is factors"
    if isinstance(result, torch.Tensor): return result
    A, B = result
    return B@A

def allowed(name):
    "How much of the largest entry the two sides of a pair may differ by"
    return 2e-5 if name.startswith('svd') else 1e-5

def difference(name, d, weights, sure):
    "How much the two sides of a pair differ at most on a layer, relative to the largest entry"
    theirs, ours = (as_matrix(SIDES[side](d, weights)) for side in PAIRS[name])
    off = (theirs-ours).abs()
    if 'ties' in name: off = off[sure]
    return (off.max()/theirs.abs().max()).item()

def compare(layers, weights):
    "The largest difference of each pair over all layers; more than `allowed` is an error"
    worst = dict.fromkeys(PAIRS, 0.)
    undecided = entries = 0
    for d in layers:
        sure = decided(d, weights)
        undecided += (~sure).sum().item()
        entries += sure.numel()
        for name in PAIRS: worst[name] = max(worst[name], difference(name, d, weights, sure))
    wrong = {name: off for name, off in worst.items() if not off<=allowed(name)}
    if wrong: sys.exit(f'results differ: {wrong}')
    if undecided>1e-4*entries: sys.exit(f'{undecided} of {entries} entries are undecided')
    return dict(largest_difference=worst, undecided=undecided, entries=entries)

# ---- seconds

def seconds(f, *args):
    "Of one call"
    start = time.perf_counter()
    f(*args)
    return time.perf_counter()-start

def in_turn(sides, layers, weights, rounds):
    "Seconds of each side and round, over all layers; which side begins changes from layer to layer"
    took = {side: [] for side in sides}
    for _ in range(rounds):
        spent = dict.fromkeys(sides, 0.)
        for i, d in enumerate(layers):
            order = sides if i%2==0 else sides[::-1]
            for side in order: spent[side] += seconds(SIDES[side], d, weights)
        for side in sides: took[side].append(spent[side])
    return took

def ratios(took):
    "Each figure from the medians of its two sides"
    middle = {side: statistics.median(s) for side, s in took.items()}
    return {name: middle[theirs]/middle[ours] for name, (theirs, ours) in PAIRS.items()}

def slope(points):
    "The exponent p of seconds ~ E^p"
    E, took = np.log(list(points)), np.log(list(points.values()))
    return float(np.polyfit(E, took, 1)[0])

def curve(side, shapes, counts, rounds):
    "Median seconds over a sample of layers, for each number of experts"
    cases = {E: [experts(shape, E, 1000+i) for i, shape in enumerate(shapes)] for E in counts}
    took = {E: [] for E in counts}
    for E in counts: in_turn([side], cases[E][:1], weights_of(E), 1)
    for _ in range(rounds):
        for E in counts: took[E] += in_turn([side], cases[E], weights_of(E), 1)[side]
    return {E: statistics.median(s) for E, s in took.items()}

# ---- memory, in a process of its own

def status(key):
    "Bytes that the system notes of this process"
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key+':'))*1024

def peak(side, shapes, n_experts):
    "Bytes that a merge of layers, one after the other, needs at most above the experts"
    weights = weights_of(n_experts)
    SIDES[side](experts((64, 64), n_experts, 0), weights)
    layers = [experts(shape, n_experts, i) for i, shape in enumerate(shapes)]
    Path('/proc/self/clear_refs').write_text('5') # the peak begins anew
    before = status('VmRSS')
    for d in layers: SIDES[side](d, weights)
    return status('VmHWM')-before

def measured(side, shapes, n_experts):
    "The peak of one side"
    command = [sys.executable, __file__, '--peak', json.dumps([side, shapes, n_experts])]
    threads = str(torch.get_num_threads())
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536', HYDRAMOE_QUIET='1', OMP_NUM_THREADS=threads)
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=env).stdout)

def largest(shapes):
    "The shape with the most entries"
    return max(shapes, key=lambda shape: shape[0]*shape[1])

def memory(a):
    "Peaks of TIES, and of 64 experts of a large model"
    shape = largest(block(**SMOLLM2))
    sides = ['peft_ties', 'our_peft_ties']
    if not a.fast: sides += ['mergekit_ties', 'our_mergekit_ties']
    peaks = {side: measured(side, [shape], 9) for side in sides}
    many = [shape] if a.fast else sorted(set(block(**SEVEN_B)))
    state = measured('our_mergekit_ties', many, 64)
    product = 4*math.prod(largest(many))
    large = dict(experts=64, shapes=many, peak_bytes=state, product_bytes=product)
    figures = dict(peak_vs_peft=peaks['peft_ties']/peaks['our_peft_ties'], state_peak=state/product)
    if not a.fast: figures['peak_vs_mergekit'] = peaks['mergekit_ties']/peaks['our_mergekit_ties']
    return dict(figures, peak_bytes=dict(peaks, shape=shape), large=large)

# ---- all of it

def options():
    how = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=how)
    p.add_argument('--json', action='store_true', help='print one JSON object and nothing else')
    p.add_argument('--fast', action='store_true', help='a block of small layers, few rounds: does it run?')
    p.add_argument('--blocks', type=int, default=30, help='blocks of 7 layers')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int, default=None, help='of torch; default: all of this machine')
    p.add_argument('--peak', help=argparse.SUPPRESS)
    return p.parse_args()

def measure(a):
    "All figures, and what they are made of"
    from hydramoe.foundations.core import machine, versions
    shapes = block(**SMALL if a.fast else SMOLLM2)
    layers = [experts(shape, 9, i) for i, shape in enumerate(shapes*a.blocks)]
    weights = weights_of(9)
    in_turn(list(SIDES), layers[:7], weights, 1) # warm-up
    same = compare(layers, weights)
    took = in_turn(list(SIDES), layers, weights, a.rounds)
    sample, counts = (shapes[-1:], EXPERTS[:4]) if a.fast else (shapes, EXPERTS)
    curves = {side: curve(side, sample, counts, a.rounds) for side in ('our_mergekit_ties', 'our_svd')}
    figures = ratios(took)|memory(a)
    figures |= dict(exponent=slope(curves['our_mergekit_ties']), svd_exponent=slope(curves['our_svd']))
    settings = dict(blocks=a.blocks, rounds=a.rounds, threads=torch.get_num_threads(), rank=RANK, density=DENSITY)
    conditions = dict(settings, versions=versions('torch', 'peft', 'mergekit', 'numpy'), machine=machine(),
                      work=__doc__.split('\n\n')[2])
    median = {side: statistics.median(s) for side, s in took.items()}
    return figures|dict(equal=same, seconds=median, rounds=took, shapes=shapes, curves=curves, curve_shapes=sample,
                        conditions=conditions)

def show(found):
    "A table"
    for name, figure in found.items():
        if isinstance(figure, float): print(f'{name:20} {figure:9.2f}')
    for side, took in found['seconds'].items(): print(f'  {side:20} {took:9.3f} s')

def main():
    a = options()
    warnings.simplefilter('ignore')
    if a.peak:
        print(json.dumps(peak(*json.loads(a.peak))))
        return
    if a.fast: vars(a).update(blocks=1, rounds=2, threads=1)
    if a.threads: torch.set_num_threads(a.threads)
    with torch.inference_mode(): found = measure(a)
    if a.json: print(json.dumps(found, indent=1))
    else: show(found)

if __name__=='__main__': main()
