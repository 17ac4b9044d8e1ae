"""A process of its own for whatever touches the device: a kernel that crashes there ends that process alone."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from fastvit_kernels.bench.gpu.device import Device

T = TypeVar("T")
_ENDS_IN = 10.0


class Lost(Exception):
    """The process has ended, or was ended, before it answered; the message says how."""


class TimedOut(Lost):
    """It took too long."""


class Worker:
    """Runs tasks one after another in one process, and in a new one after that was lost.

    Args:
        make_device: called in the process; every task gets what it returns. A function of a module, as tasks are.
    """

    def __init__(self, make_device: Callable[[], Device]) -> None:
        self._make_device = make_device
        self._process: Any = None
        self._connection: Connection | None = None

    def run(self, task: Callable[..., T], *arguments: Any, limit: float) -> T:
        """`task(device, *arguments)`.

        Raises:
            TimedOut: there was no answer within `limit` seconds.
            Lost: the process has ended, or the device does not work for it any more.
        """
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._connection is not None
        try:
            self._connection.send((task, arguments))
            if not self._connection.poll(limit):
                self.close()
                raise TimedOut(f"no result within {limit:.0f} s")
            usable, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_ENDS_IN)
            code = self._process.exitcode
            self.close()
            raise Lost(f"the process ended with exit code {code}") from error
        if not usable:
            self.close()
        if isinstance(answer, Exception):
            raise answer
        found: T = answer
        return found

    def close(self) -> None:
        """End the process and everything that it has started."""
        if self._process is None:
            return
        assert self._connection is not None
        self._connection.close()
        # Compilers that it has started belong to its group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(_ENDS_IN)
        self._process = None

    def _start(self) -> None:
        self.close()
        context = get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._make_device))
        self._process.start()
        other.close()


def _serve(connection: Connection, make_device: Callable[[], Device]) -> None:
    os.setpgrp()
    device = make_device()
    while True:
        try:
            task, arguments = connection.recv()
        except EOFError:
            return
        answer: Any
        try:
            answer = task(device, *arguments)
        except Exception as error:
            answer = Lost(f"{type(error).__name__}: {error}")
        try:
            # An error in a kernel shows when it is waited for, and stays: nothing runs in this process any more.
            device.synchronize()
        except Exception as error:
            connection.send((False, answer if isinstance(answer, Exception) else Lost(str(error))))
            return
        connection.send((not device.spoiled, answer))
        if device.spoiled:
            return
