"""What a training will need on every node of the connected cluster, asked before an hour of it."""

from collections.abc import Callable

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from meanet import storage
from meanet.errors import UserError

_PATIENCE_S = 60.0


def check_storage(uri: str) -> str:
    """Prove that this process and every other node can write a folder, and that all mean the same one; returns it,
    absolute if local.

    Raises:
        UserError: one cannot, or sees another folder; which, and why.
    """
    place = storage.check_writable(uri)
    with storage.marked(place) as marker:
        _on_other_nodes(lambda: storage.check_marked(place, marker))
    return place


def _on_other_nodes(check: Callable[[], None]) -> None:
    """Run a check in a worker of each.

    Raises:
        UserError: of the first that fails, with its node's address.
    """
    own = ray.get_runtime_context().get_node_id()
    known = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = {one["NodeID"]: one["NodeManagerAddress"] for one in known if one["Alive"] and one["NodeID"] != own}
    task = ray.remote(num_cpus=0, max_retries=0)(_said)
    there = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
    asked = {task.options(scheduling_strategy=there[node]).remote(check): node for node in nodes}
    if not asked:
        return
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE_S)
    for answer in done:
        try:
            said = ray.get(answer)
        except ray.exceptions.RayError as error:
            said = f"it could not be asked ({str(error).splitlines()[0]}): it must have this meanet installed"
        if said is not None:
            raise UserError(f"node {asked[answer][:8]} ({nodes[asked[answer]]}): {said}")
    if late:
        node = asked[late[0]]
        raise UserError(f"node {node[:8]} ({nodes[node]}) does not answer within {_PATIENCE_S:.0f} s: look at its load")


def _said(check: Callable[[], None]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None
