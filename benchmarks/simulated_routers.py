"""Routers with the real board, policies and prefix table before simulated replicas, in simulated time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from random import Random

from fastdeploy.daemon.router.board.board import Board, Lease
from fastdeploy.daemon.router.instance import Instance, ReplicaHandle
from fastdeploy.daemon.router.policy.policy import Policy

from .router_traffic import Conversation, Kind, Turn, chat, traffic
from .simulated_replica import Job, Replica, Timeline

REPLICAS = 8
#: Seconds between speed measurements, metric scrapes, and reports of other routers.
MEASURE_EVERY, SCRAPE_EVERY, REPORT_EVERY = 1.0, 2.0, 0.1


class Sharing(Enum):
    """The ways in which routers learn of each other's requests."""

    NOTHING = auto()
    #: The last report.
    REPORTS = auto()
    #: The last report, extrapolated by the own router's changes since.
    GUESSING = auto()


@dataclass(frozen=True, slots=True)
class Setting:
    #: Requests per second of each kind.
    rates: Mapping[Kind, float]
    #: One replica has half the speed.
    one_is_slow: bool = False
    #: Requests per second that two replicas receive directly.
    past_the_routers: float = 0.0
    routers: int = 1
    sharing: Sharing = Sharing.NOTHING
    #: Blocks of each replica's prefix cache: 96k tokens.
    cache_blocks: int = 1500


@dataclass(frozen=True, slots=True)
class Scene:
    """A setting with its clients, whose requests are the same for every policy."""

    setting: Setting
    seed: int
    #: Duration of the arrivals in seconds.
    seconds: float
    clients: Sequence[Conversation]
    strangers: Sequence[Conversation]

    @classmethod
    def of(cls, setting: Setting, seed: int, seconds: float) -> Scene:
        strangers: Mapping[Kind, float] = {chat: setting.past_the_routers} if setting.past_the_routers else {}
        return cls(
            setting,
            seed,
            seconds,
            traffic(setting.rates, seed, seconds),
            traffic(strangers, seed + 1, seconds),
        )


def simulate(scene: Scene, policy: Policy) -> list[Job]:
    """Send all requests of the scene through the routers."""
    return _Simulation(scene, policy).run()


#: Sends a turn and calls back on completion.
_Send = Callable[[Turn, Callable[[], None]], None]


class _Simulation:
    def __init__(self, scene: Scene, policy: Policy) -> None:
        self._scene, self._setting = scene, scene.setting
        self._policy = policy
        self._random = Random(scene.seed)
        self._time = Timeline()
        speeds = [0.5 if self._setting.one_is_slow else 1.0, *[1.0] * (REPLICAS - 1)]
        self._replicas = [Replica(self._time, speed, self._setting.cache_blocks) for speed in speeds]
        self._boards = [self._new_board() for _ in range(self._setting.routers)]
        self._others = [_Others() for _ in self._boards]
        self._jobs: list[Job] = []

    def run(self) -> list[Job]:
        for conversation in self._scene.clients:
            self._play(conversation, self._through_a_router)
        for number, stranger in enumerate(self._scene.strangers):
            self._play(stranger, partial(self._past_the_routers, self._replicas[number % 2]))
        with ExitStack() as stack:
            for board in self._boards:
                stack.enter_context(closing(board))
                self._every(MEASURE_EVERY, partial(self._measure, board))
                if self._policy.needs_load:
                    self._every(SCRAPE_EVERY, partial(self._scrape, board))
            if self._setting.sharing != Sharing.NOTHING:
                self._every(REPORT_EVERY, self._report)
            self._time.run()
        return self._jobs

    def _play(self, conversation: Conversation, send: _Send) -> None:
        """Send each turn after the response to the previous one."""
        turns = iter(conversation.turns)

        def go_on() -> None:
            turn = next(turns, None)
            if turn and self._time.now + turn.pause < self._scene.seconds:
                self._time.at(self._time.now + turn.pause, lambda: send(turn, go_on))

        self._time.at(conversation.start, go_on)

    def _through_a_router(self, turn: Turn, go_on: Callable[[], None]) -> None:
        """Spread the clients' connections evenly over the routers."""
        router = self._random.randrange(len(self._boards))
        board = self._boards[router]
        if self._setting.sharing == Sharing.GUESSING:
            board.set_remote(self._others[router].by_now(_loads(board), len(self._boards)))
        lease = board.pick(self._policy, turn.facts)
        assert isinstance(lease, Lease)

        def ended(job: Job) -> None:
            lease.count_tokens(turn.answer_tokens - 1)
            lease.release()
            self._jobs.append(job)
            go_on()

        job = Job(turn, self._time.now, began=lambda job: lease.count_tokens(1), ended=ended)
        self._replicas[lease.instance.replica or 0].submit(job)

    def _past_the_routers(self, replica: Replica, turn: Turn, go_on: Callable[[], None]) -> None:
        replica.submit(Job(turn, self._time.now, began=lambda job: None, ended=lambda job: go_on()))

    def _new_board(self) -> Board:
        board = Board.create(clock=lambda: self._time.now)
        board.open_counters()
        for number in range(REPLICAS):
            board.admit(Instance("127.0.0.1", 8000 + number, replica=number))
        return board

    def _every(self, seconds: float, act: Callable[[], None]) -> None:
        """Repeat until the arrivals end."""

        def again() -> None:
            act()
            if self._time.now < self._scene.seconds:
                self._time.at(self._time.now + seconds, again)

        again()

    def _measure(self, board: Board) -> None:
        board.measure(self._time.now)

    def _scrape(self, board: Board) -> None:
        for handle in board.handles():
            replica = self._replicas[handle.instance.replica or 0]
            board.set_load(handle, replica.running, len(replica.waiting))

    def _report(self) -> None:
        loads = [_loads(board) for board in self._boards]
        for router, board in enumerate(self._boards):
            others = [load for other, load in enumerate(loads) if other != router]
            elsewhere = {handle: _sum(load[handle] for load in others) for handle in loads[router]}
            self._others[router] = _Others(elsewhere, loads[router])
            board.set_remote(elsewhere)


#: Requests and prompt tokens in flight.
_Load = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Others:
    """Reported in-flight requests of the other routers, and those of the own router at that time."""

    said: Mapping[ReplicaHandle, _Load] = field(default_factory=dict)
    own_then: Mapping[ReplicaHandle, _Load] = field(default_factory=dict)

    def by_now(self, own: Mapping[ReplicaHandle, _Load], routers: int) -> dict[ReplicaHandle, _Load]:
        """Extrapolate the report, assuming that all routers changed like the own one."""
        return {
            handle: (
                max(0, said[0] + (routers - 1) * (own[handle][0] - self.own_then[handle][0])),
                max(0, said[1] + (routers - 1) * (own[handle][1] - self.own_then[handle][1])),
            )
            for handle, said in self.said.items()
        }


def _loads(board: Board) -> dict[ReplicaHandle, _Load]:
    return {row.handle: (row.in_flight, row.tokens) for row in board.status()}


def _sum(loads: Iterable[_Load]) -> _Load:
    requests, tokens = zip(*loads, strict=True)
    return sum(requests), sum(tokens)


def figures_of(jobs: Sequence[Job]) -> Figures:
    waits = sorted(job.first_token_at - job.arrived for job in jobs)
    return Figures(
        ttft_mean=1e3 * sum(waits) / len(waits),
        ttft_p50=1e3 * waits[len(waits) // 2],
        ttft_p99=1e3 * waits[len(waits) * 99 // 100],
        e2e_mean=1e3 * sum(job.ended_at - job.arrived for job in jobs) / len(jobs),
        cached=100 * sum(job.cached_tokens for job in jobs) / sum(job.turn.prompt_tokens for job in jobs),
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """Results: times in milliseconds, and the percentage of cached prompt tokens."""

    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    e2e_mean: float
    cached: float
