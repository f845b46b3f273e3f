"""What torchrun tells a process, and what processes tell each other outside of collectives.

torchrun's agent has a key-value store that outlives the workers, and so a restart of the group.
"""

# pyright: reportPrivateImportUsage=false
# (Stores are in torch's documentation, but not in its lists of exports.)
import hashlib
import os
from datetime import timedelta
from functools import lru_cache

import torch.distributed as dist

_STORE_TIMEOUT = timedelta(seconds=60)
_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("connectFullMesh failed", "Timed out waiting", "pair closure"),
)
"""Words of gloo's messages about a rank that is gone."""


def rank() -> int:
    """The rank of this process; 0 if it is the only one."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """The number of processes started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def attempt() -> int:
    """How often torchrun has restarted the group."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def run_id() -> str:
    """The id of the launch, the same after a restart; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def agent_store() -> "dist.Store | None":
    """A new connection to the store of torchrun's agent; None without an agent."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT)


def init_process_group(backend: str, step_timeout: float) -> None:
    """Create the default process group of all ranks. A collective fails after half an hour, and not
    before the watchdog has had five minutes more than `step_timeout` seconds to say which rank
    hangs."""
    timeout = timedelta(seconds=max(1800.0, step_timeout + 300.0))
    store = agent_store()
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    # After a restart the store still has the addresses of the processes that were killed.
    fresh = dist.PrefixStore(f"group of attempt {attempt()}", store)
    dist.init_process_group(backend, store=fresh, rank=rank(), world_size=world(), timeout=timeout)


def first_to_say(text: str) -> bool:
    """Whether no process of this launch has called this with `text` before: an error that all ranks
    find is printed once. Without torchrun's store, True on every rank."""
    if world() == 1:
        return True
    try:
        store = _shared_store()
        digest = hashlib.sha256(text.encode()).hexdigest()
        return store is None or store.add(f"said {digest}", 1) == 1
    except RuntimeError:  # the agent is gone
        return True


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` only says that another rank is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


_shared_store = lru_cache(maxsize=1)(agent_store)
