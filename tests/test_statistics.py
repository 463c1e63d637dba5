"Intervals, tests and power against scipy, against each other, and counted in worlds whose truth is known"
import itertools, math, subprocess, sys
from dataclasses import replace

import numpy as np, pytest
from scipy import stats

from hydramoe.foundations.accuracy import accuracy_difference, mcnemar_p, wilson
from hydramoe.foundations.core import HydraError, rng
from hydramoe.foundations.power import (
    Design, detectable_text, least_detectable, paired_spread, power_at, prompts_needed, spread_of_interval,
    standardised_difference)
from hydramoe.foundations.statistics import (
    Difference, correct, difference_record, difference_text, domain_nll, half_interval, holm, interval_text,
    is_significant, log_difference, log_macro_draws, macro_weights, mean_of_runs, paired_bootstrap, paired_difference,
    perplexity, sign_flip_p)
from helpers import root


def planted(seed=0, per=40, change=-.02, runs=None, noise=.03, luck=.1):
    "Total nll under a and b, domains and tokens; (R,N) if runs are asked for"
    g = rng(seed, 'planted for tests')
    domains = np.repeat(['x', 'y', 'z'], per)
    tokens = g.integers(5, 60, 3*per)
    difficulty = g.gamma(8, .2, 3*per)
    by_prompt = change+g.normal(0, luck, 3*per)
    if runs is None: return (difficulty+by_prompt)*tokens, difficulty*tokens, domains.tolist(), tokens
    apart = by_prompt+g.normal(0, noise, (runs, 1))+g.normal(0, .03, (runs, 3*per))
    return (difficulty+apart)*tokens, np.tile(difficulty*tokens, (runs, 1)), domains.tolist(), tokens

def flat(x): return x, np.zeros(len(x)), ['one']*len(x), np.ones(len(x)) # a single domain of equal records


# ---- perplexity and the bootstrap

def test_perplexity_weighs_tokens_inside_and_domains_across():
    p = perplexity(np.array([math.log(4)*3, math.log(4)*1, math.log(9)*50]), np.array([3, 1, 50]), ['a', 'a', 'b'])
    assert p['a']==pytest.approx(4)
    assert p['b']==pytest.approx(9)
    assert p['macro']==pytest.approx(6)

def test_weights_and_domains_say_the_same():
    a, b, domains, tokens = planted()
    macro = domain_nll(a, tokens, domains)['macro']
    assert a@macro_weights(tokens, domains)==pytest.approx(macro)
    assert log_difference(a, b, domains, tokens)==pytest.approx(macro-domain_nll(b, tokens, domains)['macro'])

def test_bootstrap_draws_are_shared_between_systems():
    a, b, domains, tokens = planted()
    d = log_macro_draws(np.stack([a, a*1.01, b]), tokens, domains, 50)
    np.testing.assert_allclose(d[1], d[0]*1.01)
    np.testing.assert_allclose(paired_bootstrap(a+tokens*.02, a, domains, tokens), [100*math.expm1(.02)]*3)

def test_the_interval_is_scipys_where_scipy_has_one():
    x = rng(0, 'skewed').gamma(2, .01, 60)
    _, low, high = paired_bootstrap(*flat(x), draws=9999)
    scipys = stats.bootstrap((x,), np.mean, n_resamples=9999, method='percentile', rng=rng(1, 'scipy'))
    theirs = scipys.confidence_interval
    spread = theirs.high-theirs.low
    assert np.log1p(low/100)==pytest.approx(theirs.low, abs=.05*spread)
    assert np.log1p(high/100)==pytest.approx(theirs.high, abs=.05*spread)

def swapped(percents): # what b against a must be
    point, low, high = -np.log1p(np.array(percents)/100)
    return [point, high, low]

def test_swapping_the_systems_flips_the_sign():
    a, b, domains, tokens = planted()
    ab, ba = paired_bootstrap(a, b, domains, tokens), paired_bootstrap(b, a, domains, tokens)
    np.testing.assert_allclose(np.log1p(np.array(ba)/100), swapped(ab), atol=1e-12)
    assert sign_flip_p(a, b, domains, tokens)==sign_flip_p(b, a, domains, tokens)
    a, b, domains, tokens = planted(runs=3)
    ab, ba = paired_difference(a, b, domains, tokens), paired_difference(b, a, domains, tokens)
    np.testing.assert_allclose(np.log1p(np.array(ba[:3])/100), swapped(ab[:3]), atol=1e-12)
    assert ab.p==pytest.approx(ba.p)

@pytest.mark.parametrize('runs', [None, 3])
def test_the_order_of_records_does_not_matter(runs):
    a, b, domains, tokens = planted(runs=runs)
    mixed = rng(0, 'order').permutation(len(tokens))
    other = a[..., mixed], b[..., mixed], np.array(domains)[mixed].tolist(), tokens[mixed]
    d, e = paired_difference(a, b, domains, tokens, draws=9999), paired_difference(*other, draws=9999)
    assert e.percent==pytest.approx(d.percent)
    np.testing.assert_allclose(e[1:3], d[1:3], atol=.06*(d.high-d.low)) # other draws of the same records
    assert e.p==pytest.approx(d.p, abs=.02)

def test_a_spread_does_not_depend_on_the_order():
    a, b, domains, tokens = planted()
    mixed = rng(0, 'order').permutation(len(tokens))
    other = a[mixed], b[mixed], np.array(domains)[mixed].tolist(), tokens[mixed]
    assert paired_spread(*other)==pytest.approx(paired_spread(a, b, domains, tokens))

def test_all_records_twice_is_the_same_difference_and_less_doubt():
    a, b, domains, tokens = planted()
    once = paired_difference(a, b, domains, tokens)
    twice = paired_difference(np.tile(a, 2), np.tile(b, 2), domains*2, np.tile(tokens, 2))
    assert twice.percent==pytest.approx(once.percent)
    assert (twice.high-twice.low)/(once.high-once.low)==pytest.approx(1/math.sqrt(2), rel=.1)

def test_a_harder_domain_weighs_as_much_as_another():
    a, b, domains, tokens = planted()
    longer = np.where(np.array(domains)=='x', 10, 1)
    harder = log_difference(a*longer, b*longer, domains, tokens*longer)
    assert harder==pytest.approx(log_difference(a, b, domains, tokens))

def covered(seed, per, **how):
    d = paired_difference(*planted(seed, per, **how), draws=300, seed=seed)
    return d.low <= 100*math.expm1(-.02) <= d.high

def test_an_interval_over_prompts_covers():
    assert .91 <= np.mean([covered(s, 40) for s in range(300)]) <= .98

def test_an_interval_by_too_few_prompts_does_not():
    assert np.mean([covered(s, 4) for s in range(300)]) < .9 # as the lesson says


# ---- runs

def test_one_run_is_the_interval_of_one_level():
    a, b, domains, tokens = planted()
    d = paired_difference(a, b, domains, tokens, seed=3)
    assert d[:3]==paired_bootstrap(a, b, domains, tokens, seed=3)
    assert d.runs==1
    assert paired_difference(a[None], b[None], domains, tokens, seed=3)==d
    assert 'training noise is held fixed' in interval_text(d.runs)
    assert 'fixed' not in interval_text(3)

@pytest.mark.parametrize('runs', [2, 3, 5])
@pytest.mark.parametrize('noise', [0., .03])
def test_an_interval_over_runs_covers(runs, noise):
    assert .925 <= np.mean([covered(s, 20, runs=runs, noise=noise) for s in range(300)])

def test_one_run_does_not_cover_what_training_adds():
    def one_of(seed):
        a, b, domains, tokens = planted(seed, 40, runs=1)
        d = paired_difference(a, b, domains, tokens, draws=300)
        return d.low <= 100*math.expm1(-.02) <= d.high
    assert np.mean([one_of(s) for s in range(200)]) < .75

def test_runs_alone_are_students_t():
    "No spread from prompt to prompt: what is left is the t interval of the runs"
    tokens, domains = np.full(12, 7), list('xxxxyyyyzzzz')
    b = np.full((4, 12), 14.)
    a = b+7*np.array([[-.01], [-.03], [.005], [-.02]])
    d = paired_difference(a, b, domains, tokens)
    theirs = stats.ttest_1samp([-.01, -.03, .005, -.02], 0)
    np.testing.assert_allclose(np.log1p(np.array(d[1:3])/100), theirs.confidence_interval(), rtol=1e-6)
    assert d.p==pytest.approx(theirs.pvalue)
    by_means = mean_of_runs([100*math.expm1(x) for x in (-.01, -.03, .005, -.02)])
    np.testing.assert_allclose(by_means, d, rtol=1e-6)

def test_p_is_where_the_interval_touches_zero():
    a, b, domains, tokens = planted(runs=4)
    d = paired_difference(a, b, domains, tokens)
    at = paired_difference(a, b, domains, tokens, level=1-d.p)
    assert min(abs(at.low), abs(at.high)) < 1e-6
    assert paired_difference(a, a, domains, tokens).p==1.

def test_parts_add_as_sides_of_a_triangle():
    one, other = half_interval(np.array([.3]), [4], .05), half_interval(np.array([.4]), [9], .05)
    assert half_interval(np.array([.3, .4]), [4, 9], .05)==pytest.approx(math.hypot(one, other))

def test_what_cannot_be_compared_is_refused():
    a, b, domains, tokens = planted(runs=3)
    with pytest.raises(HydraError, match='3 runs of a and 2 of b'): paired_difference(a, b[:2], domains, tokens)
    with pytest.raises(HydraError, match='token counts'): paired_difference(a, b, domains[1:], tokens)
    with pytest.raises(HydraError, match='b has losses that are not finite'):
        paired_difference(a, b*np.nan, domains, tokens)
    with pytest.raises(HydraError, match='at least two'): mean_of_runs([1.])


# ---- p-values

def test_sign_flips_are_all_flips_of_a_small_set():
    x = np.array([.3, -.1, .5, .2, .45, -.05, .3, .1])
    sums = [abs(np.dot(s, x)) for s in itertools.product([-1, 1], repeat=8)]
    exact = np.mean(np.array(sums) >= abs(x.sum())-1e-12)
    assert sign_flip_p(*flat(x))==pytest.approx(exact, abs=.01)

def test_sign_flips_agree_with_scipy():
    x = rng(0, 'x').normal(.3, 1, 30)
    theirs = stats.permutation_test((x,), np.mean, permutation_type='samples', n_resamples=9999, rng=rng(1, 'scipy'))
    assert sign_flip_p(*flat(x))==pytest.approx(theirs.pvalue, abs=.015)

def test_a_p_value_is_never_zero_and_one_where_nothing_differs():
    a, b, domains, tokens = planted()
    assert sign_flip_p(a+tokens, a, domains, tokens, flips=499)==1/500
    assert sign_flip_p(a, a, domains, tokens, flips=499)==1

def test_blocks_of_flips_are_all_counted():
    a, b, domains, tokens = planted()
    assert sign_flip_p(a+tokens, a, domains, tokens, flips=2500)==1/2501

def test_false_alarms_are_as_rare_as_claimed():
    p = [sign_flip_p(*planted(s, 12, change=0.), flips=399) for s in range(500)]
    assert .025 <= np.mean(np.array(p)<=.05) <= .08


# ---- many comparisons

def step_down(p, alpha): # Holm's procedure as he wrote it: the smallest first, until one fails
    rejected = set()
    for k, i in enumerate(np.argsort(p, kind='stable')):
        if p[i] > alpha/(len(p)-k): break
        rejected.add(int(i))
    return rejected

@pytest.mark.parametrize('seed', range(20))
def test_holm_rejects_what_his_procedure_rejects(seed):
    p = rng(seed, 'p').random(9)**3
    for alpha in (.01, .05, .2): assert {int(i) for i in np.flatnonzero(holm(p)<=alpha)}==step_down(p, alpha)

def test_holm_lies_between_benjamini_hochberg_and_bonferroni():
    p = rng(0, 'p').random(12)**2
    assert (holm(p) <= np.minimum(1, 12*p)+1e-15).all()
    assert (holm(p) >= stats.false_discovery_control(p)-1e-15).all()
    assert holm([.03]).tolist()==[.03]
    assert holm([]).tolist()==[]

def test_holm_does_not_depend_on_the_order():
    p = rng(0, 'p').random(12)
    mixed = rng(0, 'order').permutation(12)
    np.testing.assert_array_equal(holm(p[mixed]), holm(p)[mixed])

def test_a_star_needs_p_and_interval():
    clear = Difference(-2., -3., -1., .01)
    assert is_significant(clear)
    assert difference_text(clear)=='-2.0 % [-3.0, -1.0] *'
    assert is_significant(Difference(2., 1., 3., .01))
    for d in (clear._replace(p=.06), clear._replace(p=None), clear._replace(high=.5)): assert not is_significant(d)
    assert difference_text(clear[:3], 'points')=='-2.0 points [-3.0, -1.0]'
    assert difference_record(clear)==dict(percent=-2., lo=-3., hi=-1., p=.01, runs=1)

def test_correcting_changes_p_alone():
    family = {'a': Difference(-2., -3., -1., .03), 'b': Difference(-1., -2., -.1, .04)}
    corrected = correct(family)
    assert [d.p for d in corrected.values()]==[.06, .06]
    assert correct({})=={}
    assert all(corrected[n][:3]==family[n][:3] for n in family)
    with pytest.raises(HydraError, match='no p-value of c'): correct(dict(family, c=Difference(0., 0., 0.)))
    with pytest.raises(HydraError, match='from 0 to 1'): holm([.5, float('nan')])


# ---- accuracy

@pytest.mark.parametrize('right, n', [(0, 10), (10, 10), (3, 7), (180, 200)])
def test_wilson_is_the_score_test_turned_round(right, n):
    share, low, high = wilson(right, n)
    z = stats.norm.ppf(.975)
    for end in (low, high):
        if 0<end<1: assert abs(share-end)/math.sqrt(end*(1-end)/n)==pytest.approx(z)
    assert wilson(n-right, n)[1:]==pytest.approx((1-high, 1-low))

def test_mcnemar_is_the_binomial_test_of_what_differs():
    a = np.array([1]*9+[0]*2+[1]*20+[0]*5)
    b = np.array([0]*9+[1]*2+[1]*20+[0]*5)
    assert mcnemar_p(a, b)==pytest.approx(stats.binomtest(9, 11).pvalue)
    assert mcnemar_p(a, b)==mcnemar_p(b, a)
    assert mcnemar_p(a, a)==1.

def newcombe(r, s, t, u): # both right, only a, only b, neither: method 10 as it is written for a table of counts
    n = r+s+t+u
    p1, p2 = (r+s)/n, (r+t)/n
    (l1, u1), (l2, u2) = (stats.binomtest(k, n).proportion_ci(method='wilson') for k in (r+s, r+t))
    A, B = (r+s)*(t+u)*(r+t)*(s+u), r*u-s*t
    if B>n/2: C = B-n/2
    else: C = 0 if B>=0 else B
    phi = C/math.sqrt(A) if A else 0
    low = p1-p2-math.sqrt((p1-l1)**2-2*phi*(p1-l1)*(u2-p2)+(u2-p2)**2)
    high = p1-p2+math.sqrt((u1-p1)**2-2*phi*(u1-p1)*(p2-l2)+(p2-l2)**2)
    return 100*low, 100*high

TABLES = [(36, 12, 2, 0), (14, 5, 0, 22), (10, 15, 5, 20), (6, 4, 4, 6), (1, 1, 7, 12), (9, 0, 0, 0)]

@pytest.mark.parametrize('table', TABLES)
def test_newcombe_by_counts(table):
    a, b = np.repeat([1, 1, 0, 0], table), np.repeat([1, 0, 1, 0], table)
    d = accuracy_difference(a, b)
    assert d[1:3]==pytest.approx(newcombe(*table))
    assert d.percent==pytest.approx(100*(table[1]-table[2])/sum(table))
    e = accuracy_difference(b, a)
    assert (e.percent, e.low, e.high, e.p)==pytest.approx((-d.percent, -d.high, -d.low, d.p))

def test_an_accuracy_interval_covers_and_its_test_is_careful():
    held, alarms = [], []
    for seed in range(400):
        kinds = rng(seed, 'kinds').choice(4, 40, p=[.5, .15, .15, .2])
        d = accuracy_difference(np.isin(kinds, (0, 1)), np.isin(kinds, (0, 2)))
        held.append(d.low<=0<=d.high)
        alarms.append(d.p<=.05)
    assert .93 <= np.mean(held)
    assert np.mean(alarms) <= .06

def test_answers_that_are_none_are_refused():
    with pytest.raises(HydraError, match='right and wrong'): mcnemar_p([.5, 1], [1, 0])
    with pytest.raises(HydraError, match='the same items'): accuracy_difference([1, 0, 1], [1, 0])
    with pytest.raises(HydraError, match='at least one item'): wilson(0, 0)


# ---- power

def test_the_spread_predicts_the_standard_error():
    worlds = [planted(s, 30) for s in range(200)]
    predicted = np.mean([paired_spread(*w) for w in worlds])/math.sqrt(90)
    assert np.std([log_difference(*w) for w in worlds])==pytest.approx(predicted, rel=.15)

def test_effect_size_is_the_paired_t_statistic_over_root_n():
    x = rng(0, 'x').normal(.3, 1, 30)
    t = stats.ttest_1samp(x, 0).statistic
    assert standardised_difference(*flat(x))==pytest.approx(t/math.sqrt(30))

def test_a_spread_comes_back_out_of_an_interval():
    a, b, domains, tokens = planted(per=150)
    _, low, high = paired_bootstrap(a, b, domains, tokens, draws=5000)
    assert spread_of_interval(low, high, 450)==pytest.approx(paired_spread(a, b, domains, tokens), rel=.06)

def test_of_one_run_the_least_difference_is_the_textbooks():
    design = Design(.1, 50, 9)
    textbook = (stats.norm.ppf(.975)+stats.norm.ppf(.8))*.1/math.sqrt(450)
    assert least_detectable(design)==pytest.approx(100*math.expm1(textbook), rel=1e-4)
    assert power_at(design, 0.)==pytest.approx(.05)

def test_of_runs_alone_the_power_is_that_of_students_t():
    "No spread from prompt to prompt: the noncentral t distribution"
    design = Design(0., 50, 9, runs=4, run_spread=.01)
    for effect in (0., .01, .02):
        far = stats.nct.sf(stats.t.ppf(.975, 3), 3, effect/.005)+stats.nct.cdf(-stats.t.ppf(.975, 3), 3, effect/.005)
        assert power_at(design, 100*math.expm1(effect))==pytest.approx(far, abs=.005)

def detected(seed, change, runs):
    d = paired_difference(*planted(seed, 40, change=change, runs=runs, noise=.02), draws=200, seed=seed)
    return d.low>0 or d.high<0

@pytest.mark.parametrize('runs', [3, 6])
def test_power_is_what_is_counted(runs):
    worlds = [planted(s, 40, runs=1, luck=.1) for s in range(30)]
    spreads = [paired_spread(a[0], b[0], d, t) for a, b, d, t in worlds]
    design = Design(np.mean(spreads), 40, 3, runs, run_spread=.02)
    least = math.log1p(least_detectable(design)/100)
    assert np.mean([detected(s, -least, runs) for s in range(300)])==pytest.approx(.8, abs=.08)

def test_more_of_anything_detects_less_and_more_comparisons_more():
    design = Design(.1, 20, 9, 3, .005)
    least = least_detectable(design)
    assert least_detectable(replace(design, prompts=80)) < least > least_detectable(replace(design, runs=6))
    assert least_detectable(replace(design, comparisons=20)) > least < least_detectable(replace(design, power=.95))

def test_the_number_of_prompts_is_the_least_that_is_enough():
    for design in (Design(.1, 10, 9), Design(.1, 10, 9, 4, .003)):
        n = prompts_needed(design, 1.5)
        assert least_detectable(replace(design, prompts=n)) <= 1.5 < least_detectable(replace(design, prompts=n-1))
    assert prompts_needed(Design(.1, 10, 9, 3, .02), 1.) is None
    assert prompts_needed(Design(.1, 10, 9), 0.) is None

def test_the_sentence_says_what_was_computed():
    design = Design(.1, 20, 9, 3, .005, comparisons=4)
    text = detectable_text(design)
    assert f'{least_detectable(design):.2g} %' in text
    assert '20 prompts in each of 9 domains' in text
    assert '3 training runs' in text
    assert 'corrected for 4 comparisons' in text
    assert 'held fixed' not in text

IMPOSSIBLE = [(dict(prompts=1), 'at least 2'), (dict(domains=0), 'domains=0'), (dict(power=1.), 'power=1'),
              (dict(spread=-1.), 'spread=-1')]

@pytest.mark.parametrize('wrong, says', IMPOSSIBLE)
def test_a_design_that_cannot_be_is_refused(wrong, says):
    with pytest.raises(HydraError, match=says): replace(Design(.1, 20, 9), **wrong)

def test_a_domain_of_one_prompt_has_no_spread():
    with pytest.raises(HydraError, match="domain 'z'"):
        paired_spread(np.arange(3.), np.zeros(3), list('xxz'), np.ones(3))


def test_a_table_of_systems_is_one_family():
    "The reference is compared with nothing; all others are corrected together"
    from hydramoe.experts.score import Losses
    from hydramoe.proof.compare import macro_differences
    _, b, domains, tokens = planted(per=12)
    offsets = np.cumsum([0, *tokens])
    by_token = np.repeat(b/tokens, tokens)
    losses = Losses(by_token[None], offsets, [str(i) for i in range(len(tokens))], domains, ['b'])
    systems = {'b': by_token}
    for i, change in enumerate((-.05, -.02, 0.)):
        luck = rng(i, 'systems').normal(change, .1, len(tokens))
        systems[f's{i}'] = by_token+np.repeat(luck, tokens)
    found = macro_differences(losses, systems, 'b', 500, 0)
    def compared(name): return macro_differences(losses, {'b': by_token, name: systems[name]}, 'b', 500, 0)[name]
    alone = {n: compared(n) for n in systems if n!='b'}
    assert [found[n].p for n in alone]==holm([d.p for d in alone.values()]).tolist()
    assert all(found[n][:3]==alone[n][:3] for n in alone)
    assert list(found)==list(systems)
    assert found['b'][:4]==(0., 0., 0., 1.)
    assert not is_significant(found['b'])

def test_statistics_need_no_torch():
    imports = 'import sys, hydramoe.foundations.power, hydramoe.foundations.accuracy'
    code = imports+'; assert not {"torch", "scipy"} & sys.modules.keys()'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=root)


@pytest.mark.slow
@pytest.mark.parametrize('per', [20, 40])
def test_bootstrap_coverage_with_unequal_records(per):
    "Records of unequal length, heavy tails, nine domains: the truth is the difference of the whole world"
    g = rng(0, 'world')
    n = 9*5000
    tokens = g.integers(5, 300, n)
    domains = np.repeat(list('abcdefghi'), 5000)
    b = tokens*g.gamma(6, .25, n)
    a = b*g.normal(.99, .08, n)
    truth = paired_bootstrap(a, b, domains.tolist(), tokens, draws=2)[0]
    def covers(s):
        at = np.concatenate([rng(s, d).choice(np.flatnonzero(domains==d), per) for d in 'abcdefghi'])
        lo, hi = paired_bootstrap(a[at], b[at], domains[at].tolist(), tokens[at], draws=500, seed=s)[1:]
        return lo<=truth<=hi
    assert .90 <= np.mean([covers(s) for s in range(400)]) <= .985
