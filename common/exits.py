"""Exit codes of every command, as the README lists them."""

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3  # too many non-finite steps in a row
EXIT_NOT_SAVED = 4  # a checkpoint could not be written
EXIT_PREEMPTED = 75  # stopped by a signal after a save: start again to go on
EXIT_INTERRUPTED = 130  # by Ctrl-C
