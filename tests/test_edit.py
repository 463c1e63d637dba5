"Domains edited by hand: any file is read or refused in words, and every row keeps a domain"
import numpy as np
import pytest, yaml
from hypothesis import given, settings, strategies as st
from hydramoe.domains.cluster import agreement, kmeans
from hydramoe.domains.discover import Domains
from hydramoe.domains.edit import edit_domains, read_domains_yaml, write_domains_yaml
from hydramoe.foundations.core import HydraError
from helpers import blobs

KEYS = st.sampled_from(['cluster','name','split','line','rows','x'])|st.text(max_size=4)
LEAVES = st.none()|st.booleans()|st.integers(-3,9)|st.floats()|st.text(max_size=8)
YAML = st.recursive(LEAVES, lambda c: st.lists(c, max_size=4)|st.dictionaries(KEYS, c, max_size=5), max_leaves=12)

@settings(deadline=None, max_examples=120)
@given(YAML|st.lists(YAML, max_size=4).map(lambda l: dict(domains=l)))
def test_any_yaml_is_read_or_refused_in_words(tmp_path_factory, body):
    path = tmp_path_factory.getbasetemp()/'any.yaml'
    path.write_text(yaml.safe_dump(body), encoding='utf-8')
    try: plan = read_domains_yaml(path, 2)
    except HydraError as e: assert 'any.yaml' in str(e)
    else: assert sorted(e['cluster'] for e in plan)==[0,1]

@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_in_words(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp()/'bytes.yaml'
    path.write_bytes(data)
    with pytest.raises(HydraError, match='bytes.yaml'): read_domains_yaml(path, 2)

def test_merge_all_then_split_gives_every_row_a_domain(tmp_path):
    x,truth = blobs(n=120, k=4)
    rows = [f'row {i}' for i in range(120)]
    domains = Domains(kmeans(x, 4)[0], list('abcd'), 'words')
    labels = domains.assign(x)
    file = write_domains_yaml(tmp_path/'d.yaml', domains, labels, rows, domains.distances(x))
    body = yaml.safe_load(file.read_text())
    for e in body['domains']: e['name'] = 'all'
    file.write_text(yaml.safe_dump(body))
    one,l = edit_domains(file, domains, x, labels)
    assert one.names==['all']
    assert not l.any()
    assert np.allclose(one.centroids[0], x.mean(0), atol=1e-4)
    file = write_domains_yaml(tmp_path/'d.yaml', one, l, rows, one.distances(x))
    file.write_text(file.read_text().replace('split: 1', 'split: 4'))
    four,l4 = edit_domains(file, one, x, l)
    assert agreement(l4, truth)['ari']==1
    assert np.array_equal(four.assign(x), l4)
    assert len(four.edits)==5
    assert Domains.load(four.save(tmp_path/'s')).edits==four.edits
