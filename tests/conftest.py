"""What every test needs: Ctrl-C that reaches the programs under test."""

import signal

# A shell starts what it runs in the background deaf to it, and programs inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
