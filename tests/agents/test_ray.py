"""Environment workers as actors of a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter

import pytest

from agents.cli import UsageError
from agents.config import WorkerConfig
from agents.rollout import Limits, play_text
from agents.workers.actors import _ray
from agents.workers.pool import WorkerPool, start_workers
from policy_opt.protocols import Job
from tests.agents.faulty import Faulty
from tests.agents.test_workers import FAULTY, ROOT, Talker, plain, talk

pytestmark = pytest.mark.full
BUSY = "tests.agents.faulty:Busy"


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with two CPUs each; this process is at the first."""
    ray = _ray()
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "memory": 3 << 30, "object_store_memory": 80 << 20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=node)
    found.second = found.add_node(**{k: v for k, v in node.items() if k != "include_dashboard"})
    yield found
    ray.shutdown()
    found.shutdown()


def start(cluster, count: int, spec: str = FAULTY, timeout_s: float = 90.0, **arguments) -> WorkerPool:
    config = WorkerConfig(ray=cluster.address, memory_gib=0.5, timeout_s=timeout_s)
    return start_workers(spec, arguments, count, config)


def test_actors_play_as_processes_do(cluster, capfd) -> None:
    """The same trajectories; losses are outcomes; Ray starts what has ended again, and says nothing on the display."""
    pool = start(cluster, 2, what="raise", on=[1])
    assert [plain(t) for t in talk(pool)] == [plain(t) for t in talk(lambda: Faulty(what="raise", on=[1]))]
    pool.close()
    pool = start(cluster, 1, what="kill", on=[1])
    assert [t.stop_reason for t in talk(pool, 4)] == ["answered", "error:WorkerDied", "answered", "answered"]
    pool.close()
    pool = start(cluster, 1, timeout_s=5.0, what="hang", on=[1])
    assert [t.stop_reason for t in talk(pool, 4)] == ["answered", "error:WorkerTimeout", "answered", "answered"]
    assert pool.losses == {"WorkerTimeout": 1}
    pool.close()
    pool = start(cluster, 1, what="gorge", on=[1])
    assert [t.stop_reason for t in talk(pool, 4)] == ["answered", "error:WorkerMemory", "answered", "answered"]
    pool.close()
    pool = start(cluster, 1, what="graze", on=[1])
    assert [t.stop_reason for t in talk(pool, 4)][1] in ("error:WorkerDied", "error:WorkerMemory")
    pool.close()
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_a_node_that_is_lost_costs_its_episodes_and_no_more(cluster) -> None:
    """Workers stand on both nodes; one node is killed in mid-rollout; the run goes on with the other."""
    pool = start(cluster, 2, BUSY, ms=20.0)
    assert len({env_node(pool, i) for i in range(2)}) == 2
    killer = threading.Timer(1.0, lambda: cluster.remove_node(cluster.second, allow_graceful=False))
    killer.start()
    played = play_text([Job(i, i, 0) for i in range(120)], pool, Talker(), Limits(error_reward=-1.0), 0)
    killer.join()
    reasons = Counter(t.stop_reason for t in played)
    assert set(reasons) <= {"answered", "error:WorkerDied"} and reasons["error:WorkerDied"] <= 4
    assert {t.stop_reason for t in played[-20:]} == {"answered"}
    assert 1 <= pool.losses["WorkerDied"] >= reasons["error:WorkerDied"]  # a reset is made again elsewhere
    assert len({env_node(pool, i) for i in range(2)}) == 1
    pool.close()


def env_node(pool: WorkerPool, i: int) -> str:
    """The node of a worker."""
    ray = _ray()
    actor = pool._workers[i].connection._actor  # type: ignore[attr-defined]
    return ray.get(actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id()))


def test_the_command_line_plays_on_a_cluster(cluster) -> None:
    done = command("--worker.ray", "auto", "--worker.memory-gib", "0.5", "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["success"][0] == 1.0


def test_mistakes_are_named(cluster) -> None:
    with pytest.raises(UsageError, match="did you mean 'Faulty'"):
        start(cluster, 1, "tests.agents.faulty:Faultty")
    for words, *argv in (
        ("start one with: ray start --head", "--worker.ray", "127.0.0.1:1", "--workers", "1"),
        ("give --workers N", "--worker.ray", "auto"),
    ):
        done = command(*argv)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    """An evaluation of a script, on the command line."""
    what = ("--model", "scripted:oracle", "--env", "tool_qa", "--episodes", "6")
    return subprocess.run([sys.executable, "-m", "agents.eval", *what, *argv], capture_output=True, text=True, cwd=ROOT)
