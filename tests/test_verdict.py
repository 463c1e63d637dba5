"Should you build a mixture? Worlds whose answer is known, the command on experts of noise, and the page"
import json, shlex, shutil
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest

from hydramoe.foundations.core import HydraError, rng
from hydramoe.foundations.files import read_json, write_jsonl
from hydramoe.domains.examples import lesson_texts
from hydramoe.experts.score import Losses, hindsight, macro_nll, pick
from hydramoe.hydra import Hydra
from hydramoe.hydra.adopt import adopt
from hydramoe.proof.outlook import outlook_answer
from hydramoe.proof.compare import macro_differences
from hydramoe.proof.verdict import ANSWERS, Evidence, decide, foreseen, gather_evidence, smallest_seen
from hydramoe.proof.verdict import one_adapter, verdict, verdict_sentences, verdict_systems
from hydramoe.proof.verdict_page import expert_changes, find_stage, held_out_rows, judge_hydra, run_single, score_hydra
from helpers import TINY, files_in, here
from hydras import NAMES, TEXTS, by_hand

EXPERTS = ['code', 'law', 'math', 'verse']

# ---- planted worlds

def world(seed, gain=.2, everywhere=.1, luck=.1, right=1., uniform=0., per=20, names=EXPERTS):
    """Held-out losses of four experts, their uniform mix and a router that is right for a share of the rows; and who
    is at home"""
    g = rng(seed, 'world')
    home = np.repeat(np.arange(4), per)
    sizes = g.integers(10, 40, len(home))
    base = np.repeat(g.gamma(8, .2, len(home)), sizes)
    own = home==np.arange(4)[:,None]
    level = np.repeat(g.normal(0, luck, own.shape)-everywhere-gain*own, sizes, axis=1)
    experts = base+level+g.normal(0, .3, level.shape)
    routed = np.where(g.random(len(home))<right, home, g.integers(0, 4, len(home)))
    routed = np.take_along_axis(experts, np.repeat(routed, sizes)[None], 0)[0]
    mix = base-everywhere-gain/4-uniform+g.normal(0, .1, len(base))
    nll = np.stack([base, *experts, mix, routed])
    columns = ['base', *names, 'uniform mix', 'routed']
    ids, domains = [str(i) for i in range(len(home))], [names[e] for e in home]
    return Losses(nll, np.cumsum([0, *sizes]), ids, domains, columns), home

def with_column(losses, name, nll):
    "One more column"
    return Losses(np.stack([*losses.nll, nll]), losses.offsets, losses.ids, losses.domains, [*losses.columns, name])

def answer(losses, home, trained=None):
    "The answer alone, which is quicker to have than the whole verdict"
    systems = verdict_systems(losses, EXPERTS, home)
    one = one_adapter(losses, EXPERTS)
    to_one = macro_differences(losses, systems, one, 400, seed=0)
    return decide(gather_evidence(losses, systems, one, to_one, trained, draws=400))

PLANTED = {
    'build': dict(right=.95),
    'better router': dict(right=.1),
    'one adapter': dict(gain=0.),
    'better data': dict(gain=0., everywhere=-.02),
    'merge': dict(right=.8, uniform=.14)}

@pytest.mark.parametrize('planted', PLANTED)
def test_a_planted_world_gives_its_answer(planted):
    found = [answer(*world(seed, **PLANTED[planted])) for seed in range(10)]
    assert found.count(planted)>=9, found

def test_a_merge_that_gains_less_than_routing_is_not_the_answer():
    for seed in range(5):
        losses, home = world(seed, right=.95, uniform=.08)
        systems, one = verdict_systems(losses, EXPERTS, home), one_adapter(losses, EXPERTS)
        e = gather_evidence(losses, systems, one, macro_differences(losses, systems, one, 400, seed=0), draws=400)
        assert e.merged[2]<0<e.merged_to_routed[1] # better than one adapter, worse than routing
        assert decide(e)=='build'

def test_equal_experts_need_no_mixture_in_nine_of_ten_worlds():
    found = [answer(*world(seed, gain=0., right=0.)) for seed in range(100)]
    assert found.count('one adapter')>=90, found

def test_luck_is_headroom_for_hindsight_and_none_for_the_foreseen_expert():
    naive, honest = [], []
    for seed in range(60):
        losses, _ = world(seed, gain=0.)
        law = macro_nll(losses, losses['law'])
        naive.append(macro_nll(losses, pick(losses, EXPERTS, hindsight(losses, EXPERTS)))-law)
        honest.append(macro_nll(losses, pick(losses, EXPERTS, foreseen(losses, EXPERTS)))-law)
    assert max(naive)<0
    assert abs(np.mean(honest)) < 4*np.std(honest)/60**.5 < .02

def test_an_expert_is_chosen_without_the_rows_it_is_scored_on():
    losses, _ = world(0)
    before = foreseen(losses, EXPERTS)
    for i in (0, 33, 79):
        nll = losses.nll.copy()
        part = slice(losses.offsets[i], losses.offsets[i+1])
        nll[1:5,part] = rng(i, 'other').normal(50, 50, nll[1:5,part].shape)
        other = Losses(nll, losses.offsets, losses.ids, losses.domains, losses.columns)
        assert foreseen(other, EXPERTS)[i]==before[i]

def test_a_domain_of_one_row_is_foreseen_from_the_others():
    losses, _ = world(0)
    losses.domains[0] = 'alone'
    nll = losses.nll.copy()
    nll[1,:losses.offsets[1]] = -100. # code's own luck with that row
    nll[3,losses.offsets[1]:] = -100. # math is best everywhere else
    assert foreseen(Losses(nll, losses.offsets, losses.ids, losses.domains, losses.columns), EXPERTS)[0]==2

def test_names_and_their_order_change_nothing():
    losses, home = world(1, right=.6)
    before = verdict(losses, EXPERTS, home, draws=200)
    turned = [3, 1, 0, 2] # where each expert goes
    nll = losses.nll.copy()
    for old, new in enumerate(turned): nll[1+new] = losses.nll[1+old]
    names = ['a', 'b', 'c', 'd']
    other = Losses(nll, losses.offsets, losses.ids, losses.domains, ['base', *names, 'uniform mix', 'routed'])
    after = verdict(other, names, np.array(turned)[home], draws=200)
    assert after['answer']==before['answer']
    assert after['headroom']==before['headroom']
    assert after['closed']==before['closed']
    def nameless(found): return [{k: v for k, v in row.items() if k!='system'} for row in found['systems']]
    assert nameless(before)==nameless(after)
    assert names[turned[EXPERTS.index(before['one_adapter'])]]==after['one_adapter']

def test_a_single_adapter_is_what_has_to_be_beaten_even_if_it_is_worse():
    losses, home = world(0)
    assert one_adapter(losses, EXPERTS) in EXPERTS
    assert verdict(losses, EXPERTS, home, draws=50)['is_stand_in']
    good = with_column(losses, 'single adapter', losses['base']-.35)
    bad = with_column(losses, 'single adapter', losses['base'])
    assert verdict(bad, EXPERTS, home, draws=50)['one_adapter']=='single adapter'
    assert answer(losses, home)=='build'
    assert answer(good, home)=='one adapter'
    assert 'stands in' not in verdict(good, EXPERTS, home, draws=50)['text']

def test_the_seed_expert_stands_in_only_if_it_is_the_better():
    losses, _ = world(0)
    assert one_adapter(with_column(losses, 'seed expert', losses['base']+1), EXPERTS) in EXPERTS
    assert one_adapter(with_column(losses, 'seed expert', losses['base']-1), EXPERTS)=='seed expert'

def test_experts_that_saw_little_are_given_more_rows_before_the_mixture_is_given_up():
    losses, home = world(0, gain=0.)
    assert answer(losses, home, trained=dict.fromkeys(EXPERTS, 8))=='better data'
    assert answer(losses, home, trained=dict.fromkeys(EXPERTS, 80))=='one adapter'
    good, home = world(0)
    assert answer(good, home, trained=dict.fromkeys(EXPERTS, 8))=='build'

def test_few_rows_tell_nothing():
    losses, home = world(0, per=4)
    found = verdict(losses, EXPERTS, home, draws=50)
    assert found['answer']=='better data'
    assert '16 held-out rows' in found['text']
    assert 'four times in five' not in found['text']

def test_one_expert_alone_is_one_adapter():
    losses, _ = world(0, gain=0.)
    columns = ['base', 'code', 'uniform mix', 'routed']
    same = Losses(losses.nll[[0, 1, 1, 1]], losses.offsets, losses.ids, losses.domains, columns)
    found = verdict(same, ['code'], np.zeros(80, int), draws=50)
    assert found['answer']=='one adapter'
    assert 'four times in five' not in found['text']

def test_a_verdict_is_plain_data_and_the_same_again():
    losses, home = world(0, right=.7)
    found = verdict(losses, EXPERTS, home, draws=100)
    assert found['answer']==answer(losses, home)
    assert found['text']==' '.join(found['sentences'])
    assert json.loads(json.dumps(found, allow_nan=False))==found==verdict(losses, EXPERTS, home, draws=100)

def test_a_missing_column_is_named():
    losses, home = world(0)
    del losses.columns[-1]
    with pytest.raises(HydraError, match="'routed'"): verdict(losses, EXPERTS, home)

def test_what_is_seen_comes_from_the_noisiest_comparison():
    wide, narrow = (0., -4., 4.), (-1., -1.5, -.5)
    assert smallest_seen([narrow, wide], 60)==smallest_seen([wide], 60) > smallest_seen([narrow], 60)

def test_every_answer_can_be_said_and_reached():
    yes, no, worse = (-5., -6., -4.), (0., -1., 1.), (5., 4., 6.) # differences and their intervals
    either = (yes, no)
    reached = set()
    for own, headroom, routed, merged, to_routed in product(either, either, either, either, (no, worse)):
        closed = [None, None] if headroom==no else [.7 if x==yes else .2 for x in (routed, merged)]
        e = Evidence(99, 40, own, headroom, routed, merged, to_routed, *closed)
        said = decide(e)
        reached.add(said)
        assert verdict_sentences(said, e, 'x', 1.)[0]==ANSWERS[said]
        if said in ('merge', 'build'): assert yes in (routed, merged)
    assert reached==set(ANSWERS)

def test_the_heat_map_is_the_change_against_the_base():
    losses, _ = world(0, luck=0.)
    domains, changes = expert_changes(losses, EXPERTS, 'base')
    assert domains==sorted(EXPERTS)
    assert (changes.argmin(0)==[EXPERTS.index(d) for d in domains]).all()
    assert abs(np.log1p(changes.diagonal()/100).mean()+.3)<.02

def test_before_training_only_what_speaks_against_is_said():
    assert outlook_answer([100], None)==outlook_answer([5, 9, 30], .9)=='better data'
    assert outlook_answer([100, 100], .1)==outlook_answer([100, 100], None)=='one adapter'
    assert outlook_answer([100, 100], .9)=='train'

# ---- a Hydra

NUMBERED = [(i, name, text) for i in range(8) for name, text in zip(NAMES, TEXTS)]
ROWS = [dict(prompt=f'{text}, {i}', completion=f'{name} {i}', domain=name) for i, name, text in NUMBERED]

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A bundle of noise, one with a gate, one that was built, held-out rows"
    d = tmp_path_factory.mktemp('verdict')
    by_hand().save(d/'b')
    adopt({name: d/'b'/'experts'/name for name in NAMES}, d/'gated', 'tiny', 'fp32', 'lag')
    write_jsonl(d/'rows.jsonl', ROWS)
    pairs = [(f'{start}{t}', topic) for start in ('', 'Please: ') for t, topic in zip(*lesson_texts())]
    write_jsonl(d/'mine.jsonl', [dict(prompt=t, completion=topic) for t, topic in pairs])
    built = here('build', 'mine.jsonl', *TINY, '--k', 2, '--lr', '5e-3', '--quiet', cwd=d)
    assert built.returncode==0, built.stderr
    (d/'said').write_text(built.stdout)
    return d

def judged(made, *argv): return here('verdict', *argv, '--quiet', cwd=made)

def test_rows_without_domains_are_grouped_by_the_router(made):
    records = [dict(id=str(i), prompt=[dict(role='user', content=r['prompt'])], domain='user',
                    completion=[dict(role='assistant', content=r['completion'])]) for i, r in enumerate(ROWS)]
    hydra = Hydra.load(made/'mine-hydra')
    scored = score_hydra(hydra, records)
    first = scored.weights.argmax(1)
    assert scored.losses.domains==[hydra.names[e] for e in first]
    assert (scored.home==first).all()

def test_the_build_ends_with_a_verdict(made):
    lines = (made/'said').read_text().splitlines()
    assert lines[1].startswith('verdict: 8 rows were held out')
    assert lines[2].startswith('try it: ')
    quiet = here('build', 'mine.jsonl', *TINY, '--k', 2, '--lr', '5e-3', '--quiet', '--no-verdict', cwd=made)
    assert 'verdict' not in quiet.stdout
    assert quiet.returncode==0

def test_a_build_is_found_again_and_a_single_has_its_tokens(made):
    about = dict(built=read_json(made/'mine-hydra'/'hydra.json')['built'])
    assert len(held_out_rows(about))==8
    single, experts = run_single(about), find_stage(about, 'experts')
    tokens = [sum(step['tokens'] for step in read_json(f/'history.json')['history']) for f in (single.parent, experts)]
    assert tokens[0]==tokens[1]
    assert run_single(about)==single
    inputs = read_json(single.parent/'seal.json')['meta']['inputs']
    assert inputs==dict(rows=about['built']['seals']['rows'], start=about['built']['seals']['seed'])
    rows = [json.loads(line)['id'] for line in (find_stage(about, 'rows')/'train.jsonl').read_text().splitlines()]
    assert not set(rows) & {r['id'] for r in held_out_rows(about)}

def test_a_damaged_stage_is_not_found(made, tmp_path):
    about = dict(built=read_json(made/'mine-hydra'/'hydra.json')['built'])
    found = find_stage(about, 'domains')
    copy = tmp_path/found.name
    shutil.copytree(found, copy)
    assert find_stage(about, 'domains', tmp_path)==copy
    (copy/'dev.jsonl').write_text('{}')
    assert find_stage(about, 'domains', tmp_path) is None
    assert held_out_rows(about, tmp_path)==[]

def test_both_stand_ins_are_scored_as_their_adapters_alone(made):
    hydra = Hydra.load(made/'b')
    records = [dict(id=str(i), prompt=[dict(role='user', content=r['prompt'])], domain=r['domain'],
                    completion=[dict(role='assistant', content=r['completion'])]) for i, r in enumerate(ROWS)]
    found, scored = judge_hydra(hydra, records, made/'b'/'experts'/'law')
    np.testing.assert_allclose(scored.losses['single adapter'], scored.losses['law'], rtol=1e-4, atol=1e-4)
    assert found['one_adapter']=='single adapter'

# ---- the command and the page

class Page(HTMLParser):
    "What a page refers to, and the tags that it leaves open"
    def __init__(self, text):
        super().__init__()
        self.refers, self.open = [], []
        self.feed(text)
    def handle_starttag(self, tag, attributes):
        self.refers += [value for name, value in attributes if name in ('src', 'href')]
        if tag not in ('meta', 'img', 'br', 'link', 'hr'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop()==tag

@pytest.mark.parametrize('bundle', ['b', 'gated', 'mine-hydra'])
def test_a_bundle_gets_an_answer_and_a_page_that_needs_nothing(made, bundle, tmp_path):
    before = files_in(made/bundle)
    out = judged(made, bundle, '--rows', 'rows.jsonl', '--out', tmp_path/'page.html', '--json')
    assert (out.returncode, out.stderr)==(0, ''), out.stderr
    found = json.loads(out.stdout)
    assert found['answer'] in ANSWERS
    assert found['rows']==len(ROWS)
    text = (tmp_path/'page.html').read_text()
    page = Page(text)
    assert not page.open
    assert all(r.startswith('data:image/') for r in page.refers)
    assert page.refers
    assert ANSWERS[found['answer']] in text
    assert 'width=device-width' in text
    assert '<script' not in text
    assert ('Learning curves' in text)==(bundle=='mine-hydra')
    assert ('win 70 %' in text)==(bundle!='gated')
    assert files_in(made/bundle)==before

def test_prompts_on_the_page_are_text(made, tmp_path):
    bad = [dict(r, prompt='<script>alert(1)</script> "&\' '+r['prompt']) for r in ROWS]
    write_jsonl(tmp_path/'bad.jsonl', bad)
    assert judged(made, 'b', '--rows', tmp_path/'bad.jsonl', '--out', tmp_path/'page.html').returncode==0
    text = (tmp_path/'page.html').read_text()
    assert '<script' not in text
    assert '&lt;script' in text
    assert not Page(text).open

def test_files_get_an_outlook_and_a_command_to_go_on(made, tmp_path):
    how = ['--base', 'tiny', '--encoder', 'words', '--k', 2]
    out = judged(made, 'mine.jsonl', *how, '--out', tmp_path/'o.html', '--json')
    assert (out.returncode, out.stderr)==(0, ''), out.stderr
    found = json.loads(out.stdout)
    assert sum(d['rows'] for d in found['domains'])==found['counts']['train']==72
    assert shlex.split(found['next'])[:3]==['hydramoe', 'build', 'mine.jsonl']
    assert found['forecast']['seconds']>=0
    assert not Page((tmp_path/'o.html').read_text()).refers

@pytest.mark.parametrize('argv, said', [
    (['b'], 'give some, --rows FILE'),
    (['b', 'rows.jsonl'], 'with --rows'),
    (['b', '--rows', 'rows.jsonl', '--k', 3], '--k is about files'),
    (['b', '--rows', 'rows.jsonl', '--single'], '--single DIR'),
    (['b', '--rows', 'rows.jsonl', '--single', 'gated'], 'no PEFT adapter'),
    (['rows.jsonl', '--rows', 'rows.jsonl'], '--rows is about a bundle'),
    (['rows.jsonl', '--single'], '--single is about a bundle'),
    (['b', '--rows', 'nowhere.jsonl'], 'nowhere.jsonl'),
    (['nowhere.jsonl'], 'nowhere.jsonl')])
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(made, tmp_path, argv, said):
    out = judged(made, *argv, '--out', tmp_path/'page.html')
    assert (out.returncode, out.stdout, out.stderr.count('\n'))==(2, '', 1), out.stderr
    assert said in out.stderr, out.stderr
    assert not list(tmp_path.iterdir())

def test_a_page_is_never_written_over(made, tmp_path):
    (tmp_path/'page.html').write_text('mine')
    out = judged(made, 'b', '--rows', 'rows.jsonl', '--out', tmp_path/'page.html')
    assert out.returncode==2
    assert 'exists' in out.stderr
    assert (tmp_path/'page.html').read_text()=='mine'

def test_a_verdict_that_fails_leaves_the_build_be(made, monkeypatch):
    from hydramoe.proof import verdict_page
    def broken(*args): raise HydraError('not every loss is finite')
    monkeypatch.setattr(verdict_page, 'judge_hydra', broken)
    monkeypatch.setattr('hydramoe.hydra.card.MIN_DEV_ROWS', 2)
    out = here('build', 'mine.jsonl', *TINY, '--k', 2, '--lr', '5e-3', '--quiet', cwd=made)
    assert out.returncode==0
    assert 'verdict: none, for not every loss is finite' in out.stdout
    assert 'try it: ' in out.stdout
