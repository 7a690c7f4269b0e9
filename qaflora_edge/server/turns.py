"""Turns: who is answered next, with bounded patience and the same chance for each client."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qaflora_edge.server.refusals import unavailable


class Room:
    """How many may wait in all, whatever they wait for."""

    def __init__(self, n_most: int) -> None:
        self.n_most, self.n_waiting = n_most, 0


class Turns:
    """So many at once; the others wait, and clients take turns.

    n_at_once  who may have a turn at the same time
    """

    def __init__(self, n_at_once: int, room: Room) -> None:
        self.n_running, self._n_at_once, self._room = 0, n_at_once, room
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it.

        Raises Refusal when too many wait.
        """
        await self._enter(client)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, client: str) -> None:
        if self.n_running < self._n_at_once:  # then nobody waits
            self.n_running += 1
            return
        if self._room.n_waiting >= self._room.n_most:
            raise unavailable(
                f"The server is busy: {self._room.n_waiting} requests wait already; try again "
                "later.",
                "queue_full",
            )
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._waiting.setdefault(client, deque())
        queue.append(mine)
        self._room.n_waiting += 1
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # the turn came as we gave up
                self._leave()
            elif mine in queue:
                queue.remove(mine)
                if not queue:
                    del self._waiting[client]
            raise
        finally:
            self._room.n_waiting -= 1

    def _leave(self) -> None:
        """Give the turn to the client that was served the longest ago."""
        while self._waiting:
            client, queue = self._waiting.popitem(last=False)
            mine = queue.popleft()
            if queue:
                self._waiting[client] = queue  # at the end
            if not mine.done():
                mine.set_result(None)
                return
        self.n_running -= 1
