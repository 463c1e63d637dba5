"""Balanced k-means, measured: `python benchmarks/cluster.py --json` (10 minutes); `--fast` takes seconds.

Data: a Gaussian mixture in 384 dimensions, 64 components of Zipf-distributed sizes (component i holds a share
proportional to 1/i; centres N(0,1), noise N(0,1) in each dimension), as fp32 in a memory-mapped .npy file; and, where
there are enough, MiniLM embeddings of the training records.

What is compared, on the same rows, with the same number of threads, after one run of each on few rows:
  balanced_vs_plain     seconds of hydramoe.domains.balance.balanced_kmeans / seconds of sklearn
                        MiniBatchKMeans(64).fit, defaults
  inertia_vs_plain      inertia of the balanced clusters / inertia of MiniBatchKMeans' clusters, each with its own
                        centroids
  max_over_mean         largest balanced cluster / mean cluster
  seconds_per_million   of balanced_kmeans, by the row; seconds_by_rows tells whether it is linear
  peak_gib              largest resident memory of a process of its own that runs balanced_kmeans on the memory-mapped
                        file
At some 20,000 rows (a multiple of 64, for the auction needs that), all with the centroids of sklearn KMeans, capacity
n/64:
  inertia_vs_optimal    assign_balanced / the least inertia of any assignment within the capacities, that is of
                        optimal transport. linear_sum_assignment on 20,000 x 20,000 slots takes hours, so the optimum
                        is *proved* instead: for any prices p, sum_i min_c (d_ic + p_c) - sum_c p_c n/64 lies below
                        the inertia of every such assignment (weak duality); scipy's L-BFGS-B finds prices that make
                        it large, in float64, and we divide by that bound. optimum_over_bound - 1, of
                        assign_balanced(exact=True), tells how tight the bound is
  speed_vs_auction      seconds of c-BTM's auction / seconds of assign_balanced; both are given the same matrix of
                        squared distances, and time is the assignment alone; the median of five runs
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np

K, D = 64, 384

def zipf(path, n, k=K, d=D, seed=0):
    "Write n rows of the mixture to a .npy file, block by block"
    g = np.random.default_rng(seed)
    share = 1/np.arange(1, k+1)
    centres = g.normal(size=(k, d)).astype(np.float32)
    x = np.lib.format.open_memmap(path, 'w+', np.float32, (n, d))
    for i in range(0, n, 50_000):
        z = g.choice(k, min(50_000, n-i), p=share/share.sum())
        x[i:i+len(z)] = centres[z] + g.standard_normal((len(z), d), np.float32)
    x.flush()
    return path

def auction(score, rounds=50_000):
    """c-BTM's balanced assignment (Gururangan et al. 2023, arXiv 2303.14177; their code:
    kernelmachine/balanced-kmeans). Clusters bid for rows. Each bids for its n/k best at their prices: what the row is
    worth to it more than the best row it leaves, and eps = a fiftieth of the range of scores. The highest bidder gets
    the row and its price rises by the bid; who holds a row keeps it for eps for the first 100 rounds; after 1,000
    rounds, eps is bid for rows nobody wants."""
    import torch
    n, k = score.shape
    eps = float(((score.max()-score.min())/50).clamp_min(1e-4))
    worth = score.T.contiguous()
    value = worth.clone()
    bids = torch.zeros(k, n)
    price = torch.zeros(n)
    held = None
    for r in range(rounds):
        top, row = value.topk(n//k+1, dim=1)
        bids.zero_().scatter_(1, row[:, :-1], top[:, :-1]-top[:, -1:]+eps)
        if r<100 and held is not None: bids.view(-1)[held] = eps
        if r>1000: bids.view(-1)[unwanted] = eps
        wanted = (bids>0).any(0)
        rows = wanted.nonzero().squeeze(1)
        unwanted = (~wanted).nonzero().squeeze(1)
        high, winner = bids[:, rows].max(0)
        if len(rows)==n: return winner.numpy(), r+1
        price[rows] += high
        held = winner*n+rows
        value = worth-price
        value.view(-1)[held] = worth.view(-1)[held]
    return None, rounds

def timed(f, times=1):
    "Median seconds, and the last result"
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        result = f()
        seconds.append(time.perf_counter()-began)
    return statistics.median(seconds), result

def inertia(x, centroids, labels):
    "Sum of squared distances of rows to the centroids of their labels, block by block"
    total = 0.
    for i in range(0, len(x), 20_000):
        block = slice(i, i+20_000)
        off = x[block]-centroids[labels[block]]
        total += float((off**2).sum(dtype=np.float64))
    return total

def max_over_mean(labels):
    "The largest cluster ÷ the mean cluster"
    return float(np.bincount(labels).max()*K/len(labels))

def squared_distances(x, centroids):
    "(rows, clusters), computed in float64, as fp32"
    x, c = x.astype(np.float64), centroids.astype(np.float64)
    squares = (x**2).sum(1)[:, None] + (c**2).sum(1)
    return (squares - 2*x@c.T).astype(np.float32)

def bound(costs, room):
    "A number that no assignment within the capacities can go below"
    from scipy.optimize import minimize
    costs = costs.astype(np.float64)
    def dual(prices):
        "Minus the bound at these prices, and the slope of that"
        dear = costs+prices
        cheapest = dear.argmin(1)
        paid = dear[np.arange(len(dear)), cheapest].sum()
        return prices@room-paid, room-np.bincount(cheapest, minlength=len(room))
    start = np.zeros(len(room))
    limits = [(0, None)]*len(room)
    return -minimize(dual, start, jac=True, bounds=limits, method='L-BFGS-B', options=dict(maxiter=500)).fun

def small(x, threads):
    "Assignments with the same centroids and capacities: ours, the auction, the optimum"
    import torch
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits
    x = np.array(x[:len(x)//K*K])
    with threadpool_limits(threads): centroids = KMeans(K, random_state=0).fit(x).cluster_centers_
    costs = squared_distances(x, centroids)
    torch.set_num_threads(threads)
    with threadpool_limits(threads): ours, theirs, found = beside_auction(costs)
    return found | beside_optimum(costs, ours, theirs)

def beside_auction(costs):
    "Our labels, the auction's, and seconds of both on the same matrix, after a run of each on few rows"
    import torch
    from hydramoe.domains.balance import assign_balanced
    score = torch.from_numpy(-costs)
    assign_balanced(costs[:64*K])
    auction(score[:64*K])
    ours_s, ours = timed(lambda: assign_balanced(costs), 5)
    auction_s, (theirs, rounds) = timed(lambda: auction(score), 5)
    found = dict(rows=len(costs), speed_vs_auction=auction_s/ours_s, ours_seconds=ours_s, auction_seconds=auction_s,
                 auction_rounds=rounds, auction_finished=theirs is not None, max_over_mean=max_over_mean(ours))
    return ours, theirs, found

def beside_optimum(costs, ours, theirs):
    "What our labels, the exact ones and the auction's cost, ÷ a bound that none can go below"
    from hydramoe.domains.balance import assign_balanced
    n = len(costs)
    def total(labels): return float(costs[np.arange(n), labels].sum(dtype=np.float64))
    least = bound(costs, np.full(K, n/K))
    exact_s, exact = timed(lambda: assign_balanced(costs, exact=True))
    return dict(inertia_vs_optimal=total(ours)/least, optimum_over_bound=total(exact)/least, exact_seconds=exact_s,
                auction_vs_optimal=None if theirs is None else total(theirs)/least)

def large(x, threads):
    "Balanced k-means beside scikit-learn's MiniBatchKMeans, from rows to labels, after a run of each on few rows"
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits
    from hydramoe.domains.balance import balanced_kmeans
    def plain(x): return MiniBatchKMeans(K, random_state=0).fit(x)
    with threadpool_limits(threads):
        plain(x[:20_000])
        balanced_kmeans(x[:20_000], K)
        plain_s, theirs = timed(lambda: plain(x), 3)
    ours_s, (centroids, labels) = timed(lambda: balanced_kmeans(x, K), 3)
    their_inertia = inertia(x, theirs.cluster_centers_, theirs.labels_)
    return dict(rows=len(x), balanced_vs_plain=ours_s/plain_s, ours_seconds=ours_s, plain_seconds=plain_s,
                inertia_vs_plain=inertia(x, centroids, labels)/their_inertia,
                max_over_mean=max_over_mean(labels), plain_max_over_mean=max_over_mean(theirs.labels_))

PEAK = """
import sys, resource, numpy as np
from hydramoe.domains.balance import balanced_kmeans
balanced_kmeans(np.load(sys.argv[1], mmap_mode='r'), {k})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

def peak(path):
    "GiB of a fresh process that clusters the file"
    r = subprocess.run([sys.executable, '-c', PEAK.format(k=K), str(path)], capture_output=True, text=True, check=True)
    return int(r.stdout.split()[-1])/2**20

def by_rows(x):
    "Seconds for an eighth, a quarter, a half of the rows and all"
    from hydramoe.domains.balance import balanced_kmeans
    counts = len(x)//8, len(x)//4, len(x)//2, len(x)
    return {n: timed(lambda: balanced_kmeans(x[:n], K))[0] for n in counts}

def records(most):
    "MiniLM embeddings of training records, or why not"
    from hydramoe.domains.embed import embed, prompt_text
    from hydramoe.foundations.core import cache_dir
    from hydramoe.data.cards import card_names
    from hydramoe.data.load import load
    texts = {}
    for name in card_names(use='train'):
        try: texts |= {prompt_text(r): None for r in load(name)}
        except ValueError as e: print(f'{name}: {e}', file=sys.stderr)
        if len(texts)>=most: break
    texts = list(texts)[:most]
    if len(texts)<4096: return f'{len(texts)} records: too few for {K} clusters'
    return embed(texts, keep=cache_dir()/'embedded')

def of_records(most, threads):
    "All comparisons on embeddings of records, or why not"
    if not most: return 'not asked for'
    x = records(most)
    if isinstance(x, str): return x
    assigned = small(x, threads)
    return assigned | {f'kmeans_{name}': value for name, value in large(x, threads).items()}

def of_mixture(a, threads):
    "All measurements on the mixture: assignments of few rows, k-means of all, seconds by rows, and GiB"
    with tempfile.TemporaryDirectory() as tmp:
        path = zipf(Path(tmp)/'x.npy', a.rows)
        x = np.load(path, mmap_mode='r')
        few = small(x[:a.small], threads)
        many = large(x, threads)
        seconds = by_rows(x)
        return few, many, seconds, peak(path)

def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, default=1_000_000, help='of the mixture')
    p.add_argument('--small', type=int, default=20_032,
                   help='rows for auction and optimum; rounded down to a multiple of 64')
    p.add_argument('--records', type=int, default=8192, help='training records to embed with MiniLM, at most; 0: none')
    p.add_argument('--threads', type=int, default=0, help='of both sides; 0: OMP_NUM_THREADS, or all cores')
    p.add_argument('--fast', action='store_true', help='40,000 rows, 4,096 for auction and optimum, no records')
    p.add_argument('--json', action='store_true', help='print JSON alone')
    if p.parse_args().fast: p.set_defaults(rows=40_000, small=4096, records=0)
    return p.parse_args()

def main():
    a = options()
    if a.threads: os.environ['OMP_NUM_THREADS'] = str(a.threads)
    from hydramoe.foundations.core import default_threads, machine
    threads = default_threads()
    few, many, seconds, gib = of_mixture(a, threads)
    real = of_records(a.records, threads)
    out = {name: many[name] for name in ('balanced_vs_plain', 'inertia_vs_plain', 'max_over_mean')}
    out |= {name: few[name] for name in ('inertia_vs_optimal', 'speed_vs_auction')}
    out |= dict(peak_gib=gib, seconds_per_million=many['ours_seconds']*1e6/a.rows, seconds_by_rows=seconds)
    out |= dict(threads=threads, compared=__doc__, mixture=many, mixture_small=few, minilm_records=real)
    out |= dict(machine=machine())
    if a.json:
        print(json.dumps(out, indent=1))
        return
    for name, value in out.items():
        if name!='compared': print(f'{name:20} {value}')

if __name__=='__main__': main()
