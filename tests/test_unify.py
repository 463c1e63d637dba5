"""Unify: what holds for any rows (order, sides, growth, idempotence, the ledger), other processes, damaged sets,
and a Hub that fails"""
import os, shutil
import httpx
import pytest
from huggingface_hub import DatasetCard, HfApi
from hypothesis import HealthCheck, example, given, settings, strategies as st
from hydramoe.data.parts import PARTS
from hydramoe.data.hub_metadata import license_class
from hydramoe.data.dedup import drop_near_duplicates, jaccard, near_clusters, near_pairs, prompt_words, shingles
from hydramoe.data.leaks import find_leaks
from hydramoe.data.unify import STEPS, domain_rows, tokenizer_of, unify_records
from hydramoe.data.unified_card import UNIFIED_FILES, dataset_card, open_unified, toy_unify_stage, unify_stage
from hydramoe.data.unified_card import write_unified
from hydramoe.data.push import push_dataset
from hydramoe.models.template import byte_tokenizer
from hydramoe.models.base import tiny_base
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import read_json, read_jsonl
from hydramoe.data.records import record
from hydramoe.data.splits import ngrams, prompt_key
from hydramoe.data.toy import toy_records
from hydramoe.data.cards import card_names, cards_digest, load_card
from hydramoe.data.load import load
from hydramoe.foundations.store import stage

TOK = byte_tokenizer()
CLOCK = ('the old clock in the hall of the inn strikes nine times at noon '
         'and nobody who lives there has ever asked for a reason {} {}')
QUEENS = ('how many ways are there to lay eight queens on a chess board '
          'such that none of them attacks any other one on it {} {}')
STEMS = [CLOCK, QUEENS, 'say {} {}', '{}']
WORDS = ['', 'now', 'Now!', '2+3', '2-3', 'ﬁn', '你好', '\u2028']
ENDINGS = ['', 'x', 'X.', 'a b']
SYSTEM_TURN = [dict(role='system', content='Be brief.')]
EARLIER_TURNS = [dict(role='user', content='Hi'), dict(role='assistant', content='Yes?')]
ANSWERS = ['yes', 'no', 'word '*80]
LICENSES = ['mit', 'cc-by-nc-4.0', 'unknown']


@st.composite
def any_rows(draw, most=24):
    "Records among which equal and nearly equal prompts, over-long ones and conversations abound"
    out = []
    for _ in range(draw(st.integers(1, most))):
        stem = draw(st.sampled_from(STEMS))
        text = stem.format(draw(st.sampled_from(WORDS)), draw(st.sampled_from(ENDINGS)))
        before = draw(st.sampled_from([[], SYSTEM_TURN, EARLIER_TURNS]))
        answer = draw(st.sampled_from(ANSWERS))
        source = draw(st.sampled_from('abc'))
        domain = draw(st.sampled_from(['math', 'writing']))
        license = draw(st.sampled_from(LICENSES))
        turns = [*before, dict(role='user', content=text)]
        r = record(turns, answer, source=source, domain=domain, license=license)
        group = draw(st.sampled_from([None, None, 'talk 1', 'talk 2']))
        if r['prompt'][-1]['content']: out.append(r | dict(group=group) if group else r)
    return out


many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

def flat(got):
    "The rows of all parts"
    return [r for p in PARTS for r in getattr(got, p)]


@many
@given(any_rows(), st.integers(0, 3), st.sampled_from(['all', 'open']), st.sampled_from([None, 200]),
       st.randoms(use_true_random=False))
def test_order_idempotence_and_ledger(rs, seed, licenses, max_length, shuffle):
    exam = 'how many ways are there to lay eight queens on a chess board such that none attacks'
    held = [record(exam, 'x', 'exam')] if seed==3 else []
    def do(rows): return unify_records(rows, TOK, dict(experts=300), held, max_length, seed, licenses)
    try: got, counts = do(rs)
    except HydraError as e:
        assert 'for experts, 1 were asked for' in str(e)
        return
    assert do(shuffle.sample(rs, len(rs))) == (got, counts)
    assert do(flat(got))[0] == got
    for c in counts['sources'].values():
        assert c['given'] == sum(c['removed'].values()) + c['kept']
        assert set(c['removed']) <= set(STEPS)
    assert sum(c['given'] for c in counts['sources'].values()) == len(rs)
    kept = sum(c['kept'] for c in counts['sources'].values())
    domains = [domain for part in counts['parts'].values() for domain in part.values()]
    dealt = sum(s['rows'] for sources in domains for s in sources.values())
    assert kept == len(flat(got)) == dealt
    if licenses=='open': assert not {r['license'] for r in flat(got)} & {'unknown', 'cc-by-nc-4.0'}
    assert set(find_leaks(flat(got), held)) <= {''}


@many
@given(any_rows(), st.integers(0, 3))
def test_near_duplicates_and_conversations_are_on_one_side(rs, seed):
    got, _ = unify_records(rs, TOK, seed=seed)
    side = {}
    for p in PARTS:
        for r in getattr(got, p):
            assert side.setdefault(r.get('group', r['id']), p) == p
            assert r['part'] == p
    kept = flat(got)
    assert len({prompt_key(r) for r in kept}) == len(kept)
    sets = [shingles(prompt_words(r)) for r in kept]
    def is_near(i, j): return jaccard(sets[i], sets[j]) >= .85
    near = [(a, b) for j, b in enumerate(kept) for i, a in enumerate(kept[:j]) if is_near(i, j)]
    assert all(a['part'] == b['part'] for a, b in near)


@many
@given(any_rows(), any_rows(), st.integers(0, 3))
def test_growth_moves_nothing_out_of_protection(old, more, seed):
    """A row is never less protected than before, nor is any near twin of it.

    It is more so where the same turn turns up in a conversation of a better protected part.
    """
    was, _ = unify_records(old, TOK, seed=seed)
    now, _ = unify_records(old+more, TOK, seed=seed)
    part = {r['id']: r['part'] for r in flat(was)}
    rank = PARTS.index
    assert all(rank(r['part']) <= rank(part.get(r['id'], 'experts')) for r in flat(now))
    grouped = any('group' in r for r in old+more)
    assert all(r['part'] == part[r['id']] for r in flat(now) if r['id'] in part and not grouped)
    before = [(shingles(prompt_words(r)), r) for r in flat(was)]
    for r in flat(now):
        s = shingles(prompt_words(r))
        for t, q in before:
            if jaccard(s, t) >= .85: assert rank(r['part']) <= rank(q['part']), (r, q)


letters = st.lists(st.sampled_from('abcd'), min_size=1, max_size=9)


@many
@given(st.lists(letters, min_size=1, max_size=9), st.permutations(range(9)))
def test_pairs_are_near_and_do_not_depend_on_order(texts, order):
    sets = [shingles(t) for t in texts]
    order = [i for i in order if i < len(sets)]
    pairs = {frozenset(p) for p in near_pairs(sets)}
    assert pairs == {frozenset((order[i], order[j])) for i, j in near_pairs([sets[i] for i in order])}
    assert all(jaccard(*(sets[i] for i in p)) >= .85 for p in pairs)
    def triples(text): return {tuple(text[i:i+3]) for i in range(max(1, len(text)-2))}
    for a, b in zip(texts, texts[1:]):
        exact = len(triples(a) & triples(b))/len(triples(a) | triples(b))
        assert abs(jaccard(shingles(a), shingles(b)) - exact) < 1e-12


@many
@example(' '.join(map(str, range(13))), 0)
@given(st.text('ab c.', min_size=1, max_size=80), st.integers(0, 5))
def test_held_out_runs_are_those_of_grams(text, pad):
    "A row is a leak wherever data.grams, the reference, sees one"
    if not text.strip(): return
    row = record('well then '*pad + text, 'x', 'web')
    held = record(text, 'y', 'exam')
    in_both = ngrams(row['prompt'][0]['content']) & ngrams(held['prompt'][0]['content'])
    if in_both: assert find_leaks([row], [held]) == ['prompt']


def test_another_process_makes_the_same_bytes(in_two_processes):
    code = ('import sys; from pathlib import Path; from hydramoe.data.unified_card import toy_unify_stage; '
            'toy_unify_stage(Path(sys.argv[1]), 600, 3, 3, 120, 5, router=2, rows=150)')
    outs = in_two_processes(code)
    assert outs[0] == outs[1]
    assert set(outs[0]) == set(UNIFIED_FILES)


def test_tokens_are_counted_for_every_base_that_can_be_loaded(tmp_path, monkeypatch):
    TOK.save_pretrained(tmp_path/'mine')
    tiny_base().model.config.save_pretrained(tmp_path/'mine')
    monkeypatch.setattr('hydramoe.models.load.gemma3_dir', lambda: tmp_path/'mine') # as fetched
    monkeypatch.setattr('hydramoe.models.load.hub', lambda name, revision=None: tmp_path/'mine')
    for base in ('bytes', 'gemma3', str(tmp_path/'mine'), 'org/name', 'org/name@main'):
        assert tokenizer_of(base)('a word').input_ids == TOK('a word').input_ids
    said = "'nonesuch' is neither 'smollm2' nor 'gemma3', nor a directory"
    with pytest.raises(HydraError, match=said): tokenizer_of('nonesuch')


def test_a_domain_that_cannot_give_is_named():
    toys = toy_records(30)
    too_few = 'domain coding has 30 rows for experts|domain .* for test, 40 were asked for; ask for fewer'
    with pytest.raises(HydraError, match=too_few): unify_records(toys, TOK, dict(test=40))
    with pytest.raises(HydraError, match='domain .* has 0 rows for experts'):
        unify_records(toys[:1], TOK, dict(experts=10), shares=dict(test=.9, dev=.05, router=.04))
    assert flat(unify_records([], TOK)[0]) == []


def test_threshold_and_long_texts():
    with pytest.raises(HydraError, match='from .8 to 1'): unify_records(toy_records(2), TOK, threshold=.3)
    long = 'word '.join(map(str, range(20_000)))
    a = record(long, 'x', 'a')
    b = record(long+' end', 'x', 'b')
    assert len(drop_near_duplicates([a, b])) == 1


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    how = dict(tokens_per_domain=1500, dev=3, test=4, router=5, rows=150)
    return stage(toy_unify_stage, how, root=tmp_path_factory.mktemp('stages'))


class Hub:
    "A stub of HfApi: notes calls, holds files by commit, fails where told"
    def __init__(self, private=True, fail=None, loses=None):
        self.private = private # is the repository?
        self.fail = fail # the number of the call that fails
        self.loses = loses # a file that does not arrive
        self.log = []
        self.there = []
    def _at(self, name):
        self.log.append(name)
        if self.fail == len(self.log): raise (OSError if self.fail%2 else httpx.ConnectError)('connection reset')
    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        self._at('create')
        assert repo_type == 'dataset'
        assert exist_ok
    def repo_info(self, repo_id, *, repo_type):
        self._at('info')
        return self
    def list_repo_files(self, repo_id, *, repo_type, revision=None):
        self._at('list')
        return ['.gitattributes', *self.there]
    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, commit_message):
        self._at('upload')
        self.there = [f for f in sorted(os.listdir(folder_path)) if f in allow_patterns and f != self.loses]
        self.oid = 'abc123'
        return self


def test_push(made):
    hub = Hub()
    assert push_dataset(made, 'me/set', hub) == 'abc123'
    assert hub.log == ['create', 'info', 'list', 'upload', 'list']
    assert set(hub.there) == {*UNIFIED_FILES, 'seal.json'}
    assert push_dataset(made, 'me/set', hub) == 'abc123' # a second time: the files there are ours
    before = {p.name: p.read_bytes() for p in made.iterdir()}
    for n in range(1, 6):
        hub = Hub(fail=n)
        with pytest.raises(HydraError, match='was not pushed to me/set: connection reset'):
            push_dataset(made, 'me/set', hub)
        assert len(hub.log) == n
    with pytest.raises(HydraError, match='was not pushed to not/a/name'):
        push_dataset(made, 'not/a/name', HfApi(token='none'))
    with pytest.raises(HydraError, match='commit abc123 lacks dev.jsonl'):
        push_dataset(made, 'me/set', Hub(loses='dev.jsonl'))
    assert {p.name: p.read_bytes() for p in made.iterdir()} == before

SPOILED = dict(extra=lambda d: (d/'notes.txt').write_text('x'), missing=lambda d: (d/'dev.jsonl').unlink(),
               altered=lambda d: (d/'test.jsonl').write_text(''))


def test_push_sends_nothing_it_should_not(made, tmp_path):
    for why, spoil in SPOILED.items():
        copy = shutil.copytree(made, tmp_path/why)
        spoil(copy)
        hub = Hub()
        with pytest.raises(HydraError, match=why): push_dataset(copy, 'me/set', hub)
        with pytest.raises(HydraError, match=why): open_unified(copy)
        assert hub.log == []
    def vague(out):
        "A set whose licence nobody stated"
        rows = [record(f'What is {i} plus {i}?', str(2*i), 'mine', domain='math') for i in range(200)]
        write_unified(out, *unify_records(rows, byte_tokenizer()), {}, dict(base='bytes', threshold=.85))
    at = stage(vague, {}, root=tmp_path/'stages', name='vague')
    hub = Hub(private=False)
    with pytest.raises(HydraError, match='licence is unclear .mine.; push it with private=True'):
        push_dataset(at, 'me/set', hub, private=False)
    assert hub.log == []
    assert push_dataset(at, 'me/set', Hub()) == 'abc123'


def test_card(made):
    card = DatasetCard.load(made/'README.md')
    counts = read_json(made/'counts.json')
    assert card.data.license == 'cc0-1.0'
    assert card.data.language == ['en']
    assert card.data.size_categories == ['n<1K']
    assert 'text-generation' in card.data.task_categories
    files = {f['split']: f['path'] for f in card.data.configs[0]['data_files']}
    assert files == {p: f'{p}.jsonl' for p in PARTS}
    for s, c in counts['sources'].items():
        assert f"| {s} |" in card.text
        assert c['license'] == ['CC0-1.0']
    for p in PARTS: assert f"{len(read_jsonl(made/f'{p}.jsonl')):,} |" in card.text
    rows = [record(f'q {i}', 'a', 's', 'math', 'mit' if i % 2 else 'unknown') for i in range(99)]
    vague = dataset_card(unify_records(rows, TOK)[1])
    assert DatasetCard(vague).data.license_name == 'mixed-unclear'
    assert DatasetCard(vague).data.license_link
    assert 'do not publish it again' in vague


def test_every_licence_of_our_cards_is_known_or_said_to_be_unclear():
    for n in card_names():
        card = load_card(n)
        l = card['license'] if card['license'] != 'other' else card['license_name']
        assert license_class(l) != 'unclear' or l in ('unknown', 'unclear') or card['license'] == 'other', (n, l)


@pytest.mark.slow
def test_real_cards(tmp_path):
    """The whole set, sealed.

    Nothing held out is in it, no two rows are near, and every domain has enough of several sources.
    """
    made = stage(unify_stage, dict(max_length=300, cards=cards_digest()), root=tmp_path)
    got = open_unified(made)
    counts = read_json(made/'counts.json')
    held = [r for n in card_names(use='evaluate') for r in load(n)]
    assert set(find_leaks(flat(got), held)) == {''}
    assert len(set(near_clusters(flat(got)))) == len(flat(got))
    assert not {r['source'] for r in flat(got)} & set(counts['held'])
    for row in domain_rows(counts):
        assert row['tokens'] >= 150_000, row
        assert sum(row[p] for p in PARTS) >= 1500, row
        assert row['sources'] >= 2, row
    files = DatasetCard.load(made/'README.md').data.configs[0]['data_files']
    assert {f['path'] for f in files} == {f'{p}.jsonl' for p in PARTS}


def test_rows_that_the_template_of_the_base_refuses_are_counted_and_not_fatal():
    tok = byte_tokenizer()
    no_tools = "{% if m['role']=='tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    tok.chat_template = "{% for m in messages %}"+no_tools+"{% endfor %}" + tok.chat_template
    turns = [dict(role='user', content='2+2?'), dict(role='assistant', content='add'), dict(role='tool', content='4')]
    bad = record(turns, 'It is 4.', 'calls', domain='math', license='mit')
    toys = toy_records(20)
    got, counts = unify_records([*toys, bad], tok)
    assert counts['sources']['calls']['removed'] == {'refused by the base': 1}
    assert 'refused by the base' in counts['steps']
    plain, before = unify_records(toys, byte_tokenizer())
    assert 'refused by the base' not in before['steps']
    assert [len(p) for p in (got.experts, got.test)] == [len(p) for p in (plain.experts, plain.test)]
