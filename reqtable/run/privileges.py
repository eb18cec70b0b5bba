"""Gives up root: a server that root has started, and that has bound its sockets, goes on as another user."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass

from reqtable.table.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Account:
    """Names the user and the group that a process goes on as. A group that is None is that of the user."""

    name: str
    user: int
    group: int

    @classmethod
    def of(cls, user: str | None, group: str | None) -> Account | None:
        """Return the account of a user's name or number, and a group's; None if neither is given.

        Raises ConfigurationError if there is none of that name, or if this process is not root.
        """
        if user is None and group is None:
            return None
        if os.geteuid() != 0:
            raise ConfigurationError(
                "only root can become another user: leave --user and --group out, or start as root"
            )
        try:
            found = pwd.getpwuid(os.getuid()) if user is None else _user(user)
        except KeyError:
            raise ConfigurationError(f"--user {user}: there is no such user") from None
        try:
            own = found.pw_gid if group is None else _group(group)
        except KeyError:
            raise ConfigurationError(f"--group {group}: there is no such group") from None
        return cls(found.pw_name, found.pw_uid, own)

    def become(self) -> None:
        """Go on as this account, for good: other groups, too, are those of the user."""
        os.initgroups(self.name, self.group)
        os.setgid(self.group)
        os.setuid(self.user)


def _user(text: str) -> pwd.struct_passwd:
    return pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)


def _group(text: str) -> int:
    return grp.getgrgid(int(text)).gr_gid if text.isdecimal() else grp.getgrnam(text).gr_gid
