"""What a route costs and is worth, measured: `python benchmarks/route.py --json` (20 minutes); `--fast` takes two.

Prompts of the training cards, `--train`, `--dev` and `--test` of each of the nine domains, dealt over its cards in
turn, none longer than `--chars` characters. Every router is fitted on the same training prompts with true domains as
labels; margins are chosen on the development prompts, for 98 % agreement there (a point more than is asked for, since
chance flatters), and they name the *best* router; the test prompts only report.

Costs are of one prompt of 128 tokens, batch 1, text in and weights out, encoder included, one step of each in turn,
medians of `--rounds` rounds; the reference in the same rounds is one forward of the base over the same 128 tokens
with a cache and logits for the last position. A hidden state after layer n costs the first n blocks; under a fork at
or above that layer the base has made it anyway, and `under_fork` is then what is left. A cascade costs its cheap
router, and its good one times the share of test prompts that are asked again. Accuracies are shares of the test
prompts, with a standard error of about 0.8 points for 720.
  router_vs_prefill   the least cost of a router that sends at least 97 % of the test prompts where the best one sends
                      them
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

# ---- prompts

def shuffled(items, rng):
    "The same in another order"
    return [items[i] for i in rng.permutation(len(items))]

def prompts_of_cards(chars, rng):
    "domain → the prompts of each of its cards, each once, none too long, shuffled"
    cards = {d: [] for d in DOMAINS}
    for name in card_names(use='train'):
        records = load(name)
        texts = dict.fromkeys(map(prompt_text, records)) # each once
        short = [t for t in texts if len(t)<=chars]
        domain = records[0]['domain']
        if short and domain in cards: cards[domain].append(shuffled(short, rng))
    return cards

def round_robin(lists):
    "The first of each list, then the second of each, and so on"
    longest = max(map(len, lists))
    return [own[i] for i in range(longest) for own in lists if i<len(own)]

def dealt(args):
    "part → texts, domains; round-robin over the cards of a domain"
    rng = np.random.default_rng(args.seed)
    sizes = dict(train=args.train, dev=args.dev, test=args.test)
    parts = {part: ([], []) for part in sizes}
    for domain,cards in prompts_of_cards(args.chars, rng).items():
        once = list(dict.fromkeys(round_robin(cards)))
        left = shuffled(once[:sum(sizes.values())], rng)
        for part,n in sizes.items():
            own, left = left[:n], left[n:]
            texts, domains = parts[part]
            texts.extend(own)
            domains.extend([domain]*len(own))
    return parts

def views(parts, base, depths):
    "name → part → vectors; and the static arrays"
    texts = {part: t for part,(t,_) in parts.items()}
    seen = {'minilm': {part: embed(t, keep=cache_dir()/'embedded') for part,t in texts.items()}}
    tokens = distil_tokens(texts['train'], seen['minilm']['train'])
    seen['static'] = {part: static_vectors(t, tokens) for part,t in texts.items()}
    for d in depths: seen[f'layer {d}'] = {part: pooled_state(t, base, d, most=128) for part,t in texts.items()}
    return seen, tokens

# ---- routers, all fitted on the same training prompts

def fitted(parts, seen, tokens, depths):
    "name → (router, view)"
    y = parts['train'][1]
    x = {view: vectors['train'] for view,vectors in seen.items()}
    of_domain = [x['minilm'][np.array(y)==d] for d in DOMAINS]
    means = Domains(np.stack([own.mean(0) for own in of_domain]), list(DOMAINS))
    near = similarity_router(means)
    out = {'similarity': (near, 'minilm'),
           'classifier': (classifier_router(means, x['minilm'], y), 'minilm'),
           'ridge': (ridge_router(means, x['minilm'], y), 'minilm'),
           'knn': (knn_router(means, x['minilm'], y), 'minilm'),
           'static, similarity': (use_static(near, tokens), 'static'),
           'static, classifier': (use_static(classifier_router(means, x['static'], y), tokens), 'static')}
    for d in depths:
        view = f'layer {d}'
        for kind,fit in (('ridge', ridge_router), ('classifier', classifier_router)):
            out[f'{view}, {kind}'] = fit_on_hidden(fit, list(DOMAINS), x[view], y, d), view
    return out

def with_cascades(routers, parts, seen):
    "The routers, and the static classifier before each good one"
    x = seen['static']['dev']
    cheap = calibrate(routers['static, classifier'][0], x, parts['dev'][1])
    weights = cheap(x=x)
    out = dict(routers)
    for name,(good,view) in routers.items():
        if view=='static': continue
        choice = good(x=seen[view]['dev']).argmax(1)
        least = choose_margin(weights, choice, agree=.98)
        out[f'static, then {name}'] = cascade_router(cheap, good, least), view
    return out

def first_choice(router, view, seen, part):
    "The domain that each prompt of a part is sent to"
    x = seen[view][part]
    if router.kind=='cascade': x = seen['static'][part], x
    return router(x=x).argmax(1)

# ---- costs

def took(f, clock):
    "Seconds of one call"
    began = clock()
    f()
    return clock()-began

def width(router, view):
    "How many numbers a router reads of a prompt"
    kinds = dict(similarity='centroids', knn='prompts')
    array = 'center' if view.startswith('layer') else kinds.get(router.kind, 'weight')
    return router.arrays[array].shape[-1]

def weighing(router, view):
    "The step of a router itself: from the vector of a prompt to weights"
    x = np.ones((1, width(router, view)))
    return lambda: router(x=x)

def steps_of_routes(routers, base, texts, depths):
    "All steps on one prompt of 128 tokens: the base's prefill, a vector from text in each view, each router's weights"
    ids = base.tokenizer(' '.join(texts), return_tensors='pt')['input_ids'][:,:128]
    prompt = base.tokenizer.decode(ids[0])
    tokens = routers['static, similarity'][0].arrays
    def hidden(d): return lambda: pooled_state([prompt], base, d, most=128)
    steps = dict(prefill=lambda: base.model(input_ids=ids, use_cache=True, logits_to_keep=1),
                 minilm=lambda: embed([prompt]),
                 static=lambda: static_vectors([prompt], tokens))
    steps |= {f'layer {d}': hidden(d) for d in depths}
    return steps | {name: weighing(r, view) for name,(r,view) in routers.items() if r.kind!='cascade'}

@torch.inference_mode()
def costs(routers, base, texts, depths, rounds, clock):
    "Seconds of the steps that routes are made of, in turn, medians; each runs once before"
    steps = steps_of_routes(routers, base, texts, depths)
    for f in steps.values(): f()
    seconds = {k: [] for k in steps}
    for _ in range(rounds):
        for k,f in steps.items(): seconds[k].append(took(f, clock))
    return {k: statistics.median(v) for k,v in seconds.items()}

# ---- the table

def right(parts, part, choice):
    "Share of the prompts of a part that are sent to their own domain"
    return float((np.array(DOMAINS)[choice]==np.array(parts[part][1])).mean())

def asked_again(router, seen):
    "Share of the test prompts that a router passes on to a good one: all, unless it is a cascade"
    if router.kind!='cascade': return 1.
    sure = margin(router.part('first')(x=seen['static']['test']))
    return float((sure<=router.params['margin']).mean())

def seconds_of(name, router, view, seconds, asked):
    "Seconds of a whole route, from text to weights; of a cascade, its good router for those that are asked again"
    good = seconds[view]+seconds[name.removeprefix('static, then ')]
    if router.kind!='cascade': return good
    return seconds['static']+seconds['static, classifier']+asked*good

def rows(routers, parts, seen, seconds):
    "The best router on development prompts, and one row a router"
    choice = {n: {part: first_choice(r, v, seen, part) for part in ('dev','test')} for n,(r,v) in routers.items()}
    dev_right = {n: right(parts, 'dev', own['dev']) for n,own in choice.items()}
    best = max((n for n,(r,_) in routers.items() if r.kind!='cascade'), key=dev_right.get)
    out = []
    for n,(r,v) in routers.items():
        asked = asked_again(r, seen)
        cost = seconds_of(n, r, v, seconds, asked)
        test = choice[n]['test']
        agreement = float((test==choice[best]['test']).mean())
        row = dict(router=n, share=round(cost/seconds['prefill'], 4), asked=round(asked, 3),
                   dev_right=round(dev_right[n], 4), right=round(right(parts, 'test', test), 4),
                   agreement=round(agreement, 4))
        if v.startswith('layer') and r.kind!='cascade': row['under_fork'] = round(seconds[n]/seconds['prefill'], 4)
        out.append(row)
    return best, out

def options():
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
    return p.parse_args()

def measure(args):
    "The best router, the table, and the seconds of all steps; how many prompts each part has"
    depths = [int(d) for d in args.depths.split(',') if d]
    base = load_base('smollm2', 'fp32', 'cpu')
    parts = dealt(args)
    seen, tokens = views(parts, base, depths)
    routers = with_cascades(fitted(parts, seen, tokens, depths), parts, seen)
    clock = time.process_time if args.cpu_clock else time.perf_counter
    seconds = costs(routers, base, parts['test'][0], depths, args.rounds, clock)
    best, table = rows(routers, parts, seen, seconds)
    return best, table, seconds, {part: len(texts) for part,(texts,_) in parts.items()}

def show(out):
    "A table"
    print(f"best on development prompts: {out['best']}; cheapest that agrees: {out['router']}, "
          f"{out['router_vs_prefill']:.1%} of a prefill of {out['prefill_ms']} ms, {out['agreement']:.1%}")
    for r in out['table']:
        fork = f" ({100*r['under_fork']:.2f}% under a fork)" if 'under_fork' in r else ''
        print(f"  {r['router']:34} {r['share']:7.2%} of the prefill{fork:24} right {r['right']:.1%}  "
              f"agrees {r['agreement']:.1%}  asked {r['asked']:.0%}")

def main():
    args = options()
    torch.set_num_threads(args.threads)
    best, table, seconds, prompts = measure(args)
    agreeing = [r for r in table if r['agreement']>=.97]
    cheapest = min(agreeing, key=lambda r: r['share'])
    conditions = dict(vars(args), torch=torch.__version__, work=__doc__.split('\n\n', 1)[1])
    out = dict(router_vs_prefill=cheapest['share'], agreement=cheapest['agreement'], router=cheapest['router'],
               best=best, table=table, prefill_ms=round(1e3*seconds['prefill'], 1), prompts=prompts,
               conditions=conditions, machine=machine())
    if args.json: print(json.dumps(out, indent=1))
    else: show(out)

if __name__=='__main__': main()
