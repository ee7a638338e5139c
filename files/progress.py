"""Progress bars. On a terminal tqdm draws over its own line. In a log file or a pipe that would
become hundreds of lines, so there a bar is a plain line now and then, and one at the end."""

import functools
import sys
import time

from tqdm import tqdm as terminal_bar

SECONDS = 30  # between two lines of a log


class LogLines:
    """A file that tqdm draws on. Of its bars it writes one every 30 seconds, and the last one."""

    def __init__(self):
        self.written = time.monotonic()
        self.latest = ""
        self.last_line = ""

    def write(self, text):
        is_last = text == "\n"  # what tqdm writes when a bar is closed
        self.latest = text.strip() or self.latest
        if not self.latest:
            return
        if is_last or time.monotonic() - self.written >= SECONDS:
            # a bar that is closed right after its last step would stand there twice
            if self.latest != self.last_line:
                print(self.latest, file=sys.stderr, flush=True)
            self.last_line = self.latest
            self.written = time.monotonic()
            self.latest = ""

    def flush(self):
        """Lines are written at once."""


tqdm = terminal_bar if sys.stderr.isatty() else functools.partial(terminal_bar, file=LogLines())
