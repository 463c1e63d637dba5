"""Two threads of torch beside a busy process, measured: `python benchmarks/busy.py --json`.

Some ten minutes on two cores.

A thread of torch that waits for the other one spins, by default of its OpenMP library, and a core that spins is lost
to whatever else runs on it. With OMP_WAIT_POLICY=PASSIVE it sleeps instead, and with GOMP_SPINCOUNT=1000 beside it,
it spins for a moment before. hydramoe sets both unless the user has set the first. Measured: tokens a second of
scoring (`response_losses` with nine experts, each row its own), of training (steps of nine experts, fused) and of one
answer, token by token; the same work in a process of its own each time; the policies in turn, round after round, on a
quiet machine and beside one process that keeps a core busy; medians.
  score_quiet, train_quiet, answer_quiet    hydramoe's ÷ the library's own default, nothing else running: what it
                                            costs
  score_busy, train_busy, answer_busy       the same beside a busy process: what it brings
  asleep_*                                  the same for PASSIVE alone
`--base tiny --rows 2 --rounds 1` takes seconds, to see that it works.
"""
import argparse, json, os, statistics, subprocess, sys, time, warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))

POLICIES = dict(ours=dict(OMP_WAIT_POLICY='PASSIVE', GOMP_SPINCOUNT='1000'),
                asleep=dict(OMP_WAIT_POLICY='PASSIVE'),
                default={})
WORKS = ('score', 'train', 'answer')
MOMENTS = ('quiet', 'busy')
NEIGHBOUR = 'while True: pass'

def options():
    how = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=how)
    p.add_argument('--base', default='smollm2', help="'smollm2', 'tiny', a path or a Hub id")
    p.add_argument('--quant', default='nf4', help='precision of the base')
    p.add_argument('--domains', type=int, default=9, help='experts')
    p.add_argument('--rows', type=int, default=4, help='rows of each expert')
    p.add_argument('--length', type=int, default=128, help='tokens of the longest prompt, and of the longest answer')
    p.add_argument('--threads', type=int, default=2, help='of torch')
    p.add_argument('--rounds', type=int, default=3, help='times that each measurement is taken, in turn')
    p.add_argument('--json', action='store_true')
    p.add_argument('--work', choices=WORKS, help=argparse.SUPPRESS)
    return p.parse_args()

def prepared(a):
    "A gated model and the training rows of each domain"
    import torch
    from train import rows_of
    from hydramoe.models.load import load_base
    from hydramoe.experts.stack import LoraSpec
    from hydramoe.experts.model import gated
    torch.set_num_threads(a.threads)
    a.held = 1
    base = load_base(a.base, a.quant)
    rows = rows_of(a, base)[0]
    model = gated(base, slots=len(rows), spec=LoraSpec(rank=8, alpha=16))
    for e,name in enumerate(rows): model.stack.init_expert(e, 0, name)
    return model, rows

def score(a):
    "Seconds for the loss of every row under its own expert, after two rows that don't count; tokens of all rows"
    import torch
    from hydramoe.experts.score import response_losses
    model, rows = prepared(a)
    examples = [x for own in rows.values() for x in own]
    each = torch.eye(len(rows))
    gates = torch.cat([each[e].expand(len(own), -1) for e,own in enumerate(rows.values())])
    response_losses(model, examples[:2], gates[:2])
    began = time.perf_counter()
    response_losses(model, examples, gates)
    took = time.perf_counter()-began
    return took, sum(len(x.ids) for x in examples)

def train(a):
    "Seconds for one pass over the rows, all experts fused, after a first step; tokens of all other steps"
    from hydramoe.experts.train import Optimizers, TrainSpec, fit_step, plan_steps
    from hydramoe.experts.train import training_mode
    model, rows = prepared(a)
    names = list(rows)
    spec = TrainSpec(rows=1., warmup=2)
    steps = plan_steps(list(rows.values()), names, spec)
    with training_mode(model, False):
        opt = Optimizers(model.stack, [len(steps)]*len(names), spec)
        fit_step(model, opt, steps[0], 0, names)
        began = time.perf_counter()
        for k,step in enumerate(steps[1:], 1): fit_step(model, opt, step, k, names)
    took = time.perf_counter()-began
    return took, sum(len(x.ids) for step in steps[1:] for _,x in step)

def answer(a):
    "Seconds for the tokens of one answer, after an answer of two that doesn't count; how many tokens"
    import torch
    from hydramoe.experts.gates import one_hot
    model, rows = prepared(a)
    prompt = next(iter(rows.values()))[0].ids[:32]
    ids = torch.tensor([prompt])
    def tokens(n):
        model.generate(ids, attention_mask=torch.ones_like(ids), gates=one_hot([0], len(rows)), do_sample=False,
                       min_new_tokens=n, max_new_tokens=n)
    tokens(2)
    began = time.perf_counter()
    tokens(a.length//4)
    took = time.perf_counter()-began
    return took, a.length//4

def environment(policy):
    "The user's environment with the variables of a policy in place of the user's own"
    rest = {k: v for k,v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
    return rest | dict(HYDRAMOE_QUIET='1', TRANSFORMERS_VERBOSITY='error') | POLICIES[policy]

def measured(work, policy, busy):
    "Tokens a second of one piece of work in a process of its own"
    command = [sys.executable, __file__, *sys.argv[1:], '--work', work]
    env = environment(policy)
    neighbour = subprocess.Popen([sys.executable, '-c', NEIGHBOUR]) if busy else None
    try: out = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout
    finally:
        if neighbour:
            neighbour.kill()
            neighbour.wait()
    return float(out.split()[-1])

def every_round(rounds):
    "(work, moment, policy) → tokens a second in each round"
    took = {}
    for _ in range(rounds):
        for work in WORKS:
            for when in MOMENTS:
                for policy in POLICIES:
                    speed = measured(work, policy, when=='busy')
                    took.setdefault((work, when, policy), []).append(speed)
    return took

def against_default(speed, policy):
    "A policy's speed ÷ the default's, for each work and moment"
    cases = [(work, when) for work in WORKS for when in MOMENTS]
    return {f'{work}_{when}': speed[work, when, policy]/speed[work, when, 'default'] for work,when in cases}

def one_work(a):
    "Do one piece of work and print its tokens a second"
    import torch # before hydramoe, which would set the policy
    warnings.simplefilter('ignore')
    took, n = dict(score=score, train=train, answer=answer)[a.work](a)
    print(n/took)

def main():
    a = options()
    if a.work: return one_work(a)
    from hydramoe.foundations.core import machine, versions
    took = every_round(a.rounds)
    speed = {case: statistics.median(rounds) for case,rounds in took.items()}
    asleep = against_default(speed, 'asleep')
    ratios = against_default(speed, 'ours') | {f'asleep_{name}': ratio for name,ratio in asleep.items()}
    if not a.json:
        for (work, when, policy),v in speed.items(): print(f'{work} {when} {policy}: {v:.0f} tokens/s')
        print(ratios)
        return
    settings = {k: v for k,v in vars(a).items() if k not in ('work', 'json')}
    conditions = settings | dict(versions=versions('torch', 'transformers'), machine=machine())
    rounded = {' '.join(case): [round(x, 1) for x in rounds] for case,rounds in took.items()}
    print(json.dumps(ratios | dict(tokens_a_second=rounded, conditions=conditions), indent=1))

if __name__=='__main__': main()
