"""A clock that stands still until a test moves it, in place of `time` in a module of training.

What a module makes of seconds is then exact on every machine, however busy it is: a real clock would count the other
processes' turns too.
"""

import threading


class Clock:
    """Has the names of `time` that training reads; any thread may move it."""

    def __init__(self):
        self.now, self._lock = 0.0, threading.Lock()

    def pass_by(self, seconds):
        with self._lock:
            self.now += seconds

    def perf_counter(self):
        return self.now

    monotonic = perf_counter


def slowed(call, clock, seconds):
    """`call`, which takes `seconds` of `clock`."""

    def slow(*arguments):
        clock.pass_by(seconds)
        return call(*arguments)

    return slow
