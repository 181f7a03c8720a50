"""Imported before anything else by what starts as a process: until its command listens (`common.command.run`), Ctrl-C
ends it without a word, where Python would print a traceback of whatever it imports.
"""

import _signal  # built in: `signal` brings enum with it

if _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
