"""The data plane's side of a region: :class:`ProducerSide` publishes observations and puts weights in force."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks
from ..errors import InvalidOptionError, InvalidWeightsError, RegionError
from . import abi, seqlock
from .abi import ServerState
from .buffers import Action, Publication
from .region import Region, checked_weights


class ProducerSide(Region):
    """An open region as its producer uses it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sequence_id = 0
        self._action: Action | None = None
        self._action_known = self._action_seen = 0
        self._applied: tuple[int, int] | None = None
        self._safe = True
        self._safe_weights = np.ones(0)
        self._lease_end: float = 0
        #: Seconds for which an agent's weights are good at most, whatever lease it asks for.
        self.longest_lease = math.inf
        self._in_force = np.ones(0)
        self._names_changed = False
        if self.is_producer:
            self._states = np.zeros(self.capacity, np.uint8)
            self._table = np.zeros(self.layout.names_size // 8, np.uint64)

    def _begin(self, safe_weights: NDArray[np.float64]) -> None:
        """Put a new region's safe weights in force; there is one for each of its servers."""
        self._safe_weights = safe_weights
        self._in_force = safe_weights.copy()

    def publish(self, shown: Publication) -> int:
        """Publish an observation; its sequence id is one more than the last.

        Names and states are those of :meth:`set_server`; which action is in force, and since when, is what
        :meth:`weights_in_force` last found.

        Args:
            shown: of up to ``capacity`` servers.

        Returns:
            The sequence id.

        Raises:
            InvalidOptionError: if it does not fit, or holds a number that is negative or not finite; nothing has been
                published then.
        """
        memory = self._require_producer()
        n = shown.active.shape[0]
        if not 0 < n <= self.capacity:
            raise InvalidOptionError(f"region {self.name!r} has room for 1 to {self.capacity} servers, got {n}")
        buffer = self._buffer
        if buffer is None:
            buffer = self._buffer = self.new_buffer()
        try:
            buffer.fill(shown)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidOptionError(f"an observation for region {self.name!r} cannot be published: {error}") from error
        before = len(self._safe_weights)
        if n != before:
            self._resize(n)
        buffer.states[:n] = self._states[:n]
        buffer.weights[:n] = self._in_force
        buffer.safe_weights[:n] = self._safe_weights
        buffer.set_applied(self._applied, self._safe)
        if not seqlock.frame_is_valid(self._frame_sections, buffer.words):
            raise InvalidOptionError(
                f"an observation for region {self.name!r} has features, ground truth, counters or times that are "
                "negative, not finite or beyond 2**63"
            )
        if self._names_changed:
            seqlock.write_names(memory, self._names, self._table)
            self._names_changed = False
        buffer.set_names_version(int(seqlock.load_word(memory, seqlock.NAMES_VERSION)))
        self._sequence_id += 1
        if seqlock.publish_frame(
            memory, self._frames, self._frame_sections, buffer.words, self._sequence_id, time.monotonic_ns()
        ):
            self._observation_futex.wake()
        return self._sequence_id

    def set_server(self, index: int, *, name: str | None = None, state: ServerState | None = None) -> None:
        """Name a server or say how it is, from the next observation on. Both are reset when the server leaves.

        Args:
            index: the server, below the capacity; may be one that the next observation is the first to have.
            name: address or label, at most 63 bytes of printable UTF-8; "": unnamed; None: as before.
            state: None: as before; ``UNKNOWN`` until it is set.

        Raises:
            InvalidOptionError: for a value out of its range; nothing has changed then.
        """
        self._require_producer()
        index = checks.whole("index", index, low=0, high=self.capacity - 1)
        if state is not None:
            try:
                state = ServerState(state)
            except ValueError:
                raise InvalidOptionError(f"state must be a ServerState, got {state!r}") from None
        if name is not None:
            if not isinstance(name, str) or not name.isprintable() or len(name.encode()) >= abi.NAME_SIZE:
                raise InvalidOptionError(
                    f"the name of a server must be at most {abi.NAME_SIZE - 1} bytes of printable text, got {name!r}"
                )
            self._set_name(index, name.encode())
        if state is not None:
            self._states[index] = state

    def _set_name(self, index: int, name: bytes) -> None:
        rows = self._table[abi.NAMES.size // 8 :].view(f"S{abi.NAME_SIZE}")
        if rows[index] != name:
            rows[index] = name
            self._count_names(index + 1)

    def _count_names(self, num_servers: int) -> None:
        """Have the table count for so many servers at least, and publish it with the next observation."""
        head = self._table[: abi.NAMES.size // 8].view(abi.NAMES.dtype)[0]
        head["num_servers"] = max(int(head["num_servers"]), num_servers, len(self._safe_weights))
        self._names_changed = True

    def heartbeat(self) -> None:
        """Say that the producer lives, though it has nothing to publish."""
        seqlock.store_word(self._require_producer(), seqlock.HEARTBEAT, time.monotonic_ns())

    def set_num_servers(self, num_servers: int) -> None:
        """Servers join or leave, before the observation that shows it; those that join have the safe weight 1.

        Raises:
            InvalidOptionError: if there is no room for them.
        """
        self._require_producer()
        self._resize(checks.whole("num_servers", num_servers, high=self.capacity))

    def set_safe_weights(self, weights: ArrayLike) -> None:
        """Change the weights that are in force without an agent's, float[number of servers]."""
        self._require_producer()
        checked = checked_weights("safe_weights", weights)
        if len(checked) != len(self._safe_weights):
            raise InvalidWeightsError(f"safe_weights must be {len(self._safe_weights)} numbers, got {len(checked)}")
        self._safe_weights = checked
        self._combine()

    def weights_in_force(self) -> NDArray[np.float64]:
        """Weights that the data plane is to dispatch by now, float64[number of servers]; a view, do not change it.

        Those of the newest action while its lease lasts, else the safe weights; an action that cannot be read is
        ignored. Call it before each publication and whenever :meth:`wait_action` returns true.
        """
        self._require_producer()
        now = time.monotonic_ns()
        if self._action is None:
            self._action = Action(self.layout)
        seen = int(seqlock.load_word(self._memory, seqlock.ACTION_COUNT))
        try:
            found = self._read_action(self._action, self._action_known)
        except RegionError:
            # The copy now holds what no agent may write.
            found = self._action_known = 0
        self._action_seen = found or seen
        action = self._action
        if found:
            self._action_known = found
            # From now on if it says that it was written later, as on the clock of another namespace.
            lease = min(action.lease_ns or math.inf, self.longest_lease * 1e9)
            self._lease_end = min(action.written_at, time.monotonic_ns()) + lease
            if now < self._lease_end:
                self._applied = action.sequence_id, now
        good = self._action_known > 0 and now < self._lease_end
        if found or self._safe == good:
            self._safe = not good
            self._combine()
        return self._in_force

    @property
    def safe_weights_in_force(self) -> bool:
        """True if :meth:`weights_in_force` last found no action with a lease that lasts."""
        return self._safe

    @property
    def index_in_force(self) -> NDArray[np.float64] | None:
        """Index parameters that go with :meth:`weights_in_force`, float64[n, 2]: speed per core, background load.

        For the first n servers, as many as the action has; None if the agent gave none. A view, do not change it.
        """
        action = self._action
        if self._safe or action is None or not action.has_index:
            return None
        return action.index[: min(action.num_servers, len(self._safe_weights))]

    def _combine(self) -> None:
        weights = self._safe_weights.copy()
        if not self._safe and self._action is not None:
            count = min(self._action.num_servers, len(weights))
            weights[:count] = self._action.weights[:count]
            if not weights.any():
                # The servers that were to take flows have left.
                self._safe = True
                weights = self._safe_weights.copy()
        self._in_force = weights

    def _resize(self, num_servers: int) -> None:
        """Servers have joined or left: those that joined have the safe weight 1 until it is changed."""
        before = len(self._safe_weights)
        weights = np.ones(num_servers)
        known = min(num_servers, before)
        weights[:known] = self._safe_weights[:known]
        self._safe_weights = weights if weights.any() else np.ones(num_servers)
        self._combine()
        self._states[num_servers:before] = ServerState.UNKNOWN
        for index in range(num_servers, before):
            self._set_name(index, b"")
        if self._table.any():
            self._count_names(num_servers)

    def wait_action(self, timeout: float) -> bool:
        """Sleep until the agent has written an action that :meth:`weights_in_force` has not seen, or ``timeout``."""
        self._require_producer()
        return self._wait(seqlock.ACTION_COUNT, self._action_event // 8, self._action_futex, self._action_seen, timeout)

    def _require_producer(self) -> NDArray[np.uint64]:
        if not self.is_producer:
            raise RegionError(f"region {self.name!r} was attached; only its creator is its producer")
        return self._memory
