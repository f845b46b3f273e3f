"""What torchrun tells a process, and what processes tell each other beside their collectives.

torchrun's agent keeps a store, a small dictionary on the network, that outlives the workers and so
also the restart of a group.
"""

# pyright: reportPrivateImportUsage=false
# (Stores are in torch's documentation, but not in its lists of exports.)
import hashlib
import os
from datetime import timedelta
from functools import lru_cache

import torch.distributed as dist

_PATIENCE = timedelta(seconds=60)
"""For an answer of the store, which is a process of its own and always there."""
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "connectFullMesh failed",
    "Timed out waiting",
    "pair closure",
)
"""How gloo says that another rank is gone."""


def rank() -> int:
    """Of this process; 0 if it is the only one."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def attempt() -> int:
    """How often torchrun has restarted the group."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def name() -> str:
    """That of the launch, the same after a restart; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def connect() -> "dist.Store | None":
    """A connection of its own to the store of torchrun's agent; None if there is no agent's."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=_PATIENCE)


def begin(backend: str, patience: float) -> None:
    """Form the process group of all ranks; they wait for one another half an hour, or five minutes
    more than `patience` seconds."""
    timeout = timedelta(seconds=max(1800.0, patience + 300.0))
    store = connect()
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    # The store still has the addresses of those that a restart has killed.
    ours = dist.PrefixStore(f"group of attempt {attempt()}", store)
    dist.init_process_group(backend, store=ours, rank=rank(), world_size=world(), timeout=timeout)


def first_to_say(text: str) -> bool:
    """Whether no process of this launch has said `text` yet: what all find wrong is said once.

    Without torchrun there is nobody to ask, and everybody says it.
    """
    if world() == 1:
        return True
    try:
        store = _board()
        digest = hashlib.sha256(text.encode()).hexdigest()
        return store is None or store.add(f"said {digest}", 1) == 1
    except RuntimeError:  # the agent is gone
        return True


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` says no more than that another rank is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


@lru_cache(maxsize=1)
def _board() -> "dist.Store | None":
    return connect()
