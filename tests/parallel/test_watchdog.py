"""A step that does not end: who hangs, and where."""

import threading
import time

import pytest
import torch.distributed as dist

from switchworks.parallel import torchrun
from switchworks.parallel.watchdog import RankStatus, Watchdog, diagnose


def watched(store: dist.Store, rank: int, left: list[int], *steps: float) -> None:
    """A rank in a thread of this process whose steps take so many seconds."""
    watch = Watchdog(store, rank, 2, timeout=1.0, step=40, leave=lambda status: left.append(rank))
    for step, seconds in enumerate(steps, start=41):
        time.sleep(seconds)
        watch.reached(step)
    watch.close()


def run_both(*steps: tuple[float, ...]) -> list[int]:
    store, left = dist.HashStore(), []
    threads = [
        threading.Thread(target=watched, args=(store, rank, left, *times))
        for rank, times in enumerate(steps)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(left)


def test_ranks_give_up_a_step_that_does_not_end_and_one_says_who_hangs_where(capsys):
    assert run_both((0.1, 2.6), (0.1, 0.1, 2.6)) == [0, 1]
    said = capsys.readouterr().err
    assert said.count("error: step 42 has not ended for 1 seconds.") == 1
    assert "rank 0 hangs in step 42, at test_watchdog.py:" in said
    assert "(watched)" in said


def test_steps_that_end_in_time_are_left_alone(capsys):
    assert run_both((0.4, 0.4, 0.4, 0.4), (0.4, 0.4, 0.4, 0.4)) == []
    assert capsys.readouterr().err == ""


LIVELY = RankStatus(3, 17, "distributed_c10d.py:2810 (all_reduce), called from step.py:85", True)


def test_a_rank_that_tells_nothing_any_more_is_the_one_to_blame():
    stopped = RankStatus(1, 16, "layers.py:9 (forward)", False)
    message = diagnose([LIVELY, stopped], [LIVELY._replace(beat=5), stopped], 60)
    assert "step 18 has not ended for 60 seconds" in message
    assert "rank 1 does not answer" in message
    assert "last heard of in step 17, at layers.py:9 (forward)" in message
    assert "waiting for others: rank 0, in step 18, at distributed_c10d.py:2810" in message


def test_a_rank_that_never_told_anything_is_named_too():
    assert "rank 1 does not answer" in diagnose([LIVELY, None], [LIVELY, None], 60)


def test_of_many_waiting_ranks_eight_are_named():
    others = [LIVELY._replace(beat=5)] * 20
    busy = RankStatus(5, 17, "recorder.py:57 (write)", False)
    message = diagnose([LIVELY] * 21, [*others, busy], 60)
    assert "rank 20 hangs in step 18, at recorder.py:57 (write)" in message
    assert "rank 0, 1, 2, 3, 4, 5, 6, 7, ..., in step 18" in message


@pytest.fixture
def agent(monkeypatch):
    """The store of torchrun's agent, and the environment it gives its workers."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    torchrun._shared_store.cache_clear()
    yield store
    torchrun._shared_store.cache_clear()


def test_what_all_ranks_find_wrong_is_said_by_the_first_to_find_it(agent):
    assert torchrun.first_to_say("lr = -1 must be positive")
    assert not torchrun.first_to_say("lr = -1 must be positive")
    assert torchrun.first_to_say("texts/ is empty")


def test_without_torchrun_everything_is_said(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    torchrun._shared_store.cache_clear()
    assert torchrun.first_to_say("lr = -1")
    assert torchrun.first_to_say("lr = -1")


def test_a_lost_rank_is_told_from_other_errors():
    gloo = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:34"
    assert torchrun.is_lost_contact(RuntimeError(gloo))
    assert not torchrun.is_lost_contact(RuntimeError("shape mismatch"))
    assert not torchrun.is_lost_contact(ValueError(gloo))
