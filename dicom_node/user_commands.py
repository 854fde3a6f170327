# ruff: noqa: T201 - what commands say goes to standard output
"""`dicom-node users`: lines for the users file. Passcodes come from a prompt or standard input, not from arguments."""

from __future__ import annotations

import argparse
import getpass
import sys

from dicom_node.commands import FAILED, OK, settings
from dicom_node.errors import ConfigError

__all__ = ["users_check", "users_hash"]

MAX_LINE = 4096


def _passcode(again: bool) -> bytes:
    if not sys.stdin.isatty():
        return sys.stdin.buffer.readline(MAX_LINE).rstrip(b"\r\n")
    first = getpass.getpass("passcode: ")
    if again and getpass.getpass("again: ") != first:
        raise ConfigError("the two passcodes differ; begin anew")
    return first.encode()


def users_hash(arguments: argparse.Namespace) -> int:
    """Print a user's line for the users file."""
    from dicom_node.dimse.users import hash_passcode, user_line

    print(user_line(arguments.name, hash_passcode(_passcode(again=True))))
    return OK


def users_check(arguments: argparse.Namespace) -> int:
    """Whether a passcode is that of a user in the configured file."""
    from dicom_node.dimse.users import UsersFile

    identity = settings(arguments).user_identity
    if identity is None or identity.users_file is None:
        raise ConfigError("user_identity.users_file is not set; name the file that the lines of `users hash` are in")
    right = UsersFile(identity.users_file).check(arguments.name, _passcode(again=False))
    print("the passcode is right" if right else "there is no such user, or it is another passcode")
    return OK if right else FAILED
