"Fetching against a local index: what a notebook cell cannot show, plus the pins themselves"
import multiprocessing as mp, os, signal, subprocess, sys, textwrap, time, zipfile
import pytest
from hydramoe import fetch
from hydramoe.core import HydraError, file_sha256


def make_wheel(folder, name='hydra_toy', version='1.0', payload=b'x'):
    p = folder/f'{name}-{version}-py3-none-any.whl'
    with zipfile.ZipFile(p, 'w') as z:
        z.writestr(f'{name}/data.bin', payload)
        z.writestr(f'{name}-{version}.dist-info/METADATA', f'Metadata-Version: 2.1\nName: {name.replace("_", "-")}\nVersion: {version}\n')
        z.writestr(f'{name}-{version}.dist-info/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{name}-{version}.dist-info/RECORD', '')
    return p


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A pinned toy package in an index of its own"
    links = tmp_path/'links'; links.mkdir()
    wheel = make_wheel(links, payload=os.urandom(50_000))
    for k, v in dict(PIP_NO_INDEX='1', PIP_FIND_LINKS=str(links), HYDRAMOE_CACHE=str(tmp_path/'cache'), HYDRAMOE_QUIET='1').items(): monkeypatch.setenv(k, v)
    monkeypatch.setitem(fetch.PACKAGES, 'hydra-toy', fetch.Package('1.0', file_sha256(wheel), .05))
    fetch._archive.cache_clear(); fetch._opened.cache_clear()
    yield wheel
    fetch._archive.cache_clear(); fetch._opened.cache_clear()


@pytest.mark.parametrize('damage', ['truncate', 'flip', 'extra', 'unsealed', 'gone'])
def test_damage_is_repaired(toy, damage):
    p = fetch.archive('hydra-toy')
    data = bytearray(p.read_bytes())
    if damage == 'truncate': p.write_bytes(data[:-1])
    if damage == 'flip': data[1000] ^= 1; p.write_bytes(data)
    if damage == 'extra': (p.parent/'stray').write_text('?')
    if damage == 'unsealed': (p.parent/'seal.json').unlink()
    if damage == 'gone': p.unlink()
    fetch._archive.cache_clear()
    again = fetch.archive('hydra-toy')
    assert again == p and file_sha256(again) == fetch.PACKAGES['hydra-toy'].sha256


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


CHILD = textwrap.dedent('''
    import sys
    from hydramoe import fetch
    fetch.PACKAGES['hydra-toy'] = fetch.Package('1.0', sys.argv[1], .05)
    print(fetch.archive('hydra-toy'))
''')


def test_two_processes_at_once(toy):
    sha = fetch.PACKAGES['hydra-toy'].sha256
    ps = [subprocess.Popen([sys.executable, '-c', CHILD, sha], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [p.communicate(timeout=120)[0].strip() for p in ps]
    assert [p.returncode for p in ps] == [0, 0] and outs[0] == outs[1]
    assert file_sha256(outs[0]) == sha


def test_killed_then_run_again(toy):
    sha = fetch.PACKAGES['hydra-toy'].sha256
    for wait in (.3, .8, 1.2):
        p = subprocess.Popen([sys.executable, '-c', CHILD, sha], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait); p.send_signal(signal.SIGKILL); p.wait()
    assert file_sha256(fetch.archive('hydra-toy')) == sha


def test_no_pin_is_bigbench():
    assert not any('bigbench' in n.replace('-', '') for n in fetch.PACKAGES)
