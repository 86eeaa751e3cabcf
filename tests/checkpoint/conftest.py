import multiprocessing
import os
import signal

import pytest


def _kill_self(*_arguments, **_settings):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def killed_in():
    """killed_in(owner, name, function, *arguments): run in a child that is killed where it calls `owner.name`."""

    def run(owner, name, function, *arguments):
        def child():
            setattr(owner, name, _kill_self)
            function(*arguments)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL

    return run
