"""What a route costs and is worth, measured: `python benchmarks/route.py --json` (some twenty minutes on one core); `--fast` takes two.

Prompts of the training cards, `--train`, `--dev` and `--test` of each of the nine domains, dealt over its cards in turn, none
longer than `--chars` characters. Every router is fitted on the same training prompts with true domains as labels; margins are
chosen on the development prompts, for 98 % agreement there (a point more than is asked for, since chance flatters), and they name the *best* router; the test prompts only report.

Costs are of one prompt of 128 tokens, batch 1, text in and weights out, encoder included, one step of each in turn, medians of
`--rounds` rounds; the reference in the same rounds is one forward of the base over the same 128 tokens with a cache and logits
for the last position. A hidden state after layer n costs the first n blocks; under a fork at or above that layer the base has
made it anyway, and `under_fork` is then what is left. A cascade costs its cheap router, and its good one times the share of
test prompts that are asked again. Accuracies are shares of the test prompts, with a standard error of about 0.8 points for 720.
  router_vs_prefill   the least cost of a router that sends at least 97 % of the test prompts where the best one sends them
  agreement           of that router
"""
import argparse, json, statistics, time
import numpy as np
import torch
from hydramoe.models.load import load_base
from hydramoe.models.hidden import pooled_state
from hydramoe.domains.embed import embed, prompt_text
from hydramoe.domains.discover import Domains
from hydramoe.foundations.core import cache_dir, machine
from hydramoe.data.records import DOMAINS
from hydramoe.data.cards import card_names
from hydramoe.data.load import load
from hydramoe.hydra.vectors import distil_tokens, static_vectors
from hydramoe.hydra.route import calibrate, classifier_router, similarity_router
from hydramoe.hydra.kinds import knn_router, ridge_router
from hydramoe.hydra.cascade import cascade_router, choose_margin, margin, fit_on_hidden, use_static

def dealt(args):
    "part → texts, domains; round-robin over the cards of a domain"
    cards, rng = {d: [] for d in DOMAINS}, np.random.default_rng(args.seed)
    for name in card_names(use='train'):
        rows = list({t: None for r in load(name) if len(t := prompt_text(r))<=args.chars})
        domain = load(name)[0]['domain']
        if rows and domain in cards: cards[domain].append([rows[i] for i in rng.permutation(len(rows))])
    out, sizes = {p: ([], []) for p in ('train','dev','test')}, dict(train=args.train, dev=args.dev, test=args.test)
    for d,lists in cards.items():
        turn = list(dict.fromkeys(l[i] for i in range(max(map(len, lists))) for l in lists if i<len(l)))[:sum(sizes.values())]
        turn = [turn[i] for i in rng.permutation(len(turn))]
        for p,n in sizes.items():
            out[p][0].extend(turn[:n]); out[p][1].extend([d]*len(turn[:n])); turn = turn[n:]
    return out

def views(parts, base, depths):
    "name → part → vectors; and the static arrays"
    seen = {'minilm': {p: embed(t, keep=cache_dir()/'embedded') for p,(t,_) in parts.items()}}
    tokens = distil_tokens(parts['train'][0], seen['minilm']['train'])
    seen['static'] = {p: static_vectors(t, tokens) for p,(t,_) in parts.items()}
    for d in depths: seen[f'layer {d}'] = {p: pooled_state(t, base, d, most=128) for p,(t,_) in parts.items()}
    return seen, tokens

def fitted(parts, seen, tokens, depths):
    "name → (router, view)"
    y = parts['train'][1]
    x = {v: a['train'] for v,a in seen.items()}
    means = Domains(np.stack([x['minilm'][np.array(y)==d].mean(0) for d in DOMAINS]), list(DOMAINS))
    near = similarity_router(means)
    out = {'similarity': (near, 'minilm'), 'classifier': (classifier_router(means, x['minilm'], y), 'minilm'), 'ridge': (ridge_router(means, x['minilm'], y), 'minilm'),
           'knn': (knn_router(means, x['minilm'], y), 'minilm'), 'static, similarity': (use_static(near, tokens), 'static'),
           'static, classifier': (use_static(classifier_router(means, x['static'], y), tokens), 'static')}
    for d in depths:
        out[f'layer {d}, ridge'] = fit_on_hidden(ridge_router, list(DOMAINS), x[f'layer {d}'], y, d), f'layer {d}'
        out[f'layer {d}, classifier'] = fit_on_hidden(classifier_router, list(DOMAINS), x[f'layer {d}'], y, d), f'layer {d}'
    return out

def with_cascades(routers, parts, seen):
    "The routers, and the static classifier before each good one"
    cheap = calibrate(routers['static, classifier'][0], seen['static']['dev'], parts['dev'][1])
    w, out = cheap(x=seen['static']['dev']), dict(routers)
    for n,(r,v) in routers.items():
        if v=='static': continue
        out[f'static, then {n}'] = cascade_router(cheap, r, choose_margin(w, r(x=seen[v]['dev']).argmax(1), agree=.98)), v
    return out

def first_choice(router, view, seen, part):
    return router(x=(seen['static'][part], seen[view][part]) if router.kind=='cascade' else seen[view][part]).argmax(1)

def took(f, clock):
    t = clock(); f()
    return clock()-t

@torch.inference_mode()
def costs(routers, base, texts, depths, rounds, clock):
    "Seconds of the steps that routes are made of, in turn, medians"
    ids = base.tokenizer(' '.join(texts), return_tensors='pt')['input_ids'][:,:128]
    prompt = base.tokenizer.decode(ids[0])
    def arithmetic(n):
        r, v = routers[n]
        at = np.ones((1, r.arrays['center' if v.startswith('layer') else 'centroids' if r.kind=='similarity' else 'prompts' if r.kind=='knn' else 'weight'].shape[-1]))
        return lambda: r(x=at)
    steps = {'prefill': lambda: base.model(input_ids=ids, use_cache=True, logits_to_keep=1), 'minilm': lambda: embed([prompt]), 'static': lambda: static_vectors([prompt], routers['static, similarity'][0].arrays)}
    steps |= {f'layer {d}': (lambda d=d: pooled_state([prompt], base, d, most=128)) for d in depths} | {n: arithmetic(n) for n,(r,v) in routers.items() if r.kind!='cascade'}
    for f in steps.values(): f()
    seconds = {k: [] for k in steps}
    for _ in range(rounds):
        for k,f in steps.items(): seconds[k].append(took(f, clock))
    return {k: statistics.median(v) for k,v in seconds.items()}

def rows(routers, parts, seen, seconds):
    "One row a router"
    right = lambda part, c: float((np.array(DOMAINS)[c]==np.array(parts[part][1])).mean())
    choice = {n: {p: first_choice(r, v, seen, p) for p in ('dev','test')} for n,(r,v) in routers.items()}
    best = max((n for n in routers if routers[n][0].kind!='cascade'), key=lambda n: right('dev', choice[n]['dev']))
    out = []
    for n,(r,v) in routers.items():
        alone = n.removeprefix('static, then ')
        cost, asked = seconds[v]+seconds[alone], 1.
        if r.kind=='cascade':
            asked = float((margin(r.part('first')(x=seen['static']['test']))<=r.params['margin']).mean())
            cost = seconds['static']+seconds['static, classifier']+asked*cost
        out.append(dict(router=n, share=round(cost/seconds['prefill'], 4), asked=round(asked, 3), dev_right=round(right('dev', choice[n]['dev']), 4),
                        right=round(right('test', choice[n]['test']), 4), agreement=round(float((choice[n]['test']==choice[best]['test']).mean()), 4)))
        if v.startswith('layer') and r.kind!='cascade': out[-1]['under_fork'] = round(seconds[alone]/seconds['prefill'], 4)
    return best, out

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', action='store_true', help='print one JSON object and nothing else')
    p.add_argument('--fast', action='store_true', help='30, 12 and 12 prompts a domain, layer 4 alone')
    p.add_argument('--train', type=int, default=600, help='prompts a domain')
    p.add_argument('--dev', type=int, default=80, help='prompts a domain')
    p.add_argument('--test', type=int, default=80, help='prompts a domain')
    p.add_argument('--chars', type=int, default=400, help='of the longest prompt')
    p.add_argument('--depths', default='2,4', help='layers whose hidden state is read')
    p.add_argument('--rounds', type=int, default=21)
    p.add_argument('--seed', type=int, default=0, help='of the split')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--cpu-clock', action='store_true', help='count processor time, for a machine that is not quiet')
    if p.parse_args().fast: p.set_defaults(train=30, dev=12, test=12, depths='4', rounds=7)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    depths, base = [int(d) for d in args.depths.split(',') if d], load_base('smollm2', 'fp32', 'cpu')
    parts = dealt(args)
    seen, tokens = views(parts, base, depths)
    routers = with_cascades(fitted(parts, seen, tokens, depths), parts, seen)
    seconds = costs(routers, base, parts['test'][0], depths, args.rounds, time.process_time if args.cpu_clock else time.perf_counter)
    best, table = rows(routers, parts, seen, seconds)
    fit = min((r for r in table if r['agreement']>=.97), key=lambda r: r['share'])
    out = dict(router_vs_prefill=fit['share'], agreement=fit['agreement'], router=fit['router'], best=best, table=table, prefill_ms=round(1e3*seconds['prefill'], 1),
               prompts={n: len(t) for n,(t,_) in parts.items()}, conditions=dict(vars(args), torch=torch.__version__, work=__doc__.split('\n\n', 1)[1]), machine=machine())
    if args.json: print(json.dumps(out, indent=1)); return
    print(f"best on development prompts: {best}; cheapest that agrees: {fit['router']}, {fit['share']:.1%} of a prefill of {out['prefill_ms']} ms, {fit['agreement']:.1%}")
    for r in table: print(f"  {r['router']:34} {r['share']:7.2%} of the prefill{'' if 'under_fork' not in r else ' (%.2f%% under a fork)' % (100*r['under_fork']):24} right {r['right']:.1%}  agrees {r['agreement']:.1%}  asked {r['asked']:.0%}")

if __name__=='__main__': main()
