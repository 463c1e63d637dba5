"""Balanced k-means, measured: `python benchmarks/cluster.py --json` (about 10 minutes on two cores); `--fast` takes seconds.

Data: a Gaussian mixture in 384 dimensions, 64 components of Zipf-distributed sizes (component i holds a share
proportional to 1/i; centres N(0,1), noise N(0,1) in each dimension), as fp32 in a memory-mapped .npy file; and, where there
are enough, MiniLM embeddings of the training records.

What is compared, on the same rows, with the same number of threads, after one run of each on few rows:
  balanced_vs_plain     seconds of hydramoe.domains.balance.balanced_kmeans / seconds of sklearn MiniBatchKMeans(64).fit, defaults
  inertia_vs_plain      inertia of the balanced clusters / inertia of MiniBatchKMeans' clusters, each with its own centroids
  max_over_mean         largest balanced cluster / mean cluster
  seconds_per_million   of balanced_kmeans, by the row; seconds_by_rows tells whether it is linear
  peak_gib              largest resident memory of a process of its own that runs balanced_kmeans on the memory-mapped file
At some 20,000 rows (a multiple of 64, for the auction needs that), all with the centroids of sklearn KMeans, capacity n/64:
  inertia_vs_optimal    assign_balanced / the least inertia of any assignment within the capacities, that is of optimal transport.
                        linear_sum_assignment on 20,000 x 20,000 slots takes hours, so the optimum is *proved* instead: for any
                        prices p, sum_i min_c (d_ic + p_c) - sum_c p_c n/64 lies below the inertia of every such assignment (weak
                        duality); scipy's L-BFGS-B finds prices that make it large, in float64, and we divide by that bound.
                        optimum_over_bound - 1, of assign_balanced(exact=True), tells how tight the bound is
  speed_vs_auction      seconds of c-BTM's auction / seconds of assign_balanced; both are given the same matrix of squared
                        distances, and time is the assignment alone; the median of five runs
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
    """c-BTM's balanced assignment (Gururangan et al. 2023, arXiv 2303.14177; their code: kernelmachine/balanced-kmeans).
    Clusters bid for rows. Each bids for its n/k best at their prices: what the row is worth to it more than the best row it
    leaves, and eps = a fiftieth of the range of scores. The highest bidder gets the row and its price rises by the bid; who
    holds a row keeps it for eps for the first 100 rounds; after 1,000 rounds, eps is bid for rows nobody wants."""
    import torch
    n, k = score.shape
    eps = float(((score.max()-score.min())/50).clamp_min(1e-4))
    worth = score.T.contiguous()
    value, bids, price, held = worth.clone(), torch.zeros(k, n), torch.zeros(n), None
    for r in range(rounds):
        top, row = value.topk(n//k+1, dim=1)
        bids.zero_().scatter_(1, row[:, :-1], top[:, :-1]-top[:, -1:]+eps)
        if r<100 and held is not None: bids.view(-1)[held] = eps
        if r>1000: bids.view(-1)[unwanted] = eps
        wanted = (bids>0).any(0)
        rows, unwanted = wanted.nonzero().squeeze(1), (~wanted).nonzero().squeeze(1)
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
        t = time.perf_counter(); r = f(); seconds.append(time.perf_counter()-t)
    return statistics.median(seconds), r

def inertia(x, centroids, labels):
    return sum(float(((x[i:i+20_000]-centroids[labels[i:i+20_000]])**2).sum(dtype=np.float64)) for i in range(0, len(x), 20_000))

def bound(costs, room):
    "A number that no assignment within the capacities can go below"
    from scipy.optimize import minimize
    costs = costs.astype(np.float64)
    def dual(p):
        a = costs+p
        l = a.argmin(1)
        return p@room-a[np.arange(len(a)), l].sum(), room-np.bincount(l, minlength=len(room))
    return -minimize(dual, np.zeros(len(room)), jac=True, bounds=[(0, None)]*len(room), method='L-BFGS-B', options=dict(maxiter=500)).fun

def small(x, threads):
    "Assignments with the same centroids and capacities: ours, the auction, the optimum"
    import torch
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits
    from hydramoe.domains.balance import assign_balanced
    n = len(x)//K*K
    x = np.array(x[:n])
    with threadpool_limits(threads): c = KMeans(K, random_state=0).fit(x).cluster_centers_
    costs = ((x.astype(np.float64)**2).sum(1)[:, None] + (c.astype(np.float64)**2).sum(1) - 2*x.astype(np.float64)@c.T.astype(np.float64)).astype(np.float32)
    total = lambda l: float(costs[np.arange(n), l].sum(dtype=np.float64))
    torch.set_num_threads(threads)
    score = torch.from_numpy(-costs)
    with threadpool_limits(threads):
        assign_balanced(costs[:64*K]); auction(score[:64*K])
        ours_s, ours = timed(lambda: assign_balanced(costs), 5)
        auction_s, (theirs, rounds) = timed(lambda: auction(score), 5)
    out = dict(rows=n, speed_vs_auction=auction_s/ours_s, ours_seconds=ours_s, auction_seconds=auction_s, auction_rounds=rounds,
               auction_finished=theirs is not None, max_over_mean=float(np.bincount(ours).max()*K/n))
    least = bound(costs, np.full(K, n/K))
    optimum_s, best = timed(lambda: assign_balanced(costs, exact=True))
    out |= dict(inertia_vs_optimal=total(ours)/least, optimum_over_bound=total(best)/least, exact_seconds=optimum_s,
                auction_vs_optimal=None if theirs is None else total(theirs)/least)
    return out

def large(x, threads):
    "Balanced k-means beside scikit-learn's MiniBatchKMeans, from rows to labels"
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits
    from hydramoe.domains.balance import balanced_kmeans
    plain = lambda x: MiniBatchKMeans(K, random_state=0).fit(x)
    with threadpool_limits(threads):
        plain(x[:20_000]); balanced_kmeans(x[:20_000], K)
        plain_s, m = timed(lambda: plain(x), 3)
    ours_s, (c, labels) = timed(lambda: balanced_kmeans(x, K), 3)
    return dict(rows=len(x), balanced_vs_plain=ours_s/plain_s, ours_seconds=ours_s, plain_seconds=plain_s,
                inertia_vs_plain=inertia(x, c, labels)/inertia(x, m.cluster_centers_, m.labels_),
                max_over_mean=float(np.bincount(labels).max()*K/len(x)),
                plain_max_over_mean=float(np.bincount(m.labels_).max()*K/len(x)))

def peak(path):
    "GiB of a fresh process that clusters the file"
    code = "import sys, resource, numpy as np; from hydramoe.domains.balance import balanced_kmeans; " \
           f"balanced_kmeans(np.load(sys.argv[1], mmap_mode='r'), {K}); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    r = subprocess.run([sys.executable, '-c', code, str(path)], capture_output=True, text=True, check=True)
    return int(r.stdout.split()[-1])/2**20

def by_rows(x):
    "Seconds for an eighth, a quarter, a half of the rows and all"
    from hydramoe.domains.balance import balanced_kmeans
    return {n: timed(lambda: balanced_kmeans(x[:n], K))[0] for n in (len(x)//8, len(x)//4, len(x)//2, len(x))}

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
    return embed(texts, keep=cache_dir()/'embedded') if len(texts)>=4096 else f'{len(texts)} records: too few for {K} clusters'

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, default=1_000_000, help='of the mixture')
    p.add_argument('--small', type=int, default=20_032, help='rows for auction and optimum; rounded down to a multiple of 64')
    p.add_argument('--records', type=int, default=8192, help='training records to embed with MiniLM, at most; 0: none')
    p.add_argument('--threads', type=int, default=0, help='of both sides; 0: OMP_NUM_THREADS, or all cores')
    p.add_argument('--fast', action='store_true', help='40,000 rows, 4,096 for auction and optimum, no records')
    p.add_argument('--json', action='store_true', help='print JSON alone')
    if p.parse_args().fast: p.set_defaults(rows=40_000, small=4096, records=0)
    a = p.parse_args()
    if a.threads: os.environ['OMP_NUM_THREADS'] = str(a.threads)
    from hydramoe.foundations.core import default_threads, machine
    threads = default_threads()
    with tempfile.TemporaryDirectory() as tmp:
        path = zipf(Path(tmp)/'x.npy', a.rows)
        x = np.load(path, mmap_mode='r')
        few = small(x[:a.small], threads)
        many = large(x, threads)
        seconds = by_rows(x)
        gib = peak(path)
    real = records(a.records) if a.records else 'not asked for'
    real = real if isinstance(real, str) else small(real, threads) | {f'kmeans_{k}': v for k, v in large(real, threads).items()}
    out = {k: many[k] for k in ('balanced_vs_plain', 'inertia_vs_plain', 'max_over_mean')}
    out |= {k: few[k] for k in ('inertia_vs_optimal', 'speed_vs_auction')}
    out |= dict(peak_gib=gib, seconds_per_million=many['ours_seconds']*1e6/a.rows, seconds_by_rows=seconds, threads=threads,
                compared=__doc__, mixture=many, mixture_small=few, minilm_records=real, machine=machine())
    if a.json: print(json.dumps(out, indent=1))
    else:
        for k, v in out.items(): k!='compared' and print(f'{k:20} {v}')

if __name__=='__main__': main()
