"""Turns: who is answered next, with bounded patience and the same chance for each client."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, NamedTuple, TypeVar

from qaflora_edge.server.refusals import Refusal, unavailable

T = TypeVar("T")


class Client(NamedTuple):
    """Who asks: the address is known, and the user is what a request says."""

    address: str
    user: str = ""


class Waiting(Generic[T]):
    """Who waits, in turn: addresses with each other, and the users of an address among themselves.

    So nobody has a second share by calling himself by two names.
    """

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, OrderedDict[str, deque[T]]] = OrderedDict()

    def add(self, client: Client, one: T) -> None:
        users = self._addresses.setdefault(client.address, OrderedDict())
        users.setdefault(client.user, deque()).append(one)

    def remove(self, client: Client, one: T) -> None:
        """Take one out; nothing where it does not wait."""
        users = self._addresses.get(client.address, OrderedDict())
        queue = users.get(client.user, deque())
        if one in queue:
            queue.remove(one)
            if not queue:
                del users[client.user]
            if not users:
                del self._addresses[client.address]

    def next(self) -> T | None:
        """Take out the first of the user, of the address, whose turn was the longest ago."""
        if not self._addresses:
            return None
        address, users = self._addresses.popitem(last=False)
        user, queue = users.popitem(last=False)
        one = queue.popleft()
        if queue:
            users[user] = queue  # at the end
        if users:
            self._addresses[address] = users
        return one


class Room:
    """How many may wait in all, whatever they wait for.

    Where it is full, who comes takes the place of the last one of the address that has the most,
    if that has more even so: nobody keeps others out by asking often.
    """

    def __init__(self, n_most: int) -> None:
        self.n_most = n_most
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}  # by address

    @property
    def n_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def enter(self, address: str, one: asyncio.Future[None]) -> None:
        """Let one wait. Raises Refusal when there is no place for it."""
        if self.n_waiting >= self.n_most:
            n_mine = len(self._waiting.get(address, ()))
            most = max(self._waiting, key=lambda each: len(self._waiting[each]), default=address)
            last = next(
                (each for each in reversed(self._waiting.get(most, ())) if not each.done()), None
            )
            if last is None or len(self._waiting[most]) <= n_mine + 1:
                raise self._full()
            last.set_exception(self._full())
            self.leave(most, last)
        self._waiting.setdefault(address, []).append(one)

    def leave(self, address: str, one: asyncio.Future[None]) -> None:
        """Take one out; nothing where its place was taken."""
        waiting = self._waiting.get(address, [])
        if one in waiting:
            waiting.remove(one)
            if not waiting:
                del self._waiting[address]

    def _full(self) -> Refusal:
        message = f"The server is busy: {self.n_waiting} requests wait already; try again later."
        return unavailable(message, "queue_full")


class Turns:
    """So many at once; the others wait, and clients take turns.

    n_at_once  who may have a turn at the same time
    """

    def __init__(self, n_at_once: int, room: Room) -> None:
        self.n_running, self._n_at_once, self._room = 0, n_at_once, room
        self._waiting = Waiting[asyncio.Future[None]]()

    @asynccontextmanager
    async def turn(self, client: Client) -> AsyncIterator[None]:
        """Wait for a turn, and have it.

        Raises Refusal when too many wait.
        """
        await self._enter(client)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, client: Client) -> None:
        if self.n_running < self._n_at_once:  # then nobody waits
            self.n_running += 1
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._room.enter(client.address, mine)
        self._waiting.add(client, mine)
        try:
            await mine
        except BaseException:
            if mine.done() and not mine.cancelled() and mine.exception() is None:
                self._leave()  # the turn came as we gave up
            else:
                self._waiting.remove(client, mine)
            raise
        finally:
            self._room.leave(client.address, mine)

    def _leave(self) -> None:
        """Give the turn to whose it is."""
        while (mine := self._waiting.next()) is not None:
            if not mine.done():
                mine.set_result(None)
                return
        self.n_running -= 1
