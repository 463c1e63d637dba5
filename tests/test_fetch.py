"Fetching against a local index: what a notebook cell cannot show, plus the pins themselves"
import os, signal, subprocess, sys, textwrap, time, zipfile
import pytest
from hydramoe.foundations import fetch
from hydramoe.foundations.core import HydraError
from hydramoe.foundations.files import file_sha256
from helpers import exchange


def make_wheel(folder, name='hydra_toy', version='1.0', payload=b'x'):
    p = folder/f'{name}-{version}-py3-none-any.whl'
    info = f'{name}-{version}.dist-info'
    metadata = f'Metadata-Version: 2.1\nName: {name.replace("_", "-")}\nVersion: {version}\n'
    with zipfile.ZipFile(p, 'w') as z:
        z.writestr(f'{name}/data.bin', payload)
        z.writestr(f'{info}/METADATA', metadata)
        z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{info}/RECORD', '')
    return p

def forget_archives():
    "What this process has checked and opened is looked at again"
    fetch._checked_archive.cache_clear()
    fetch._open_archive.cache_clear()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A pinned toy package in an index of its own"
    links = tmp_path/'links'
    links.mkdir()
    wheel = make_wheel(links, payload=os.urandom(50_000))
    cache = str(tmp_path/'cache')
    env = dict(PIP_NO_INDEX='1', PIP_FIND_LINKS=str(links), HYDRAMOE_CACHE=cache, HYDRAMOE_QUIET='1')
    for k, v in env.items(): monkeypatch.setenv(k, v)
    monkeypatch.setitem(fetch.PACKAGES, 'hydra-toy', fetch.Package('1.0', file_sha256(wheel), .05))
    forget_archives()
    yield wheel
    forget_archives()


@pytest.mark.parametrize('damage', ['truncate', 'flip', 'extra', 'unsealed', 'gone'])
def test_damage_is_repaired(toy, damage):
    p = fetch.archive('hydra-toy')
    data = bytearray(p.read_bytes())
    if damage == 'truncate': p.write_bytes(data[:-1])
    if damage == 'flip':
        data[1000] ^= 1
        p.write_bytes(data)
    if damage == 'extra': (p.parent/'stray').write_text('?')
    if damage == 'unsealed': (p.parent/'seal.json').unlink()
    if damage == 'gone': p.unlink()
    fetch._checked_archive.cache_clear()
    again = fetch.archive('hydra-toy')
    assert again == p
    assert file_sha256(again) == fetch.PACKAGES['hydra-toy'].sha256


def test_missing_package_names_what_to_do(toy):
    toy.unlink()
    with pytest.raises(HydraError, match='could not fetch hydra-toy==1.0') as e: fetch.archive('hydra-toy')
    assert 'run again' in str(e.value)


def test_other_bytes_same_version(toy):
    make_wheel(toy.parent, payload=b'tampered')
    with pytest.raises(HydraError, match='could not fetch'): fetch.archive('hydra-toy')


def test_escaping_member_is_refused(toy, tmp_path, monkeypatch):
    with zipfile.ZipFile(toy, 'a') as z: z.writestr('hydra_toy/../../../escape.txt', 'out')
    monkeypatch.setitem(fetch.PACKAGES, 'hydra-toy', fetch.Package('1.0', file_sha256(toy), .05))
    with pytest.raises(HydraError, match='would leave its folder'): fetch.unpack('hydra-toy', 'hydra_toy')
    assert not list(tmp_path.rglob('escape.txt'))


FETCH = textwrap.dedent('''
    import sys
    from hydramoe.foundations import fetch
    fetch.PACKAGES['hydra-toy'] = fetch.Package('1.0', sys.argv[1], .05)
    print(fetch.archive('hydra-toy'))
''')


def test_two_processes_at_once(toy):
    sha = fetch.PACKAGES['hydra-toy'].sha256
    ps = [subprocess.Popen([sys.executable, '-c', FETCH, sha], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [p.communicate(timeout=120)[0].strip() for p in ps]
    assert [p.returncode for p in ps] == [0, 0]
    assert outs[0] == outs[1]
    assert file_sha256(outs[0]) == sha


def test_killed_then_run_again(toy):
    sha = fetch.PACKAGES['hydra-toy'].sha256
    for wait in (.3, .8, 1.2):
        p = subprocess.Popen([sys.executable, '-c', FETCH, sha], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert file_sha256(fetch.archive('hydra-toy')) == sha


def test_no_pin_is_bigbench():
    assert not any('bigbench' in n.replace('-', '') for n in fetch.PACKAGES)


def test_an_archive_exchanged_in_place_with_equal_size_and_date_is_seen(toy):
    p = fetch.archive('hydra-toy')
    data = bytearray(p.read_bytes())
    data[1000] ^= 1
    exchange(p, data)
    # in the same process, nothing cleared
    assert file_sha256(fetch.archive('hydra-toy')) == fetch.PACKAGES['hydra-toy'].sha256
    assert fetch.member('hydra-toy', 'hydra_toy/data.bin')


# ---- the Hub
A, B = 'a'*40, 'b'*40

@pytest.fixture
def stub(tmp_path, monkeypatch):
    "A Hub of one model, whose branch main moves; says what it was asked"
    import huggingface_hub
    from types import SimpleNamespace
    hub = SimpleNamespace(asked=[], main=A, on=True)
    def ask(id, revision):
        hub.asked.append((id, revision))
        if not hub.on: raise ConnectionError('no network')
    class Api:
        def model_info(self, id, revision=None, **kw):
            ask(id, revision)
            if id != 'org/model': raise ValueError('404')
            return SimpleNamespace(sha=dict(main=hub.main, v1=B)[revision or 'main'])
    def snapshot_download(id, revision=None, **kw):
        ask(id, revision)
        d = tmp_path/'snapshots'/revision
        d.mkdir(parents=True, exist_ok=True)
        return str(d)
    monkeypatch.setenv('HYDRAMOE_CACHE', str(tmp_path/'cache'))
    monkeypatch.delenv('HYDRAMOE_QUIET', raising=False)
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    return hub

def test_a_branch_is_resolved_to_its_commit_and_said(stub, capsys):
    assert fetch.hub_commit('org/model') == A
    assert f'org/model: main is commit {A}' in capsys.readouterr().err
    assert fetch.hub('org/model').name == A
    assert stub.asked[-1] == ('org/model', A)
    stub.main = B
    assert fetch.hub('org/model').name == B # a branch is asked for anew
    assert fetch.hub('org/model', 'v1').name == B

def test_a_commit_that_is_here_is_asked_for_no_more(stub):
    at = fetch.hub('org/model', A)
    stub.asked.clear()
    stub.on = False
    assert fetch.hub('org/model', A) == at
    assert stub.asked == []
    says = f"'main' of org/model is .*no network.*org/model@COMMIT .*fetched before: {A}.*or a folder"
    with pytest.raises(HydraError, match=says): fetch.hub('org/model')
    with pytest.raises(HydraError, match='could not be fetched'): fetch.hub('org/model', B)

@pytest.mark.parametrize('id, revision', [('org/none', None), ('org/model', 'no-such-branch')])
def test_what_the_hub_does_not_know(stub, id, revision):
    with pytest.raises(HydraError, match='give a commit'): fetch.hub(id, revision)

def test_a_bundle_on_the_hub_needs_no_revision(stub):
    from hydramoe.hydra.auto import bundle_dir
    stub.main = A
    first = bundle_dir('org/model')
    assert first.name == f'org--model-{A}'
    assert bundle_dir('org/model', A) == first
    stub.main = B
    assert bundle_dir('org/model').name == f'org--model-{B}'
