"""Who is at the other end of a unix socket, as the kernel says, and who of them may give orders."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

_CREDENTIALS = struct.Struct("iII")
#: asm-generic/socket.h; the socket module has no name for it.
_SO_PEERGROUPS = 59
#: More than Python's getsockopt takes at a time.
_MOST_GROUPS = 256


@dataclass(frozen=True, slots=True)
class Peer:
    """A process as it was when it connected: what it becomes afterwards gives it no rights here."""

    pid: int
    uid: int
    #: Its primary and all other groups.
    groups: frozenset[int]

    def __str__(self) -> str:
        return f"{user_name(self.uid)} (uid {self.uid}, pid {self.pid})"


def peer_of(connection: socket.socket) -> Peer:
    """Raises OSError if the kernel does not tell."""
    pid, uid, gid = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return Peer(pid, uid, frozenset({gid, *_other_groups(connection, uid, gid)}))


def may_command(peer: Peer, uid: int, gid: int) -> bool:
    """Root, the daemon's own user, and the members of its group."""
    return peer.uid in (0, uid) or gid in peer.groups


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "a user without a name"


def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def who_may(uid: int, gid: int) -> str:
    """For people: "root, user fd and members of group fd"."""
    own = "" if uid == 0 else f", user {user_name(uid)}"
    return f"root{own} and members of group {group_name(gid)}"


def own_rights() -> str:
    return who_may(os.geteuid(), os.getegid())


def _other_groups(connection: socket.socket, uid: int, gid: int) -> Iterable[int]:
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        # It has more of them: those that it got when it logged in.
        return os.getgrouplist(user_name(uid), gid)
    return struct.unpack(f"{len(found) // 4}I", found)
