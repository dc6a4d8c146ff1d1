"""The plug-in as users have it: their own tests, in a pytest of their own, with every warning an error."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(120)

TRAINING = """
import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch

import ckpt_cloud
from ckpt_cloud import CommitOptions, ObjectStoreWriter
from ckpt_cloud.errors import (
    CheckpointExists, CheckpointIncomplete, CheckpointNotFound, ChecksumMismatch, CommitStateUnknown, CorruptManifest,
    MissingObject, PermissionDenied, StoreUnavailable,
)
from ckpt_cloud.testing import Crashed

SEEN = []


def state(step):
    torch.manual_seed(step)
    return {"model": torch.nn.Linear(64, 64).state_dict(), "step": step}


def save(url, step, **options):
    commit = CommitOptions(deadline_s=0.2, pause_s=0.01)
    ckpt_cloud.save(state(step), checkpoint_id=url, storage_writer=ObjectStoreWriter(commit=commit, **options))


def loaded(url):
    into = state(0)
    ckpt_cloud.load(into, checkpoint_id=url)
    torch.testing.assert_close(into["model"], state(into["step"])["model"], rtol=0, atol=0)
    return into["step"]


def test_save_and_load(checkpoint_url):
    save(f"{checkpoint_url}/step-1", 1)
    save(f"{checkpoint_url}/step-2", 2)
    assert loaded(ckpt_cloud.latest(checkpoint_url)) == 2
    SEEN.append(checkpoint_url)


def test_every_test_has_a_place_of_its_own_and_leaves_nothing(checkpoint_url):
    assert ckpt_cloud.latest(checkpoint_url) is None
    with pytest.raises(urllib.error.HTTPError, match="404"):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(f"{os.environ['AWS_ENDPOINT_URL']}/{SEEN[0].split('/')[2]}?list-type=2")


def test_other_processes_get_there(checkpoint_url):
    save(f"{checkpoint_url}/step-1", 1)
    code = f"import ckpt_cloud; print(ckpt_cloud.latest({checkpoint_url!r}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == f"{checkpoint_url}/step-1"


def test_the_environment_is_the_machines_own_again():
    assert os.environ["AWS_PROFILE"] == "nobody"
    assert "AWS_ENDPOINT_URL" not in os.environ


def test_an_upload_that_fails(checkpoint_url, store_faults):
    store_faults.fail("put", key="*.safetensors", error=PermissionDenied)
    with pytest.raises(PermissionDenied):
        save(checkpoint_url, 1)
    with pytest.raises(CheckpointNotFound):
        loaded(checkpoint_url)
    save(checkpoint_url, 2)
    assert loaded(checkpoint_url) == 2


def test_a_commit_whose_answer_is_lost_once(checkpoint_url, store_faults):
    store_faults.fail("put", key="COMMIT", applied=True)
    save(checkpoint_url, 1)
    assert [o.outcome for o in store_faults.operations if o[:2] == ("put", "COMMIT")] == ["StoreUnavailable"]
    assert loaded(checkpoint_url) == 1


def test_a_commit_that_is_never_answered(checkpoint_url, store_faults):
    store_faults.fail("put", key="COMMIT", times=None)
    with pytest.raises(CommitStateUnknown):
        save(checkpoint_url, 1)
    with pytest.raises(CheckpointIncomplete):
        loaded(checkpoint_url)
    store_faults.clear()
    save(checkpoint_url, 2)
    assert loaded(checkpoint_url) == 2


def test_damaged_bytes(checkpoint_url, store_faults):
    save(checkpoint_url, 1)
    for damage, error in [
        (lambda: store_faults.corrupt("*.safetensors"), ChecksumMismatch),
        (lambda: store_faults.shorten("*.safetensors", size=100), MissingObject),
        (lambda: store_faults.corrupt("*/manifest"), CorruptManifest),
        (lambda: store_faults.fail("get*", key="COMMIT", error=StoreUnavailable("down")), StoreUnavailable),
    ]:
        damage()
        with pytest.raises(error):
            loaded(checkpoint_url)
        store_faults.clear()
    store_faults.corrupt("*.safetensors", times=1)
    assert loaded(checkpoint_url) == 1


def test_a_crash_at_every_operation_commits_nothing(checkpoint_url, store_faults):
    save(f"{checkpoint_url}/whole", 1)
    operations = len(store_faults.operations)
    assert store_faults.operations[-1] == ("put", "COMMIT", "done")
    for n in range(1, operations + 1):
        url = f"{checkpoint_url}/{n}"
        store_faults.crash_at(n)
        with pytest.raises(CommitStateUnknown if n == operations else Crashed):
            save(url, n)
        store_faults.clear()
        with pytest.raises(CheckpointNotFound):
            loaded(url)
        assert ckpt_cloud.latest(checkpoint_url) == f"{checkpoint_url}/whole"
    save(f"{checkpoint_url}/1", 2)
    assert loaded(ckpt_cloud.latest(checkpoint_url)) == 2


def test_a_crash_leaves_the_checkpoint_that_was_there(checkpoint_url, store_faults):
    save(checkpoint_url, 1)
    for n in range(1, 6):
        store_faults.crash_at(n)
        with pytest.raises((Crashed, CommitStateUnknown)):
            save(checkpoint_url, 2, overwrite=True)
        store_faults.clear()
        assert loaded(checkpoint_url) == 1
    with pytest.raises(CheckpointExists):
        save(checkpoint_url, 2)


def test_training_goes_on_while_the_store_hangs(checkpoint_url, store_faults):
    store_faults.hang("put", key="*.safetensors")
    pending = ckpt_cloud.async_save(state(1), checkpoint_id=checkpoint_url)
    store_faults.wait_for("put", key="*.safetensors")
    assert not pending.done()
    store_faults.release()
    pending.result()
    assert loaded(checkpoint_url) == 1


def test_faults_end_with_the_test(checkpoint_url):
    save(checkpoint_url, 1)
    assert loaded(checkpoint_url) == 1
    with open("endpoint", "w") as file:
        file.write(os.environ["AWS_ENDPOINT_URL"])
"""


def run_pytest(directory, *arguments, **environment):
    """The plug-in alone, as its entry point would load it, in a process of its own."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "AWS_"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "ckpt_cloud.testing.plugin", "-p", "no:cacheprovider", *arguments],
        cwd=directory,
        env=plain | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_a_training_loop_is_tested(tmp_path):
    (tmp_path / "test_training.py").write_text(TRAINING)
    done = run_pytest(
        tmp_path,
        "-Werror",
        # From torch, on each save and load without a process group.
        "-Wignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning",
        # A developer's machine: profiles, other endpoints, and a proxy that does not know 127.0.0.1.
        AWS_PROFILE="nobody",
        AWS_ENDPOINT_URL_S3="http://127.0.0.1:9",
        HTTP_PROXY="http://127.0.0.1:9",
        http_proxy="http://127.0.0.1:9",
    )
    assert f"{TRAINING.count('def test_')} passed" in done.stdout, done.stdout + done.stderr
    assert done.stderr == ""
    host, _, port = (tmp_path / "endpoint").read_text().removeprefix("http://").partition(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0, "the server outlived the tests"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "endpoint",
        "test_training.py",
    ]


def test_without_moto_it_says_what_to_install(tmp_path):
    (tmp_path / "conftest.py").write_text("import sys\n\nsys.modules['moto'] = None\n")
    (tmp_path / "test_it.py").write_text(
        "def test_url(checkpoint_url):\n    pass\n\n\ndef test_faults(store_faults):\n    store_faults.fail()\n"
    )
    done = run_pytest(tmp_path, "-Werror")
    assert "checkpoint_url needs moto and its server" in done.stdout, done.stdout + done.stderr
    assert "pip install 'ckpt-cloud[testing]'" in done.stdout
    assert "1 passed, 1 error" in done.stdout


def test_tests_that_use_no_fixture_pay_nothing(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import sys\n\n\ndef test_it():\n"
        "    assert not {'torch', 'moto', 'boto3', 'obstore', 'ckpt_cloud.stores'} & set(sys.modules)\n"
    )
    assert "1 passed" in run_pytest(tmp_path).stdout


def test_fixtures_are_listed_with_what_they_are(tmp_path):
    listed = run_pytest(tmp_path, "--fixtures").stdout
    assert "A fresh `s3://bucket/prefix` URL" in listed
    assert "A `Faults` that all stores obey" in listed
