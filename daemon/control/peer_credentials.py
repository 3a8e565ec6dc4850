"""Peer credentials of unix sockets, and the permission to send commands."""

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
#: Python's getsockopt returns at most 1024 bytes.
_MAX_GROUPS = 256


@dataclass(frozen=True, slots=True)
class Peer:
    """Credentials of a process at the time when it connected."""

    pid: int
    uid: int
    #: Primary and supplementary groups.
    groups: frozenset[int]

    def __str__(self) -> str:
        return f"{user_name(self.uid)} (uid {self.uid}, pid {self.pid})"


def peer_of(connection: socket.socket) -> Peer:
    """Return the credentials of the process at the other end. Raises OSError."""
    pid, uid, gid = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return Peer(pid, uid, frozenset({gid, *_other_groups(connection, uid, gid)}))


def may_command(peer: Peer, uid: int, gid: int) -> bool:
    """Return whether a peer is root, the daemon's user, or in the daemon's group."""
    return peer.uid in (0, uid) or gid in peer.groups


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "unknown user"


def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def permitted(uid: int, gid: int) -> str:
    """Return who may send commands, for people: "root, user fd and members of group fd"."""
    own = "" if uid == 0 else f", user {user_name(uid)}"
    return f"root{own} and members of group {group_name(gid)}"


def permitted_here() -> str:
    return permitted(os.geteuid(), os.getegid())


def _other_groups(connection: socket.socket, uid: int, gid: int) -> Iterable[int]:
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        # Too many for one call. Return the groups of the user instead.
        return os.getgrouplist(user_name(uid), gid)
    return struct.unpack(f"{len(found) // 4}I", found)
